"""The growth of one site, inside the trace.

Best update at its amplitude, neurons at theirs, filler for the slots left empty; each kept only if the loss of the
whole batch does not rise. Everything is selected by `where`, so that one program serves every outcome.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import is_normed
from tinyjax.core.params import Params, named_leaves
from tinyjax.core.site import Kernel, Site
from tinyjax.core.slots import free_slots, width
from tinyjax.core.stacks import map_layers
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.growth.batch_norm_birth import identity_at_birth, response_moments
from tinyjax.growth.batch_split import BatchParts
from tinyjax.growth.fitting import Update, call, fit_neurons, polyak, unit_of
from tinyjax.growth.info import Status
from tinyjax.growth.line_loss import loss_along
from tinyjax.growth.line_searches import LineSearch, searches
from tinyjax.methods import Method, Neurons, Squares
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics
from tinyjax.surgery import Frozen, add_update, write

Amplitude = Callable[..., LineSearch]


class Recipe(NamedTuple):
    """The static choices of a growth."""

    loss: TracedLoss
    method: Method
    update: Update | None
    amplitude: Amplitude
    update_amplitude: Amplitude
    fill: Method | None
    orient: Callable[..., Neurons] | None
    frozen: Frozen


def grow_site(
    recipe: Recipe,
    site: Site,
    num_neurons: int,
    parts: BatchParts,
    params: Params,
    statistics: Statistics,
    loss_before: Array,
    wanted: Array,
    *,
    squares: Squares | None,
    key: Array | None,
) -> tuple[Params, dict[str, Array]]:
    """Update, neurons and filler at one site; `squares` where S is only a bound of them, see `conv_squares`."""
    start, free = params, jnp.sum(free_slots(params, site), dtype=jnp.int32)
    over_layers = partial(map_layers, site)
    layer_keys = None if key is None else _split_over(site, jax.random.fold_in(key, 0))

    neurons, delta, report, slopes = over_layers(
        partial(fit_neurons, recipe.method, recipe.update, num_neurons, squares)
    )(statistics, layer_keys)
    if all(kernel.leaf in recipe.frozen for kernel in site.producers):
        neurons = _reading(neurons)
    unit = polyak(loss_before, slopes.update)
    params, gamma_update, loss_updated = _updated(recipe, site, parts, params, delta, loss_before, unit)

    if recipe.orient is not None:
        neurons = recipe.orient(recipe.loss, params, parts.estimation, site, neurons)
    norm_at = _birth(recipe, site, parts, params, neurons)

    def grown(gamma: Array, sign: Array | float = 1.0) -> tuple[Params, Array]:
        alpha, omega = jnp.sign(gamma) * neurons.alpha, sign * jnp.sign(gamma) * neurons.omega
        signed = neurons._replace(alpha=alpha, omega=omega)
        return write(params, site, signed, amplitude=jnp.abs(gamma), limit=wanted, birth=norm_at(gamma))

    straight = _leaves((*site.producers, *site.consumers))
    if neurons.delta is not None or is_normed(site):
        straight -= _leaves(site.consumers)

    def search(sign: Array | float) -> LineSearch:
        along, coordinate = _along(site, partial(grown, sign=sign))
        loss_at = _loss_along(recipe, recipe.amplitude, parts, params, along, straight)
        dtype, unit = neurons.alpha.dtype, unit_of(loss_before, slopes)
        return recipe.amplitude(lambda gamma: loss_at(coordinate(gamma)), dtype=dtype, unit=unit)

    if statistics.is_flat and searches(recipe.amplitude):
        found, sign = _of_either_sign(search, neurons.omega.dtype)
    else:
        found, sign = search(1.0), 1.0
    candidate, born = grown(found.amplitude, sign)
    loss_grown = recipe.loss(candidate, parts.whole)
    kept = loss_grown <= loss_updated
    params, born = _select(kept, candidate, params), born & kept
    written = jnp.sum(born, dtype=jnp.int32)
    loss_after = jnp.where(kept, loss_grown, loss_updated)

    if recipe.fill is not None:
        fill_key = jax.random.fold_in(_key_from(loss_before, statistics.width) if key is None else key, 1)
        filler = over_layers(partial(call, recipe.fill, num_neurons))(statistics, _split_over(site, fill_key))
        norm = _birth(recipe, site, parts, params, filler)(jnp.ones((), filler.alpha.dtype))
        left = jnp.minimum(wanted, free) - written
        params, more = write(params, site, filler, amplitude=1.0, limit=left, birth=norm)
        born = born | more
    total = jnp.sum(born, dtype=jnp.int32)

    finites = dict(
        finite_loss=jnp.isfinite(loss_before),
        finite_statistics=_is_finite(statistics),
        finite_update=_finite([new for new, old in zip(*map(jax.tree.leaves, (params, start))) if new is not old]),
    )
    finite = jnp.all(jnp.array(list(finites.values())))
    status = _first_true(
        (~finite, Status.NON_FINITE),
        (wanted > free, Status.NO_FREE_SLOT),
        ((total < wanted) & ~_has_inputs(statistics), Status.DEAD_INPUTS),
        ((total < wanted) & kept & (found.amplitude != 0) & (recipe.fill is None), Status.BEYOND_RANK),
        (total < wanted, Status.REJECTED),
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
        width=site.capacity - free + jnp.where(finite, total, 0),
        loss_before=loss_before,
        loss_after=jnp.where(finite, loss_after, loss_before),
        **finites,
        status=status,
    )
    return params, row


def _reading(neurons: Neurons) -> Neurons:
    """The neurons without those that read nothing: in a frozen fan-in they never would."""
    reads = jnp.any(neurons.alpha.reshape(-1, neurons.alpha.shape[-1]) != 0, axis=0)
    return neurons._replace(omega=jnp.where(reads[:, None], neurons.omega, 0))


def _of_either_sign(search: Callable[[Array], LineSearch], dtype: jnp.dtype) -> tuple[LineSearch, Array]:
    """The better search of those with what neurons write as it is and turned, where the slope at 0 does not tell."""
    signs = jnp.array([1, -1], dtype)
    both = jax.lax.map(search, signs)
    best = jnp.argmin(jnp.where(jnp.isnan(both.loss), jnp.inf, both.loss))
    return jax.tree.map(lambda x: x[best], both), signs[best]


def _along(
    site: Site, grown: Callable[[Array], tuple[Params, Array]]
) -> tuple[Callable[[Array], Params], Callable[[Array], Array]]:
    """From a coordinate in which the fan-in moves straight to parameters, and from the amplitude to that coordinate.

    Fan-in and fan-out grow with the signed root of the amplitude, a delta and a normalisation do not; under a norm on a
    residual stream the fan-in grows with the amplitude, and the fan-out is there at once.
    """
    if is_normed(site):
        return lambda gamma: grown(gamma)[0], lambda gamma: gamma
    return lambda root: grown(jnp.sign(root) * root**2)[0], lambda gamma: jnp.sign(gamma) * jnp.sqrt(jnp.abs(gamma))


def _birth(
    recipe: Recipe, site: Site, parts: BatchParts, params: Params, neurons: Neurons
) -> Callable[[Array], Mapping[str, Array]]:
    """From the amplitude to what a normalisation must hold to be the identity on the neurons."""
    if site.norm is None or parts.normalised is None:
        return lambda gamma: {}
    traced, paths = parts.normalised
    has_bias = site.producers[0].bias is not None
    moments = response_moments(traced, paths[site.name], params, parts.whole, neurons.alpha, bias=has_bias)
    return partial(identity_at_birth, site.norm, moments)


def _updated(
    recipe: Recipe,
    site: Site,
    parts: BatchParts,
    params: Params,
    delta: Array | None,
    loss_before: Array,
    unit: Array,
) -> tuple[Params, Array, Array]:
    """The parameters after the best update, its amplitude, and the loss of the whole batch."""
    if delta is None:
        return params, jnp.zeros((), loss_before.dtype), loss_before
    moved = partial(add_update, params, site, delta)
    straight = _leaves(site.consumers)
    loss_at = _loss_along(recipe, recipe.update_amplitude, parts, params, lambda c: moved(amplitude=c), straight)
    found = recipe.update_amplitude(loss_at, dtype=delta.dtype, unit=unit)
    candidate = moved(amplitude=found.amplitude)
    loss = recipe.loss(candidate, parts.whole)
    kept = loss <= loss_before
    return _select(kept, candidate, params), jnp.where(kept, found.amplitude, 0), jnp.where(kept, loss, loss_before)


def _leaves(kernels: Sequence[Kernel]) -> set[str]:
    """The leaves of kernels and of their biases."""
    return {layout.leaf for kernel in kernels for layout in (kernel.layout, kernel.bias) if layout is not None}


def _loss_along(
    recipe: Recipe,
    rule: Amplitude,
    parts: BatchParts,
    params: Params,
    path: Callable[[Array], Params],
    straight: set[str],
) -> Callable[[Array], Array]:
    """The loss of the search samples along a path, on which the leaves in `straight` move in proportion."""
    if not searches(rule):  # it will not ask: prepare nothing
        return lambda c: recipe.loss(path(c), parts.search)
    positions = {i for i, name in enumerate(named_leaves(params)) if name in straight}
    return loss_along(parts.traced, params, parts.search, path, positions)


def skip_site(
    site: Site, params: Params, statistics: Statistics, loss_before: Array, wanted: Array
) -> tuple[Params, dict[str, Array]]:
    """What a site reports that was not asked to grow."""
    energy = map_layers(site, lambda s: moments(s).energy)(statistics)
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
        **dict.fromkeys(("finite_loss", "finite_statistics", "finite_update"), jnp.ones((), bool)),
        status=jnp.full((), Status.SKIPPED, jnp.int32),
    )
    return params, row


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


def _is_finite(statistics: Statistics) -> Array:
    """Whether all sums are: no entry of a cross moment is larger than the squares that bound it."""
    grams = [jnp.diagonal(gram, axis1=-2, axis2=-1) for gram in (statistics.gram_prev, statistics.gram)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in (*grams, statistics.energy)]))


def _has_inputs(statistics: Statistics) -> Array:
    """Whether anything enters the site besides the constant of its bias."""
    energy = jnp.diagonal(statistics.gram_prev, axis1=-2, axis2=-1)
    return jnp.any((energy[..., :-1] if statistics.bias_prev else energy) > 0)


def _first_true(*cases: tuple[Array, Status]) -> Array:
    status = jnp.full((), Status.GROWN, jnp.int32)
    for condition, value in reversed(cases):
        status = jnp.where(condition, value, status)
    return status.astype(jnp.int32)
