"""One file a kind of dimension: whether it is one, and its paths.

Enters: a dimension. Leaves: a `Verdict`: paths for estimation, or a reason. Read first: `hidden_layer.py`, the kind of
which the others are variations.
"""
