"""GradMax: neurons that compute nothing yet, written where the gradient of their fan-in will be largest."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, top_singular
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import residual_cross, unprojected_cross
from tinyjax.methods.solvers.live import live_inputs, live_outputs
from tinyjax.methods.solvers.traits import require_count, traits
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=True, stochastic=False)
def gradmax(statistics: Statistics, *, num_neurons: int, scale: float = 1.0, key: Array | None = None) -> Neurons:
    """The orthogonal fan-outs of norm `scale` that maximise the gradient with respect to the fan-ins.

    omega_k = scale x the k-th right singular vector of N~ = E[b_prev v'], alpha = 0. The directions depend on the units
    of the inputs. With zero fan-in, an activation whose derivative at 0 is 0 (as `jax.nn.relu`'s is) never lets them
    move: use `gradmax_dual` there.

    Args:
        statistics: sums at the current parameters, with `link` (else only the projected N is known).
        num_neurons: k, static; neurons beyond the rank are zero.
        scale: norm of each fan-out.
        key: not used, here for the signature of a method.

    Returns:
        Neurons with `alpha` zero and the singular values of N~.

    Raises:
        ValueError: `num_neurons` is not a positive int, or the statistics have no `link`.

    Example:
        >>> neurons = tinyjax.methods.gradmax(statistics, num_neurons=2, scale=1e-3)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Evci et al., GradMax, ICLR 2022, eq. 11; Verbockhaven et al., TMLR 2024, appendix B.1.
    """
    mean = moments(statistics)
    cross = unprojected_cross(mean)
    _, values, vt = top_singular(cross, require_count(num_neurons))
    omega = jnp.where(live_outputs(mean), scale * vt, 0)
    return Neurons(jnp.zeros((len(cross), num_neurons), cross.dtype), omega, values)


def redundancy(moments: Moments, omega: Array, delta: Array) -> Array:
    """How much of the gradient at the fan-ins asks for what the existing neurons can do (appendix B.1).

    The squared gradient at the fan-in of neuron k is |N~ w|^2 with w = omega_k (eq. 22), and N~ = N + P dW. Its share
    from the feasible part P dW is <N~ w, P dW w> / |N~ w|^2.

    Args:
        moments: means over samples.
        omega: (k, Q) fan-outs.
        delta: (H, M) the best update.

    Returns:
        (k,) 0 for neurons that repeat nothing, 1 for those that only repeat; 0 where the gradient is zero.
    """
    asked = matmul(unprojected_cross(moments), omega.T)
    feasible = asked - matmul(residual_cross(moments, delta), omega.T)
    squares = jnp.sum(asked**2, axis=0)
    return jnp.sum(asked * feasible, axis=0) / jnp.where(squares == 0, 1, squares)


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
        >>> neurons = tinyjax.methods.gradmax_dual(statistics, num_neurons=2)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))
    """
    mean = moments(statistics)
    cross = unprojected_cross(mean)
    u, values, _ = top_singular(cross, require_count(num_neurons))
    alpha = jnp.where(live_inputs(mean)[:, None], scale * u, 0)
    return Neurons(alpha, jnp.zeros((num_neurons, cross.shape[1]), cross.dtype), values)
