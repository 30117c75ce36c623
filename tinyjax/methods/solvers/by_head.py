"""Dimensions that come in heads: a slot has a fan-in and a fan-out in every head, and no head reads another's.

The value dimension of multi-head attention is one: slot j adds to the output sum_h omega_h (alpha_h' b_h), b_h being
what head h attends to. No closed form gives all heads at once. Head by head each step is exact: what the other heads'
new neurons already do is taken off its N first (Gauss-Seidel over heads; two sweeps come within a few percent of the
optimum). A head whose fan-in is read at several offsets (grouped queries) is read like a convolution.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics.offsets import product
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import one_head

SWEEPS = 2


def over_heads(
    method: Callable[..., Any], statistics: Statistics, *, num_neurons: int, key: Array | None = None
) -> Any:
    """The neurons of a method in every head, head after head and twice around.

    Args:
        method: from the statistics of one head to neurons.
        statistics: of a site with heads.
        num_neurons: k for every head: a slot holds one neuron of each.
        key: for a stochastic method.

    Returns:
        The method's record with `alpha` (heads, D, k), `omega` (k, Q), its columns (output, head, offset), and the
        root mean square of the singular values over heads, times the root of their number.

    Raises:
        ValueError: the method brings an update of the consumer, which belongs to all heads.
    """
    heads = statistics.heads
    assert heads is not None
    outputs = statistics.cross_prev.shape[-1]
    inputs = statistics.weight_prev.shape[-2]

    def visit(taken: Array, head: Array) -> tuple[Array, Any]:
        one = one_head(statistics, head, taken.at[head].set(0))
        its_key = None if key is None else jax.random.fold_in(key, head)
        neurons = method(one, num_neurons=num_neurons, key=its_key)
        if neurons.delta is not None:
            raise ValueError("the method brings an update of the consumer, which a site with heads shares among them")
        mine = product(neurons.alpha[None], neurons.omega, outputs)
        return taken.at[head].set(mine.reshape(-1, inputs, outputs)), neurons

    offsets = statistics.gram_prev.shape[-1] // (heads * inputs)
    taken = jnp.zeros((heads, offsets, inputs, outputs), statistics.gram_prev.dtype)
    order = jnp.tile(jnp.arange(heads), SWEEPS)
    _, visited = jax.lax.scan(visit, taken, order)
    last = jax.tree.map(lambda x: x[-heads:], visited)
    omega = last.omega.reshape(heads, num_neurons, outputs, offsets)
    return last._replace(
        omega=jnp.moveaxis(omega, 0, 2).reshape(num_neurons, -1),
        singular_values=jnp.sqrt(jnp.sum(last.singular_values**2, axis=0)),
    )


def best_fan_out(alpha: Array, gram: Array, cross: Array, solve: Callable[[Array, Array], Array]) -> Array:
    """The fan-out that lowers the bottleneck the most for given fan-ins: (A' S A)^+ A' N, (k, Q).

    Args:
        alpha: (D, k), or (heads, D, k).
        gram: S.
        cross: N.
        solve: (gram, cross) -> gram^+ cross.
    """
    features = alpha if alpha.ndim == 2 else _features(alpha, len(gram))
    seen = jnp.matmul(gram, features, precision="highest")
    inner = jnp.matmul(features.T, seen, precision="highest")
    omega = solve(inner, jnp.matmul(features.T, cross, precision="highest"))
    if alpha.ndim == 2:
        return omega
    by_head = omega.reshape(len(alpha), -1, alpha.shape[-1], cross.shape[-1])
    return jnp.moveaxis(by_head, (2, 3), (0, 1)).reshape(alpha.shape[-1], -1)


def _features(alpha: Array, inputs: int) -> Array:
    """The fan-ins of all heads and offsets side by side: (heads * offsets * D, heads * offsets * k)."""
    heads, own, k = alpha.shape
    offsets = inputs // (heads * own)
    each = jnp.eye(heads, dtype=alpha.dtype), jnp.eye(offsets, dtype=alpha.dtype)
    return jnp.einsum("hdk,hg,op->hodgpk", alpha, *each).reshape(inputs, heads * offsets * k)
