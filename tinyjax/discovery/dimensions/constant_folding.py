"""Operations at known numbers, evaluated while tracing: constants of a model, and what an empty slot holds."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.graph.def_use import DefUse, is_layout
from tinyjax.discovery.graph.graph import Op, Value

_STEEP = frozenset("acos acosh asin atanh cbrt div integer_pow log log1p pow rsqrt sqrt".split())


def at_numbers(op: Op, known: Sequence[Any]) -> Any:
    """What an operation makes of numbers or arrays of them."""
    assert op.eqn is not None
    with jax.ensure_compile_time_eval():
        return np.asarray(op.eqn.primitive.bind(*[np.asarray(k, v.dtype) for k, v in zip(known, op.ins)], **op.params))


def is_steep(op: Op, known: Sequence[Any], moving: Sequence[bool]) -> bool:
    """Whether an operation has an infinite slope at these numbers (None: not known) along those that move."""
    if op.name not in _STEEP or op.eqn is None or "custom_jvp_call" in op.inside or any(k is None for k in known):
        return False
    eqn = op.eqn
    points = [np.asarray(k, v.dtype) for k, v in zip(known, op.ins)]
    tangents = [np.asarray(moves, v.dtype) for moves, v in zip(moving, op.ins)]
    with jax.ensure_compile_time_eval():
        _, slope = jax.jvp(lambda *ins: eqn.primitive.bind(*ins, **op.params), points, tangents)
    return not np.isfinite(slope)


def number_of(def_use: DefUse, value: Value) -> Any:
    """What a value holds throughout, where it is computed from numbers alone (`1 / jnp.sqrt(depth)`)."""
    known = def_use.numbers
    stack = [] if value in known else [value]
    while stack:
        operands = _operands(def_use, stack[-1])
        unknown = [v for v in operands if v not in known]
        if unknown:
            stack += unknown
            continue
        latest = stack.pop()
        if latest not in known:
            known[latest] = _from_operands(def_use, latest, [known[v] for v in operands])
    return known[value]


def _operands(def_use: DefUse, value: Value) -> tuple[Value, ...]:
    """The values from whose numbers that of a value follows."""
    op = def_use.made_by.get(value)
    if op is None or op.name == "scan_in":
        return ()
    if is_layout(op):
        return op.ins[:1]
    return op.ins if op.eqn is not None and op.name in ELEMENTWISE else ()


def _from_operands(def_use: DefUse, value: Value, numbers: Sequence[Any]) -> Any:
    if value.const is not None:
        return np.asarray(value.const, value.dtype)
    op = def_use.made_by.get(value)
    if op is None or not numbers or any(x is None for x in numbers):
        return None
    return numbers[0] if is_layout(op) else at_numbers(op, numbers)
