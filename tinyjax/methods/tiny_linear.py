"""TINY where nothing but matrix products lies between producer and consumer: adapters, factorised layers.

Such a dimension computes x W O, and its weights can move the output by U O + W U' for any U and U'. What is left to new
neurons is outside of both: of S^(-1/2) N~, the part beyond the span of S^(1/2) W on the left and of O' on the right.
"""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.low_rank import best, beyond
from tinyjax.methods.solvers.ridge import held_out_ridge, held_out_update, ridge_of_update
from tinyjax.methods.solvers.traits import require_no_stream, traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=False, stochastic=False, residual=held_out_update)
def tiny_linear(
    statistics: Statistics,
    *,
    num_neurons: int,
    ridge: Ridge = held_out_ridge,
    update_ridge: Ridge | None = None,
    key: Array | None = None,
) -> Neurons:
    """The neurons of a linear hidden dimension that do what no move of its producer and its consumer can do.

    At ridge 0 they are the exact optimum over old producer, old consumer and new neurons together, and they descend
    without any update: the loss falls by sum lambda_k^2 to first order, and psi by as much. At full width, or once the
    dimension spans all inputs or all outputs, nothing is left and they are zero. On a dimension with an activation they
    are merely `tiny` kept off the outputs that existing neurons write to.

    Args:
        statistics: sums at the current parameters, with a dense consumer.
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: as for `tiny`.
        update_ridge: as for `tiny`.
        key: not used, here for the signature of a method.

    Raises:
        ValueError: as `tiny`, or the consumer is a convolution.

    Example:
        >>> methods.tiny_linear(statistics, num_neurons=2).alpha.shape
        (5, 2)
    """
    require_no_stream(statistics, "tiny_linear")
    mean = moments(statistics)
    outputs = mean.cross.shape[1]
    if mean.cross_prev.shape[1] != outputs:
        raise ValueError("`tiny_linear` needs a dense consumer: a convolution reads every neuron at several offsets")
    fan_out = statistics.weight[: statistics.weight.shape[0] - statistics.bias]
    cross = residual_cross(mean, best_update(statistics, ridge=ridge_of_update(ridge, update_ridge)))
    cross = beyond(cross.T, None, fan_out.T).T
    root = input_root(mean, resolve(ridge, statistics))
    return only_live(mean, best(root, cross, num_neurons=num_neurons, floor=jnp.sqrt(mean.energy)))
