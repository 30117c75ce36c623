"""What new heads attend to and collect, computed by the model's own operations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.layout import Layout
from tinyjax.discovery.graph.graph import Address, Value
from tinyjax.discovery.kinds.attention_heads import HeadsPath
from tinyjax.estimation.recording import evaluate
from tinyjax.estimation.tangents import carry


def attend(head: HeadsPath, scores: Array, recorded: Mapping[Address, Array]) -> Array:
    """What the model makes of scores, in one layer.

    Args:
        head: the site's.
        scores: `(n, heads, T, U)`.
        recorded: the tapped operands, by address.

    Returns:
        The weights, in the layout of the operation that reads them.
    """
    replay, layout = head.replay, _one_layer(head.scores)
    start = layout.from_matrix(scores.reshape(-1, 1)).astype(replay.scores.dtype)
    known: dict[Value, Any] = {replay.scores: start}
    for op in replay.ops:
        assert op.eqn is not None
        operands = []
        for i, value in enumerate(op.ins):
            if value in known:
                operands.append(known[value])
            elif replay.taps.get(op.path) == i:
                operands.append(recorded[op.path])
            else:
                operands.append(jnp.full(value.shape, replay.scalars[value], value.dtype))
        known.update(zip(op.outs, evaluate(op.eqn, operands)))
    return known[replay.weights]


def attend_alone(head: HeadsPath, recorded: Mapping[Address, Array]) -> Callable[[Array], Array]:
    """From the scores of one head in one layer `(n, T, U)` to its weights; all heads of the model take them at once."""
    samples, heads, _, tokens, keys = head.pair.sizes
    layout = _one_layer(head.attention.layout)

    def weights(scores: Array) -> Array:
        every = jnp.broadcast_to(scores[:, None], (samples, heads, tokens, keys))
        found = layout.to_matrix(attend(head, every, recorded)).reshape(samples, heads, tokens, keys)
        return found[:, 0].astype(scores.dtype)

    return weights


def collected(head: HeadsPath, scores: Array, values: Array, recorded: Mapping[Address, Array]) -> Array:
    """What the outputs would read of new heads: tangents along their values.

    Args:
        head: the site's.
        scores: `(*stack, n, C, T, U)` of C new heads, at most as many as the model has.
        values: `(*stack, rows, F)` input of the values, with the constant last iff they have a bias.
        recorded: the tapped operands, by address.

    Returns:
        `(*stack, rows of the outputs, C, F)`.
    """
    heads, count = head.pair.sizes[1], scores.shape[-3]
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 3) + [(0, heads - count), (0, 0), (0, 0)])
    run = lambda scores, recorded: attend(head, scores, recorded)  # noqa: E731
    for _ in head.scores.stack:
        run = jax.vmap(run)
    mine = {address: recorded[address] for address in head.replay.taps}
    weights = run(padded, mine)
    seen = carry(head.values, values, {**recorded, head.attention.address: weights})
    return seen[..., :count, :]


def tokens_of(head: HeadsPath, queries: Array, keys: Array, recorded: Mapping[Address, Array]) -> tuple[Array, Array]:
    """The tangents of a head's scores along its queries and keys: `(*stack, n, T, D)` and `(*stack, n, U, E)`.

    Args:
        head: the site's.
        queries: `(*stack, rows, D)` input of the queries, with the constant last iff they have a bias.
        keys: `(*stack, rows, E)` input of the keys.
        recorded: the tapped operands, by address.
    """
    samples, heads, _, tokens, others = head.pair.sizes
    lead = queries.shape[:-2]
    x = carry(head.pair.queries, queries, recorded).reshape(*lead, samples, heads, tokens, -1)
    y = carry(head.pair.keys, keys, recorded).reshape(*lead, samples, heads, others, -1)
    return x[..., 0, :, :], y[..., 0, :, :]  # every head reads the same


def _one_layer(layout: Layout) -> Layout:
    """The layout of one layer of a captured array, whose first axes count the layers."""
    depth = len(layout.stack)
    if not depth:
        return layout
    return dataclasses.replace(
        layout,
        factors=layout.factors[depth:],
        axes=tuple(axis - depth for axis in layout.axes[depth:]),
        stack=(),
        rows=tuple(f - depth for f in layout.rows),
        cols=tuple(f - depth for f in layout.cols),
    )
