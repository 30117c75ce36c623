"""Means of a record of sums: the one place that divides by the count."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics.record import Statistics
from tinyjax.statistics.spectra import Spectrum
from tinyjax.statistics.sums import SecondMoments, second_moments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments(SecondMoments):
    """Means over samples: the sums of `Statistics` without their leading axis, divided by the number of samples.

    Attributes:
        spectrum: of `gram_prev` where it is known.
        other: (D, D) the mean of the other half in its eigenbasis, where it is known.
        reads: as of `Statistics`.
    """

    spectrum: Spectrum | None = None
    other: Array | None = None
    reads: Array | None = None


def moments(statistics: Statistics) -> Moments:
    """Means over all samples.

    Example:
        >>> S = tinyjax.statistics.moments(statistics).gram_prev  # (D, D): the paper's S
        >>> S.shape
        (5, 5)
    """
    mean = _divide(statistics, lambda x: x[0] + x[1])  # XLA is slow to reduce an axis of two
    return mean if statistics.spectra is None else dataclasses.replace(mean, spectrum=statistics.spectra.of(2))


def half(statistics: Statistics, index: int) -> Moments:
    """Means over the even (`index` 0) or the odd (`index` 1) samples."""
    mean, spectra = _divide(statistics, lambda x: x[index]), statistics.spectra
    if spectra is None:
        return mean
    return dataclasses.replace(mean, spectrum=spectra.of(index), other=spectra.other[index])


def _divide(statistics: Statistics, select: Callable[[Array], Array]) -> Moments:
    count = select(statistics.count)
    count = jnp.where(count > 0, count, 1)  # no samples: the sums are zeros, and so are the means
    means = jax.tree.map(lambda x: select(x) / count, second_moments(statistics))
    return Moments(**means, reads=statistics.reads)
