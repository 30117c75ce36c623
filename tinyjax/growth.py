"""One growth as a pure function: statistics, best update, new neurons, amplitude, write.

`make_grow_step` fixes what is static (the sites, the method, the largest number of neurons) and returns a function of
arrays that compiles once, runs inside `jit` and `scan` next to training steps, and never makes the loss of its batch
rise.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.estimate import estimate_batch
from tinyjax.layout import Params
from tinyjax.methods import (
    Method,
    Neurons,
    best_update,
    held_out_gain,
    held_out_update,
    is_function_preserving,
    predicted_gain,
    random0,
    refit_fan_out,
    tiny0,
    update_gain,
)
from tinyjax.optimizer import reset_grown
from tinyjax.scaling import LineSearch, fixed, line_search, searches
from tinyjax.site import Site, Sites, as_sites
from tinyjax.slots import free_slots, require_growable, width
from tinyjax.statistics import Statistics, moments
from tinyjax.surgery import Trainable, add_update, everything, write
from tinyjax.trace import batch_size, has_samples

Update = Callable[[Statistics], Array]
Amplitude = Callable[..., LineSearch]
Mask = dict[str, Array]

held_out_best_update = partial(best_update, ridge=held_out_update)


class Status(enum.IntEnum):
    """What became of a growth."""

    GROWN = 0
    SKIPPED = 1
    NO_FREE_SLOT = 2
    BEYOND_RANK = 3
    REJECTED = 4
    NON_FINITE = 5


class GrowthInfo(NamedTuple):
    """What a `grow_step` did; every field is a dict by site name.

    Bottlenecks and their gains are in units of mean |V_goal|^2 over the samples the statistics saw, as the linear model
    has them at amplitude 1; `()` or, for a stack of layers, `stack`. Losses are those of the whole batch.

    Attributes:
        psi_before: the bottleneck before any update, mean |V_goal|^2.
        psi_after: what the update and the neurons leave of it.
        gain_predicted: what the neurons take away from it after the update (a side that is born zero at its best).
        gain_held_out: the same for neurons fitted on one half of the samples, on the other half.
        gain_achieved: decrease of the loss.
        amplitude: gamma of the neurons, ().
        amplitude_update: gamma of the best update, ().
        written: neurons of the method that were written, int32.
        filled: neurons of `fill` that were written, int32.
        born: which slots were written, (capacity,) booleans.
        width: used slots afterwards, int32.
        loss_before: before this site's growth.
        loss_after: after it.
        status: a `Status`, int32.
    """

    psi_before: dict[str, Array]
    psi_after: dict[str, Array]
    gain_predicted: dict[str, Array]
    gain_held_out: dict[str, Array]
    gain_achieved: dict[str, Array]
    amplitude: dict[str, Array]
    amplitude_update: dict[str, Array]
    written: dict[str, Array]
    filled: dict[str, Array]
    born: dict[str, Array]
    width: dict[str, Array]
    loss_before: dict[str, Array]
    loss_after: dict[str, Array]
    status: dict[str, Array]


class _Recipe(NamedTuple):
    """The static choices of a growth."""

    loss: Callable[[Params, Any], Array]
    method: Method
    update: Update | None
    amplitude: Amplitude
    update_amplitude: Amplitude
    fill: Method | None


class _Parts(NamedTuple):
    """A batch and its parts: statistics on three quarters, line searches on the last, acceptance on all."""

    estimation: Any
    search: Any
    whole: Any


def make_grow_step(
    loss_fn: Callable[..., Any],
    sites: Site | Sequence[Site],
    *,
    num_neurons: int | Mapping[str, int],
    method: Method = tiny0,
    update: Update | None = held_out_best_update,
    amplitude: Amplitude | None = None,
    update_amplitude: Amplitude = line_search,
    fill: Method | None = random0,
    optimizer: Any = None,
    trainable: Trainable = everything,
    has_aux: bool = False,
    refresh: bool = False,
    energy_matrix: bool = False,
) -> Callable[..., Any]:
    """A pure function that grows a network by one round.

    At each site in turn: the best update of the consumer at an amplitude found by line search, then the neurons of
    `method` at theirs, then `fill` for the slots that rank or amplitude left empty. Each is kept only if the loss of
    the whole batch does not rise. Statistics come from the first three quarters of the batch (one capture for all
    sites), line searches use the last quarter.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        sites: growable sites, from `find_sites`; grown in this order.
        num_neurons: neurons to add at each site, static: the largest number where `neurons` is passed. By name or one
            for all.
        method: from statistics to neurons.
        update: from statistics to the update of the consumer's existing weights; None for none.
        amplitude: of the neurons; default `line_search`, or 1 for a method that keeps the function.
        update_amplitude: of the update.
        fill: a method that keeps the function, for the slots left empty; None leaves them empty.
        optimizer: an Optax optimizer whose state travels along; newborn slots start afresh (wrap it in `with_birth`).
        trainable: the part of the parameters that the optimizer sees.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        refresh: estimate again before each site instead of once a round.
        energy_matrix: give the method sum v v', see `estimate`.

    Returns:
        `params, info = grow_step(params, batch, key=None, neurons=None)`, or with an optimizer
        `params, opt_state, info = grow_step(params, batch, opt_state, key=None, neurons=None)`. `neurons` is an int a
        site (traced or not; one for all or by name), 0 skips the site. Without `key` the filler's key is derived from
        the loss and the widths. Called outside of a trace it is jitted and passes `info` to `check`.

    Raises:
        ValueError: a site that cannot grow, `num_neurons` below 1 or beyond the capacity, a line search with a method
            that keeps the function, a `fill` that does not.

    Example:
        >>> grow_step = tinyjax.make_grow_step(loss_fn, sites.growable, num_neurons=8)
        >>> params, info = grow_step(params, batch)
    """
    sites = as_sites(sites)
    counts = _by_name(sites, num_neurons, "num_neurons")
    _check_static(sites, counts, method, amplitude, fill)
    if amplitude is None:
        amplitude = fixed(1.0) if is_function_preserving(method) else line_search

    def loss(params: Params, batch: Any) -> Array:
        return loss_fn(params, batch)[0] if has_aux else loss_fn(params, batch)

    recipe = _Recipe(loss, method, update, amplitude, update_amplitude, fill)

    def statistics_of(params: Params, batch: Any) -> dict[str, Statistics]:
        return estimate_batch(
            loss_fn, params, batch, sites, has_aux=has_aux, energy_matrix=energy_matrix
        ).statistics

    def grow(params: Params, batch: Any, opt_state: Any, key: Array | None, neurons: Mask) -> tuple[Any, ...]:
        parts = split_batch(batch)
        found = statistics_of(params, parts.estimation)
        current = loss(params, parts.whole)
        rows = {}
        for index, site in enumerate(sites):
            if refresh and index:
                found = statistics_of(params, parts.estimation)
            site_key = None if key is None else jax.random.fold_in(key, index)
            one = partial(_grow_site, recipe, site, counts[site.name], parts, key=site_key)
            wanted = neurons[site.name]
            params, rows[site.name] = jax.lax.cond(
                wanted > 0, one, partial(_skip, site), params, found[site.name], current, wanted
            )
            current = rows[site.name]["loss_after"]
        info = GrowthInfo(**{field: {name: row[field] for name, row in rows.items()} for field in GrowthInfo._fields})
        if optimizer is None:
            return params, info
        return params, reset_grown(optimizer, opt_state, params, sites, info.born, trainable=trainable), info

    compiled = jax.jit(grow)

    def run(params: Params, batch: Any, opt_state: Any, key: Array | None, neurons: Any) -> tuple[Any, ...]:
        wanted = counts if neurons is None else {name: 0 for name in sites.names} | _by_name(sites, neurons, "neurons")
        _check_wanted(wanted, counts)
        batch_size(batch)
        result = compiled(params, batch, opt_state, key, {name: jnp.asarray(k, jnp.int32) for name, k in wanted.items()})
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result)):
            check(result[-1])
        return result

    if optimizer is None:

        def grow_step(params: Params, batch: Any, key: Array | None = None, neurons: Any = None) -> Any:
            return run(params, batch, None, key, neurons)

        return grow_step

    def grow_step_with_optimizer(
        params: Params, batch: Any, opt_state: Any, key: Array | None = None, neurons: Any = None
    ) -> Any:
        return run(params, batch, opt_state, key, neurons)

    return grow_step_with_optimizer


def split_batch(batch: Any) -> _Parts:
    """Three quarters for statistics, the last quarter for line searches, and the whole.

    Raises:
        ValueError: fewer than 8 samples.
    """
    num_samples = batch_size(batch)
    if num_samples < 8:
        raise ValueError(f"a growth needs at least 8 samples (statistics on 3/4, line search on 1/4), got {num_samples}")
    cut = num_samples - num_samples // 4

    def part(start: int, stop: int) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x)[start:stop] if has_samples(x) else x, batch)

    return _Parts(part(0, cut), part(cut, num_samples), batch)


def check(info: GrowthInfo) -> None:
    """Turns what went wrong inside a jitted growth into an error; call it on the host.

    A growth that was skipped, or rejected because the loss would have risen, is not an error.

    Raises:
        ValueError: naming the site and the cure.
    """
    for name, status in info.status.items():
        if status == Status.NON_FINITE:
            raise ValueError(
                f"site `{name}`: the loss or the statistics are not finite, nothing was changed. Look for NaN or Inf in "
                "the batch and in the parameters."
            )
        if status == Status.NO_FREE_SLOT:
            raise ValueError(
                f"site `{name}` has fewer free slots than neurons asked for: width {int(info.width[name])} of "
                f"{info.born[name].shape[0]} slots. Make room with `resize` or ask for fewer with `neurons=`."
            )
        if status == Status.BEYOND_RANK:
            raise ValueError(
                f"site `{name}`: the method found {int(info.written[name])} neurons, fewer than asked for. Give a `fill` "
                "for the other slots, or ask for fewer."
            )


def _grow_site(
    recipe: _Recipe,
    site: Site,
    num_neurons: int,
    parts: _Parts,
    params: Params,
    statistics: Statistics,
    loss_before: Array,
    wanted: Array,
    *,
    key: Array | None,
) -> tuple[Params, dict[str, Array]]:
    """Update, neurons and filler at one site."""
    start, free = params, jnp.sum(free_slots(params, site))
    over_layers = _over(site)
    layer_keys = None if key is None else _split_over(site, jax.random.fold_in(key, 0))

    delta = None if recipe.update is None else over_layers(recipe.update)(statistics)
    params, gamma_update, loss_updated = _updated(recipe, site, parts, params, delta, loss_before)
    neurons = over_layers(partial(_call, recipe.method, num_neurons))(statistics, layer_keys)

    def grown(gamma: Array) -> tuple[Params, Array]:
        signed = neurons._replace(alpha=jnp.sign(gamma) * neurons.alpha, omega=jnp.sign(gamma) * neurons.omega)
        return write(params, site, signed, amplitude=jnp.abs(gamma), limit=wanted)

    found = recipe.amplitude(lambda gamma: recipe.loss(grown(gamma)[0], parts.search), dtype=neurons.alpha.dtype)
    candidate, born = grown(found.amplitude)
    loss_grown = recipe.loss(candidate, parts.whole)
    kept = loss_grown <= loss_updated
    params, born = _select(kept, candidate, params), born & kept
    written = jnp.sum(born, dtype=jnp.int32)
    loss_after = jnp.where(kept, loss_grown, loss_updated)

    if recipe.fill is not None:
        fill_key = jax.random.fold_in(_key_from(loss_before, statistics.width) if key is None else key, 1)
        filler = over_layers(partial(_call, recipe.fill, num_neurons))(statistics, _split_over(site, fill_key))
        params, more = write(params, site, filler, amplitude=1.0, limit=jnp.minimum(wanted, free) - written)
        born = born | more
    total = jnp.sum(born, dtype=jnp.int32)

    finite = jnp.isfinite(loss_before) & _finite(statistics) & _finite(params)
    report = over_layers(partial(_report, recipe, num_neurons))(statistics, delta, neurons, layer_keys)
    status = _first_true(
        (~finite, Status.NON_FINITE),
        (wanted > free, Status.NO_FREE_SLOT),
        (~kept & (total == 0), Status.REJECTED),
        (total < wanted, Status.BEYOND_RANK if not searches(recipe.amplitude) else Status.REJECTED),
    )
    params = _select(finite, params, start)
    born = born & finite
    row = dict(
        **report,
        gain_achieved=loss_before - loss_after,
        amplitude=jnp.where(kept & finite, found.amplitude, 0),
        amplitude_update=jnp.where(finite, gamma_update, 0),
        written=jnp.where(finite, written, 0),
        filled=jnp.where(finite, total - written, 0),
        born=born,
        width=width(params, site),
        loss_before=loss_before,
        loss_after=jnp.where(finite, loss_after, loss_before),
        status=status,
    )
    return params, row


def _updated(
    recipe: _Recipe, site: Site, parts: _Parts, params: Params, delta: Array | None, loss_before: Array
) -> tuple[Params, Array, Array]:
    """The parameters after the best update, its amplitude, and the loss of the whole batch."""
    if delta is None:
        return params, jnp.zeros((), loss_before.dtype), loss_before
    moved = partial(add_update, params, site, delta)
    found = recipe.update_amplitude(
        lambda gamma: recipe.loss(moved(amplitude=gamma), parts.search), dtype=delta.dtype
    )
    candidate = moved(amplitude=found.amplitude)
    loss = recipe.loss(candidate, parts.whole)
    kept = loss <= loss_before
    return _select(kept, candidate, params), jnp.where(kept, found.amplitude, 0), jnp.where(kept, loss, loss_before)


def _report(
    recipe: _Recipe, num_neurons: int, statistics: Statistics, delta: Array | None, neurons: Neurons, key: Array | None
) -> dict[str, Array]:
    """Bottlenecks and gains at amplitude 1, in the linear model."""

    def fit(half: Statistics) -> tuple[Neurons, Array | None]:
        change = None if recipe.update is None else recipe.update(half)
        return refit_fan_out(half, _call(recipe.method, num_neurons, half, key), change), change

    mean = moments(statistics)
    gain = predicted_gain(mean, refit_fan_out(statistics, neurons, delta), delta)
    updated = jnp.zeros_like(gain) if delta is None else update_gain(mean, delta)
    return dict(
        psi_before=mean.energy,
        psi_after=mean.energy - updated - gain,
        gain_predicted=gain,
        gain_held_out=held_out_gain(statistics, fit),
    )


def _skip(
    site: Site, params: Params, statistics: Statistics, loss_before: Array, wanted: Array
) -> tuple[Params, dict[str, Array]]:
    """What a site reports that was not asked to grow."""
    energy = _over(site)(lambda s: moments(s).energy)(statistics)
    zero = jnp.zeros((), statistics.energy.dtype)
    none = jnp.zeros((), jnp.int32)
    row = dict(
        psi_before=energy,
        psi_after=energy,
        gain_predicted=jnp.zeros_like(energy),
        gain_held_out=jnp.zeros_like(energy),
        gain_achieved=jnp.zeros_like(loss_before),
        amplitude=zero,
        amplitude_update=zero,
        written=none,
        filled=none,
        born=jnp.zeros(site.capacity, bool),
        width=width(params, site),
        loss_before=loss_before,
        loss_after=loss_before,
        status=jnp.full((), Status.SKIPPED, jnp.int32),
    )
    return params, row


def _call(method: Method, num_neurons: int, statistics: Statistics, key: Array | None) -> Neurons:
    return method(statistics, num_neurons=num_neurons, key=key)


def _over(site: Site) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Maps a function of one layer over the layers of a stack."""

    def lift(function: Callable[..., Any]) -> Callable[..., Any]:
        for _ in site.stack:
            function = jax.vmap(function)
        return function

    return lift


