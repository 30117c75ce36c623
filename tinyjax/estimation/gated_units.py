"""The sums of gated units, and a pass over some samples whose rows are kept for the search of new gates in them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.kinds.gated_units import GatedPath
from tinyjax.discovery.sites import paths_of
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.hidden_layer import sums_of_rows
from tinyjax.estimation.rows import capture_paths, captured_inputs, path_rows, row_weight
from tinyjax.estimation.summation import SitePass, Summation, summed
from tinyjax.methods import best_update, find_gates, held_out_update
from tinyjax.statistics.dense import with_constant
from tinyjax.statistics.sums import Sums

ROWS = 8192
"""Rows (samples times positions) that are searched; more make the search slower and no better."""


def _sums(at: SitePass, path: GatedPath) -> Sums:
    """The sums of units that are ordinary neurons once their gates are given."""
    rows = path_rows(at, path)
    weight = row_weight(path.weights, at.captured, rows.x.dtype)
    assert not isinstance(at.given, Pattern)
    if at.given is not None:
        opened = path.activation(matmul(_gate_inputs(at, path), at.given.astype(rows.x.dtype)))
        weight = opened if weight is None else weight * opened
    return sums_of_rows(at, rows, weight)


def _gate_inputs(at: SitePass, path: GatedPath) -> Array:
    """(*stack, rows, B) input of the gate, the constant last iff it has a bias."""
    assert at.site.gate is not None
    return with_constant(captured_inputs(path.gate, at.captured), at.site.gate.bias is not None)


def _search(
    loss: TracedLoss,
    params: Params,
    batch: Any,
    sites: Sites,
    num_gates: Mapping[str, int],
) -> dict[str, Array]:
    """Gates for new units of every site of gated units, in what the best update of its consumers leaves undone.

    Deterministic: the starts of the search are pseudo-random numbers that change with the width of the site.

    Args:
        loss: the loss.
        params: the parameters.
        batch: the samples to search in.
        sites: growable sites of gated units.
        num_gates: how many, by site name.

    Returns:
        (*stack, B, num_gates) by site name, the gate's bias as last row iff it has one.
    """
    traced, discovery = loss.trace(params, batch), loss.discover(params, batch)
    paths = {site.name: paths_of(discovery, site) for site in sites}
    captured = capture_paths(traced, params, batch, [path for found in paths.values() for path in found])
    found = {}
    for site in sites:
        mine = [path for path in paths[site.name] if isinstance(path, GatedPath)]
        at = SitePass(params, site, mine, captured, traced.num_samples)
        statistics = summed(SUMMATION, at)
        update = functools.partial(best_update, ridge=held_out_update)
        search = functools.partial(find_gates, mine[0].activation, num_gates=num_gates[site.name])
        update, search = map_layers(site, update), map_layers(site, search)
        delta = update(statistics)
        rows = (jnp.concatenate(part, axis=-2) for part in zip(*(_searched(at, path, delta) for path in mine)))
        found[site.name] = search(*rows, key=_keys(site, statistics.width))
    return found


def _searched(at: SitePass, path: GatedPath, delta: Array) -> tuple[Array, Array, Array, Array]:
    """Inputs of the gate and of the producer, residual, and the half that each row belongs to; of the first samples."""
    rows, site = path_rows(at, path), at.site
    weight = row_weight(path.weights, at.captured, rows.x.dtype)
    positions = rows.x.shape[-2] // at.num_samples
    kept = min(at.num_samples, max(2, ROWS // positions)) * positions
    x = with_constant(rows.x, site.producers[0].bias is not None)
    x = x if weight is None else weight * x
    with_bias = delta.shape[-2] > rows.h.shape[-1]
    residual = rows.v - matmul(with_constant(rows.h, with_bias), delta)
    odd = (jnp.arange(kept) // positions % 2)[:, None] == 1
    gating, x, residual = (part[..., :kept, :] for part in (_gate_inputs(at, path), x, residual))
    return gating, x, residual, jnp.broadcast_to(odd, (*site.stack, kept, 1))


def _keys(site: Site, width: Array) -> Array:
    """A key for every layer of a stack, another one at every width."""
    key = jax.random.fold_in(jax.random.key(0), jnp.max(width))
    return jax.random.split(key, site.stack) if site.stack else key


SUMMATION = Summation(_sums, search=_search)
