"""TINY: the neurons that lower the expressivity bottleneck the most (proposition 3.2)."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.residual_stream import alternate_readers
from tinyjax.methods.solvers.ridge import held_out_ridge, held_out_update, ridge_of_update
from tinyjax.methods.solvers.traits import require_count, traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=False, stochastic=False, residual=held_out_update)
def tiny(
    statistics: Statistics,
    *,
    num_neurons: int,
    ridge: Ridge = held_out_ridge,
    update_ridge: Ridge | None = None,
    key: Array | None = None,
) -> Neurons:
    r"""The `num_neurons` neurons that lower the expressivity bottleneck the most.

    With S the second moment of the producer's input, N its cross moment with the residual of the best update, and the
    singular value decomposition S^(-1/2) N = sum_k lambda_k u_k w_k':

        alpha_k = sqrt(lambda_k) S^(-1/2) u_k,      omega_k = sqrt(lambda_k) w_k.

    The k-th neuron lowers psi by lambda_k^2 when `ridge` is 0. The first-order descent is guaranteed for the neurons
    together with the best update at the same amplitude, not for the neurons alone. Every reader of a residual stream
    has an S of its own: its neurons are found by alternating least squares, one after the other
    (`solvers/residual_stream.py`).

    Args:
        statistics: sums at the current parameters.
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: on the correlation scale, S + ridge diag(S); a number or a function of the statistics. 0 is exact.
        update_ridge: the same for the best update that defines the residual; default `ridge` if that is a number, else
            `held_out_update`.
        key: not used, here for the signature of a method.

    Returns:
        Neurons, each with the sign that makes the largest entry of omega positive.

    Raises:
        ValueError: `num_neurons` is not a positive int, or `ridge` is negative.

    Example:
        >>> neurons = tinyjax.methods.tiny(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Verbockhaven et al., TMLR 2024, proposition 3.2, appendix C.2.
    """
    mean = moments(statistics)
    cross = residual_cross(mean, best_update(statistics, ridge=ridge_of_update(ridge, update_ridge)))
    floor = jnp.sqrt(mean.energy)
    if mean.grams is not None and mean.reads is not None:
        price, count = resolve(ridge, statistics), require_count(num_neurons)
        found = alternate_readers(mean.grams, mean.reads, cross, num_neurons=count, ridge=price, floor=floor)
        return only_live(mean, Neurons(*found))
    root = input_root(mean, resolve(ridge, statistics))
    return only_live(mean, best(root, cross, num_neurons=num_neurons, floor=floor))