def _split_over(site: Site, key: Array) -> Array:
    """A key for each layer of a stack."""
    return jax.random.split(key, site.stack) if site.stack else key


def _key_from(loss: Array, used: Array) -> Array:
    """A key that changes with the loss and the width: the filler's when the user gives none."""
    bits = jax.lax.bitcast_convert_type(loss.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), bits), jnp.max(used))


def _select(keep: Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(keep, a, b), new, old)


def _finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _first_true(*cases: tuple[Array, Status]) -> Array:
    status = jnp.full((), Status.GROWN, jnp.int32)
    for condition, value in reversed(cases):
        status = jnp.where(condition, value, status)
    return status.astype(jnp.int32)


def _by_name(sites: Sites, value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value for name in sites.names}
    unknown = [name for name in value if name not in sites.names]
    if unknown:
        known = ", ".join(f"`{name}`" for name in sites.names) or "none"
        raise ValueError(f"`{what}` names the unknown site `{unknown[0]}`; this grow_step has {known}")
    return dict(value)


def _check_static(
    sites: Sites, counts: Mapping[str, int], method: Method, amplitude: Amplitude | None, fill: Method | None
) -> None:
    if not sites:
        raise ValueError("`sites` is empty: there is nothing to grow. Print `find_sites(...)` to see why")
    for site in sites:
        require_growable(site)
        if site.name not in counts:
            raise ValueError(f"`num_neurons` has no entry for site `{site.name}`")
        k = counts[site.name]
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"`num_neurons` of site `{site.name}` must be an int of at least 1, got {k!r}")
        if k > site.capacity:
            raise ValueError(
                f"`num_neurons` of site `{site.name}` is {k}, more than its {site.capacity} slots; `resize` it first"
            )
    if amplitude is not None and searches(amplitude) and is_function_preserving(method):
        name = getattr(method, "__name__", repr(method))
        raise ValueError(
            f"`{name}` keeps the function, so the loss is the same at every amplitude and a line search would find "
            "nothing; leave `amplitude` out, or scale the neurons with `normalized`"
        )
    if fill is not None and not is_function_preserving(fill):
        raise ValueError("`fill` must keep the function (`random0` does): it is written without a line search")


def _check_wanted(wanted: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    for name, k in wanted.items():
        if not isinstance(k, jax.core.Tracer) and not 0 <= int(k) <= counts[name]:
            raise ValueError(
                f"`neurons` asks for {int(k)} at site `{name}`; this grow_step was made for 0 .. {counts[name]}"
            )
