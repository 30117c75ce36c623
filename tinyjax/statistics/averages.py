"""Means of a record of sums: the one place that divides by the count."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics.record import _SUMS, Null, Statistics
from tinyjax.statistics.spectra import Spectrum


class Moments(NamedTuple):
    """Means over samples: the fields of `Statistics` without their leading axis, divided by the number of samples.

    `spectrum` is that of `gram_prev` where it is known, and `other` the mean of the other half in its eigenbasis.
    """

    gram_prev: Array
    cross_prev: Array
    gram: Array
    cross: Array
    link: Array | None
    energy: Array
    energy_matrix: Array | None
    cross_asked: Array | None = None
    null: Null | None = None
    offset_gram: Array | None = None
    spectrum: Spectrum | None = None
    other: Array | None = None
    gram_out: Array | None = None
    third_moments: Array | None = None
    grams: Array | None = None
    reads: Array | None = None


def moments(statistics: Statistics) -> Moments:
    """Means over all samples.

    Example:
        >>> S = tinyjax.statistics.moments(statistics).gram_prev  # (D, D): the paper's S
        >>> S.shape
        (5, 5)
    """
    mean = _divide(statistics, lambda x: x[0] + x[1])  # XLA is slow to reduce an axis of two
    return mean if statistics.spectra is None else mean._replace(spectrum=statistics.spectra.of(2))


def half(statistics: Statistics, index: int) -> Moments:
    """Means over the even (`index` 0) or the odd (`index` 1) samples."""
    mean, spectra = _divide(statistics, lambda x: x[index]), statistics.spectra
    return mean if spectra is None else mean._replace(spectrum=spectra.of(index), other=spectra.other[index])


def _divide(statistics: Statistics, select: Callable[[Array], Array]) -> Moments:
    count = select(statistics.count)
    count = jnp.where(count > 0, count, 1)  # no samples: the sums are zeros, and so are the means
    sums = {name: getattr(statistics, name) for name in _SUMS if name != "count"}
    return Moments(**jax.tree.map(lambda x: select(x) / count, sums), reads=statistics.reads)
