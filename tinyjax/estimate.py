"""From a loss and a batch to the sums of every site, in one forward and one backward pass.

All sites share one capture. A batch whose loss is a mean of per-sample terms is cut into chunks inside a `lax.scan`, so
memory does not grow with the batch; sums are formed inside the jit, no activation outlives its chunk.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.averaging import require_mean
from tinyjax.gates import search_gates
from tinyjax.layout import Params
from tinyjax.linalg import some_solution
from tinyjax.patches import LINK_LIMIT
from tinyjax.patterns import search_patterns
from tinyjax.rows import capture_paths
from tinyjax.rowsums import null_signs
from tinyjax.separable import coupling
from tinyjax.site import Site, Sites, as_sites
from tinyjax.sites import Discovery, discover, paths_of
from tinyjax.slots import matrices, per_site, require_growable
from tinyjax.statistics import Pattern, Statistics, keep_half, merge
from tinyjax.sums import site_sums
from tinyjax.thirds import Residual, even_part, find_residual, third_sums
from tinyjax.trace import Trace, batch_size, has_samples, map_samples, take_samples, trace
from tinyjax.window import num_offsets

DEFAULT_CHUNK = 1024
_HIGHEST = jax.lax.Precision.HIGHEST


class Estimate(NamedTuple):
    """The statistics of a batch.

    Attributes:
        loss: mean loss of the batch, ().
        statistics: by site name.
    """

    loss: Array
    statistics: dict[str, Statistics]


@overload
def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site,
    *,
    has_aux: bool = ...,
    energy_matrix: bool = ...,
    offset_gram: bool = ...,
    null_draws: int = ...,
    num_gates: int | Mapping[str, int] = ...,
    third_moments: int = ...,
    chunk: int | None = ...,
    micro_batch: int | None = ...,
) -> Statistics: ...
@overload
def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Sequence[Site],
    *,
    has_aux: bool = ...,
    energy_matrix: bool = ...,
    offset_gram: bool = ...,
    null_draws: int = ...,
    num_gates: int | Mapping[str, int] = ...,
    third_moments: int = ...,
    chunk: int | None = ...,
    micro_batch: int | None = ...,
) -> dict[str, Statistics]: ...
def estimate(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    *,
    has_aux: bool = False,
    energy_matrix: bool = False,
    offset_gram: bool = False,
    null_draws: int = 0,
    num_gates: int | Mapping[str, int] = 1,
    third_moments: int = 0,
    chunk: int | None = None,
    micro_batch: int | None = None,
) -> Statistics | dict[str, Statistics]:
    """The sums of `Statistics` at the current parameters.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: the parameters.
        batch: every leaf has the samples as leading axis, except typed keys and 0-d leaves; or an iterator of such
            batches, whose sums are merged.
        sites: growable sites of this model, from `find_sites`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        energy_matrix: also sum v v' (as wide as the consumer; `fisher_tiny` needs it).
        offset_gram: also sum what every two kernel offsets of a consumer read together, of which S is a bound (for thin
            convolutions; `tiny_conv_als` and `conv_gains` need it).
        null_draws: R, also sum with random signs R times (`significant` needs 19). The sign of a sample follows from
            its position among all samples alone. Costs about R times N and P.
        num_gates: how many gates to look for at a site of gated units, or patterns at one of whole attention heads, in
            a pass of their own over at most `DEFAULT_CHUNK` samples: as many as units or heads are to be added. For all
            such sites or by name.
        third_moments: R, also sum (w'v) b_prev b_prev' for the R outputs w in which the residual v is largest, in a
            second pass over the batch (`second_order` needs 4).
        chunk: samples a pass, even; default at most `DEFAULT_CHUNK`, or the whole batch where the loss couples its
            samples: one capture then, in which only the sums over patches pass by chunks.
        micro_batch: makes the loss the mean of the losses of so many samples at a time (even; the last may be fewer),
            as accumulated gradients do: a batch normalisation sees a micro-batch, and memory does not grow with the
            batch. A remainder is compiled on its own.

    Returns:
        One record for a single `Site`, a dict by site name for several. Sums are float32, or float64 if the model is.

    Raises:
        ValueError: for a site that cannot grow or is not found in this model, a bad batch, a loss that is not a scalar,
            an odd `chunk` or `micro_batch`, a `chunk` for a loss that couples the samples or sums over them, null
            draws for a site too wide for them, or third moments where they say nothing.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=sites))
        >>> statistics = estimate(params, batch)
        >>> psi = tinyjax.bottleneck(statistics["hidden_1"]).after
    """
    batches = batch if isinstance(batch, Iterator) else iter((batch,))
    total: dict[str, Statistics] = {}
    options: dict[str, Any] = dict(
        has_aux=has_aux,
        energy_matrix=energy_matrix,
        offset_gram=offset_gram,
        null_draws=null_draws,
        chunk=chunk,
        micro_batch=micro_batch,
    )
    options |= dict(num_gates=num_gates, third_moments=third_moments)
    first = 0
    for one in batches:
        found = estimate_batch(loss_fn, params, one, sites, first=first, **options).statistics
        first += batch_size(one)
        if total and any(s.gates is not None for s in found.values()):
            raise ValueError("gates and patterns of new heads are looked for in one batch: pass one, not an iterator")
        if total and third_moments:
            raise ValueError("third moments belong to the residual of one batch: pass one, not an iterator")
        if total and any(s.link is None for s in found.values()):
            raise ValueError("a site is too wide for statistics of several batches to be merged: pass one batch")
        total = {name: merge(total[name], s) if total else s for name, s in found.items()}
    if not total:
        raise ValueError("the iterator of batches is empty" if isinstance(batch, Iterator) else "`sites` is empty")
    return total[sites.name] if isinstance(sites, Site) else total


def estimate_batch(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    *,
    has_aux: bool = False,
    energy_matrix: bool = False,
    offset_gram: bool = False,
    null_draws: int = 0,
    num_gates: int | Mapping[str, int] = 1,
    third_moments: int = 0,
    chunk: int | None = None,
    micro_batch: int | None = None,
    first: Array | int = 0,
) -> Estimate:
    """`estimate` for one batch, with the loss; always by name. `first` is the index of its first sample."""
    if null_draws < 0:
        raise ValueError(f"`null_draws` must be >= 0, got {null_draws}")
    if third_moments < 0:
        raise ValueError(f"`third_moments` must be >= 0, got {third_moments}")
    sites = as_sites(sites)
    for site in sites:
        require_growable(site)
    num_samples = batch_size(batch)
    if chunk is not None and (chunk < 2 or chunk % 2):
        raise ValueError(f"`chunk` must be an even number of samples, got {chunk}")
    if micro_batch is not None:
        _check_micro_batch(micro_batch, chunk)
    even = 2 * -(-num_samples // (2 * num_chunks(num_samples)))  # chunks as equal as can be
    size = min(micro_batch or chunk or even, num_samples)
    gated = Sites(site for site in sites if site.gate is not None)
    some = take_samples(batch, 0, min(DEFAULT_CHUNK, num_samples))
    whole_heads = Sites(site for site in sites if site.pattern)
    gates: dict[str, Array | Pattern] = {}
    for search, found in ((search_gates, gated), (search_patterns, whole_heads)):
        if found:
            gates |= search(loss_fn, params, some, found, per_site(sites, num_gates), has_aux=has_aux)
    step = _Step(loss_fn, sites, has_aux, energy_matrix or third_moments > 0, offset_gram, null_draws, gates)
    if size < num_samples:
        traced = trace(loss_fn, params, take_samples(batch, 0, size), has_aux=has_aux)
        discovery = discover(traced)
        coupled = coupling(discovery.graph, discovery.axes) if micro_batch is None else ""
        if coupled and chunk is not None:
            raise ValueError(f"this loss couples the samples of a batch ({coupled}): leave `chunk` out")
        if not coupled:
            if micro_batch is None:
                require_mean(loss_fn, params, batch, take_samples(batch, 0, size), has_aux=has_aux)

            def in_chunks(step: _Step) -> Estimate:
                return _in_chunks(step, traced, discovery, params, batch, num_samples, size, first)

            return in_chunks(step) if not third_moments else _with_thirds(step, in_chunks, discovery, third_moments)
    traced = trace(loss_fn, params, batch, has_aux=has_aux)
    discovery = discover(traced)

    def at_once(step: _Step) -> Estimate:
        return step(traced, discovery, params, batch, first)

    return at_once(step) if not third_moments else _with_thirds(step, at_once, discovery, third_moments)


def num_chunks(num_samples: int) -> int:
    """How many passes of at most `DEFAULT_CHUNK` samples a batch takes."""
    return -(-num_samples // DEFAULT_CHUNK)


def _check_micro_batch(micro_batch: int, chunk: int | None) -> None:
    if chunk is not None:
        raise ValueError("`micro_batch` and `chunk` both say how many samples pass at a time: leave one out")
    if not isinstance(micro_batch, int) or micro_batch < 2 or micro_batch % 2:
        raise ValueError(f"`micro_batch` must be an even number of samples, got {micro_batch!r}")


def _wide(discovery: Discovery, sites: Sites) -> list[str]:
    """The sites whose `link` would be too large, so that all samples must pass before N is projected."""
    names = []
    for site in sites:
        for path in discovery.paths.get(site.name, ()):
            if path.geometry is None:
                continue
            producer, consumer = path.producer.kernel, path.consumers[0].kernel
            inputs, hidden = (math.prod(k.factors[f] for f in k.rows) for k in (producer, consumer))
            if num_offsets(path.geometry.consumer) * inputs * hidden > LINK_LIMIT:
                names.append(site.name)
                break
    return names


class _Step(NamedTuple):
    """Sums of one chunk."""

    loss_fn: Callable[..., Any]
    sites: Sites
    has_aux: bool
    energy_matrix: bool
    offset_gram: bool
    null_draws: int
    gates: Mapping[str, Array | Pattern]
    updates: Mapping[str, Array] = MappingProxyType({})  # of wide sites: what N is projected against
    residuals: Mapping[str, Residual] = MappingProxyType({})  # of which to take third moments

    def __call__(self, traced: Trace, discovery: Discovery, params: Params, batch: Any, first: Array | int) -> Estimate:
        paths = {site.name: paths_of(discovery, site) for site in self.sites}
        captured = capture_paths(traced, params, batch, [path for found in paths.values() for path in found])
        num_samples = traced.num_samples
        signs = null_signs(self.null_draws, first, num_samples) if self.null_draws else None
        options = num_samples, self.energy_matrix, signs, self.offset_gram
        sums = {
            site.name: site_sums(
                params,
                site,
                paths[site.name],
                captured,
                *options,
                self.gates.get(site.name),
                self.updates.get(site.name),
            )
            for site in self.sites
        }
        for site in self.sites:
            if (residual := self.residuals.get(site.name)) is not None:
                third = third_sums(site, paths[site.name], captured, num_samples, residual)
                sums[site.name] = dataclasses.replace(sums[site.name], third_moments=third)
        return Estimate(captured.loss, sums)


def _with_thirds(step: _Step, sums: Callable[[_Step], Estimate], discovery: Discovery, num_outputs: int) -> Estimate:
    """The sums of a first pass, and third moments of its residual from a second."""
    curvatures = {site.name: even_part(site, paths_of(discovery, site)) for site in step.sites}
    found = sums(step)
    residuals = {}
    for site in step.sites:
        find = partial(find_residual, num_outputs=num_outputs)
        for _ in site.stack:
            find = jax.vmap(find)
        residuals[site.name] = find(found.statistics[site.name])
    second = sums(step._replace(residuals=residuals)).statistics  # only the third moments of it are used

    def joined(name: str, statistics: Statistics) -> Statistics:
        third, outputs = second[name].third_moments, residuals[name].outputs
        return dataclasses.replace(statistics, third_moments=third, third_outputs=outputs, curvature=curvatures[name])

    return found._replace(statistics={name: joined(name, s) for name, s in found.statistics.items()})


def _in_chunks(
    step: _Step,
    traced: Trace,
    discovery: Discovery,
    params: Params,
    batch: Any,
    num_samples: int,
    size: int,
    first: Array | int,
) -> Estimate:
    """The sums of all chunks: in one pass, or in two where N has to be projected against the update of all samples."""
    scan = partial(_scan, traced=traced, discovery=discovery, params=params, batch=batch, num_samples=num_samples)
    wide = _wide(discovery, step.sites)
    if not wide:
        return scan(step, size=size, first=first)
    shapes = {site.name: matrices(params, site)[1] for site in step.sites if site.name in wide}
    updates = {
        name: jnp.zeros_like(weight, jnp.promote_types(weight.dtype, jnp.float32)) for name, weight in shapes.items()
    }
    found = scan(step._replace(updates=updates), size=size, first=first).statistics  # only G and M of it are used
    updates = {name: some_solution(found[name].gram.sum(0), found[name].cross.sum(0)) for name in wide}
    return scan(step._replace(updates=updates), size=size, first=first)


def _scan(
    step: _Step,
    traced: Trace,
    discovery: Discovery,
    params: Params,
    batch: Any,
    num_samples: int,
    size: int,
    first: Array | int,
) -> Estimate:
    """Chunks of equal size in a scan, the remainder on its own."""
    chunks = num_samples // size
    stacked = map_samples(lambda x: x[: chunks * size].reshape(chunks, size, *x.shape[1:]), batch)
    leaves, structure = jax.tree.flatten(stacked)
    sliced = [has_samples(leaf) for leaf in jax.tree.leaves(batch)]

    def body(total: Estimate, xs: tuple[Array, list[Array]]) -> tuple[Estimate, None]:
        start, moving = xs[0], iter(xs[1])
        one = jax.tree.unflatten(structure, [next(moving) if s else leaf for s, leaf in zip(sliced, leaves)])
        found = step(traced, discovery, params, one, start)
        return Estimate(
            total.loss + found.loss * (size / num_samples), _merge_all(total.statistics, found.statistics)
        ), None

    one = [leaf[0] if s else leaf for s, leaf in zip(sliced, leaves)]
    shapes = jax.eval_shape(lambda xs: step(traced, discovery, params, jax.tree.unflatten(structure, xs), first), one)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    starts = first + size * jnp.arange(chunks)
    total, _ = jax.lax.scan(body, zero, (starts, [leaf for s, leaf in zip(sliced, leaves) if s]))
    left = num_samples - chunks * size
    if not left:
        return total
    rest = take_samples(batch, chunks * size, num_samples)
    if left == 1:  # an axis of one sample has no identity: repeat the sample, and count the copy's half as empty
        rest = map_samples(lambda x: jnp.concatenate([x, x]), rest)
    rest_traced = trace(step.loss_fn, params, rest, has_aux=step.has_aux)
    last = step(rest_traced, discover(rest_traced), params, rest, first + chunks * size)
    if left == 1:
        last = last._replace(statistics={name: keep_half(s, 0) for name, s in last.statistics.items()})
    return Estimate(total.loss + last.loss * (left / num_samples), _merge_all(total.statistics, last.statistics))


def _merge_all(a: dict[str, Statistics], b: dict[str, Statistics]) -> dict[str, Statistics]:
    return {name: merge(a[name], b[name]) for name in a}
