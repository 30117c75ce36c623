"""Which known pattern mixes the entries of a dimension: a softmax, a layer norm, a norm, a mean."""

from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import REDUCTIONS
from tinyjax.discovery.dimensions.unification import Atom, roots
from tinyjax.discovery.graph.def_use import DefUse, is_layout
from tinyjax.discovery.graph.graph import Op, Value

_SQUARES = ("square", "integer_pow", "mul")
_SCALINGS = ("div", "mul")


def name_mixing(model: Dimensions, dimension: Atom) -> str:
    """The pattern of the reductions over a dimension, or "" for none that has a name."""
    found = [_name(model.def_use, op) for op in _reductions(model, dimension)]
    return next((name for name in ("a softmax", "a layer norm", "a norm", "a mean") if name in found), "")


def is_norm(model: Dimensions, dimension: Atom) -> bool:
    """Whether what mixes the entries of a dimension is a norm."""
    return name_mixing(model, dimension) in ("a layer norm", "a norm")


def is_taken_off(def_use: DefUse, op: Op) -> bool:
    """Whether a reduction divided by a number, a mean, is subtracted from what it was taken of."""
    start = def_use.origin(op.ins[0])
    return any(user.name == "sub" and def_use.origin(user.ins[0]) is start for user, _ in _readers(def_use, op.outs[0]))


def _reductions(model: Dimensions, dimension: Atom) -> list[Op]:
    return [
        op
        for op in model.graph.ops
        if op.name in REDUCTIONS
        and not model.axes.parameter_only(op.ins[0])
        and any(dimension in roots(model.axes[op.ins[0]][d]) for d in op.params["axes"])
    ]


def _name(def_use: DefUse, op: Op) -> str:
    maker = def_use.made_by.get(def_use.origin(op.ins[0]))
    readers = _readers(def_use, op.outs[0])
    if op.name != "reduce_sum":
        return ""
    if maker is not None and maker.name == "exp" and any(user.name in ("div", "log") for user, _ in readers):
        return "a softmax"
    if is_taken_off(def_use, op):
        return "a layer norm"
    if maker is not None and maker.name in _SQUARES and _squares(def_use, maker):
        return "a norm"
    return "a mean" if any(scaled for _, scaled in readers) else ""


def _squares(def_use: DefUse, op: Op) -> bool:
    if op.name == "integer_pow":
        return op.params["y"] == 2
    return op.name == "square" or def_use.origin(op.ins[0]) is def_use.origin(op.ins[1])


def _readers(def_use: DefUse, value: Value) -> list[tuple[Op, bool]]:
    """What reads a value behind views, broadcasts and factors that are numbers, and whether there was such a factor."""
    found, queue = [], [(value, False)]
    while queue:
        v, scaled = queue.pop()
        for user in def_use.used_by.get(v, []):
            number = user.name in _SCALINGS and any(def_use.scalar(other) is not None for other in user.ins)
            if is_layout(user) or number:
                queue += [(out, scaled or number) for out in user.outs]
            else:
                found.append((user, scaled))
    return found
