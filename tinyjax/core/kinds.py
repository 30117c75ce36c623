"""The kinds of site, by the words that name their files in every room (spaces and hyphens are underscores there)."""

HIDDEN_LAYER = "hidden layer"
CONVOLUTION = "convolution"
GATED_UNITS = "gated units"
ATTENTION_VALUES = "attention values"
QUERY_KEY = "query-key"
ATTENTION_HEADS = "attention heads"
RECURRENT_UNITS = "recurrent units"
RESIDUAL_STREAM = "residual stream"

KINDS = (
    HIDDEN_LAYER,
    CONVOLUTION,
    GATED_UNITS,
    ATTENTION_VALUES,
    QUERY_KEY,
    ATTENTION_HEADS,
    RECURRENT_UNITS,
    RESIDUAL_STREAM,
)
