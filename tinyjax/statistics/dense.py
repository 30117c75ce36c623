"""The sums of matching rows: arrays in, `Sums` out."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics.offsets import cross_at_offsets, energy_at_offsets, gram_at_offsets
from tinyjax.statistics.sums import USUAL, Extras, Null, Sums

_HIGHEST = jax.lax.Precision.HIGHEST


def row_sums(
    x: Array,
    h: Array,
    v: Array,
    num_samples: int,
    *,
    bias_prev: bool,
    bias: bool,
    weight: Array | None = None,
    extras: Extras = USUAL,
) -> Sums:
    """The sums of a pair of matrix products: x `(*stack, rows, D)`, h `(*stack, rows, H)`, v `(*stack, rows, Q)`.

    A `weight` `(*stack, rows, C)` multiplies the rows of x and the constant beside it, C times side by side.
    """
    b_prev, b = with_constant(x, bias_prev), with_constant(h, bias)
    if weight is not None:
        b_prev = (weight[..., :, None] * b_prev[..., None, :]).reshape(*b_prev.shape[:-1], -1)
    null = None if extras.signs is None else _null_sums(b_prev, b, halves(v, num_samples), extras.signs)
    b_prev, b, v = (halves(array, num_samples) for array in (b_prev, b, v))
    gram_prev = _gram(b_prev, b_prev)
    return Sums(
        gram_prev=gram_prev,
        cross_prev=_gram(b_prev, v),
        gram=_gram(b, b),
        cross=_gram(b, v),
        link=_gram(b_prev, b)[..., None, :, :],
        energy=jnp.sum(v**2, axis=(-2, -1)),
        energy_matrix=_gram(v, v) if extras.energy_matrix else None,
        null=null,
        offset_gram=gram_prev[..., None, :, None, :] if extras.offset_gram else None,
    )


def tangent_sums(
    seen: Array,
    h: Array,
    v: Array,
    num_samples: int,
    *,
    heads: int | None,
    bias: bool,
    extras: Extras = USUAL,
) -> Sums:
    """The sums of a slot's tangents `(*stack, rows, heads * offsets, D)`, see `Statistics` for their order.

    Without heads, several offsets are those of a convolution.
    """
    *lead, offsets, inputs = seen.shape
    together = row_sums(
        seen.reshape(*lead, -1),
        h,
        v,
        num_samples,
        bias_prev=False,
        bias=bias,
        extras=extras._replace(offset_gram=False),
    )
    if heads is not None:  # the Gram over offsets lies in S
        return together
    link, null = together.link, together.null
    assert link is not None
    return dataclasses.replace(
        together,
        gram_prev=gram_at_offsets(together.gram_prev, offsets),
        cross_prev=cross_at_offsets(together.cross_prev, offsets),
        link=link.reshape(*link.shape[:-3], offsets, inputs, -1),
        energy_matrix=energy_at_offsets(together.energy_matrix, offsets),
        offset_gram=together.gram_prev.reshape(*lead, 2, offsets, inputs, offsets, inputs)
        if extras.offset_gram
        else None,
        null=null
        and null._replace(
            cross_prev=cross_at_offsets(null.cross_prev, offsets),
            link=null.link.reshape(*null.link.shape[:-3], offsets, inputs, -1),
        ),
    )


def _null_sums(b_prev: Array, b: Array, v: Array, signs: Array) -> Null:
    """Sums of rows with the signs (R, n) of their samples, one draw after the other; `v` comes in halves."""
    num_samples, depth = signs.shape[1], b.ndim - 2

    def draw(sign: Array) -> Null:
        rows = jnp.repeat(sign, b.shape[-2] // num_samples)[:, None].astype(b.dtype)
        flipped_prev, flipped, plain = (halves(x, num_samples) for x in (rows * b_prev, rows * b, b))
        return Null(
            cross_prev=_gram(flipped_prev, v),
            gram=_gram(flipped, plain),
            cross=_gram(flipped, v),
            link=_gram(flipped_prev, plain)[..., None, :, :],
        )

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, depth + 1), jax.lax.map(draw, signs))


def null_signs(draws: int, first: Array | int, num_samples: int) -> Array:
    """Random signs (R, n), each from the sample's absolute index alone, so that no cut of a batch changes them."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), first + jnp.arange(num_samples))
    return jax.vmap(lambda key: jax.random.rademacher(key, (draws,), jnp.float32))(keys).T


def with_constant(x: Array, bias: bool) -> Array:
    """Rows with the constant 1 last, if there is a bias."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1) if bias else x


def halves(x: Array, num_samples: int) -> Array:
    """`(*stack, samples * positions, cols)` as `(*stack, 2, rows, cols)`: even samples, odd samples (zeros to even)."""
    *lead, _, cols = x.shape
    depth = len(lead)
    x = x.reshape(*lead, num_samples, -1, cols)
    if num_samples % 2:
        x = jnp.pad(x, [(0, 0)] * depth + [(0, 1), (0, 0), (0, 0)])
    x = x.reshape(*lead, -1, 2, x.shape[-2], cols)
    return jnp.moveaxis(x, depth + 1, depth).reshape(*lead, 2, -1, cols)


def _gram(x: Array, y: Array) -> Array:
    return jnp.einsum("...ni,...nj->...ij", x, y, precision=_HIGHEST)
