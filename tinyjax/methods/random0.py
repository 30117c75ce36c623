"""He-initialised fan-in, zero fan-out: the control every method is compared with, and the filler of unused slots."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.methods.base import Neurons, live_inputs, require_count, require_key, traits
from tinyjax.methods.ridge import held_out_update
from tinyjax.statistics import Statistics, moments


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
        >>> neurons = tinyjax.random0(statistics, num_neurons=2, key=key)
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
