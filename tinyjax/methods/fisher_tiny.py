"""TINY in the metric of the outputs: the goal is whitened by its own second moment, as natural gradients do."""

from jaxtyping import Array

from tinyjax.core.linalg import root_of
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.ridge import held_out_ridge, held_out_update, ridge_of_update
from tinyjax.methods.solvers.traits import traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=False, stochastic=False, needs={"energy_matrix": True}, residual=held_out_update)
def fisher_tiny(
    statistics: Statistics,
    *,
    num_neurons: int,
    ridge: Ridge = held_out_ridge,
    update_ridge: Ridge | None = None,
    output_ridge: float = 1e-2,
    key: Array | None = None,
) -> Neurons:
    r"""The neurons with the largest gain per unit of Fisher information instead of per unit of activity.

    With E = E[v v'] and S^(-1/2) N E^(-1/2) = sum_k lambda_k u_k w_k':

        alpha_k = sqrt(lambda_k) S^(-1/2) u_k,      omega_k = sqrt(lambda_k) E^(-1/2) w_k.

    They maximise 2 <N, C> - tr(S C E C') over C = alpha omega. lambda_1^2 is the largest score (a' N w)^2 /
    (a' S a  w' E w) of a single linear neuron, the natural expansion score of SENN.

    Args:
        statistics: sums at the current parameters, with `energy_matrix`.
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: of S, as for `tiny`.
        update_ridge: of the best update that defines N, as for `tiny`.
        output_ridge: of E, on its correlation scale; E is singular for a softmax.
        key: not used, here for the signature of a method.

    Raises:
        ValueError: as `tiny`, or the statistics have no `energy_matrix`.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site, energy_matrix=True))
        >>> statistics = estimate(params, batch)
        >>> neurons = tinyjax.methods.fisher_tiny(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Mitchell et al., Self-Expanding Neural Networks, 2023, for the score.
    """
    mean = moments(statistics)
    if mean.energy_matrix is None:
        raise ValueError("`fisher_tiny` needs `energy_matrix`: ask `estimate` for it")
    cross = residual_cross(mean, best_update(statistics, ridge=ridge_of_update(ridge, update_ridge)))
    inputs = input_root(mean, resolve(ridge, statistics))
    outputs = root_of(mean.energy_matrix, output_ridge)
    # lambda is a correlation here, at most 1
    return only_live(mean, best(inputs, cross, num_neurons=num_neurons, outputs=outputs, floor=1.0))
