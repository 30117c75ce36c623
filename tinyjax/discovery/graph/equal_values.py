"""Equal values of a graph as one: what is computed twice, and operations that return what they are given."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from tinyjax.discovery.graph.graph import Graph, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS

# A view whose result has the shape and dtype of its operand is the operand.
_RENAMING = frozenset(
    """reshape squeeze convert_element_type copy copy_p sharding_constraint optimization_barrier name slice
    broadcast_in_dim concatenate pvary""".split()
)
# What belongs to its scan, or is known by more than its operands.
_APART = KNOWN_FUNCTIONS | {"scan_carry", "scan_in", "scan_out", "cond_out", "while", "iota"}
# The number that changes nothing, and as which operands it does.
_NEUTRAL = {"add": (0, (0, 1)), "sub": (0, (1,)), "mul": (1, (0, 1)), "div": (1, (1,))}


def merged(graph: Graph, aux: Sequence[Value]) -> tuple[Graph, list[Value]]:
    """The graph and its auxiliary outputs with equal values made one value."""
    ops, instead = _distinct(graph.ops, _returned)
    return graph._replace(ops=tuple(ops), loss=instead.get(graph.loss, graph.loss)), [instead.get(v, v) for v in aux]


def copies(graph: Graph) -> dict[Value, Value]:
    """For every value that is a copy of another without being the same tensor, that other.

    What is detached (`stop_gradient`) holds the same numbers, and so does what a zero was added to.
    """
    return _distinct(graph.ops, lambda op: _returned(op) or _detached(op) or _unchanged(op))[1]


def _distinct(
    ops: Sequence[Op], returned: Callable[[Op], tuple[Value, ...] | None]
) -> tuple[list[Op], dict[Value, Value]]:
    """The operations that make new values, and what takes the place of other values.

    Two operations are the same if they are given the same values in the same way, in the same scan. An operation that
    makes an axis (a broadcast, a draw, an iota) never is another: arrays of one shape may fill different dimensions.
    """
    instead: dict[Value, Value] = {}
    known: dict[Hashable, int] = {}  # where among the operations that are kept
    fills: dict[Value, Hashable] = {}
    kept: list[Op] = []
    for op in ops:
        if any(v in instead for v in (*op.ins, *op.chosen_by)):
            ins, chosen_by = (tuple(instead.get(v, v) for v in values) for values in (op.ins, op.chosen_by))
            op = dataclasses.replace(op, ins=ins, chosen_by=chosen_by)
        if op.name == "broadcast_in_dim" and op.ins[0].const is not None:
            fills[op.outs[0]] = (_of_number(op.ins[0]), op.outs[0].shape)
        first = returned(op)
        if first is None and (key := _key(op, fills)) is not None:
            at = known.setdefault(key, len(kept))
            if at < len(kept):
                first = kept[at].outs
                kept[at] = dataclasses.replace(kept[at], twins=(*kept[at].twins, op.path))
        if first is None:
            kept.append(op)
        else:
            instead.update(zip(op.outs, first))
    return kept, instead


def _returned(op: Op) -> tuple[Value, ...] | None:
    """The operands of an operation that returns them as they are."""
    if op.name == "transpose" and list(op.params["permutation"]) == sorted(op.params["permutation"]):
        return op.ins
    if op.name not in _RENAMING or (op.name == "reshape" and op.params["dimensions"] is not None):
        return None
    same = len(op.ins) == len(op.outs) and all(_alike(a, b) for a, b in zip(op.ins, op.outs))
    return op.ins if same else None


def _detached(op: Op) -> tuple[Value, ...] | None:
    return op.ins if op.name == "stop_gradient" else None


def _unchanged(op: Op) -> tuple[Value, ...] | None:
    """The operand of an operation to which the other one, a number, does nothing."""
    if op.name not in _NEUTRAL:
        return None
    number, places = _NEUTRAL[op.name]
    for i in places:
        if op.ins[i].const is not None and op.ins[i].const == number and _alike(op.ins[1 - i], op.outs[0]):
            return (op.ins[1 - i],)
    return None


def _alike(a: Value, b: Value) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.kind != "const"


def _key(op: Op, fills: dict[Value, Hashable]) -> Hashable | None:
    """What two operations have in common that return the same; None for one that is like no other."""
    if op.name in _APART or op.eqn is None or op.eqn.effects or op.name.startswith(("random", "rng", "threefry")):
        return None
    if all(v.kind == "const" or v in fills for v in op.ins) or _makes_axis(op):
        return None
    params = tuple(sorted(op.params.items()))
    if not _is_hashable(params):
        return None
    ins = tuple(_of_number(v) if v.const is not None else fills.get(v, v) for v in op.ins)
    return op.name, params, ins, op.scans, op.inside


def _makes_axis(op: Op) -> bool:
    if op.name != "broadcast_in_dim":
        return False
    given = [op.outs[0].shape[d] for d in op.params["broadcast_dimensions"]]
    made = [n for d, n in enumerate(op.outs[0].shape) if d not in op.params["broadcast_dimensions"]]
    return tuple(given) != op.ins[0].shape or any(n > 1 for n in made)


def _of_number(value: Value) -> Hashable:
    return str(value.dtype), np.asarray(value.const).tobytes()


def _is_hashable(params: Any) -> bool:
    """Whether every parameter of an operation can be compared; jaxprs and functions are by identity."""
    if isinstance(params, tuple):
        return all(map(_is_hashable, params))
    return isinstance(params, Hashable)
