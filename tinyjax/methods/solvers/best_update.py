"""The best update of the existing weights, and what it leaves for new neurons to do (propositions 3.1, 3.2).

dW* = G^+ M moves the consumer's pre-activations as close to V_goal as the existing neurons can. What is left is the
residual (the paper's V_goalproj); its cross moment with the producer's input is N = N~ - P dW.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, solve
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.output_metric import orthonormal
from tinyjax.statistics.record import Statistics

Ridge = float | Array | Callable[[Statistics], Array]


def resolve(ridge: Ridge, statistics: Statistics) -> float | Array:
    """The ridge as a number: a function of the statistics is called, anything else is taken as it is."""
    return ridge(statistics) if callable(ridge) else ridge


def best_update(statistics: Statistics, *, ridge: Ridge = 0.0) -> Array:
    r"""The update of the consumer that lowers the expressivity bottleneck the most.

    Minimises E|v - dW' b|^2 + ridge E sum_i b_i^2 |dW_i|^2, so dW = (G + ridge diag G)^+ M.

    Args:
        statistics: sums at the current parameters.
        ridge: on the correlation scale; a number, or a function that chooses it such as `held_out_update`. 0 is exact,
            the solution of smallest norm.

    Returns:
        (H, M) in weights per unit of amplitude, bias row last; zero rows for free slots.

    Example:
        >>> delta = tinyjax.methods.best_update(statistics, ridge=tinyjax.methods.held_out_update)
        >>> delta.shape, bool(jnp.all(delta[4:12] == 0))  # 12 slots and the bias; 8 of them are free
        ((13, 12), True)

    Reference: Verbockhaven et al., TMLR 2024, proposition 3.1.
    """
    statistics, basis = orthonormal(statistics)
    mean = moments(statistics)
    delta = solve(mean.gram, mean.cross, resolve(ridge, statistics))
    return delta if basis is None else matmul(delta, basis.T)


def residual_cross(moments: Moments, delta: Array) -> Array:
    """N = N~ - P dW, the cross moment of the producer's input with what the update `delta` leaves undone.

    Without `link`, `cross_prev` was taken against the residual in the first place and is returned as it is.

    Args:
        moments: means over samples.
        delta: (H, M) update of the consumer.

    Returns:
        (D, Q).
    """
    if moments.link is None:
        return moments.cross_prev
    feasible = jnp.einsum("odh,hm->dmo", moments.link, delta, precision="highest")
    return moments.cross_prev - feasible.reshape(moments.cross_prev.shape)


def unprojected_cross(moments: Moments) -> Array:
    """N~, the cross moment of the producer's input with V_goal itself: (D, Q).

    Raises:
        ValueError: the statistics have neither `link` nor `cross_asked`: their `cross_prev` is already projected.
    """
    if moments.link is not None:
        return moments.cross_prev
    if moments.cross_asked is None:
        raise ValueError(
            "these statistics have no `link`: their `cross_prev` is already projected, and without `cross_asked` the "
            "unprojected one, which this method needs, is lost. Use a method of the projected goal here, such as "
            "`tiny` or `tiny0`."
        )
    return moments.cross_asked
