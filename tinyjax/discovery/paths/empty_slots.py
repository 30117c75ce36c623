"""What an empty slot (fan-in and bias zero) holds at every value that follows a product."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tinyjax.discovery.dimensions.constant_folding import at_numbers, is_steep, number_of
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import SUMS, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.paths.dataflow import Dataflow

_SAME = ("scan_in", "scan_out", "reduce_max", "reduce_min", "scan_carry", "reduce_window_max")
_ZERO_OF_ZERO = ("reduce_sum", "reduce_window_sum", "pad", "slice", "rev", "cumsum")


class EmptySlots(NamedTuple):
    """What empty slots hold.

    Attributes:
        at: for every value where that is a known number, the number.
        unsilent_op: for a value at which an empty slot is not zero, the operation that made it so.
        refusal: why an empty slot cannot be trained, or "".
    """

    at: Mapping[Value, Any]
    unsilent_op: Mapping[Value, str]
    refusal: str


def find_empty_slots(flow: Dataflow) -> EmptySlots:
    """What an empty slot holds at every value that follows a product."""
    at: dict[Value, Any] = {start: _zero(start) for start in flow.starts}
    unsilent_op: dict[Value, str] = {}
    refusal = ""
    for op, inside, outs in flow.steps:
        known = [held(flow, at, v, shifts=op.name in SUMS) for v in op.ins]
        if not refusal and is_steep(op, known, [v in flow.values for v in op.ins]):  # times a gradient of 0: NaN
            refusal = f"the gradient of `{op.name}` is not finite where a neuron is empty"
        number = _through(op, known, [known[i] for i, v in enumerate(op.ins) if v in flow.values])
        for out in outs:
            if number is not None:
                at[out] = np.asarray(number).astype(out.dtype)
            if not _is_zero(at.get(out)):
                unsilent_op[out] = next((unsilent_op[v] for v in inside if v in unsilent_op), op.name)
    return EmptySlots(at, unsilent_op, refusal)


def _through(op: Op, known: list[Any], inside: list[Any]) -> Any:
    """What an operation makes of the numbers that empty slots hold in its operands (None: not known)."""
    if op.name in KNOWN_FUNCTIONS or op.name == "dot_general":
        # Of a norm or dropout zero gives zero; what they give elsewhere depends on other slots or on a draw.
        return 0 if any(_is_zero(number) for number in inside) else None
    if op.name in ("mul", "and") and any(_is_zero(number) for number in known):
        return 0 if all(number is None or np.isfinite(number) for number in known) else np.nan
    if op.name == "div" and _is_zero(known[0]):
        return np.nan if _is_zero(known[1]) else 0
    if op.name == "select_n" and _are_equal(known[1:]):
        return known[1]
    if op.name in ("cond_out", "scan_carry") and _are_equal(known):
        return known[0]
    if is_layout(op) or op.name in _SAME:
        return known[0]
    if op.name in _ZERO_OF_ZERO:
        return 0 if _is_zero(known[0]) else None
    if op.name in ELEMENTWISE and op.eqn is not None and all(number is not None for number in known):
        return at_numbers(op, known)
    return None


def held(flow: Dataflow, at: Mapping[Value, Any], value: Value, *, shifts: bool) -> Any:
    """What an empty slot holds in an operand; a parameter vector that is *added* (`shifts`) is zero there.

    Args:
        flow: the values that follow a product.
        at: what an empty slot holds at those of them where that is known.
        value: the operand.
        shifts: whether it is added.
    """
    source = _behind_layout(flow, at, value, shifts)
    number = _at_hand(flow, at, source, shifts)
    factors, seen = [source] if shifts and number is None else [], set[Value]()
    while factors:  # a running mean, times its momentum
        factor = _behind_layout(flow, at, factors.pop(), shifts)
        found, op = _at_hand(flow, at, factor, shifts), flow.def_use.made_by.get(factor)
        if _is_zero(found):
            return 0
        product = found is None and op is not None and op.name in ("mul", "div") and factor not in seen
        if op is not None and product and flow.axes.parameter_only(factor):
            factors += op.ins[:1] if op.name == "div" else op.ins
        seen.add(factor)
    return number


def _at_hand(flow: Dataflow, at: Mapping[Value, Any], value: Value, shifts: bool) -> Any:
    """What an empty slot holds in an operand, as far as that is known without asking for what it is made of."""
    if value in at:
        return at[value]
    if value.const is None and shifts and flow.def_use.vector(value) is not None and flow.has_slots(value):
        return _zero(value)
    return number_of(flow.def_use, value)


def _behind_layout(flow: Dataflow, at: Mapping[Value, Any], value: Value, shifts: bool) -> Value:
    while _at_hand(flow, at, value, shifts) is None and (op := flow.def_use.made_by.get(value)) is not None:
        if op.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
            break
        value = op.ins[0]
    return value


def _is_zero(number: Any) -> bool:
    return number is not None and bool(number == 0)


def _are_equal(numbers: list[Any]) -> bool:
    return all(number is not None for number in numbers) and len({float(number) for number in numbers}) == 1


def _zero(value: Value) -> Any:
    return np.zeros((), value.dtype)
