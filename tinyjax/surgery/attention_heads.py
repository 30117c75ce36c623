"""Whole attention heads on their way into slots: value dimensions side by side become the columns of a head."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import rows
from tinyjax.core.neurons import Neurons, Pattern
from tinyjax.core.site import Site
from tinyjax.core.slots import used_dimensions


def whole_heads(site: Site, leaves: Mapping[str, Array], neurons: Neurons) -> Neurons:
    """From value dimensions, head after head, to heads, whose dimensions are those that the other heads use.

    Returns:
        A fan-in `(*stack, U, D, k)`, its layers being value dimensions, and as `gate` that of queries and that of keys.
    """
    pattern = neurons.gate
    (producer,) = site.producers
    size, inputs = producer.layout.factors[producer.layout.stack[-1]], rows(producer) + (producer.bias is not None)
    num_neurons = neurons.alpha.shape[-1]
    fits = isinstance(pattern, Pattern) and num_neurons % size == 0 and neurons.alpha.shape[-2] % inputs == 0
    if not fits or num_neurons // size > pattern.query.shape[-1]:
        raise ValueError(
            f"site `{site.name}` needs whole heads, {size} value dimensions each with a pattern: take neurons from "
            "statistics of this site"
        )
    heads = num_neurons // size
    scores, values = used_dimensions(leaves, site)
    alpha = neurons.alpha.reshape(*neurons.alpha.shape[:-2], -1, inputs, num_neurons).sum(-3)
    alpha = jnp.moveaxis(alpha.reshape(*alpha.shape[:-1], heads, size), -1, -3)
    omega = jnp.swapaxes(neurons.omega.reshape(*neurons.omega.shape[:-2], heads, size, -1), -1, -2)
    stack = len(site.stack)
    alpha, omega = _placed(alpha, values, stack), _placed(omega, values, stack + 2)
    gate = tuple(_placed(part[..., :heads], scores, stack) for part in (pattern.query, pattern.key))
    return neurons._replace(alpha=alpha, omega=omega.reshape(*omega.shape[:-2], -1), gate=gate)


def _placed(x: Array, used: Array, axis: int) -> Array:
    """The entries along an axis in the places marked in `used`, in order, zeros elsewhere."""
    rank = jnp.cumsum(used) - 1
    shape = [-1 if d == axis else 1 for d in range(x.ndim)]
    return jnp.where(used.reshape(shape), jnp.take(x, rank, axis=axis, mode="clip"), 0)
