"""NORTH with weights: random neurons whose fan-in is orthogonal to the fan-ins already there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import matmul
from tinyjax.methods.base import Neurons, live_inputs, require_count, require_key, traits
from tinyjax.methods.north import admissible, span, with_mean_norm
from tinyjax.methods.ridge import held_out_update
from tinyjax.statistics import Statistics, moments


@traits(function_preserving=True, stochastic=True, residual=held_out_update)
def north_weight(statistics: Statistics, *, num_neurons: int, key: Array | None = None) -> Neurons:
    """Random fan-ins orthogonal to those of the existing neurons, with their mean norm; bias and fan-out zero.

    Args:
        statistics: sums at the current parameters, with `weight_prev`; of the sums only the live inputs matter.
        num_neurons: k, static.
        key: a new key for every growth.

    Returns:
        Neurons with `omega` zero and singular values 1; neurons beyond the admissible dimension (live inputs minus rank
        of the weights) are zero and have singular value 0. Without any existing neuron the norm is He's, sqrt(2).

    Raises:
        ValueError: `key` is None, or `num_neurons` is not a positive int.

    Example:
        >>> neurons = tinyjax.north_weight(statistics, num_neurons=2, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Maile et al., When, where, and how to add new neurons to ANNs, 2022.
    """
    key, num_neurons = require_key(key, "north_weight"), require_count(num_neurons)
    mean = moments(statistics)
    live = live_inputs(mean)
    if statistics.bias_prev:
        live = live.at[-1].set(False)
    weights = jnp.where(live[:, None], statistics.weight_prev, 0)
    basis, rank = span(weights)
    draw = jnp.where(live[:, None], jax.random.normal(key, (len(live), num_neurons), weights.dtype), 0)
    alpha = jnp.where(live[:, None], draw - matmul(basis, matmul(basis.T, draw)), 0)
    return admissible(with_mean_norm(alpha, weights), jnp.sum(live) - rank, outputs=mean.cross_prev.shape[1])
