"""Passes over a batch: all samples at once, or chunks of them in a scan, once or twice.

A batch whose loss is a mean of per-sample terms is cut into chunks inside a `lax.scan`, so memory does not grow with
the batch; sums are formed inside the jit, no activation outlives its chunk.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.batch import has_samples, map_samples, take_samples
from tinyjax.core.kernels import matrices
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.sites import Discovery, paths_of
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.convolution import projection
from tinyjax.estimation.kinds import SUMMATIONS, site_sums
from tinyjax.estimation.options import SumOptions
from tinyjax.estimation.recording import Captured
from tinyjax.estimation.rows import capture_paths
from tinyjax.estimation.summation import SitePass
from tinyjax.estimation.third_moments import Residual, even_part, find_residual, third_sums
from tinyjax.statistics.convolution.image_sums import Projection, exact_projection
from tinyjax.statistics.merging import merge
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import energy_alone, keep_half


class Estimate(NamedTuple):
    """The statistics of a batch.

    Attributes:
        loss: mean loss of the batch, ().
        statistics: by site name.
    """

    loss: Array
    statistics: dict[str, Statistics]


class Step(NamedTuple):
    """Sums of one chunk."""

    loss: TracedLoss
    sites: Sites
    options: SumOptions
    gates: Mapping[str, Array | Pattern]
    updates: Mapping[str, Projection] = MappingProxyType({})  # of wide sites: what N is projected against
    residuals: Mapping[str, Residual] = MappingProxyType({})  # of which to take third moments
    asked: Mapping[str, Array] = MappingProxyType({})  # whether a site's sums are wanted at all; default: they are

    def __call__(self, traced: Trace, discovery: Discovery, params: Params, batch: Any, first: Array | int) -> Estimate:
        """The sums of these samples, of which `first` is the index of the first."""
        paths = {site.name: paths_of(discovery, site) for site in self.sites}
        captured = capture_paths(traced, params, batch, [path for found in paths.values() for path in found])
        num_samples = traced.num_samples
        extras = self.options.extras(first, num_samples)

        def at(site: Site, captured: Captured) -> SitePass:
            chosen = self.gates.get(site.name), self.updates.get(site.name), self.options.project
            return SitePass(params, site, paths[site.name], captured, num_samples, extras, *chosen)

        sums = {
            site.name: _if_asked(
                self.asked.get(site.name), lambda found, site=site: site_sums(at(site, found)), captured
            )
            for site in self.sites
        }
        for site in self.sites:
            if (residual := self.residuals.get(site.name)) is not None:
                third = third_sums(at(site, captured), residual)
                sums[site.name] = dataclasses.replace(sums[site.name], third_moments=third)
        return Estimate(captured.loss, sums)


def _if_asked(asked: Array | None, sums: Callable[[Captured], Statistics], captured: Captured) -> Statistics:
    """The sums; zeros but for the energy where they are not asked for."""
    if asked is None:
        return sums(captured)
    return jax.lax.cond(asked, sums, lambda found: energy_alone(sums(found)), captured)


def with_thirds(step: Step, sums: Callable[[Step], Estimate], discovery: Discovery) -> Estimate:
    """The sums of a first pass, and third moments of its residual from a second, where they are asked for."""
    if not step.options.third_moments:
        return sums(step)
    curvatures = {site.name: even_part(site, paths_of(discovery, site)) for site in step.sites}
    found = sums(step)
    residuals = {}
    for site in step.sites:
        find = map_layers(site, partial(find_residual, num_outputs=step.options.third_moments))
        residuals[site.name] = find(found.statistics[site.name])
    second = sums(step._replace(residuals=residuals)).statistics  # only the third moments of it are used

    def joined(name: str, statistics: Statistics) -> Statistics:
        third, outputs = second[name].third_moments, residuals[name].outputs
        return dataclasses.replace(statistics, third_moments=third, third_outputs=outputs, curvature=curvatures[name])

    return found._replace(statistics={name: joined(name, s) for name, s in found.statistics.items()})


def sums_in_chunks(
    step: Step,
    traced: Trace,
    discovery: Discovery,
    params: Params,
    batch: Any,
    num_samples: int,
    size: int,
    first: Array | int,
) -> Estimate:
    """The sums of all chunks: in one pass, or in two where N has to be projected against the update of all samples."""
    project = step.options.project
    step = step._replace(options=dataclasses.replace(step.options, project=None))  # a second pass costs more than links
    scan = partial(_scan, traced=traced, discovery=discovery, params=params, batch=batch, num_samples=num_samples)
    wide = _wide(discovery, step.sites)
    if not wide:
        return scan(step, size=size, first=first)
    weights = {site.name: matrices(params, site)[1] for site in wide}
    nothing = {
        name: Projection(jnp.zeros_like(weight, jnp.promote_types(weight.dtype, jnp.float32)))
        for name, weight in weights.items()
    }
    found = scan(step._replace(updates=nothing), size=size, first=first).statistics  # only G and M of it are used
    updates = {}
    for site in wide:
        rule = exact_projection if project is None else partial(projection, project, site, params, num_samples)
        updates[site.name] = rule(found[site.name].gram, found[site.name].cross)
    taken = {name: Projection(found.update) for name, found in updates.items()}
    loss, statistics = scan(step._replace(updates=taken), size=size, first=first)
    ridges = {name: found.ridge for name, found in updates.items()}
    return Estimate(
        loss, {name: dataclasses.replace(s, ridge_update=ridges.get(name)) for name, s in statistics.items()}
    )


def _scan(
    step: Step,
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
    sliced = [has_samples(leaf, num_samples) for leaf in jax.tree.leaves(batch)]

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
    last = step(step.loss.trace(params, rest), step.loss.discover(params, rest), params, rest, first + chunks * size)
    if left == 1:
        last = last._replace(statistics={name: keep_half(s, 0) for name, s in last.statistics.items()})
    return Estimate(total.loss + last.loss * (left / num_samples), _merge_all(total.statistics, last.statistics))


def _merge_all(a: dict[str, Statistics], b: dict[str, Statistics]) -> dict[str, Statistics]:
    return {name: merge(a[name], b[name]) for name in a}


def _wide(discovery: Discovery, sites: Sites) -> list[Site]:
    """The sites whose `link` would be too large, so that all samples must pass before N is projected."""
    return [site for site in sites if any(SUMMATIONS[path.kind].is_wide(path) for path in paths_of(discovery, site))]
