"""What writers bring to a reader of a residual stream, and the sums of all readers side by side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.capture import Captured
from tinyjax.patches import Sums
from tinyjax.slots import block_diagonal
from tinyjax.statistics import Null
from tinyjax.stream import Branch, index_column, num_inputs
from tinyjax.tangent import carry


def brought(branches: Sequence[Branch], captured: Captured, num_rows: int, dtype: jnp.dtype) -> Array:
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


def side_by_side(parts: Sequence[Sums]) -> tuple[Sums, Array, Array]:
    """The sums of all readers as those of one, with S of every reader and which columns are whose.

    Returns:
        Sums whose G and M are block-diagonal and whose S is the sum of all; (2, R, D, D); (R, Q).
    """
    widths = [part.cross_prev.shape[-1] for part in parts]
    owner = jnp.repeat(jnp.arange(len(parts)), jnp.array(widths), total_repeat_length=sum(widths))
    grams = jnp.stack([part.gram_prev for part in parts], axis=1)

    def beside(name: str) -> Array:
        return jnp.concatenate([getattr(part, name) for part in parts], axis=-1)

    def diagonal(name: str) -> Array:
        return block_diagonal([getattr(part, name) for part in parts])

    nulls = [part.null for part in parts if part.null is not None]
    null = None
    if nulls:
        null = Null(
            cross_prev=jnp.concatenate([n.cross_prev for n in nulls], axis=-1),
            gram=block_diagonal([n.gram for n in nulls]),
            cross=block_diagonal([n.cross for n in nulls]),
            link=jnp.concatenate([n.link for n in nulls], axis=-1),
        )
    total = jnp.sum(grams, axis=1)
    sums = Sums(
        gram_prev=total,
        cross_prev=beside("cross_prev"),
        gram=diagonal("gram"),
        cross=diagonal("cross"),
        link=beside("link"),
        energy=sum((part.energy for part in parts[1:]), parts[0].energy),
        energy_matrix=None if parts[0].energy_matrix is None else diagonal("energy_matrix"),
        null=null,
        offset_gram=None if parts[0].offset_gram is None else total[:, None, :, None, :],
    )
    return sums, grams, (owner == jnp.arange(len(parts))[:, None]).astype(total.dtype)
