"""How the values and operations of a graph hang together, and which values are views of a parameter leaf."""

from typing import Any, NamedTuple

from tinyjax.equal_values import copies
from tinyjax.trace import VIEWS, Graph, Op, Scan, Value


class View(NamedTuple):
    """A value that is a parameter leaf up to layout, `depth` leading axes having been taken off by scans."""

    leaf: int
    depth: int


class Wiring:
    """How values and operations of a graph hang together.

    Attributes:
        made_by: the operation that makes a value.
        used_by: the operations that read it.
        views: values that are views of a leaf.
        steps: for a value, the scans from one step of which to the next it may change.
    """

    def __init__(self, graph: Graph):
        self.made_by: dict[Value, Op] = {v: op for op in graph.ops for v in op.outs}
        self.used_by: dict[Value, list[Op]] = {}
        self.views: dict[Value, View] = {v: View(i, 0) for i, v in enumerate(graph.params)}
        self.steps: dict[Value, frozenset[Scan]] = {}
        self._copies = copies(graph)
        for op in graph.ops:
            changing = frozenset[Scan]().union(*(self.steps.get(v, frozenset()) for v in op.ins))
            if op.name in ("scan_in", "scan_carry") and op.scans:
                changing |= {op.scans[-1]}
            self.steps.update(dict.fromkeys(op.outs, changing.intersection(op.scans)))
            for v in op.ins:
                self.used_by.setdefault(v, []).append(op)
            if op.ins and op.ins[0] in self.views and is_view(op):
                leaf, depth = self.views[op.ins[0]]
                self.views[op.outs[0]] = View(leaf, depth + (op.name == "scan_in"))

    def origin(self, value: Value) -> Value:
        """The tensor that a value is a view or a copy of."""
        value = self._copies.get(value, value)
        while (op := self.made_by.get(value)) is not None and is_view(op) and op.name != "scan_in":
            value = self._copies.get(op.ins[0], op.ins[0])
        return value

    def scalar(self, value: Value) -> Any:
        """The number that a value broadcasts, or None."""
        while value.const is None:
            op = self.made_by.get(value)
            if op is None or not (is_view(op) or op.name == "broadcast_in_dim"):
                return None
            value = op.ins[0]
        return value.const

    def vector(self, value: Value) -> tuple[View, Value] | None:
        """The view that a value broadcasts, and the value that is this view."""
        while value not in self.views:
            op = self.made_by.get(value)
            if op is None or not (is_view(op) or op.name == "broadcast_in_dim"):
                return None
            value = op.ins[0]
        return self.views[value], value


def is_view(op: Op) -> bool:
    """Whether an operation only renames or rearranges the entries of its operand."""
    if op.name == "broadcast_in_dim":
        return _size(op.ins[0]) == _size(op.outs[0])
    return op.name in VIEWS and len(op.outs) == 1


def _size(value: Value) -> int:
    size = 1
    for n in value.shape:
        size *= n
    return size
