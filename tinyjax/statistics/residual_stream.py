"""Sums of a residual stream: the records of its readers side by side."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import block_diagonal
from tinyjax.statistics.record import Null
from tinyjax.statistics.sums import Sums


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
