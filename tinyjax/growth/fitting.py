"""The neurons and the update of one layer in the linear model: fitted, scored on the other half, and their slopes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul
from tinyjax.methods import (
    Effect,
    Method,
    Neurons,
    Squares,
    effect,
    in_outputs,
    orthonormal,
    product,
    refit,
    update_gain,
    with_ridges,
)
from tinyjax.methods.solvers.traits import declared
from tinyjax.statistics.averages import half, moments
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import keep_halves

Update = Callable[[Statistics], Array]


class Slopes(NamedTuple):
    """How fast the loss falls with the amplitude, ().

    Attributes:
        update: with that of the best update.
        neurons: with that of the neurons, to first order.
        second_order: with its power 3/2, for neurons that do nothing to first order; None without any.
    """

    update: Array
    neurons: Array
    second_order: Array | None


def fit_neurons(
    method: Method,
    update: Update | None,
    num_neurons: int,
    squares: Squares | None,
    statistics: Statistics,
    key: Array | None,
) -> tuple[Neurons, Array | None, dict[str, Array], Slopes]:
    """The neurons and the update of one layer, with bottlenecks, gains and slopes in the linear model.

    The update is at amplitude 1, and so are neurons whose squares are known from S; where S is a bound, neurons are at
    the amplitude that is best on the samples they were fitted on.

    One program fits all samples, the even and the odd ones in turn, at the ridges chosen for all; what a half found is
    scored on the other.
    """
    statistics, basis = orthonormal(statistics)
    statistics = with_ridges(statistics)
    born_empty = declared(method, "function_preserving", default=True)  # a side may be empty, as far as is known

    def fit_part(part: Array) -> tuple[Neurons, Neurons, Array | None]:
        kept = keep_halves(statistics, (part == 0) | (jnp.arange(2) == part - 1))
        delta = None if update is None else update(kept)
        neurons = call(method, num_neurons, kept, key)
        if neurons.delta is not None and delta is not None:
            raise ValueError("the method brings its own update of the consumer: pass `update=None` to `make_grow_step`")
        linear = _linear(neurons)
        return neurons, refit(kept, linear, delta) if born_empty else linear, delta

    neurons, refitted, deltas = jax.lax.map(fit_part, jnp.arange(3))

    means = (moments(statistics), half(statistics, 0), half(statistics, 1))
    exact = None if squares is None else squares(refitted)

    def effect_on(samples: int, part: int) -> Effect:
        fitted, delta = jax.tree.map(lambda x: x[part], (refitted, deltas))
        found = effect(means[samples], fitted, fitted.delta if delta is None else delta)
        return found if exact is None else found._replace(square=exact[part, samples])

    def gain(samples: int, part: int) -> Array:
        scaled = exact is not None and refitted.delta is None
        return effect_on(samples, part).gain(effect_on(part, part).best_amplitude if scaled else 1)

    mean = means[0]
    first, delta = jax.tree.map(lambda x: x[0], (neurons, deltas))
    change = first.delta if delta is None else delta
    updated = jnp.zeros_like(mean.energy) if change is None else update_gain(mean, change)
    predicted = gain(0, 0)
    report = dict(
        psi_before=mean.energy,
        psi_after=mean.energy - updated - predicted,
        gain_predicted=predicted,
        gain_held_out=(gain(2, 1) + gain(1, 2)) / 2,
    )
    zero = jnp.zeros_like(mean.energy)
    steep = 1.0 if statistics.slope is None or statistics.is_flat else abs(statistics.slope)
    if first.delta is not None and not born_empty:  # both take one amplitude: the neurons' share of the move is steep
        first = first._replace(alpha=first.alpha / steep**0.5, omega=first.omega / steep**0.5)
    slopes = Slopes(
        update=zero if delta is None else inner(mean.cross, delta),
        neurons=steep * inner(mean.cross_prev, product(first.alpha, first.omega, mean.cross.shape[1]))
        + (zero if first.delta is None else inner(mean.cross, first.delta)),
        second_order=None if first.second_order is None else jnp.sum(first.second_order),
    )
    delta = delta if basis is None or delta is None else matmul(delta, basis.T)
    return in_outputs(first, basis), delta, report, slopes


def _linear(neurons: Neurons) -> Neurons:
    """The neurons in the linear model, in which those of second order write nothing."""
    if neurons.second_order is None:
        return neurons
    return neurons._replace(omega=jnp.where(neurons.second_order[:, None] > 0, 0, neurons.omega))


def call(method: Method, num_neurons: int, statistics: Statistics, key: Array | None) -> Neurons:
    """A method of arguments by position, as mapping over layers wants them."""
    return method(statistics, num_neurons=num_neurons, key=key)


def polyak(loss: Array, slope: Array) -> Array:
    """The amplitude at which the linear model predicts a loss of zero; 1 where it predicts no change."""
    total = jnp.abs(jnp.sum(slope))
    return jnp.where(total > 0, jnp.abs(loss) / jnp.where(total > 0, total, 1), 1).astype(slope.dtype)


def unit_of(loss: Array, slopes: Slopes) -> Array:
    """The amplitude at which the neurons are predicted to bring the loss to zero, by the order that does it first."""
    first = polyak(loss, slopes.neurons)
    if slopes.second_order is None:
        return first
    second = polyak(loss, slopes.second_order) ** (2 / 3)
    only_one = jnp.where(jnp.all(slopes.second_order == 0), first, second)
    both = jnp.any(slopes.second_order != 0) & (jnp.sum(slopes.neurons) != 0)
    return jnp.where(both, jnp.minimum(first, second), only_one)
