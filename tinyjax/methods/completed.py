"""A method completed by another: where the first has no more useful directions, the second takes over (section 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.neuron_count import significant
from tinyjax.methods.solvers.traits import (
    Method,
    common_residual,
    is_function_preserving,
    is_stochastic,
    needs,
    require_key,
    traits,
)
from tinyjax.statistics.record import Statistics


def within_rank(statistics: Statistics, neurons: Neurons) -> Array:
    """Which neurons are not empty, (k,): the ones with a positive singular value."""
    return neurons.singular_values > 0


def within_significance(statistics: Statistics, neurons: Neurons) -> Array:
    """Which neurons are not empty and among those that `significant` counts at level .05, (k,).

    The statistics need null draws: `completed` asks `make_grow_step` for them.
    """
    return within_rank(statistics, neurons) & (jnp.arange(len(neurons.singular_values)) < significant(statistics))


vars(within_significance)["needs"] = {"null_draws": 19}


def completed(
    method: Method, fallback: Method, *, useful: Callable[[Statistics, Neurons], Array] = within_rank
) -> Method:
    """The method whose useless neurons are replaced by those of `fallback`, a method itself.

    Greedy growth stops when no new neuron helps to first order, although some do to second order: `second_order` finds
    those. Random directions (or any fallback with positive probability of helping) are what lets it reach zero training
    error.

    Args:
        method: comes first.
        fallback: gives the neurons in the places that are left. Must not bring an update of its own.
        useful: (statistics, neurons of `method`) -> (k,) which of them to keep: those within the rank, or
            `methods.within_significance`, on samples whose noise alone has full rank.

    Returns:
        A method. The singular value of a replaced neuron is 0; `delta` is that of `method`.

    Example:
        >>> method = tinyjax.methods.completed(tinyjax.methods.tiny0, tinyjax.methods.random0)
        >>> method(statistics, num_neurons=2, key=key).alpha.shape
        (5, 2)

    Reference: Verbockhaven et al., TMLR 2024, section 4 and proposition 4.2.
    """
    stochastic = is_stochastic(method) or is_stochastic(fallback)
    preserving = is_function_preserving(method) and is_function_preserving(fallback)

    @traits(
        function_preserving=preserving,
        stochastic=stochastic,
        needs=needs(method, fallback, useful),
        residual=common_residual(method, fallback),
    )
    def complete(statistics: Statistics, *, num_neurons: int, key: Array | None = None) -> Neurons:
        keys = jax.random.split(require_key(key, "completed")) if stochastic else (None, None)
        first = method(statistics, num_neurons=num_neurons, key=keys[0])
        second = fallback(statistics, num_neurons=num_neurons, key=keys[1])
        if second.delta is not None:
            raise ValueError(
                "`fallback` brings an update of the existing weights; complete with a method that does not"
            )
        keep = useful(statistics, first)
        place = jnp.maximum(
            jnp.cumsum(~keep) - 1, 0
        )  # the first of the fallback's neurons go into the first places left
        second = second._replace(
            alpha=jnp.take(second.alpha, place, axis=-1),
            omega=second.omega[place],
            second_order=None if second.second_order is None else second.second_order[place],
        )
        return Neurons(
            jnp.where(keep, first.alpha, second.alpha),
            jnp.where(keep[:, None], first.omega, second.omega),
            jnp.where(keep, first.singular_values, 0),
            first.delta,
            second_order=_rates(keep, first.second_order, second.second_order),
        )

    return complete


def _rates(keep: Array, first: Array | None, second: Array | None) -> Array | None:
    """The second-order rates of neurons from two methods, 0 for neurons without."""
    if first is None and second is None:
        return None
    return jnp.where(keep, 0 if first is None else first, 0 if second is None else second)
