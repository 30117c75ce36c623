"""Random neurons with both sides filled: the baseline of the paper's section 5.2."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.methods.base import Neurons, only_live, require_count, require_key, traits
from tinyjax.methods.ridge import held_out_update
from tinyjax.statistics import Statistics, moments


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
        >>> neurons = tinyjax.random(statistics, num_neurons=2, draw=methods.symmetric_uniform, key=key)
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
