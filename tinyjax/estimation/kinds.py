"""The kinds of site and how each is summed."""

from tinyjax.core.kinds import (
    ATTENTION_HEADS,
    ATTENTION_VALUES,
    CONVOLUTION,
    GATED_UNITS,
    HIDDEN_LAYER,
    QUERY_KEY,
    RECURRENT_UNITS,
    RESIDUAL_STREAM,
)
from tinyjax.estimation import (
    attention_heads,
    attention_values,
    convolution,
    gated_units,
    hidden_layer,
    query_key,
    recurrent_units,
    residual_stream,
)
from tinyjax.estimation.summation import SitePass, summed
from tinyjax.statistics.record import Statistics

SUMMATIONS = {
    HIDDEN_LAYER: hidden_layer.SUMMATION,
    CONVOLUTION: convolution.SUMMATION,
    GATED_UNITS: gated_units.SUMMATION,
    ATTENTION_VALUES: attention_values.SUMMATION,
    QUERY_KEY: query_key.SUMMATION,
    ATTENTION_HEADS: attention_heads.SUMMATION,
    RECURRENT_UNITS: recurrent_units.SUMMATION,
    RESIDUAL_STREAM: residual_stream.SUMMATION,
}


def site_sums(at: SitePass) -> Statistics:
    """The record of one site from what its paths captured."""
    return summed(SUMMATIONS[at.paths[0].kind], at)
