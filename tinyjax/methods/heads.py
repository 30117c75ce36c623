"""Dimensions that come in heads: a slot has a fan-in and a fan-out in every head, and no head reads another's.

The value dimension of multi-head attention is one: slot j adds to the output sum_h omega_h (alpha_h' b_h), b_h being
what head h attends to. No closed form gives all heads at once. Head by head each step is exact: what the other heads'
new neurons already do is taken off its N first (Gauss-Seidel over heads; two sweeps come within a few percent of the
optimum). A head whose fan-in is read at several offsets (grouped queries) is read like a convolution.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics import Statistics

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


def one_head(statistics: Statistics, head: Array | int, taken: Array | None = None) -> Statistics:
    """The statistics of one head, as of a dense site, or as of a convolution where it is read at several offsets.

    Args:
        statistics: of a site with heads.
        head: which.
        taken: (heads, offsets, D, M) what neurons of other heads do, alpha omega; None for none.
    """
    heads, inputs = statistics.heads, statistics.weight_prev.shape[-2]
    assert heads is not None and statistics.link is not None
    outputs = statistics.cross_prev.shape[-1]
    block = statistics.gram_prev.shape[-1] // heads
    offsets = block // inputs
    gram = statistics.gram_prev.reshape(2, heads, block, heads, block)[:, head]
    cross = statistics.cross_prev.reshape(2, heads, block, outputs)[:, head]
    if taken is not None:
        others = jnp.einsum("sigj,gjm->sim", gram, taken.reshape(heads, block, outputs), precision="highest")
        cross = cross - others
    link = statistics.link.reshape(2, heads, block, -1)[:, head]
    hidden = statistics.weight.shape[0] - statistics.bias
    own, bias = statistics.weight[:hidden].reshape(heads, -1, outputs)[head], statistics.weight[hidden:]
    return dataclasses.replace(
        statistics,
        gram_prev=gram_at_offsets(jnp.take(gram, head, axis=2), offsets),
        cross_prev=cross_at_offsets(cross, offsets),
        link=link.reshape(2, offsets, inputs, -1),
        energy_matrix=energy_at_offsets(statistics.energy_matrix, offsets),
        weight_prev=statistics.weight_prev[head],
        weight=jnp.concatenate([own, bias]),
        ridge=None if statistics.ridge is None else statistics.ridge[head],
        offset_gram=jnp.take(gram, head, axis=2).reshape(2, offsets, inputs, offsets, inputs),
        null=None,
        heads=None,
    )


def gram_at_offsets(gram: Array, offsets: int) -> Array:
    """S (..., oD, oD) of inputs (offset, D) as the sum (..., D, D) of every offset's own.

    It bounds what a neuron costs that is read at all of them: E|sum_o omega_o x_o|^2 <= |omega|^2 sum_o E x_o^2.
    """
    blocks = gram.reshape(*gram.shape[:-2], offsets, gram.shape[-1] // offsets, offsets, -1)
    return jnp.einsum("...oioj->...ij", blocks)


def cross_at_offsets(cross: Array, offsets: int) -> Array:
    """N~ (..., oD, M) as (..., D, M o), columns (output, offset)."""
    *lead, rows, outputs = cross.shape
    blocks = cross.reshape(*lead, offsets, rows // offsets, outputs)
    return jnp.moveaxis(blocks, -3, -1).reshape(*lead, rows // offsets, -1)


def energy_at_offsets(matrix: Array | None, offsets: int) -> Array | None:
    """E (..., M, M) for columns (output, offset): every offset writes to the same outputs."""
    if matrix is None or offsets == 1:
        return matrix
    size = matrix.shape[-1] * offsets
    each = jnp.eye(offsets, dtype=matrix.dtype)
    return jnp.einsum("...mn,op->...monp", matrix, each).reshape(*matrix.shape[:-2], size, size)


def product(alpha: Array, omega: Array, outputs: int) -> Array:
    """The matrix alpha omega that multiplies b_prev: (D, Q), or (heads * offsets * D, M) for a site with heads.

    Args:
        alpha: (D, k), or (heads, D, k).
        omega: (k, Q).
        outputs: M, of the consumer.
    """
    if alpha.ndim == 2:
        return jnp.matmul(alpha, omega, precision="highest")
    by_head = omega.reshape(omega.shape[0], outputs, alpha.shape[0], -1)
    return jnp.einsum("hdk,kmho->hodm", alpha, by_head, precision="highest").reshape(-1, outputs)


def omega_of_heads(omega: Array, heads: int, outputs: int) -> Array:
    """Fan-outs (k, Q), columns (output, head, offset), as those of every head: (heads, k, outputs * offsets)."""
    by_head = omega.reshape(omega.shape[0], outputs, heads, -1)
    return jnp.moveaxis(by_head, 2, 0).reshape(heads, omega.shape[0], -1)


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
