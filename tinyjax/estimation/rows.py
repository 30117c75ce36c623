"""From captured arrays to the matching rows of a path."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.kernels import cols, rows
from tinyjax.core.layout import Layout
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.paths.path import NONE, Cell, Head, Path
from tinyjax.estimation.attention_replay import collected, tokens_of
from tinyjax.estimation.recording import Captured, capture
from tinyjax.statistics.dense import with_constant

_HIGHEST = jax.lax.Precision.HIGHEST


class Rows(NamedTuple):
    """What one path captured, in matching rows.

    Attributes:
        x: (*stack, rows, D) input of the producer, without the constant.
        h: (*stack, rows, H) input of the consumers.
        v: (*stack, rows, M) V_goal, consumers side by side.
        weight: (*stack, rows, 1) factor of the rows of x and the constant beside it, or None.
        gating: (*stack, rows, B) input of the gate, the constant last iff it has a bias; or None.
    """

    x: Array
    h: Array
    v: Array
    weight: Array | None
    gating: Array | None


def capture_paths(traced: Trace, params: Params, batch: Any, paths: Sequence[Path]) -> Captured:
    """What the rows of all these paths need, in one forward and one backward pass."""
    producers = [path.producer for path in paths if not path.branches]
    producers += [path.gate for path in paths if path.gate is not None]
    heads = [path.head for path in paths if path.head is not None]
    producers += [path.pair.projected for path in paths if path.pair is not None]
    producers += [term for path in paths if path.cell is not None for term in path.cell.terms.values()]
    producers += [use for head in heads for use in (head.query, head.pair.projected)]
    producers += [branch.use for path in paths for branch in path.branches if branch.rows is None]
    consumers = [consumer for path in paths for consumer in path.consumers]
    return capture(
        traced,
        jax.tree.leaves((params, batch)),
        _distinct(producers + consumers),
        _distinct(consumers),
        {address: operand for path in paths for address, operand in path.taps().items()},
    )


def _distinct(uses: Sequence[Product]) -> list[Product]:
    return list({use.op.path: use for use in uses}.values())


def path_rows(site: Site, path: Path, captured: Captured, num_samples: int) -> Rows:
    """The rows of one path, in float32 at least."""
    if path.cell is not None:
        return _cell_rows(site, path, path.cell, captured, num_samples)
    x = captured_matrix(path.producer.inputs, captured.inputs[path.producer.op.path])
    first = path.consumers[0]
    h = captured_matrix(first.inputs, captured.inputs[first.op.path])
    goals = [captured_matrix(c.outputs, captured.gradients[c.op.path]) for c in _in_order(path, site)]
    v = -num_samples * jnp.concatenate(goals, axis=-1)
    columns = [weight.column(captured.inputs[weight.address]).astype(x.dtype) for weight in path.weights]
    weight = functools.reduce(jnp.multiply, columns) if columns else None
    gating = None
    if path.gate is not None and site.gate is not None:
        gating = captured_matrix(path.gate.inputs, captured.inputs[path.gate.op.path])
        gating = with_constant(gating, site.gate.bias is not None)
    return Rows(x, h, v, weight, gating)


def _cell_rows(site: Site, path: Path, cell: Cell, captured: Captured, num_samples: int) -> Rows:
    """The rows of the states of a recurrence that are read, in (samples, other axes, steps)."""
    terms = {leaf: _by_step(use.inputs, captured.inputs[use.op.path], cell.length) for leaf, use in cell.terms.items()}
    heard = [_by_step(use.inputs, captured.inputs[use.op.path], len(at)) for use, at in zip(path.consumers, cell.reads)]
    asked = [
        -num_samples * _by_step(use.outputs, captured.gradients[use.op.path], len(at))
        for use, at in zip(path.consumers, cell.reads)
    ]
    num_rows, dtype = len(heard[0]), jnp.result_type(*terms.values(), *heard, *asked)
    blocks = [
        terms[kernel.leaf] if kernel.leaf in terms else jnp.zeros((num_rows, cell.length, rows(kernel)), dtype)
        for kernel in site.producers
    ]
    h = jnp.zeros((num_rows, cell.length, site.capacity), dtype)
    goals = {kernel.leaf: jnp.zeros((num_rows, cell.length, cols(kernel)), dtype) for kernel in site.consumers}
    for use, steps, seen, goal in zip(path.consumers, cell.reads, heard, asked):
        at = np.flatnonzero(np.array(steps) != NONE)
        states = np.array(steps)[at]
        h = h.at[:, states].set(seen[:, at].astype(dtype))
        goals[use.leaf] = goals[use.leaf].at[:, states].add(goal[:, at].astype(dtype))
    read = sorted({step for steps in cell.reads for step in steps} - {NONE})
    parts = jnp.concatenate(blocks, -1), h, jnp.concatenate(list(goals.values()), -1)
    x, h, v = (part[:, np.array(read)].reshape(num_rows * len(read), -1) for part in parts)
    return Rows(x, h, v, None, None)


def _by_step(layout: Layout, array: Array, num_steps: int) -> Array:
    """A captured array as `(rows, steps, cols)`."""
    matrix = captured_matrix(layout, array)
    return matrix.reshape(-1, num_steps, matrix.shape[-1])


def read_shares(site: Site, paths: Sequence[Path]) -> tuple[float, ...] | None:
    """For each column of the consumers of recurrent units, the share of the states that it reads."""
    read = [[{*steps} - {NONE} for steps in path.cell.reads] for path in paths if path.cell is not None]
    if not read:
        return None
    total = sum(len(set[int]().union(*steps)) for steps in read)
    mine = dict.fromkeys((kernel.leaf for kernel in site.consumers), 0)
    for path, steps in zip(paths, read):
        for use, found in zip(path.consumers, steps):
            mine[use.leaf] += len(found)
    return tuple(mine[kernel.leaf] / total for kernel in site.consumers for _ in range(cols(kernel)))


def head_tokens(site: Site, head: Head, captured: Captured) -> tuple[Array, Array]:
    """What queries and keys of a new head read, `(*stack, n, T, D)` and `(*stack, n, U, E)`."""
    projected = head.pair.projected
    x = captured_matrix(head.query.inputs, captured.inputs[head.query.op.path])
    y = captured_matrix(projected.inputs, captured.inputs[projected.op.path])
    return tokens_of(head, with_constant(x, site.pattern[0].bias is not None), y, captured.inputs)


def head_inputs(site: Site, head: Head, values: Array, captured: Captured, pattern: Pattern | None) -> Array:
    """What the outputs read of new heads, `(*stack, rows, C, F)`: of one that attends uniformly without a pattern."""
    x, y = head_tokens(site, head, captured)
    scores = jnp.zeros((*x.shape[:-2], 1, x.shape[-2], y.shape[-2]), x.dtype)
    if pattern is not None:
        query, key = pattern.query.astype(x.dtype), pattern.key[..., : y.shape[-1], :].astype(x.dtype)
        q = jnp.einsum("...ntd,...kdc->...nctk", x, query, precision=_HIGHEST)
        k = jnp.einsum("...nue,...kec->...ncuk", y, key, precision=_HIGHEST)
        scores = jnp.einsum("...nctk,...ncuk->...nctu", q, k, precision=_HIGHEST)
    return collected(head, scores, values, captured.inputs)


def _in_order(path: Path, site: Site) -> list[Product]:
    """The consumers of a path in the order of the site's kernels."""
    by_leaf = {consumer.leaf: consumer for consumer in path.consumers}
    return [by_leaf[kernel.leaf] for kernel in site.consumers]


def captured_matrix(layout: Layout, array: Array) -> Array:
    """A captured array as `(*stack, rows, cols)`, in float32 at least."""
    return layout.to_matrix(array).astype(jnp.promote_types(array.dtype, jnp.float32))
