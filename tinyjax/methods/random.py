"""Random neurons with both sides filled: the baseline of the paper's section 5.2."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.live import live_inputs, only_live
from tinyjax.methods.solvers.ridge import held_out_update
from tinyjax.methods.solvers.traits import require_count, require_key, traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


def symmetric_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws from U[-1, 1], the other distribution of section 5.2."""
    return jax.random.uniform(key, shape, dtype, minval=-1.0, maxval=1.0)


@traits(function_preserving=False, stochastic=True, residual=held_out_update)
def random(
    statistics: Statistics,
    *,
    num_neurons: int,
    draw: Callable[[Array, tuple[int, ...], Any], Array] = jax.random.normal,
    key: Array | None = None,
) -> Neurons:
    """Neurons with every live entry of alpha and omega drawn independently, for a search over both twins.

    Args:
        statistics: sums at the current parameters; only their live inputs and outputs matter.
        num_neurons: k, static.
        draw: (key, shape, dtype) -> array, such as `jax.random.normal` or `symmetric_uniform`.
        key: a new key for every growth.

    Returns:
        Neurons with singular values 1: no order among them, none is empty.

    Raises:
        ValueError: `key` is None, or `num_neurons` is not a positive int.

    Example:
        >>> neurons = tinyjax.methods.random(statistics, num_neurons=2, draw=methods.symmetric_uniform, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Verbockhaven et al., TMLR 2024, section 5.2.
    """
    key, num_neurons = require_key(key, "random"), require_count(num_neurons)
    mean = moments(statistics)
    inputs, outputs = mean.cross_prev.shape
    dtype = mean.cross_prev.dtype
    key_alpha, key_omega = jax.random.split(key)
    alpha = draw(key_alpha, (inputs, num_neurons), dtype)
    omega = draw(key_omega, (num_neurons, outputs), dtype)
    return only_live(mean, Neurons(alpha, omega, jnp.ones((num_neurons,), dtype)))


@traits(function_preserving=True, stochastic=True, residual=held_out_update)
def random0(statistics: Statistics, *, num_neurons: int, key: Array | None = None) -> Neurons:
    """Neurons with fan-in drawn from N(0, 2 / fan_in) over the live inputs, bias 0 and fan-out 0.

    With JAX's default generator the draw of a row depends on its index alone, so inputs appended to the layer change
    nothing for those already there, and dead inputs change nothing at all for the inputs before them.

    Args:
        statistics: sums at the current parameters; only their live inputs matter.
        num_neurons: k, static.
        key: a new key for every growth.

    Returns:
        Neurons with `omega` zero and singular values 1: no order among them, none is empty.

    Raises:
        ValueError: `key` is None, or `num_neurons` is not a positive int.

    Example:
        >>> neurons = tinyjax.methods.random0(statistics, num_neurons=2, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: He et al., ICCV 2015, eq. 10.
    """
    key, num_neurons = require_key(key, "random0"), require_count(num_neurons)
    mean = moments(statistics)
    inputs, outputs = mean.cross_prev.shape
    live = live_inputs(mean)
    if statistics.bias_prev:
        live = live.at[-1].set(False)
    dtype = mean.cross_prev.dtype
    scale = jnp.sqrt(2 / jnp.maximum(jnp.sum(live), 1).astype(dtype))
    alpha = jnp.where(live[:, None], scale * jax.random.normal(key, (inputs, num_neurons), dtype), 0)
    return Neurons(alpha, jnp.zeros((num_neurons, outputs), dtype), jnp.ones((num_neurons,), dtype))
