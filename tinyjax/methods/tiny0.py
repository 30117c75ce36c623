"""TINY's directions as a birth that keeps the function: fan-in from proposition 3.2, fan-out zero."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import HE_NORM, Neurons
from tinyjax.methods.solvers.best_update import Ridge
from tinyjax.methods.solvers.ridge import held_out_ridge, held_out_update
from tinyjax.methods.solvers.traits import traits
from tinyjax.methods.tiny import tiny
from tinyjax.statistics.record import Statistics


@traits(function_preserving=True, stochastic=False, residual=held_out_update)
def tiny0(
    statistics: Statistics,
    *,
    num_neurons: int,
    ridge: Ridge = held_out_ridge,
    update_ridge: Ridge | None = None,
    key: Array | None = None,
) -> Neurons:
    """Neurons that look where `tiny` looks and write nothing yet.

    Each fan-in vector is scaled to the norm sqrt(2) that He's initialisation has on average; the fan-out is zero, so
    the network computes the same function and the next gradient steps choose what the neurons are used for.

    Args:
        statistics: sums at the current parameters.
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: as for `tiny`.
        update_ridge: as for `tiny`.
        key: not used, here for the signature of a method.

    Returns:
        Neurons with `omega` zero and the singular values of `tiny`.

    Raises:
        ValueError: as `tiny`.

    Example:
        >>> neurons = tinyjax.methods.tiny0(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))
    """
    neurons = tiny(statistics, num_neurons=num_neurons, ridge=ridge, update_ridge=update_ridge)
    largest = jnp.max(jnp.abs(neurons.alpha), axis=0)
    alpha = neurons.alpha / jnp.where(largest == 0, 1, largest)  # squares of unscaled entries may overflow float32
    norm = jnp.linalg.norm(alpha, axis=0)
    alpha = alpha * (HE_NORM / jnp.where(norm == 0, 1, norm))
    return neurons._replace(alpha=alpha, omega=jnp.zeros_like(neurons.omega))
