"""Inputs and outputs that carry anything, and what is solved in them alone."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, root_of
from tinyjax.core.neurons import Neurons
from tinyjax.statistics.averages import Moments


def live_inputs(moments: Moments) -> Array:
    """Which inputs of the producer vary at all: (D,). A new neuron must not read the others (they are free slots)."""
    return ~(jnp.diagonal(moments.gram_prev) <= 0)


def live_outputs(moments: Moments) -> Array:
    """Which outputs of the consumer are asked to move at all: (Q,). A new neuron must not write the others."""
    num_outputs = moments.cross.shape[1]
    asked_prev = jnp.any(moments.cross_prev != 0, axis=0).reshape(num_outputs, -1).any(axis=1)
    asked = asked_prev | jnp.any(moments.cross != 0, axis=0)
    return jnp.repeat(asked, moments.cross_prev.shape[1] // num_outputs)


def input_root(moments: Moments, ridge: float | Array) -> Root:
    """A root of S + ridge diag(S), (D, D); from the spectrum of S where that is known and the ridge is not 0."""
    exact = isinstance(ridge, int | float) and ridge == 0
    return root_of(moments.gram_prev, ridge) if exact or moments.spectrum is None else moments.spectrum.root(ridge)


def only_live(moments: Moments, neurons: Neurons) -> Neurons:
    """The neurons with exact zeros on dead inputs and outputs, where decompositions leave rounding dust."""
    return neurons._replace(
        alpha=jnp.where(live_inputs(moments)[:, None], neurons.alpha, 0),
        omega=jnp.where(live_outputs(moments), neurons.omega, 0),
    )
