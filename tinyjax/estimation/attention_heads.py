"""Patterns for new attention heads: a pass over some samples whose tokens are kept, for the search in them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.kernels import site_leaves
from tinyjax.core.linalg import matmul
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites
from tinyjax.core.slots import used_dimensions
from tinyjax.discovery.paths.path import Head, Path
from tinyjax.discovery.sites import paths_of
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.attention_replay import attend_alone
from tinyjax.estimation.gated_units import ROWS
from tinyjax.estimation.recording import Captured
from tinyjax.estimation.rows import capture_paths, head_tokens, path_rows
from tinyjax.estimation.summation import site_sums
from tinyjax.methods import Tokens, best_update, find_heads, held_out_update
from tinyjax.statistics.dense import with_constant


def search_patterns(
    loss: TracedLoss,
    params: Params,
    batch: Any,
    sites: Sites,
    num_heads: Mapping[str, int],
) -> dict[str, Pattern]:
    """Queries and keys of new heads for every site of whole heads, in what the best update of its outputs leaves.

    Deterministic. A new head has the query-key and value dimensions that the others have in use.

    Args:
        loss: the loss.
        params: the parameters.
        batch: the samples; only the first are searched in, as many as give `gates.ROWS` tokens.
        sites: growable sites of whole heads.
        num_heads: how many, by site name.

    Returns:
        By site name, layers of a stack in front.

    Raises:
        ValueError: more new heads than the site has slots.
    """
    for site in sites:
        if num_heads[site.name] > site.capacity:
            raise ValueError(
                f"{num_heads[site.name]} new heads at site `{site.name}`, which has {site.capacity} slots; `resize` it"
            )
    traced, discovery = loss.trace(params, batch), loss.discover(params, batch)
    most = max(max(head.pair.sizes[3:]) for site in sites for head in _heads(paths_of(discovery, site)))
    kept = max(2, ROWS // most)
    if kept < batch_size(batch):
        batch = take_samples(batch, 0, kept)
        traced = loss.trace(params, batch)
        discovery = loss.discover(params, batch)
    paths = {site.name: paths_of(discovery, site)[0] for site in sites}
    captured = capture_paths(traced, params, batch, list(paths.values()))
    return {
        site.name: _search(params, site, paths[site.name], captured, traced.num_samples, num_heads[site.name])
        for site in sites
    }


def _heads(paths: tuple[Path, ...]) -> list[Head]:
    return [path.head for path in paths if path.head is not None]


def _search(params: Params, site: Site, path: Path, captured: Captured, num_samples: int, num_heads: int) -> Pattern:
    """The pattern of one site."""
    (head,) = _heads((path,))
    update = functools.partial(best_update, ridge=held_out_update)
    scores, values = used_dimensions(site_leaves(params, site), site)

    def search(tokens: Tokens, recorded: Mapping[Any, Array]) -> tuple[Array, Array]:
        return find_heads(
            attend_alone(head, recorded),
            tokens,
            num_heads=num_heads,
            width=len(scores),
            value_width=len(values),
            used=jnp.sum(scores),
            used_values=jnp.sum(values),
        )

    for _ in site.stack:
        update, search = jax.vmap(update), jax.vmap(search)
    delta = update(site_sums(params, site, (path,), captured, num_samples))
    tokens = _tokens(site, path, head, captured, num_samples, delta)
    query, key = search(tokens, {address: captured.inputs[address] for address in head.replay.taps})
    query, key = (jnp.moveaxis(x, -3, -1).swapaxes(-3, -2) for x in (query, key))  # (heads, D, k) -> (k, D, heads)
    if site.pattern[1].bias is not None:
        key = jnp.pad(key, [(0, 0)] * (key.ndim - 2) + [(0, 1), (0, 0)])
    first = jnp.arange(len(values)) < jnp.sum(values)
    kept = jnp.broadcast_to(first[:, None], (*site.stack, len(values), num_heads))
    return Pattern(query, key, kept)


def _tokens(site: Site, path: Path, head: Head, captured: Captured, num_samples: int, delta: Array) -> Tokens:
    """What heads may read, and what an update of the outputs leaves of V_goal."""
    rows = path_rows(site, path, captured, num_samples)
    residual = rows.v - matmul(with_constant(rows.h, delta.shape[-2] > rows.h.shape[-1]), delta)
    values = with_constant(rows.x, site.producers[0].bias is not None)
    queries, keys = head_tokens(site, head, captured)
    by_sample = [x.reshape(*site.stack, num_samples, -1, x.shape[-1]) for x in (values, residual)]
    return Tokens(queries, keys, *by_sample)
