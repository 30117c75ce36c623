"""From captured arrays to the record of sums of one site."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.attention import Head, collected, tokens_of
from tinyjax.bilinear import Pair
from tinyjax.capture import Captured, capture
from tinyjax.judging import Path
from tinyjax.layout import Layout, Params
from tinyjax.linalg import matmul, some_solution
from tinyjax.methods.heads import cross_at_offsets, energy_at_offsets, gram_at_offsets
from tinyjax.patches import Sums, conv_sums
from tinyjax.recurrence import Cell
from tinyjax.scores import score_sums
from tinyjax.site import Site
from tinyjax.slots import cols, consumers_have_bias, matrices, producers_have_bias, rows, width
from tinyjax.states import NONE
from tinyjax.statistics import Null, Pattern, Statistics
from tinyjax.tangent import carry
from tinyjax.trace import Trace
from tinyjax.uses import Use
from tinyjax.writers import brought, side_by_side

_HIGHEST = jax.lax.Precision.HIGHEST


def null_signs(draws: int, first: Array | int, num_samples: int) -> Array:
    """Random signs (R, n), each from the sample's absolute index alone, so that no cut of a batch changes them."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), first + jnp.arange(num_samples))
    return jax.vmap(lambda key: jax.random.rademacher(key, (draws,), jnp.float32))(keys).T


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


def _distinct(uses: Sequence[Use]) -> list[Use]:
    return list({use.op.path: use for use in uses}.values())


def path_rows(site: Site, path: Path, captured: Captured, num_samples: int) -> Rows:
    """The rows of one path, in float32 at least."""
    if path.cell is not None:
        return _cell_rows(site, path, path.cell, captured, num_samples)
    x = _matrix(path.producer.inputs, captured.inputs[path.producer.op.path])
    first = path.consumers[0]
    h = _matrix(first.inputs, captured.inputs[first.op.path])
    goals = [_matrix(c.outputs, captured.gradients[c.op.path]) for c in _in_order(path, site)]
    v = -num_samples * jnp.concatenate(goals, axis=-1)
    columns = [weight.column(captured.inputs[weight.address]).astype(x.dtype) for weight in path.weights]
    weight = functools.reduce(jnp.multiply, columns) if columns else None
    gating = None
    if path.gate is not None and site.gate is not None:
        gating = _matrix(path.gate.inputs, captured.inputs[path.gate.op.path])
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


def _shares(site: Site, paths: Sequence[Path]) -> tuple[float, ...] | None:
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


def _by_step(layout: Layout, array: Array, num_steps: int) -> Array:
    """A captured array as `(rows, steps, cols)`."""
    matrix = _matrix(layout, array)
    return matrix.reshape(-1, num_steps, matrix.shape[-1])


