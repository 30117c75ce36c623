"""How a growth divides its batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyjax.core.batch import batch_size, take_samples
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.paths.path import Path
from tinyjax.estimation.estimator import num_chunks

FEWEST = 8
"""Samples that a growth needs at least."""


class BatchParts(NamedTuple):
    """A batch and its parts: statistics on three quarters, line searches on the last, acceptance on all.

    Attributes:
        estimation: the first three quarters.
        search: the last quarter.
        whole: all.
        traced: the loss traced on `search`.
        normalised: the loss traced on the whole batch, and its paths by site name; None where no site is normalised.
    """

    estimation: Any
    search: Any
    whole: Any
    traced: Trace
    normalised: tuple[Trace, Mapping[str, Path]] | None = None


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Three quarters of a batch, for statistics, and the last quarter, for line searches.

    The quarters are rounded so that the statistics come from chunks of one size: a remainder is compiled on its own.

    Raises:
        ValueError: fewer than `FEWEST` samples.
    """
    num_samples = batch_size(batch)
    if num_samples < FEWEST:
        raise ValueError(
            f"a growth needs at least {FEWEST} samples (statistics on 3/4, line search on 1/4), got {num_samples}"
        )
    cut = num_samples - num_samples // 4
    if (chunks := num_chunks(cut)) > 1:
        cut -= cut % (2 * chunks)
    return take_samples(batch, 0, cut), take_samples(batch, cut, num_samples)
