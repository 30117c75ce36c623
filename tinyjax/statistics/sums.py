"""The sums of one path over the samples of a pass."""

from typing import NamedTuple

from jaxtyping import Array

from tinyjax.statistics.record import Null


class Sums(NamedTuple):
    """The raw sums of `Statistics`, axis 0 is (even samples, odd samples); see there."""

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
    gram_out: Array | None = None
    ridge_update: Array | None = None
