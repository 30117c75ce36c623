"""Gated units and whole heads: ordinary neurons once their gate, or the pattern of their attention, is given.

The statistics hold one block of inputs a gate, b = [g(beta_1'x) x, ..., g(beta_K'x) x], or a pattern, b = [A_1 x, ...,
A_K x]. A method gives the neurons of the first block (one behind a gate, as many as there are value dimensions in a
head); what they do to the residual is taken out of the next block's N; and so on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, solve
from tinyjax.core.neurons import Pattern
from tinyjax.methods.solvers.best_update import best_update, residual_cross
from tinyjax.methods.solvers.ridge import held_out_update
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import neurons_a_gate, num_gates, one_gate


def gate_by_gate(
    method: Callable[..., Any], statistics: Statistics, *, num_neurons: int, key: Array | None = None
) -> Any:
    r"""The neurons of `method` for each of the first `num_neurons` gates, each on what those before it leave.

    Given the gates, exact and greedy: those of gate k are the best for block N_k - sum_{j<k} S_kj alpha_j omega_j (a
    neuron born without a fan-out counts with the best one).

    Args:
        method: of an ordinary site.
        statistics: of a site of gated units or of whole heads.
        num_neurons: K, at most the number of gates, static.
        key: for a stochastic method.

    Returns:
        Neurons, U for each gate: `alpha` (C D, K U) has those of gate k in block k of rows and zeros elsewhere; with
        their `gate` (B, K), or their `Pattern`.

    Raises:
        ValueError: more neurons than gates, or a method that brings its own update of the consumer.
    """
    count, each = num_gates(statistics), neurons_a_gate(statistics)
    if num_neurons > count:
        raise ValueError(
            f"these statistics hold {count} gates, too few for {num_neurons} neurons: "
            f"`estimate(..., num_gates={num_neurons})`"
        )
    mean, size = moments(statistics), statistics.gram_prev.shape[-1] // count
    keys = None if key is None else jax.random.split(key, num_neurons)
    delta = best_update(statistics, ridge=held_out_update)

    def step(cross: Array, index: Array) -> tuple[Array, Any]:
        left = dataclasses.replace(statistics, cross_prev=cross)
        one = one_gate(left, index)
        neuron = method(one, num_neurons=each, key=None if keys is None else keys[index])
        if neuron.delta is not None:
            raise ValueError(
                "at gated units and heads a method must not bring an update of the consumer: pass `tiny` or `tiny0`"
            )
        if isinstance(statistics.gates, Pattern):
            kept = statistics.gates.values[:, index]
            neuron = neuron._replace(
                alpha=jnp.where(kept, neuron.alpha, 0),
                omega=jnp.where(kept[:, None], neuron.omega, 0),
                singular_values=jnp.where(kept, neuron.singular_values, 0),
            )
        omega = jnp.where(jnp.any(neuron.omega != 0), neuron.omega, _fan_out(moments(one), neuron.alpha, delta))
        halves = jax.lax.dynamic_slice_in_dim(statistics.gram_prev, index * size, size, axis=-1)
        moved = jnp.einsum("hij,jk,kq->hiq", halves, neuron.alpha, omega, precision="highest")
        return cross - moved, neuron

    _, found = jax.lax.scan(step, statistics.cross_prev, jnp.arange(num_neurons))
    alpha = jnp.einsum("kdu,kj->kdju", found.alpha, jnp.eye(num_neurons, dtype=mean.gram_prev.dtype))
    alpha = jnp.pad(alpha, ((0, count - num_neurons), (0, 0), (0, 0), (0, 0)))
    return found._replace(
        alpha=alpha.reshape(count * size, -1),
        omega=found.omega.reshape(num_neurons * each, -1),
        singular_values=found.singular_values.reshape(-1),
        gate=jax.tree.map(lambda x: x[..., :num_neurons], statistics.gates),
    )


def own_blocks(statistics: Statistics, alpha: Array) -> Array:
    """Which rows of `alpha` (C D, k) a neuron reads through: booleans, the neurons of gate j through block j."""
    num_inputs, num_neurons = alpha.shape
    block = jnp.arange(num_inputs)[:, None] // (num_inputs // num_gates(statistics))
    return block == jnp.arange(num_neurons) // neurons_a_gate(statistics)


def _fan_out(mean: Moments, alpha: Array, delta: Array) -> Array:
    """The fan-out that lowers the most what an update leaves of the bottleneck, for given fan-ins."""
    gram = matmul(alpha.T, matmul(mean.gram_prev, alpha))
    return solve(gram, matmul(alpha.T, residual_cross(mean, delta)), 1e-6)
