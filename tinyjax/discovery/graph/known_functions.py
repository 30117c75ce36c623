"""The jitted functions of `tinyjax.models` that discovery knows by name: what they do to a slot is known."""

CENTRED = "tinyjax_centred"
INVERSE_RMS = "tinyjax_inverse_rms"
GROUP_NORM = "tinyjax_group_norm"
UNIT_DROPOUT = "tinyjax_unit_dropout"

NORMS = frozenset({CENTRED, INVERSE_RMS})
"""Norms that are told which slots to count."""

KNOWN_FUNCTIONS = NORMS | {GROUP_NORM, UNIT_DROPOUT}
"""All of them; each stays one operation of the graph."""
