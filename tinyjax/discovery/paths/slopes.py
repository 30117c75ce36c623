"""The slope at an empty slot: how much of what a new neuron makes arrives at its consumers, and with which sign.

Near 0 a neuron does sigma'(0) omega (alpha'b) (prop. 3.3). For a kink sigma'(0) is the slope that small inputs of both
signs see on average, 1/2 for ReLU, whatever a derivative at 0 is defined to be. Where it is negative (-tanh, sin(-x), a
factor of -1 on the way) a neuron that is to raise an output has to lower what it makes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyjax.discovery.dimensions.constant_folding import at_numbers, number_of
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.graph.def_use import DefUse, is_layout, is_view
from tinyjax.discovery.graph.graph import SUMS, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.paths.empty_slots import held
from tinyjax.discovery.paths.flow import Flow

_KEPT = frozenset(
    """broadcast_in_dim scan_in scan_out pad reduce_max reduce_min reduce_window_max slice rev name stop_gradient
    sharding_constraint""".split()
)


def slope_at_empty(def_use: DefUse, flow: Flow, start: Value, end: Value) -> float | None:
    """The mean slope of a slot's value at 0 in what its producer makes; None where it depends on more than numbers.

    Row weights and gates count as 1 (they are summed with the rows), so do the scale of a newborn and a batch
    normalisation (the identity at birth); a sum over pixels counts as many times as it has terms.

    Args:
        def_use: of the graph.
        flow: from the producer on.
        start: what the producer makes.
        end: what the consumers read.
    """
    step = step_of(start.dtype)
    ends = [_carried(def_use, flow, start, end, z) for z in (step, -step)]
    return mean_slope(*ends, step=step)


def step_of(dtype: Any) -> float:
    """How far from 0 slopes are measured: where rounding leaves three digits of a difference."""
    return 2.0**-10 if dtype.itemsize > 2 else 2.0**-4


def mean_slope(above: Any, below: Any, *, step: float) -> float | None:
    """The slope between the values at `step` and at -`step`; None where one is not known."""
    if above is None or below is None:
        return None
    slope = (float(above) - float(below)) / (2 * step)
    return slope if math.isfinite(slope) else None


def _carried(def_use: DefUse, flow: Flow, start: Value, end: Value, z: float) -> Any:
    """What arrives where the producer makes z, or None."""
    known: dict[Value, Any] = {start: np.asarray(z, start.dtype)}
    queue = [end]
    while queue:
        value = queue[-1]
        if value in known:
            queue.pop()
            continue
        op = def_use.made_by.get(value)
        if op is None or value not in flow.values or len(op.outs) != 1:
            return None
        inside = _operands(flow, op)
        if missing := [v for v in inside if v not in known]:
            queue += missing
            continue
        found = _result(def_use, flow, op, inside, known)
        if found is None:
            return None
        known[value] = np.asarray(found, value.dtype)
    return known[end]


def carried_near(def_use: DefUse, flow: Flow, start: Value, ops: Sequence[Op], side: int) -> dict[Value, Any]:
    """What a slot holds along operations in order, where the producer makes a little more or less than 0.

    What has been mixed over rows may have either sign: it counts as what went in.
    """
    known: dict[Value, Any] = {start: np.asarray(side * step_of(start.dtype), start.dtype)}
    for op in ops:
        inside = [v for v in _operands(flow, op) if v in known]
        found = _result(def_use, flow, op, inside, known) if len(inside) == len(_operands(flow, op)) else None
        known[op.outs[0]] = np.asarray(known[inside[0]] if found is None else found, op.outs[0].dtype)
    return known


def _operands(flow: Flow, op: Op) -> list[Value]:
    """The operands to follow: where rows meet a summary of themselves, the rows."""
    inside = [v for v in op.ins if v in flow.values]
    return [min(inside, key=lambda v: len(flow.poolings.before[v]))] if op in flow.rows.modulated else inside


def _result(def_use: DefUse, flow: Flow, op: Op, inside: list[Value], known: dict[Value, Any]) -> Any:
    """The number that an operation makes of numbers, or None."""
    first = known[inside[0]]
    if op in flow.rows.modulated:  # centred and normalised: the identity on a newborn
        return -first if op.name == "sub" and op.ins[0] is not inside[0] else first
    if op.name in KNOWN_FUNCTIONS or op.name in _KEPT or is_view(op):
        return first
    if op.name == "reduce_sum":
        return first * (math.prod(op.ins[0].shape) / math.prod(op.outs[0].shape))
    if op.name == "reduce_window_sum":
        return first * math.prod(op.params["window_dimensions"])
    if op in flow.poolings.counts:
        return first / math.prod(flow.poolings.before[inside[0]][-1].params["window_dimensions"])
    if op.name == "select_n" and op.ins[0] not in flow.values and number_of(def_use, op.ins[0]) is None:
        which = flow.along.selected(op)
        return None if which is None else known[op.ins[1 + which]]
    if op.name not in ELEMENTWISE or op.eqn is None:
        return None
    operands = [known[v] if v in flow.values else _outside(def_use, flow, op, v) for v in op.ins]
    return None if any(x is None for x in operands) else at_numbers(op, operands)


def _outside(def_use: DefUse, flow: Flow, op: Op, value: Value) -> Any:
    """What an operand from outside counts as for a newborn, or None."""
    number = number_of(def_use, value)
    if number is not None:
        return number
    if op.name in SUMS:
        return held(flow.along, flow.empty.at, value, shifts=True)
    if op.name not in ("mul", "div"):
        return None
    if value in flow.along.gates or flow.factors.is_one(op, value, flow.along):
        return 1
    return _newborn(def_use, flow, value)


def _newborn(def_use: DefUse, flow: Flow, value: Value) -> Any:
    """A factor made of parameters alone, where vectors along the slots are 1; None for any other."""
    number = number_of(def_use, value)
    if number is not None:
        return number
    if value in def_use.views:
        return 1.0 if flow.along.is_vector(value) else None
    op = def_use.made_by.get(value)
    if op is None or not (is_layout(op) or op.name in ELEMENTWISE):
        return None
    operands = [_newborn(def_use, flow, v) for v in op.ins]
    if any(x is None for x in operands):
        return None
    return operands[0] if is_layout(op) else at_numbers(op, operands)
