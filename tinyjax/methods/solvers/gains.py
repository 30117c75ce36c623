"""What neurons gain: on the samples they were computed from, and on samples they have not seen."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul, solve
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, residual_cross, resolve
from tinyjax.methods.solvers.by_gate import own_blocks
from tinyjax.methods.solvers.by_head import best_fan_out
from tinyjax.methods.solvers.live import input_root
from tinyjax.methods.solvers.residual_stream import readers_fan_in, readers_fan_out, readers_square
from tinyjax.methods.solvers.ridge import held_out_ridge
from tinyjax.statistics.averages import Moments, half, moments
from tinyjax.statistics.offsets import omega_of_heads, product
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import keep_half, one_head


class Effect(NamedTuple):
    """What neurons do to the bottleneck at amplitude gamma: it falls by 2 gamma slope - gamma^2 square.

    Attributes:
        slope: () mean <V_residual, V(theta)>.
        square: () mean |V(theta)|^2.
    """

    slope: Array
    square: Array

    @property
    def best_amplitude(self) -> Array:
        """Where the gain is largest, (); 0 where it is never positive."""
        moves = self.square > 0
        return jnp.where(moves, jnp.maximum(self.slope, 0) / jnp.where(moves, self.square, 1), 0)

    def gain(self, gamma: Array | float) -> Array:
        """By how much the bottleneck falls at an amplitude, ()."""
        return 2 * gamma * self.slope - gamma**2 * self.square


def effect(moments: Moments, neurons: Neurons, delta: Array | None = None) -> Effect:
    """The effect of neurons beyond the update `delta`, with S in the place of the squares of their moves.

    For a convolution S is a bound (eq. 71): put the squares of `tinyjax.estimation.conv_squares` in its place.
    """
    cross = moments.cross_prev if delta is None else residual_cross(moments, delta)
    if moments.grams is not None and moments.reads is not None:
        slope = inner(matmul(neurons.alpha.T, cross), neurons.omega)
        return Effect(slope, readers_square(moments.grams, moments.reads, neurons.alpha, neurons.omega))
    if neurons.alpha.ndim == 2:  # D^2 k operations instead of D^2 Q
        square = matmul(neurons.alpha.T, matmul(moments.gram_prev, neurons.alpha))
        slope = inner(matmul(neurons.alpha.T, cross), neurons.omega)
        return Effect(slope, inner(square, matmul(neurons.omega, neurons.omega.T)))
    move = product(neurons.alpha, neurons.omega, moments.cross.shape[1])
    return Effect(inner(cross, move), inner(move, matmul(moments.gram_prev, move)))


def predicted_gain(moments: Moments, neurons: Neurons, delta: Array | None = None) -> Array:
    """How much the neurons lower the bottleneck that the update `delta` leaves: psi(delta) - psi(delta, neurons).

    2 <N, A W> - <A W, S A W> with N = N~ - P delta, A = alpha, W = omega. Equal to the sum of lambda^2 for the exact
    `tiny` and its update. Zero for neurons with an empty side: `refit` them first.

    Args:
        moments: means over the samples to score on.
        neurons: at amplitude 1.
        delta: (H, M) the update applied with the neurons (`neurons.delta` for methods that bring one); None for none.

    Returns:
        () in units of mean |v|^2.

    Example:
        >>> neurons = tinyjax.methods.tiny(statistics, num_neurons=2, ridge=0.0)
        >>> delta = tinyjax.methods.best_update(statistics)
        >>> gain = tinyjax.methods.predicted_gain(tinyjax.statistics.moments(statistics), neurons, delta)
        >>> bool(jnp.allclose(gain, jnp.sum(neurons.singular_values**2), rtol=1e-3))
        True

    Reference: Verbockhaven et al., TMLR 2024, equation 9.
    """
    return effect(moments, neurons, delta).gain(1)


Squares = Callable[[Neurons], Array]
"""From neurons fitted k times, (k, ..), to the mean |V(theta)|^2 of each over all, even and odd samples: (k, 3)."""


def held_out_gain(
    statistics: Statistics,
    fit: Callable[[Statistics], tuple[Neurons, Array | None]],
    squares: Squares | None = None,
) -> Array:
    """The gain of neurons fitted on one half of the samples, on the other half; the mean of both ways.

    Args:
        statistics: both halves.
        fit: from the statistics of one half to neurons and the update applied with them. That half has no halves of its
            own, so ridges chosen by `held_out_ridge` are 1 there: choose them on `statistics` beforehand where that
            matters.
        squares: of a convolution, see `tinyjax.estimation.conv_squares`: its neurons are scored at the amplitude that
            is best on the half they were fitted on. None: at amplitude 1.

    Returns:
        () in units of mean |v|^2; negative when the neurons are worse than nothing on unseen samples.

    Example:
        >>> ridge, update_ridge = methods.held_out_ridge(statistics), methods.held_out_update(statistics)
        >>> def fit(half):
        ...     neurons = tinyjax.methods.tiny(half, num_neurons=2, ridge=ridge, update_ridge=update_ridge)
        ...     return neurons, tinyjax.methods.best_update(half, ridge=update_ridge)
        >>> gain = tinyjax.methods.held_out_gain(statistics, fit)
    """
    fitted = [fit(keep_half(statistics, i)) for i in (0, 1)]
    exact = None if squares is None else squares(jax.tree.map(lambda *x: jnp.stack(x), *(n for n, _ in fitted)))

    def effect_on(part: int, neurons: Neurons, delta: Array | None, index: int) -> Effect:
        found = effect(half(statistics, part), neurons, delta)
        return found if exact is None else found._replace(square=exact[index, 1 + part])

    gains = []
    for i, found in enumerate(fitted):
        gamma = 1 if exact is None else effect_on(i, *found, i).best_amplitude
        gains.append(effect_on(1 - i, *found, i).gain(gamma))
    return (gains[0] + gains[1]) / 2


def update_gain(moments: Moments, delta: Array) -> Array:
    """How much an update of the consumer lowers the bottleneck: 2 <M, dW> - <dW, G dW>, ()."""
    return 2 * inner(moments.cross, delta) - inner(delta, matmul(moments.gram, delta))


def refit(statistics: Statistics, neurons: Neurons, delta: Array | None = None) -> Neurons:
    """Neurons that were born with an empty side, given the other side that lowers the bottleneck the most.

    It says what a birth that keeps the function makes possible: `tiny0`, `random0`, `north` have no fan-out, `gradmax`
    has no fan-in. Neurons with both sides stay as they are.

    Args:
        statistics: sums at the current parameters.
        neurons: of a method.
        delta: (H, M) the update applied before them, or None.

    Example:
        >>> neurons = methods.refit(statistics, tinyjax.methods.gradmax(statistics, num_neurons=2))
        >>> gain = tinyjax.methods.predicted_gain(tinyjax.statistics.moments(statistics), neurons)
    """
    return refit_fan_in(statistics, refit_fan_out(statistics, neurons, delta), delta)


def refit_fan_out(statistics: Statistics, neurons: Neurons, delta: Array | None = None) -> Neurons:
    """Neurons with omega = (A' S A)^+ A' N where omega was zero everywhere; others as they are."""
    mean = moments(statistics)
    cross = mean.cross_prev if delta is None else residual_cross(mean, delta)
    if mean.grams is not None and mean.reads is not None:
        best = readers_fan_out(mean.grams, mean.reads, cross, neurons.alpha)
        return neurons._replace(omega=jnp.where(jnp.any(neurons.omega != 0), neurons.omega, best))
    # with a ridge: the neurons may be more than the rank
    best = best_fan_out(neurons.alpha, mean.gram_prev, cross, lambda gram, cross: solve(gram, cross, 1e-6))
    return neurons._replace(omega=jnp.where(jnp.any(neurons.omega != 0), neurons.omega, best))


def refit_fan_in(
    statistics: Statistics, neurons: Neurons, delta: Array | None = None, *, ridge: Ridge = held_out_ridge
) -> Neurons:
    """Neurons with alpha = S^+ N W' (W W')^+, W = omega, where alpha was zero everywhere; others as they are.

    Without a ridge on S, D inputs fit fewer than D samples perfectly: by default it is the one of `tiny`. Heads are
    fitted on their own.
    """
    if statistics.heads is not None:

        def fit(head: Array, alpha: Array, omega: Array) -> Array:
            one = Neurons(alpha, omega, neurons.singular_values)
            return refit_fan_in(one_head(statistics, head), one, delta, ridge=ridge).alpha

        omegas = omega_of_heads(neurons.omega, statistics.heads, statistics.cross_prev.shape[-1])
        each = jnp.arange(statistics.heads), neurons.alpha, omegas
        return neurons._replace(alpha=jax.lax.map(lambda one: fit(*one), each))
    mean = moments(statistics)
    cross = mean.cross_prev if delta is None else residual_cross(mean, delta)
    omega = neurons.omega

    def best() -> Array:
        if mean.grams is not None and mean.reads is not None:
            return readers_fan_in(mean.grams, mean.reads, cross, omega, resolve(ridge, statistics))
        root = input_root(mean, resolve(ridge, statistics))
        reached = root.unwhiten(root.whiten(matmul(cross, omega.T)))
        alpha = solve(matmul(omega, omega.T), reached.T).T
        return alpha if statistics.gates is None else jnp.where(own_blocks(statistics, alpha), alpha, 0)

    # A branch: factoring S is dear, and few methods are born without a fan-in.
    return neurons._replace(alpha=jax.lax.cond(jnp.any(neurons.alpha != 0), lambda: neurons.alpha, best))
