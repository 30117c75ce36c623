"""The sums of hidden layers: rows with rows."""

from jaxtyping import Array

from tinyjax.core.kernels import consumers_have_bias, producers_have_bias
from tinyjax.discovery.kinds.hidden_layer import HiddenPath
from tinyjax.estimation.rows import Rows, path_rows, row_weight
from tinyjax.estimation.summation import SitePass, Summation
from tinyjax.statistics.dense import row_sums
from tinyjax.statistics.sums import Sums


def sums_of_rows(at: SitePass, rows: Rows, weight: Array | None = None) -> Sums:
    """The sums of rows, those of b_prev times a weight of their own."""
    return row_sums(
        rows.x,
        rows.h,
        rows.v,
        at.num_samples,
        bias_prev=producers_have_bias(at.site),
        bias=consumers_have_bias(at.site),
        weight=weight,
        extras=at.extras,
    )


def _sums(at: SitePass, path: HiddenPath) -> Sums:
    rows = path_rows(at, path)
    return sums_of_rows(at, rows, row_weight(path.weights, at.captured, rows.x.dtype))


SUMMATION = Summation(_sums)
