"""Net2WiderNet: new neurons are copies of old ones, and share their fan-out with them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.ridge import held_out_update
from tinyjax.methods.solvers.traits import require_count, require_key, require_no_stream, traits
from tinyjax.statistics.record import Statistics


@traits(function_preserving=True, stochastic=True, residual=held_out_update)
def net2net(statistics: Statistics, *, num_neurons: int, key: Array | None = None) -> Neurons:
    """Copies of random live neurons, each with a random share of the fan-out that it takes over.

    The fan-out of a neuron is divided between itself and its copies in unequal shares, so that their gradients differ.
    `delta` takes the shares away from the originals. The function is kept at amplitude 1, for any activation, and needs
    no normalisation; at other amplitudes only a positively homogeneous activation keeps it.

    Args:
        statistics: only `weight_prev` and `weight` matter.
        num_neurons: k, static.
        key: a new key for every growth.

    Returns:
        Neurons with `delta` and singular values 1; all zero if no neuron is live.

    Raises:
        ValueError: `key` is None, or `num_neurons` is not a positive int.

    Example:
        >>> neurons = tinyjax.methods.net2net(statistics, num_neurons=2, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Chen et al., Net2Net, ICLR 2016, section 2.3.
    """
    key, num_neurons = require_key(key, "net2net"), require_count(num_neurons)
    require_no_stream(statistics, "net2net")
    weight_prev, weight = statistics.weight_prev, statistics.weight
    slots, outputs = weight_prev.shape[1], weight.shape[1]
    rows = len(weight) - statistics.bias
    fan_out = weight[:rows].reshape(-1, slots, outputs)  # (offset, slot, output)
    live = jnp.any(weight_prev != 0, axis=0) | jnp.any(fan_out != 0, axis=(0, 2))

    key_source, key_new, key_old = jax.random.split(key, 3)
    log_odds = jnp.where(live, 0, -jnp.inf).astype(weight.dtype)
    source = jax.random.categorical(key_source, log_odds, shape=(num_neurons,))
    new = jax.random.uniform(key_new, (num_neurons,), weight.dtype, minval=0.5, maxval=1.5)
    old = jax.random.uniform(key_old, (slots,), weight.dtype, minval=0.5, maxval=1.5)
    share = new / old.at[source].add(new)[source]
    given_away = jnp.zeros_like(old).at[source].add(share)

    omega = (fan_out[:, source] * share[:, None]).transpose(1, 2, 0).reshape(num_neurons, -1)
    delta = jnp.zeros_like(weight).at[:rows].set((-fan_out * given_away[:, None]).reshape(rows, outputs))
    filled = jnp.broadcast_to(jnp.any(live), (num_neurons,)).astype(weight.dtype)
    return Neurons(weight_prev[:, source], omega, filled, delta)
