"""GradMax with the sides exchanged: neurons that write nothing yet, and read where the gradient asks most."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import top_singular
from tinyjax.methods.base import Neurons, live_inputs, require_count, traits
from tinyjax.methods.update import unprojected_cross
from tinyjax.statistics import Statistics, moments


@traits(function_preserving=True, stochastic=False)
def gradmax_dual(statistics: Statistics, *, num_neurons: int, scale: float = 1.0, key: Array | None = None) -> Neurons:
    """The orthogonal fan-ins of norm `scale` that maximise the gradient with respect to the fan-outs.

    alpha_k = scale x the k-th left singular vector of N~ = E[b_prev v'], omega = 0: `gradmax` without its dead zone at
    fan-in zero, and exact for a linear activation. The directions depend on the units of the inputs.

    Args:
        statistics: sums at the current parameters, with `link` (else only the projected N is known).
        num_neurons: k, static; neurons beyond the rank are zero.
        scale: norm of each fan-in.
        key: not used, here for the signature of a method.

    Returns:
        Neurons with `omega` zero and the singular values of N~.

    Raises:
        ValueError: `num_neurons` is not a positive int, or the statistics have no `link`.

    Example:
        >>> neurons = tinyjax.gradmax_dual(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))
    """
    mean = moments(statistics)
    cross = unprojected_cross(mean)
    u, values, _ = top_singular(cross, require_count(num_neurons))
    alpha = jnp.where(live_inputs(mean)[:, None], scale * u, 0)
    return Neurons(alpha, jnp.zeros((num_neurons, cross.shape[1]), cross.dtype), values)
