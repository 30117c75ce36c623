"""The sums of whole heads, and a pass over some samples whose tokens are kept for the search of patterns in them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.kernels import consumers_have_bias, producers_have_bias, site_leaves
from tinyjax.core.linalg import matmul
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites
from tinyjax.core.slots import used_dimensions
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.kinds.attention_heads import HeadsPath
from tinyjax.discovery.sites import Discovery, paths_of
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.attention_replay import attend_alone, collected, tokens_of
from tinyjax.estimation.gated_units import ROWS
from tinyjax.estimation.rows import capture_paths, captured_inputs, path_rows
from tinyjax.estimation.summation import SitePass, Summation, summed
from tinyjax.methods import Tokens, best_update, find_heads, held_out_update
from tinyjax.statistics.dense import row_sums, with_constant
from tinyjax.statistics.sums import Extras, Sums

_HIGHEST = jax.lax.Precision.HIGHEST


def _sums(at: SitePass, path: HeadsPath) -> Sums:
    """The sums of the value dimensions of heads whose pattern is given, head after head."""
    x, h, v = path_rows(at, path)
    assert not isinstance(at.given, jax.Array)
    seen = _collected(at, path, with_constant(x, producers_have_bias(at.site)), at.given)
    bias = consumers_have_bias(at.site)
    seen = seen.reshape(*seen.shape[:-2], -1)
    return row_sums(seen, h, v, at.num_samples, bias_prev=False, bias=bias, extras=Extras(at.extras.energy_matrix))


def _finish(_: SitePass, total: Sums, weight_prev: Array, __: Array) -> tuple[Sums, dict[str, Any]]:
    """The value dimensions of all heads, in the order of the consumers' rows."""
    weight_prev = jnp.moveaxis(weight_prev, -3, -2)
    return total, {"weight_prev": weight_prev.reshape(*weight_prev.shape[:-2], -1)}


def _head_tokens(at: SitePass, path: HeadsPath) -> tuple[Array, Array]:
    """What queries and keys of a new head read, `(*stack, n, T, D)` and `(*stack, n, U, E)`."""
    x, y = captured_inputs(path.query, at.captured), captured_inputs(path.pair.projected, at.captured)
    return tokens_of(path, with_constant(x, at.site.pattern[0].bias is not None), y, at.captured.inputs)


def _collected(at: SitePass, path: HeadsPath, values: Array, pattern: Pattern | None) -> Array:
    """What the outputs read of new heads, `(*stack, rows, C, F)`: of one that attends uniformly without a pattern."""
    x, y = _head_tokens(at, path)
    scores = jnp.zeros((*x.shape[:-2], 1, x.shape[-2], y.shape[-2]), x.dtype)
    if pattern is not None:
        query, key = pattern.query.astype(x.dtype), pattern.key[..., : y.shape[-1], :].astype(x.dtype)
        q = jnp.einsum("...ntd,...kdc->...nctk", x, query, precision=_HIGHEST)
        k = jnp.einsum("...nue,...kec->...ncuk", y, key, precision=_HIGHEST)
        scores = jnp.einsum("...nctk,...ncuk->...nctu", q, k, precision=_HIGHEST)
    return collected(path, scores, values, at.captured.inputs)


def _search(
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
    most = max(max(_path(discovery, site).pair.sizes[3:]) for site in sites)
    kept = max(2, ROWS // most)
    if kept < batch_size(batch):
        batch = take_samples(batch, 0, kept)
        traced, discovery = loss.trace(params, batch), loss.discover(params, batch)
    paths = {site.name: _path(discovery, site) for site in sites}
    captured = capture_paths(traced, params, batch, list(paths.values()))
    return {
        site.name: _search_site(
            SitePass(params, site, [path := paths[site.name]], captured, traced.num_samples),
            path,
            num_heads[site.name],
        )
        for site in sites
    }


def _path(discovery: Discovery, site: Site) -> HeadsPath:
    (path,) = paths_of(discovery, site)
    assert isinstance(path, HeadsPath)
    return path


def _search_site(at: SitePass, path: HeadsPath, num_heads: int) -> Pattern:
    """The pattern of one site."""
    site = at.site
    update = functools.partial(best_update, ridge=held_out_update)
    scores, values = used_dimensions(site_leaves(at.params, site), site)

    def search(tokens: Tokens, recorded: Mapping[Any, Array]) -> tuple[Array, Array]:
        return find_heads(
            attend_alone(path, recorded),
            tokens,
            num_heads=num_heads,
            width=len(scores),
            value_width=len(values),
            used=jnp.sum(scores),
            used_values=jnp.sum(values),
        )

    update, search = map_layers(site, update), map_layers(site, search)
    tokens = _tokens(at, path, update(summed(SUMMATION, at)))
    query, key = search(tokens, {address: at.captured.inputs[address] for address in path.replay.taps})
    query, key = (jnp.moveaxis(x, -3, -1).swapaxes(-3, -2) for x in (query, key))  # (heads, D, k) -> (k, D, heads)
    if site.pattern[1].bias is not None:
        key = jnp.pad(key, [(0, 0)] * (key.ndim - 2) + [(0, 1), (0, 0)])
    first = jnp.arange(len(values)) < jnp.sum(values)
    kept = jnp.broadcast_to(first[:, None], (*site.stack, len(values), num_heads))
    return Pattern(query, key, kept)


def _tokens(at: SitePass, path: HeadsPath, delta: Array) -> Tokens:
    """What heads may read, and what an update of the outputs leaves of V_goal."""
    rows = path_rows(at, path)
    residual = rows.v - matmul(with_constant(rows.h, delta.shape[-2] > rows.h.shape[-1]), delta)
    values = with_constant(rows.x, at.site.producers[0].bias is not None)
    queries, keys = _head_tokens(at, path)
    by_sample = [x.reshape(*at.site.stack, at.num_samples, -1, x.shape[-1]) for x in (values, residual)]
    return Tokens(queries, keys, *by_sample)


SUMMATION = Summation(_sums, finish=_finish, search=_search)
