"""What writers bring to a reader of a residual stream, and the sums of all readers side by side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.discovery.kinds.embeddings import index_column, num_inputs
from tinyjax.discovery.paths.path import Branch
from tinyjax.estimation.recording import Captured
from tinyjax.estimation.tangents import carry


def stream_inputs(branches: Sequence[Branch], captured: Captured, num_rows: int, dtype: jnp.dtype) -> Array:
    """What a reader sees of a new coordinate, for every input of every writer: (rows, D).

    Args:
        branches: the writers on their way to the reader.
        captured: what they write from, and what it is multiplied by.
        num_rows: of the reader.
        dtype: of the sums; a writer that comes after the reader brings zeros.
    """
    columns = []
    for branch in branches:
        if branch.tangent is None:
            columns.append(jnp.zeros((num_rows, num_inputs(branch.use)), dtype))
        else:
            columns.append(carry(branch.tangent, _features(branch, captured, dtype), captured.inputs)[:, 0, :])
    return jnp.concatenate([column.astype(dtype) for column in columns], axis=-1)


def _features(branch: Branch, captured: Captured, dtype: jnp.dtype) -> Array:
    """The inputs of a writer, the constant last iff it has a bias; rows of a table as one-hot rows."""
    use = branch.use
    if branch.rows is not None:
        return jax.nn.one_hot(jnp.array(branch.rows), num_inputs(use), dtype=dtype)
    x = use.inputs.to_matrix(captured.inputs[use.op.path])
    if branch.is_table:
        return jax.nn.one_hot(x[:, index_column(use.op)], num_inputs(use), dtype=dtype)
    x = x.astype(dtype)
    return x if use.bias is None else jnp.concatenate([x, jnp.ones((len(x), 1), dtype)], axis=-1)
