"""The sums of a pair of convolutions from correlations along the rows of images, where nothing is strided.

A block of S is a weighted correlation of the producer's input with itself whose lag is a difference of two kernel
offsets: 3 correlations along the rows serve the 9 pairs of rows of a 3x3 kernel, 7 the 27 triples of the link between
two of them. Terms of one lag differ only in which rows count near the border; those are summed apart. Along the columns
images are patches, so that the matrix products are wide enough to run at full speed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.linalg import matmul
from tinyjax.core.windows import Window, first_read, out_shape


class Plan(NamedTuple):
    """What is summed along the rows of an image `a` against an image `b`, for terms named by kernel offsets.

    Attributes:
        lags: (*terms) a term pairs a[q] with b[q + lag].
        weights: (*terms, rows of a) how often row q counts in it.
        summed: (*terms) false where a term is the transpose of another one.
    """

    lags: np.ndarray
    weights: np.ndarray
    summed: np.ndarray


def gram_plan(rows: int, window: Window, weights: np.ndarray) -> Plan:
    """Terms (k, k'): the sum over output rows, `weights` times each, of patch patch'."""
    k, other = _offsets(window, 0, 2), _offsets(window, 1, 2)
    output = np.arange(rows) - k[..., None]
    counts = np.where(_inside(output, len(weights)), weights.take(output, mode="clip"), 0)
    return _plan(other - k, counts, other >= k)


def cross_plan(rows: int, window: Window) -> Plan:
    """Terms (o,): the sum over the output rows of v_j patch_j'."""
    return _plan(_offsets(window, 0, 1), np.ones(rows, int))


def goal_plan(rows: int, producer: Window, consumer: Window) -> Plan:
    """Terms (k, o): the sum over output rows of v_j patch_p(j,o)', from v and the producer's input."""
    middle, out = _sizes(rows, producer, consumer)
    k, o = _offsets(producer, 0, 2), _offsets(consumer, 1, 2)
    return _plan(o + k, _inside(np.arange(out) + o[..., None], middle))


def link_plan(rows: int, producer: Window, consumer: Window) -> Plan:
    """Terms (o, k, o'): the sum over output rows of patch_p(j,o) hpatch_j', from h and the producer's input."""
    middle, out = _sizes(rows, producer, consumer)
    o, k, other = (_offsets(w, place, 3) for place, w in enumerate((consumer, producer, consumer)))
    output = np.arange(middle) - other[..., None]
    read = output + o[..., None]
    return _plan(o - other + k, _inside(output, out) & _inside(read, middle))


def lag_sums(a: Array, b: Array, plan: Plan) -> Array:
    """The terms that a plan sums, in order; they add up over samples.

    Args:
        a: (n, rows, columns, A).
        b: (n, rows, columns, B), of another number of rows or not.
        plan: of such a pair.

    Returns:
        (summed terms, A, B).
    """
    lags, weights = plan.lags[plan.summed], plan.weights[plan.summed]
    distinct = np.unique(lags)
    shifted = jnp.stack([_shifted(b, int(lag), a.shape[1]) for lag in distinct], axis=3)
    whole = matmul(_flat(a).T, shifted.reshape(-1, len(distinct) * b.shape[-1]))
    whole = whole.reshape(a.shape[-1], len(distinct), -1)
    terms = []
    for lag, weight in zip(lags, weights):
        term = _centre(weight) * whole[:, np.searchsorted(distinct, lag)]
        border = np.array([q for q in _border(weight) if 0 <= q + lag < b.shape[1]], int)
        if len(border):
            deviation = (weight - _centre(weight))[border, None, None].astype(a.dtype)
            term += matmul(_flat(deviation * _rows(a, border)).T, _flat(_rows(b, border + lag)))
        terms.append(term)
    return jnp.stack(terms)


def against_constant(image: Array, weights: np.ndarray) -> Array:
    """What becomes of terms when `b` is 1 everywhere.

    Args:
        image: (rows, A) `a`, summed over samples and columns.
        weights: (*terms, rows) of the terms that remain, as others have no meaning.

    Returns:
        (*terms, A).
    """
    return jnp.tensordot(jnp.asarray(weights, image.dtype), image, 1, precision="highest")


def products(plan: Plan) -> int:
    """Multiplications for each sample, column and pair of channels that `lag_sums` needs."""
    weights = plan.weights[plan.summed]
    return lags(plan) * weights.shape[-1] + sum(len(_border(weight)) for weight in weights)


def lags(plan: Plan) -> int:
    """The number of correlations."""
    return len(np.unique(plan.lags[plan.summed]))


def _sizes(rows: int, producer: Window, consumer: Window) -> tuple[int, int]:
    """Rows between the two convolutions and behind them."""
    (middle,) = out_shape((rows,), _first_axis(producer))
    (out,) = out_shape((middle,), _first_axis(consumer))
    return middle, out


def _first_axis(window: Window) -> Window:
    return Window(window.size[:1], window.strides[:1], window.padding[:1], window.dilation[:1])


def _offsets(window: Window, place: int, places: int) -> np.ndarray:
    """The row that output row 0 reads through each offset, along axis `place` of an array of `places` axes."""
    shape = [1] * places
    shape[place] = -1
    return np.array([first_read(window, 0, offset) for offset in range(window.size[0])]).reshape(shape)


def _inside(index: np.ndarray, size: int) -> np.ndarray:
    return (index >= 0) & (index < size)


def _plan(lags: np.ndarray, weights: np.ndarray, summed: np.ndarray | None = None) -> Plan:
    weights = np.broadcast_to(weights, (*lags.shape, weights.shape[-1])).astype(int)
    return Plan(lags, weights, np.ones(lags.shape, bool) if summed is None else summed)


def _centre(weight: np.ndarray) -> int:
    return int(weight[len(weight) // 2])


def _border(weight: np.ndarray) -> np.ndarray:
    """The rows that do not count as often as the centre."""
    return np.flatnonzero(weight != _centre(weight))


def _shifted(b: Array, lag: int, rows: int) -> Array:
    """b[q + lag] for every row q of `a`; zeros outside."""
    return jax.lax.pad(b, jnp.zeros((), b.dtype), [(0, 0, 0), (-lag, lag + rows - b.shape[1], 0), (0, 0, 0), (0, 0, 0)])


def _rows(x: Array, rows: Sequence[int] | np.ndarray) -> Array:
    return jnp.concatenate([x[:, row : row + 1] for row in rows], axis=1)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
