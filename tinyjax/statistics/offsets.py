"""Second moments offset by offset, for neurons that lie side by side: head by head or pixel by pixel."""

import jax.numpy as jnp
from jaxtyping import Array


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
