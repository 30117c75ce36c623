"""Which power of a product a value scales with: statistics of a normalisation are told by it.

A mean has degree 1, a variance 2, a normalised value 0.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinyjax.discovery.dimensions.homogeneity import exponent_of
from tinyjax.discovery.graph.def_use import DefUse, is_layout
from tinyjax.discovery.graph.graph import SUMS, Op, Value
from tinyjax.discovery.paths.dataflow import Dataflow
from tinyjax.discovery.paths.poolings import Poolings

_KEPT = ("reduce_sum", "reduce_window_sum", "stop_gradient", "neg")


class Degrees(NamedTuple):
    """Powers of a product.

    Attributes:
        of: for every value that scales with a power of the product, that power.
        epsilon: the constants added to statistics of degree 2.
    """

    of: Mapping[Value, float]
    epsilon: frozenset[float]

    def read(self, op: Op, flow: Dataflow) -> float | None:
        """The degree of the first operand of an operation that follows the product."""
        return next((self.of.get(v) for v in op.ins if v in flow.values), None)


def find_degrees(flow: Dataflow, poolings: Poolings) -> Degrees:
    """The degrees of the values that follow a product."""
    degrees: dict[Value, float] = dict.fromkeys(flow.starts, 1.0)
    epsilon: set[float] = set()
    for op, inside, outs in flow.steps:
        known = [degrees[v] for v in inside if v in degrees]
        if len(known) < len(inside):
            continue
        pooled = bool(poolings.before[inside[0]])
        degree = _degree(flow.def_use, op, inside, known, pooled)
        if degree is not None:
            degrees.update(dict.fromkeys(outs, degree))
        if op.name in SUMS and len(inside) == 1 and known[0] == 2 and pooled:
            constants = [flow.def_use.scalar(v) for v in op.ins if v not in flow.values]
            epsilon.update(float(constant) for constant in constants if constant is not None)
    return Degrees(degrees, frozenset(epsilon))


def _degree(def_use: DefUse, op: Op, inside: Sequence[Value], degrees: Sequence[float], pooled: bool) -> float | None:
    """Of the result, where it is a power of the product."""
    first = degrees[0]
    if is_layout(op) or op.name in _KEPT:
        return first
    if op.name == "mul":
        return sum(degrees)
    if op.name == "div":
        return first - degrees[1] if len(inside) == 2 else (first if op.ins[0] in inside else -first)
    if (exponent := exponent_of(op)) is not None:
        return float(exponent) * first
    if op.name in ("max", "clamp"):
        return first if first == 2 and pooled else None
    if op.name in SUMS:
        return first if len(set(degrees)) == 1 else None
    if op.name == "select_n":
        return first if all(_is_nan(def_use, v) for v in op.ins[1:] if v not in inside) else None
    return None


def _is_nan(def_use: DefUse, value: Value) -> bool:
    """Whether a value is NaN throughout: `jnp.var` returns it for statistics of nothing."""
    constant = def_use.scalar(value)
    return constant is not None and bool(np.isnan(constant))
