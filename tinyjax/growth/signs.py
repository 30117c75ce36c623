"""A neuron or its twin: which of (alpha, omega) and (-alpha, -omega) the real activation makes more of.

The two do the same in the linear model, and the same to an odd activation. Under ReLU they do not: relu(alpha'b) and
-relu(-alpha'b) are two halves of alpha'b, whatever the size of alpha, and the loss falls by -E[relu(alpha'b) v'] omega,
not by half of what the linear model says.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.params import Params
from tinyjax.core.site import Site
from tinyjax.methods import Neurons
from tinyjax.surgery import write

Loss = Callable[[Params, Any], Array]


def twin_slopes(loss: Loss, params: Params, batch: Any, site: Site, neurons: Neurons) -> Array:
    r"""How fast the loss falls as each neuron and its twin begin to speak, with the network's own activation.

    The derivative by the fan-out at zero, the fan-in in place at its size: E[sigma(alpha_k'b) v'] omega_k'. For ReLU
    that is, for any size of the fan-in, the first order of a birth whose fan-in and fan-out grow with
    $\sqrt\gamma$ each. A neuron born without a fan-out counts with the one of steepest descent. Two backward passes.

    Args:
        loss: `loss(params, batch) -> loss`, without aux.
        params: the parameters; the site needs as many free slots as there are neurons.
        batch: the samples.
        site: a growable site.
        neurons: k new neurons.

    Returns:
        (2, k): of the neurons, of their twins (-alpha, -omega).

    Example:
        >>> neurons = tinyjax.methods.tiny(statistics, num_neurons=2)
        >>> slopes = tinyjax.growth.twin_slopes(loss_fn, params, batch, site, neurons)
    """
    born_silent = ~jnp.any(neurons.omega != 0)

    def of_one_twin(sign: Array) -> Array:
        alpha = sign * neurons.alpha

        def loss_at(omega: Array) -> Array:
            spoken = neurons._replace(alpha=alpha, omega=omega, delta=None)
            return loss(write(params, site, spoken, amplitude=1.0)[0], batch)

        descent = -jax.grad(loss_at)(jnp.zeros_like(neurons.omega))
        omega = jnp.where(born_silent, descent, sign * neurons.omega)
        falls = jnp.sum(descent * omega, axis=-1)
        return jnp.sum(falls.reshape(-1, falls.shape[-1]), axis=0)

    return jax.lax.map(of_one_twin, jnp.array([1, -1], neurons.alpha.dtype))


def better_twins(loss: Loss, params: Params, batch: Any, site: Site, neurons: Neurons) -> Neurons:
    """Each neuron or its twin, whichever makes the loss fall faster; arguments as `twin_slopes`.

    Example:
        >>> grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2, orient=tinyjax.growth.better_twins)
    """
    slopes = twin_slopes(loss, params, batch, site, neurons)
    sign = jnp.where(slopes[1] > slopes[0], -1, 1).astype(neurons.alpha.dtype)
    return neurons._replace(alpha=sign * neurons.alpha, omega=sign[:, None] * neurons.omega)
