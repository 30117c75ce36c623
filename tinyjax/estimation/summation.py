"""From captured arrays to the record of sums of one site."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import consumers_have_bias, matrices, producers_have_bias
from tinyjax.core.linalg import matmul, solve
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site
from tinyjax.core.slots import any_besides as _any_but
from tinyjax.core.slots import width
from tinyjax.discovery.paths.path import Path, QueryKey
from tinyjax.estimation.recording import Captured
from tinyjax.estimation.residual_stream import stream_inputs
from tinyjax.estimation.rows import captured_matrix, head_inputs, path_rows, read_shares
from tinyjax.estimation.tangents import carry
from tinyjax.methods.solvers.best_update import Ridge, resolve
from tinyjax.statistics.averages import moments
from tinyjax.statistics.convolution.image_sums import Projection, conv_sums
from tinyjax.statistics.dense import halves, row_sums, tangent_sums, with_constant
from tinyjax.statistics.query_key import score_sums
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.residual_stream import side_by_side
from tinyjax.statistics.sums import USUAL, Extras, Sums, negated


def site_sums(
    params: Params,
    site: Site,
    paths: Sequence[Path],
    captured: Captured,
    num_samples: int,
    extras: Extras = USUAL,
    gates: Array | Pattern | None = None,
    update: Projection | None = None,
    project: Ridge | None = None,
) -> Statistics:
    """The record of one site from what its paths captured; a leaf used twice adds its rows.

    With `gates` (*stack, B, C), the record of a gated unit for these gates;
    without, as if its gate were 1. With a `Pattern`, that of these new heads; without, of one that attends uniformly.
    Where no `link` is formed, N is projected against `update`; None: against the best one of these samples. With
    `project`, its ridge, convolutions form no `link`, nor N~.

    Raises:
        ValueError: for a kernel used more than once at a site too wide for its `link` to be kept.
    """
    shares = read_shares(site, paths)
    conv: dict[str, Any] = {} if update is None else {"project": lambda gram, cross: update}
    if project is not None and len(paths) == 1:
        once = partial(projection, project, site, params, num_samples)
        conv = {"project": once, "asked": False, "link_limit": 0} | conv
    options = num_samples, extras, gates, conv, shares
    slopes = [path.slope() if path.tangent is None else path.tangent.sign for path in paths]
    parts = [_path_sums(site, path, captured, *options) for path in paths]
    # What is carried along a tangent has its sign.
    falls = [path.tangent is None and slope is not None and slope < 0 for path, slope in zip(paths, slopes)]
    parts = [negated(sums) if falling else sums for sums, falling in zip(parts, falls)]
    reads = None
    if site.stream is not None:
        total, reads = side_by_side(parts)
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
        count=jnp.broadcast_to(_counts(num_samples, dtype), (*site.stack, 2)),
        **vars(total),
        weight_prev=weight_prev.astype(dtype),
        weight=weight.astype(dtype),
        width=jnp.broadcast_to(width(params, site), site.stack),
        bias_prev=producers_have_bias(site),
        bias=consumers_have_bias(site),
        gates=gates,
        heads=heads_of(site),
        shares=shares,
        reads=reads,
        normed=site.stream is not None and site.stream.normed,
        slope=slopes[0] if len(set(slopes)) == 1 else None,
    )


def projection(ridge: Ridge, site: Site, params: Params, num_samples: int, gram: Array, cross: Array) -> Projection:
    """The best update at a ridge, which may be chosen from G (2, H, H) and M (2, H, M); S and N are empty then."""
    weight_prev, weight = (matrix.astype(gram.dtype) for matrix in matrices(params, site))
    record = Statistics(
        count=_counts(num_samples, gram.dtype),
        gram_prev=jnp.zeros((2, 0, 0), gram.dtype),
        cross_prev=jnp.zeros((2, 0, 0), gram.dtype),
        gram=gram,
        cross=cross,
        link=None,
        energy=jnp.zeros((2,), gram.dtype),
        energy_matrix=None,
        weight_prev=weight_prev,
        weight=weight,
        width=width(params, site),
        bias_prev=producers_have_bias(site),
        bias=consumers_have_bias(site),
    )
    mean, value = moments(record), jnp.asarray(resolve(ridge, record), gram.dtype)
    return Projection(solve(mean.gram, mean.cross, value), value)


def _counts(num_samples: int, dtype: Any) -> Array:
    """How many samples are even, and odd."""
    return jnp.array([(num_samples + 1) // 2, num_samples // 2], dtype)


def _path_sums(
    site: Site,
    path: Path,
    captured: Captured,
    num_samples: int,
    extras: Extras,
    gates: Array | Pattern | None,
    conv: Mapping[str, Any],
    shares: tuple[float, ...] | None,
) -> Sums:
    """The sums of one path: rows with rows, or images through their windows."""
    if path.pair is not None:
        return _pair_sums(site, path, path.pair, captured, num_samples)
    if path.branches:
        return _reader_sums(path, captured, num_samples, extras)
    x, h, v, weight, gating = path_rows(site, path, captured, num_samples)
    bias_prev, bias = producers_have_bias(site), consumers_have_bias(site)
    if path.tangent is not None:
        recorded = {address: captured.inputs[address] for address in path.tangent.taps}
        seen = carry(path.tangent, with_constant(x, bias_prev), recorded)
        return tangent_sums(seen, h, v, num_samples, heads=heads_of(site), bias=bias, extras=extras)
    if path.head is not None:
        assert not isinstance(gates, Array)
        seen = head_inputs(site, path.head, with_constant(x, bias_prev), captured, gates)
        seen = seen.reshape(*seen.shape[:-2], -1)
        return row_sums(seen, h, v, num_samples, bias_prev=False, bias=bias, extras=Extras(extras.energy_matrix))
    if path.geometry is None:
        assert not isinstance(gates, Pattern)
        if gates is not None and gating is not None and path.activation is not None:
            opened = path.activation(matmul(gating, gates.astype(x.dtype)))
            weight = opened if weight is None else weight * opened
        sums = row_sums(x, h, v, num_samples, bias_prev=bias_prev, bias=bias, weight=weight, extras=extras)
        if shares is None:
            return sums
        energy = jnp.sum(halves(v, num_samples) ** 2 / jnp.array(shares, v.dtype), axis=(-2, -1))
        return dataclasses.replace(sums, energy=energy)
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
        extras=extras,
        **conv,
    )


def _pair_sums(site: Site, path: Path, pair: QueryKey, captured: Captured, num_samples: int) -> Sums:
    """The sums of queries and keys."""
    (scores,) = path.consumers
    x = captured_matrix(path.producer.inputs, captured.inputs[path.producer.op.path])
    y = captured_matrix(pair.projected.inputs, captured.inputs[pair.projected.op.path])
    x = carry(pair.queries, with_constant(x, producers_have_bias(site)), captured.inputs)
    found = pair.attention
    sums = score_sums(
        pair.sizes,
        pair.repeated,
        x,
        carry(pair.keys, y, captured.inputs),
        captured_matrix(scores.inputs, captured.inputs[scores.op.path]),
        -num_samples * captured_matrix(scores.outputs, captured.gradients[scores.op.path])[..., 0],
        None if found is None else captured_matrix(found.layout, captured.inputs[found.address])[..., 0],
    )
    depth = len(pair.projected.op.stack)
    if len(site.stack) > depth:
        return sums
    return jax.tree.map(lambda x: jnp.squeeze(x, depth), sums)  # one key for all heads: no layers


def _reader_sums(path: Path, captured: Captured, num_samples: int, extras: Extras) -> Sums:
    """The sums of the readers of one tensor of a residual stream."""
    first = path.consumers[0]
    h = captured_matrix(first.inputs, captured.inputs[first.op.path])
    goals = [captured_matrix(c.outputs, captured.gradients[c.op.path]) for c in path.consumers]
    return row_sums(
        stream_inputs(path.branches, captured, len(h), h.dtype),
        h,
        -num_samples * jnp.concatenate(goals, axis=-1),
        num_samples,
        bias_prev=False,
        bias=all(c.bias is not None for c in path.consumers),
        extras=extras,
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
    return dataclasses.replace(
        total,
        gram_prev=jnp.where(each & kept[..., None, :], total.gram_prev, 0),
        cross_prev=jnp.where(each, total.cross_prev, 0),
        link=jnp.where(each if heads is not None else each[..., None], total.link, 0),
    )


def heads_of(site: Site) -> int | None:
    """How many heads the slots of a site come in, None without."""
    stack = site.producers[0].layout.stack[len(site.stack) :]
    if site.pattern:
        return None
    return site.producers[0].layout.factors[stack[0]] if stack else None
