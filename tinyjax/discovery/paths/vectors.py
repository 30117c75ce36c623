"""The parameters that enter the values which follow a product, slot by slot: vectors along the hidden dimension."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tinyjax.discovery.dimensions.parameter_entries import Entry, leaves_behind
from tinyjax.discovery.graph.graph import Op
from tinyjax.discovery.graph.known_functions import GROUP_NORM, KNOWN_FUNCTIONS, NORMS
from tinyjax.discovery.paths.dataflow import Dataflow
from tinyjax.discovery.paths.row_factors import RowFactors

_GROUPED = (
    "`WidthGroupNorm` normalises it: a newborn changes the statistics of its group or, alone in one, is rescaled "
    "whatever its fan-in; a batch normalisation grows, and between matrix products so do `WidthRMSNorm` and "
    "`WidthLayerNorm`"
)


class Vectors(NamedTuple):
    """The parameters along a hidden dimension.

    Attributes:
        entries: for every parameter leaf that acts on the values slot by slot, the operations in which it does.
        counted: for every leaf that tells a norm of `tinyjax.models` which slots it counts, the operations that ask.
        refusal: why such a norm keeps the dimension from growing, or "".
    """

    entries: Mapping[int, Sequence[Entry]]
    counted: Mapping[int, Sequence[Op]]
    refusal: str


def find_vectors(flow: Dataflow, factors: RowFactors) -> Vectors:
    """The parameters that act on the values slot by slot; also those that a factor of the rows was multiplied by."""
    entries: dict[int, list[Entry]] = {}
    counted: dict[int, list[Op]] = {}
    refusal = ""
    for op in flow.ops:
        if op.name in NORMS:
            found = flow.def_use.vector(op.ins[1])
            if found is None or op.ins[0] not in flow.values:  # without a leaf it would count newborns
                refusal = f"`counted` of a norm (`{op.name}`) is no parameter: it would count neurons still to be born"
            else:
                counted.setdefault(found[0].leaf, []).append(op)
        if op.name == GROUP_NORM:
            refusal = _GROUPED
        if op.name in KNOWN_FUNCTIONS or not any(out in flow.values for out in op.outs):
            continue
        vectors = [v for v in op.ins if v not in flow.values and flow.has_slots(v)]
        for value in vectors:
            for leaf, through in leaves_behind(flow.def_use, flow.axes, value).items():
                entries.setdefault(leaf, []).append(Entry(op, through))
        for _, value in factors.scales.get(op, ()):
            leaf, through = next(iter(leaves_behind(flow.def_use, flow.axes, value).items()))
            entries.setdefault(leaf, []).append(Entry(op, through))
    return Vectors(entries, counted, refusal)
