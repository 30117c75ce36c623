"""Sums of a residual stream: the records of its readers side by side."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import block_diagonal
from tinyjax.statistics.sums import Null, Sums


def side_by_side(parts: Sequence[Sums]) -> tuple[Sums, Array]:
    """The sums of all readers as those of one, and which columns are whose.

    Returns:
        Sums with S of every reader, whose G and M are block-diagonal and whose S is the sum of all; (R, Q).
    """
    widths = [part.cross_prev.shape[-1] for part in parts]
    owner = jnp.repeat(jnp.arange(len(parts)), jnp.array(widths), total_repeat_length=sum(widths))
    grams = jnp.stack([part.gram_prev for part in parts], axis=1)
    nulls = [part.null for part in parts if part.null is not None]
    matrices = [part.energy_matrix for part in parts if part.energy_matrix is not None]
    total = jnp.sum(grams, axis=1)
    sums = Sums(
        gram_prev=total,
        **_joined(parts),
        energy=sum((part.energy for part in parts[1:]), parts[0].energy),
        energy_matrix=block_diagonal(matrices) if matrices else None,
        null=Null(**_joined(nulls)) if nulls else None,
        offset_gram=None if parts[0].offset_gram is None else total[:, None, :, None, :],
        grams=grams,
    )
    return sums, (owner == jnp.arange(len(parts))[:, None]).astype(total.dtype)


def _joined(parts: Sequence[Sums | Null]) -> dict[str, Array]:
    """N~ and P beside each other, G and M along the diagonal."""
    each = {name: [getattr(part, name) for part in parts] for name in Null._fields}
    return {name: block_diagonal(x) if name in ("gram", "cross") else _beside(x) for name, x in each.items()}


def _beside(matrices: Sequence[Array]) -> Array:
    return jnp.concatenate(matrices, axis=-1)
