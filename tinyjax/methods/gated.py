"""Gated units: omega g(beta'x)(mu'x) is an ordinary neuron once its gate beta is given.

The statistics of a gated unit hold one block of inputs a gate, b = [g(beta_1'x) x, ..., g(beta_K'x) x]. A method gives
the first neuron for the first gate; what it does to the residual is taken out of the next block's N; and so on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import matmul, solve
from tinyjax.methods.ridge import held_out_update
from tinyjax.methods.update import best_update, residual_cross
from tinyjax.statistics import Moments, Statistics, moments, one_gate


def gate_by_gate(
    method: Callable[..., Any], statistics: Statistics, *, num_neurons: int, key: Array | None = None
) -> Any:
    r"""One neuron of `method` for each of the first `num_neurons` gates, each on what those before it leave.

    Given the gates, exact and greedy: neuron k is the best for block N_k - sum_{j<k} S_kj alpha_j omega_j (a neuron
    born without a fan-out counts with the best one).

    Args:
        method: of an ordinary site.
        statistics: of a gated unit.
        num_neurons: at most the number of gates, static.
        key: for a stochastic method.

    Returns:
        Neurons whose `alpha` (k D, k) has neuron k in block k of rows and zeros elsewhere, with their `gate` (B, k).

    Raises:
        ValueError: more neurons than gates, or a method that brings its own update of the consumer.
    """
    assert statistics.gates is not None
    count = statistics.gates.shape[-1]
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
        neuron = method(one, num_neurons=1, key=None if keys is None else keys[index])
        if neuron.delta is not None:
            raise ValueError(
                "at gated units a method must not bring its own update of the consumer: pass `tiny` or `tiny0`"
            )
        omega = jnp.where(jnp.any(neuron.omega != 0), neuron.omega, _fan_out(moments(one), neuron.alpha, delta))
        halves = jax.lax.dynamic_slice_in_dim(statistics.gram_prev, index * size, size, axis=-1)
        moved = jnp.einsum("hij,jk,kq->hiq", halves, neuron.alpha, omega, precision="highest")
        return cross - moved, neuron

    _, found = jax.lax.scan(step, statistics.cross_prev, jnp.arange(num_neurons))
    alpha = jnp.einsum("kd,kj->kdj", found.alpha[:, :, 0], jnp.eye(num_neurons, dtype=mean.gram_prev.dtype))
    alpha = jnp.pad(alpha, ((0, count - num_neurons), (0, 0), (0, 0)))
    return found._replace(
        alpha=alpha.reshape(-1, num_neurons),
        omega=found.omega[:, 0],
        singular_values=found.singular_values[:, 0],
        gate=statistics.gates[:, :num_neurons],
    )


def own_blocks(alpha: Array, count: int) -> Array:
    """Which rows of `alpha` (count D, k) a neuron reads through: booleans, neuron j through block j."""
    num_inputs, num_neurons = alpha.shape
    return jnp.arange(num_inputs)[:, None] // (num_inputs // count) == jnp.arange(num_neurons)


def _fan_out(mean: Moments, alpha: Array, delta: Array) -> Array:
    """The fan-out that lowers the most what an update leaves of the bottleneck, for given fan-ins."""
    gram = matmul(alpha.T, matmul(mean.gram_prev, alpha))
    return solve(gram, matmul(alpha.T, residual_cross(mean, delta)), 1e-6)
