"""TINY without the projection: neurons for the whole goal, also for what the existing ones can do (an ablation)."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, resolve, unprojected_cross
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.ridge import choose_for_inputs
from tinyjax.methods.solvers.traits import traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


def held_out_unprojected(statistics: Statistics) -> Array:
    """The ridge of `tiny_unprojected` whose neurons generalise best from one half of the samples to the other."""
    return choose_for_inputs(statistics, lambda a, b: (unprojected_cross(a), unprojected_cross(b)))


@traits(function_preserving=False, stochastic=False)
def tiny_unprojected(
    statistics: Statistics, *, num_neurons: int, ridge: Ridge = held_out_unprojected, key: Array | None = None
) -> Neurons:
    """The neurons that come closest to V_goal itself, as if the existing weights could not move.

    Proposition 3.2 with N~ in the place of N. Added alone, without the best update, they always descend to first order.

    Args:
        statistics: sums at the current parameters, with `link` (else only the projected N is known).
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: on the correlation scale; a number or a function of the statistics. 0 is exact.
        key: not used, here for the signature of a method.

    Raises:
        ValueError: `num_neurons` is not a positive int, `ridge` is negative, or the statistics have no `link`.

    Example:
        >>> neurons = tinyjax.methods.tiny_unprojected(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))
    """
    mean = moments(statistics)
    root = input_root(mean, resolve(ridge, statistics))
    cross = unprojected_cross(mean)
    return only_live(mean, best(root, cross, num_neurons=num_neurons, floor=jnp.sqrt(mean.energy)))