def site_sums(
    params: Params,
    site: Site,
    paths: Sequence[Path],
    captured: Captured,
    num_samples: int,
    energy_matrix: bool,
    signs: Array | None = None,
    offset_gram: bool = False,
    gates: Array | Pattern | None = None,
    update: Array | None = None,
) -> Statistics:
    """The record of one site from what its paths captured; a leaf used twice adds its rows.

    With `signs` (R, n) also its null sums. With `gates` (*stack, B, C), the record of a gated unit for these gates;
    without, as if its gate were 1. With a `Pattern`, that of these new heads; without, of one that attends uniformly.
    Where no `link` is formed, N is projected against `update`; None: against the best one of these samples.

    Raises:
        ValueError: for a kernel used more than once at a site too wide for its `link` to be kept.
    """
    shares = _shares(site, paths)
    options = num_samples, energy_matrix, signs, offset_gram, gates, update, shares
    parts = [_path_sums(site, path, captured, *options) for path in paths]
    grams, reads = None, None
    if site.stream is not None:
        total, grams, reads = side_by_side(parts)
        parts = [total]
    if len(parts) > 1 and any(part.link is None for part in parts):
        raise ValueError(f"site `{site.name}` is too wide for a kernel that is used {len(parts)} times")
    total = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)
    weight_prev, weight = matrices(params, site)
    total = _in_present_heads(site, paths[0], total, weight_prev, weight)
    if site.pattern:  # the value dimensions of all heads, in the order of the consumers' rows
        *lead, _, inputs, _ = weight_prev.shape
        weight_prev = jnp.moveaxis(weight_prev, -3, -2).reshape(*lead, inputs, -1)
    dtype = total.energy.dtype
    return Statistics(
        count=jnp.broadcast_to(jnp.array([(num_samples + 1) // 2, num_samples // 2], dtype), (*site.stack, 2)),
        **total._asdict(),
        weight_prev=weight_prev.astype(dtype),
        weight=weight.astype(dtype),
        width=jnp.broadcast_to(width(params, site), site.stack),
        bias_prev=producers_have_bias(site),
        bias=consumers_have_bias(site),
        gates=gates,
        heads=heads_of(site),
        shares=shares,
        grams=grams,
        reads=reads,
        normed=site.stream is not None and site.stream.normed,
    )


def _path_sums(
    site: Site,
    path: Path,
    captured: Captured,
    num_samples: int,
    energy_matrix: bool,
    signs: Array | None,
    offset_gram: bool,
    gates: Array | Pattern | None,
    update: Array | None,
    shares: tuple[float, ...] | None,
) -> Sums:
    """The sums of one path: rows with rows, or images through their windows."""
    if path.pair is not None:
        return _pair_sums(site, path, path.pair, captured, num_samples)
    if path.branches:
        return _reader_sums(path, captured, num_samples, energy_matrix, signs, offset_gram)
    x, h, v, weight, gating = path_rows(site, path, captured, num_samples)
    bias_prev, bias = producers_have_bias(site), consumers_have_bias(site)
    if path.tangent is not None:
        recorded = {address: captured.inputs[address] for address in path.tangent.taps}
        seen = carry(path.tangent, with_constant(x, bias_prev), recorded)
        return tangent_sums(
            seen,
            h,
            v,
            num_samples,
            heads=heads_of(site),
            bias=bias,
            energy_matrix=energy_matrix,
            signs=signs,
            offset_gram=offset_gram,
        )
    if path.head is not None:
        assert not isinstance(gates, Array)
        seen = head_inputs(site, path.head, with_constant(x, bias_prev), captured, gates)
        seen = seen.reshape(*seen.shape[:-2], -1)
        return row_sums(seen, h, v, num_samples, bias_prev=False, bias=bias, energy_matrix=energy_matrix)
    if path.geometry is None:
        assert not isinstance(gates, Pattern)
        if gates is not None and gating is not None and path.activation is not None:
            opened = path.activation(matmul(gating, gates.astype(x.dtype)))
            weight = opened if weight is None else weight * opened
        sums = row_sums(
            x,
            h,
            v,
            num_samples,
            bias_prev=bias_prev,
            bias=bias,
            weight=weight,
            energy_matrix=energy_matrix,
            signs=signs,
            offset_gram=offset_gram,
        )
        if shares is None:
            return sums
        return sums._replace(energy=jnp.sum(halves(v, num_samples) ** 2 / jnp.array(shares, v.dtype), axis=(-2, -1)))
    geometry = path.geometry
    return conv_sums(
        x.reshape(num_samples, *geometry.space, -1),
        h.reshape(num_samples, *geometry.hidden, -1),
        v.reshape(num_samples, *geometry.out, -1),
        geometry.producer,
        geometry.consumer,
        between=geometry.between,
        bias_prev=bias_prev,
        bias=bias,
        energy_matrix=energy_matrix,
        offset_gram=offset_gram,
        project=some_solution if update is None else lambda gram, cross: update,
        signs=signs,
    )


def head_tokens(site: Site, head: Head, captured: Captured) -> tuple[Array, Array]:
    """What queries and keys of a new head read, `(*stack, n, T, D)` and `(*stack, n, U, E)`."""
    projected = head.pair.projected
    x = _matrix(head.query.inputs, captured.inputs[head.query.op.path])
    y = _matrix(projected.inputs, captured.inputs[projected.op.path])
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


def _pair_sums(site: Site, path: Path, pair: Pair, captured: Captured, num_samples: int) -> Sums:
    """The sums of queries and keys."""
    (scores,) = path.consumers
    x = _matrix(path.producer.inputs, captured.inputs[path.producer.op.path])
    y = _matrix(pair.projected.inputs, captured.inputs[pair.projected.op.path])
    x = carry(pair.queries, with_constant(x, producers_have_bias(site)), captured.inputs)
    found = pair.attention
    sums = score_sums(
        pair,
        x,
        carry(pair.keys, y, captured.inputs),
        _matrix(scores.inputs, captured.inputs[scores.op.path]),
        -num_samples * _matrix(scores.outputs, captured.gradients[scores.op.path])[..., 0],
        None if found is None else _matrix(found.layout, captured.inputs[found.address])[..., 0],
    )
    depth = len(pair.projected.op.stack)
    if len(site.stack) > depth:
        return sums
    return jax.tree.map(lambda x: jnp.squeeze(x, depth), sums)  # one key for all heads: no layers


def _reader_sums(
    path: Path, captured: Captured, num_samples: int, energy_matrix: bool, signs: Array | None, offset_gram: bool
) -> Sums:
    """The sums of the readers of one tensor of a residual stream."""
    first = path.consumers[0]
    h = _matrix(first.inputs, captured.inputs[first.op.path])
    goals = [_matrix(c.outputs, captured.gradients[c.op.path]) for c in path.consumers]
    return row_sums(
        brought(path.branches, captured, len(h), h.dtype),
        h,
        -num_samples * jnp.concatenate(goals, axis=-1),
        num_samples,
        bias_prev=False,
        bias=all(c.bias is not None for c in path.consumers),
        energy_matrix=energy_matrix,
        signs=signs,
        offset_gram=offset_gram,
    )


def _in_present_heads(site: Site, path: Path, total: Sums, weight_prev: Array, weight: Array) -> Sums:
    """The sums without those of empty heads: a neuron in one would make it a head that attends uniformly for good.

    A head is empty that has no weights in the site's dimension while others have.
    """
    heads, depth = heads_of(site), len(site.stack)
    if heads is not None:  # side by side in the rows of S, N~ and P
        hidden = weight[..., : weight.shape[-2] - consumers_have_bias(site), :]
        present = _any_but(weight_prev, depth) | _any_but(hidden.reshape(*site.stack, heads, -1), depth)
        kept = jnp.repeat(present | ~jnp.any(present), total.gram_prev.shape[-1] // heads)
    elif path.pair is not None and depth > len(path.pair.projected.op.stack):  # layers, the halves behind them
        present = _any_but(weight_prev, depth - 1) | _any_but(weight, depth - 1)
        kept = (present | ~jnp.any(present))[:, None, None]
    else:
        return total
    assert total.link is not None
    each = kept[..., None]
    return total._replace(
        gram_prev=jnp.where(each & kept[..., None, :], total.gram_prev, 0),
        cross_prev=jnp.where(each, total.cross_prev, 0),
        link=jnp.where(each if heads is not None else each[..., None], total.link, 0),
    )


def _any_but(x: Array, axis: int) -> Array:
    """Where along an axis anything is not zero."""
    return jnp.any(x != 0, axis=tuple(d for d in range(x.ndim) if d != axis))


def heads_of(site: Site) -> int | None:
    """How many heads the slots of a site come in, None without."""
    stack = site.producers[0].layout.stack[len(site.stack) :]
    if site.pattern:
        return None
    return site.producers[0].layout.factors[stack[0]] if stack else None


def tangent_sums(
    seen: Array,
    h: Array,
    v: Array,
    num_samples: int,
    *,
    heads: int | None,
    bias: bool,
    energy_matrix: bool,
    signs: Array | None = None,
    offset_gram: bool = False,
) -> Sums:
    """The sums of a slot's tangents `(*stack, rows, heads * offsets, D)`, see `Statistics` for their order.

    Without heads, several offsets are those of a convolution.
    """
    *lead, offsets, inputs = seen.shape
    together = row_sums(
        seen.reshape(*lead, -1), h, v, num_samples, bias_prev=False, bias=bias, energy_matrix=energy_matrix, signs=signs
    )
    if heads is not None:  # the Gram over offsets lies in S
        return together
    link, null = together.link, together.null
    assert link is not None
    return together._replace(
        gram_prev=gram_at_offsets(together.gram_prev, offsets),
        cross_prev=cross_at_offsets(together.cross_prev, offsets),
        link=link.reshape(*link.shape[:-3], offsets, inputs, -1),
        energy_matrix=energy_at_offsets(together.energy_matrix, offsets),
        offset_gram=together.gram_prev.reshape(*lead, 2, offsets, inputs, offsets, inputs) if offset_gram else None,
        null=null
        and null._replace(
            cross_prev=cross_at_offsets(null.cross_prev, offsets),
            link=null.link.reshape(*null.link.shape[:-3], offsets, inputs, -1),
        ),
    )


def row_sums(
    x: Array,
    h: Array,
    v: Array,
    num_samples: int,
    *,
    bias_prev: bool,
    bias: bool,
    weight: Array | None = None,
    energy_matrix: bool,
    signs: Array | None = None,
    offset_gram: bool = False,
) -> Sums:
    """The sums of a pair of matrix products: x `(*stack, rows, D)`, h `(*stack, rows, H)`, v `(*stack, rows, Q)`.

    A `weight` `(*stack, rows, C)` multiplies the rows of x and the constant beside it, C times side by side.
    """
    b_prev, b = with_constant(x, bias_prev), with_constant(h, bias)
    if weight is not None:
        b_prev = (weight[..., :, None] * b_prev[..., None, :]).reshape(*b_prev.shape[:-1], -1)
    null = None if signs is None else _null_sums(b_prev, b, halves(v, num_samples), signs)
    b_prev, b, v = (halves(array, num_samples) for array in (b_prev, b, v))
    gram_prev = _gram(b_prev, b_prev)
    return Sums(
        gram_prev=gram_prev,
        cross_prev=_gram(b_prev, v),
        gram=_gram(b, b),
        cross=_gram(b, v),
        link=_gram(b_prev, b)[..., None, :, :],
        energy=jnp.sum(v**2, axis=(-2, -1)),
        energy_matrix=_gram(v, v) if energy_matrix else None,
        null=null,
        offset_gram=gram_prev[..., None, :, None, :] if offset_gram else None,
    )


def _null_sums(b_prev: Array, b: Array, v: Array, signs: Array) -> Null:
    """Sums of rows with the signs (R, n) of their samples, one draw after the other; `v` comes in halves."""
    num_samples, depth = signs.shape[1], b.ndim - 2

    def draw(sign: Array) -> Null:
        rows = jnp.repeat(sign, b.shape[-2] // num_samples)[:, None].astype(b.dtype)
        flipped_prev, flipped, plain = (halves(x, num_samples) for x in (rows * b_prev, rows * b, b))
        return Null(
            cross_prev=_gram(flipped_prev, v),
            gram=_gram(flipped, plain),
            cross=_gram(flipped, v),
            link=_gram(flipped_prev, plain)[..., None, :, :],
        )

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, depth + 1), jax.lax.map(draw, signs))


def _in_order(path: Path, site: Site) -> list[Use]:
    """The consumers of a path in the order of the site's kernels."""
    by_leaf = {consumer.leaf: consumer for consumer in path.consumers}
    return [by_leaf[kernel.leaf] for kernel in site.consumers]


def _matrix(layout: Layout, array: Array) -> Array:
    """A captured array as `(*stack, rows, cols)`, in float32 at least."""
    return layout.to_matrix(array).astype(jnp.promote_types(array.dtype, jnp.float32))


def with_constant(x: Array, bias: bool) -> Array:
    """Rows with the constant 1 last, if there is a bias."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1) if bias else x


def halves(x: Array, num_samples: int) -> Array:
    """`(*stack, samples * positions, cols)` as `(*stack, 2, rows, cols)`: even samples, odd samples (zeros to even)."""
    *lead, _, cols = x.shape
    depth = len(lead)
    x = x.reshape(*lead, num_samples, -1, cols)
    if num_samples % 2:
        x = jnp.pad(x, [(0, 0)] * depth + [(0, 1), (0, 0), (0, 0)])
    x = x.reshape(*lead, -1, 2, x.shape[-2], cols)
    return jnp.moveaxis(x, depth + 1, depth).reshape(*lead, 2, -1, cols)


def _gram(x: Array, y: Array) -> Array:
    return jnp.einsum("...ni,...nj->...ij", x, y, precision=_HIGHEST)
