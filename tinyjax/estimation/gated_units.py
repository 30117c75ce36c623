"""Gates for new gated units: a pass over some samples whose rows are kept, for the search in them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites
from tinyjax.discovery.sites import paths_of
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.rows import Rows, capture_paths, path_rows
from tinyjax.estimation.summation import site_sums
from tinyjax.methods import best_update, find_gates, held_out_update
from tinyjax.statistics.dense import with_constant

ROWS = 8192
"""Rows (samples times positions) that are searched; more make the search slower and no better."""


def search_gates(
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
        sites: growable sites with a `gate`.
        num_gates: how many, by site name.

    Returns:
        (*stack, B, num_gates) by site name, the gate's bias as last row iff it has one.
    """
    traced, discovery = loss.trace(params, batch), loss.discover(params, batch)
    paths = {site.name: paths_of(discovery, site) for site in sites}
    captured = capture_paths(traced, params, batch, [path for found in paths.values() for path in found])
    found = {}
    for site in sites:
        statistics = site_sums(params, site, paths[site.name], captured, traced.num_samples)
        update = functools.partial(best_update, ridge=held_out_update)
        activation = paths[site.name][0].activation
        assert activation is not None
        search = functools.partial(find_gates, activation, num_gates=num_gates[site.name])
        for _ in site.stack:
            update, search = jax.vmap(update), jax.vmap(search)
        delta = update(statistics)
        parts = [
            _searched(site, path_rows(site, path, captured, traced.num_samples), delta, traced.num_samples)
            for path in paths[site.name]
        ]
        rows = (jnp.concatenate(part, axis=-2) for part in zip(*parts))
        found[site.name] = search(*rows, key=_keys(site, statistics.width))
    return found


def _searched(site: Site, rows: Rows, delta: Array, num_samples: int) -> tuple[Array, Array, Array, Array]:
    """Inputs of the gate and of the producer, residual, and the half that each row belongs to; of the first samples."""
    positions = rows.x.shape[-2] // num_samples
    kept = min(num_samples, max(2, ROWS // positions)) * positions
    x = with_constant(rows.x, site.producers[0].bias is not None)
    x = x if rows.weight is None else rows.weight * x
    with_bias = delta.shape[-2] > rows.h.shape[-1]
    residual = rows.v - matmul(with_constant(rows.h, with_bias), delta)
    odd = (jnp.arange(kept) // positions % 2)[:, None] == 1
    assert rows.gating is not None
    gating, x, residual = (part[..., :kept, :] for part in (rows.gating, x, residual))
    return gating, x, residual, jnp.broadcast_to(odd, (*site.stack, kept, 1))


def _keys(site: Site, width: Array) -> Array:
    """A key for every layer of a stack, another one at every width."""
    key = jax.random.fold_in(jax.random.key(0), jnp.max(width))
    return jax.random.split(key, site.stack) if site.stack else key
