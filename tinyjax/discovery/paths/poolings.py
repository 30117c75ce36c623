"""Which poolings and reductions over rows lie between a product and the values that follow it."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from tinyjax.discovery.dimensions.primitives import REDUCTIONS
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import Op, Value
from tinyjax.discovery.paths.dataflow import Dataflow

WINDOW_MEAN = "reduce_window_mean"
"""What a sum over windows becomes that is divided by the number of pixels in each."""


class Poolings(NamedTuple):
    """The summaries of rows on the way to each value.

    Attributes:
        before: for every value, the poolings and reductions over rows on the way to it, in order.
        counts: the divisions of a sum over windows by the number of pixels in each, padding left out.
    """

    before: Mapping[Value, tuple[Op, ...]]
    counts: frozenset[Op]

    def fewest(self, op: Op) -> int:
        """How often the operands of an operation that follow the product have been summarised, at least."""
        return min(len(self.before[v]) for v in op.ins if v in self.before)


def find_poolings(flow: Dataflow) -> Poolings:
    """The poolings on the way to each value that follows a product."""
    before: dict[Value, tuple[Op, ...]] = dict.fromkeys(flow.starts, ())
    counts: set[Op] = set()
    for op, inside, outs in flow.steps:
        pools = min((before[v] for v in inside), key=len)
        if _divides_by_count(flow.def_use, op, before.get(op.ins[0], ())):
            counts.add(op)
            pools = (*pools[:-1], dataclasses.replace(pools[-1], name=WINDOW_MEAN))
        before.update(dict.fromkeys(outs, (*pools, op) if is_pooling(flow.def_use, op) else pools))
    return Poolings(before, frozenset(counts))


def is_pooling(def_use: DefUse, op: Op) -> bool:
    """Whether an operation summarises rows, or sets zeros beside them."""
    if op.name == "pad":
        inner = any(inner for _, _, inner in op.params["padding_config"])
        return not inner and def_use.scalar(op.ins[1]) == 0
    return op.name in REDUCTIONS or op.name.startswith("reduce_window")


def _divides_by_count(def_use: DefUse, op: Op, pools: tuple[Op, ...]) -> bool:
    """Whether a sum over windows, the last of some poolings, is divided by what the same sum makes of ones."""
    if op.name != "div" or not pools:
        return False
    maker = def_use.made_by.get(def_use.broadcast(op.ins[1]))
    if maker is None or maker.name != "reduce_window_sum" or pools[-1].name != maker.name:
        return False
    return maker.params == pools[-1].params and def_use.scalar(maker.ins[0]) == 1
