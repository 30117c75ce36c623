"""The sums of a pair of convolutions from correlations of images at a few lags, where nothing is strided.

A block of S is a weighted correlation of the producer's input with itself whose lag is a difference of two kernel
offsets: 15 correlations serve the 81 blocks of a 3x3 kernel, 49 the 729 blocks of the link between two of them. Blocks
of one lag differ only in which pixels count near the border. So a lag is summed over the whole image, over the few rows
and columns where weights deviate, and over where these cross; every block is an exact combination of those.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.window import Window, first_read, out_shape


class Axis(NamedTuple):
    """What is summed along one axis of an image `a` against an image `b`, for terms named by kernel offsets.

    Attributes:
        lags: (*terms) a term pairs a[q] with b[q + lag].
        weights: (*terms, pixels of a) how often pixel q counts in it.
        distinct: the lags that are summed; a term of another lag comes out as zero.
        border: the pixels whose weight is not that of the centre in every term.
    """

    lags: np.ndarray
    weights: np.ndarray
    distinct: np.ndarray
    border: np.ndarray


class Plan(NamedTuple):
    """The correlations of two images from which a set of terms can be combined: terms along rows, along columns."""

    rows: Axis
    columns: Axis


def gram_plan(space: Sequence[int], window: Window, weights: Sequence[np.ndarray]) -> Plan:
    """Terms (k, k'): the sum over output pixels, `weights` times each, of patch patch'.

    Term (k', k) is the transpose of term (k, k'), so that only lags of rows from 0 on are summed.
    """

    def axis(i: int, lowest: float) -> Axis:
        k, other = _offsets(window, i, 0, 2), _offsets(window, i, 1, 2)
        output = np.arange(space[i]) - k[..., None]
        counts = np.where(_inside(output, len(weights[i])), weights[i].take(output, mode="clip"), 0)
        return _axis(other - k, counts, lowest)

    return Plan(axis(0, 0), axis(1, -np.inf))


def cross_plan(out: Sequence[int], window: Window) -> Plan:
    """Terms (o,): the sum over output pixels of v_j patch_j'."""
    return Plan(*(_axis(_offsets(window, i, 0, 1), np.ones(out[i], int)) for i in range(2)))


def goal_plan(space: tuple[int, ...], producer: Window, consumer: Window) -> Plan:
    """Terms (k, o): the sum over output pixels of v_j patch_p(j,o)', from v and the producer's input."""
    middle = out_shape(space, producer)
    out = out_shape(middle, consumer)

    def axis(i: int) -> Axis:
        k, o = _offsets(producer, i, 0, 2), _offsets(consumer, i, 1, 2)
        return _axis(o + k, _inside(np.arange(out[i]) + o[..., None], middle[i]))

    return Plan(axis(0), axis(1))


def link_plan(space: tuple[int, ...], producer: Window, consumer: Window) -> Plan:
    """Terms (o, k, o'): the sum over output pixels of patch_p(j,o) hpatch_j', from h and the producer's input."""
    middle = out_shape(space, producer)
    out = out_shape(middle, consumer)

    def axis(i: int) -> Axis:
        o, k, other = (_offsets(w, i, place, 3) for place, w in enumerate((consumer, producer, consumer)))
        output = np.arange(middle[i]) - other[..., None]
        read = output + o[..., None]
        return _axis(o - other + k, _inside(output, out[i]) & _inside(read, middle[i]))

    return Plan(axis(0), axis(1))


def lag_sums(a: Array, b: Array, plan: Plan) -> tuple[Array, ...]:
    """Correlations over the whole image, its border rows, its border columns, and where these cross.

    Args:
        a: (n, rows, columns, C).
        b: (n, rows, columns, C'), of another size or not.
        plan: of such a pair.

    Returns:
        Four arrays (.., C, lags * C') that add up over samples; `assemble` makes the terms of them.
    """
    rows, columns = plan.rows.border, plan.columns.border
    shifted = _shifted(_shifted(b, plan.columns, 2), plan.rows, 1)
    shifted = shifted.reshape(*shifted.shape[:3], -1)
    a_rows, b_rows = a[:, rows], shifted[:, rows]
    return (
        _einsum("nyxc,nyxd->cd", a, shifted),
        _einsum("nyxc,nyxd->ycd", a_rows, b_rows),
        _einsum("nyxc,nyxd->xcd", a[:, :, columns], shifted[:, :, columns]),
        _einsum("nyxc,nyxd->yxcd", a_rows[:, :, columns], b_rows[:, :, columns]),
    )


def assemble(sums: tuple[Array, ...], plan: Plan) -> Array:
    """The terms from their correlations: (*terms along rows, *terms along columns, C, C')."""
    whole, rows, columns, crossed = sums
    upper = jnp.concatenate([whole[None, None], columns[None]], axis=1)
    table = jnp.concatenate([upper, jnp.concatenate([rows[:, None], crossed], axis=1)], axis=0)
    lags = len(plan.rows.distinct), len(plan.columns.distinct)
    table = table.reshape(*table.shape[:3], *lags, -1)  # (place, place, C, lag, lag, C')
    y_mix, x_mix = (jnp.asarray(_mix(axis), table.dtype) for axis in plan)
    found = _einsum("suclmd,tsl->tucmd", table, y_mix)
    found = _einsum("tucmd,rum->trcd", found, x_mix)
    return found.reshape(*plan.rows.lags.shape, *plan.columns.lags.shape, *found.shape[2:])


def against_constant(image: Array, plan: Plan, pick: Callable[[np.ndarray], np.ndarray]) -> Array:
    """What becomes of terms when `b` is 1 everywhere: (*terms along rows, *terms along columns, C).

    Args:
        image: (rows, columns, C) `a`, summed over samples.
        plan: its weights say what counts.
        pick: from the weights of an axis (*terms, pixels) those of the terms that remain, as others have no meaning.
    """
    y, x = (pick(axis.weights) for axis in plan)
    mixes = [jnp.asarray(w.reshape(-1, w.shape[-1]), image.dtype) for w in (y, x)]
    return _einsum("yxc,ty,ux->tuc", image, *mixes).reshape(*y.shape[:-1], *x.shape[:-1], -1)


def products(plan: Plan) -> int:
    """Multiplications for each sample and pair of channels that `lag_sums` needs."""
    return int(np.prod([len(axis.distinct) * (axis.weights.shape[-1] + len(axis.border)) for axis in plan]))


def table_size(plan: Plan) -> int:
    """Sums kept for each pair of channels."""
    return int(np.prod([len(axis.distinct) * (1 + len(axis.border)) for axis in plan]))


def _offsets(window: Window, axis: int, place: int, places: int) -> np.ndarray:
    """The pixel that output pixel 0 reads through each offset, along axis `place` of an array of `places` axes."""
    shape = [1] * places
    shape[place] = -1
    return np.array([first_read(window, axis, offset) for offset in range(window.size[axis])]).reshape(shape)


def _inside(index: np.ndarray, size: int) -> np.ndarray:
    return (index >= 0) & (index < size)


def _axis(lags: np.ndarray, weights: np.ndarray, lowest: float = -np.inf) -> Axis:
    weights = np.broadcast_to(weights, (*lags.shape, weights.shape[-1])).astype(int)
    flat = weights.reshape(-1, weights.shape[-1])
    border = np.flatnonzero((flat != _centre(flat)).any(axis=0))
    return Axis(lags, weights, np.unique(lags[lags >= lowest]), border)


def _centre(weights: np.ndarray) -> np.ndarray:
    return weights[..., weights.shape[-1] // 2, None]


def _mix(axis: Axis) -> np.ndarray:
    """Each term as a combination of (whole axis, each border pixel) at its lag: (terms, 1 + border, lags)."""
    flat = axis.weights.reshape(-1, axis.weights.shape[-1])
    places = np.concatenate([_centre(flat), flat[:, axis.border] - _centre(flat)], axis=1)
    return places[:, :, None] * (axis.lags.reshape(-1, 1, 1) == axis.distinct)


def _shifted(b: Array, axis: Axis, place: int) -> Array:
    """b[q + lag] for every pixel q of `a`, lags side by side in front of the channels; zeros outside."""
    low, pixels = int(axis.distinct[0]), axis.weights.shape[-1]
    config = [(0, 0, 0)] * b.ndim
    config[place] = (-low, int(axis.distinct[-1]) + pixels - b.shape[place], 0)
    padded = jax.lax.pad(b, jnp.zeros((), b.dtype), config)
    slices = [jax.lax.slice_in_dim(padded, lag - low, lag - low + pixels, axis=place) for lag in axis.distinct]
    return jnp.stack(slices, axis=3)  # rows are shifted last, so that their lags come first


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
