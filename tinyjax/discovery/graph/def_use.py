"""How the values and operations of a graph hang together, and which values are views of a parameter leaf."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tinyjax.discovery.graph.equal_values import copies
from tinyjax.discovery.graph.graph import VIEWS, Graph, Op, Scan, Value


class View(NamedTuple):
    """A value that is a parameter leaf up to layout, `depth` leading axes having been taken off by scans."""

    leaf: int
    depth: int


class DefUse:
    """How values and operations of a graph hang together.

    Attributes:
        made_by: the operation that makes a value.
        used_by: the operations that read it.
        order: position of every operation.
        views: values that are views of a leaf.
        views_of: for every leaf, these values.
        learned: values that some leaf reaches.
        steps: for a value, the scans from one step of which to the next it may change.
        numbers: what values are known to hold throughout, None where that is no number; see `constants.number_of`.
    """

    def __init__(self, graph: Graph):
        self.made_by: dict[Value, Op] = {v: op for op in graph.ops for v in op.outs}
        self.used_by: dict[Value, list[Op]] = {}
        self.order: dict[Op, int] = {op: i for i, op in enumerate(graph.ops)}
        self.views: dict[Value, View] = {v: View(i, 0) for i, v in enumerate(graph.params)}
        self.views_of: list[list[Value]] = [[v] for v in graph.params]
        self.learned: set[Value] = set(graph.params)
        self.steps: dict[Value, frozenset[Scan]] = {}
        self._copies = copies(graph)
        self.numbers: dict[Value, Any] = {}
        # What a value is a view of, and what it broadcasts: noted on the way, as chains of views may be long.
        self._origin: dict[Value, Value] = {}
        self._broadcasts: dict[Value, Value] = {}
        for op in graph.ops:
            changing = frozenset[Scan]().union(*(self.steps.get(v, frozenset()) for v in op.ins))
            if op.name in ("scan_in", "scan_carry") and op.scans:
                changing |= {op.scans[-1]}
            self.steps.update(dict.fromkeys(op.outs, changing.intersection(op.scans)))
            for v in op.ins:
                self.used_by.setdefault(v, []).append(op)
            if any(v in self.learned for v in op.ins):
                self.learned.update(op.outs)
            self._note_views(op)

    def _note_views(self, op: Op) -> None:
        if not is_layout(op):
            return
        source, out = op.ins[0], op.outs[0]
        if is_view(op) and source in self.views:
            leaf, depth = self.views[source]
            self.views[out] = View(leaf, depth + (op.name == "scan_in"))
            self.views_of[leaf].append(out)
        if is_view(op) and op.name != "scan_in":
            self._origin[out] = self.origin(source)
        self._broadcasts[out] = source if source in self.views else self._broadcasts.get(source, source)

    def origin(self, value: Value) -> Value:
        """The tensor that a value is a view or a copy of."""
        value = self._copies.get(value, value)
        return self._origin.get(value, value)

    def broadcast(self, value: Value) -> Value:
        """The value that a value broadcasts or is a view of; of a leaf, the view of it."""
        return self._broadcasts.get(value, value)

    def scalar(self, value: Value) -> Any:
        """The number that a value broadcasts, or None."""
        return self.broadcast(value).const

    def vector(self, value: Value) -> tuple[View, Value] | None:
        """The view that a value broadcasts, and the value that is this view."""
        vector = value if value in self.views else self.broadcast(value)
        return (self.views[vector], vector) if vector in self.views else None

    def walk(self, starts: Iterable[Value]) -> "Walk":
        """A walk forward from some values."""
        return Walk(self.used_by, self.order, starts)


class Walk(Iterator[Op]):
    """The operations that read any of the values reached so far, each once, in the order of the graph.

    It costs what it visits, whatever else the graph holds. Who walks decides where it goes on, by `reach`.

    Attributes:
        reached: the values.
    """

    def __init__(self, used_by: Mapping[Value, list[Op]], order: Mapping[Op, int], starts: Iterable[Value]):
        self.reached: set[Value] = set()
        self._used_by, self._order = used_by, order
        self._queue: list[tuple[int, Op]] = []
        self._seen: set[Op] = set()
        self.reach(starts)

    def reach(self, values: Iterable[Value]) -> None:
        """Goes on from some values too."""
        for value in values:
            if value in self.reached:
                continue
            self.reached.add(value)
            for op in self._used_by.get(value, ()):
                if op not in self._seen:
                    self._seen.add(op)
                    heapq.heappush(self._queue, (self._order[op], op))

    def __next__(self) -> Op:
        if not self._queue:
            raise StopIteration
        return heapq.heappop(self._queue)[1]


def is_view(op: Op) -> bool:
    """Whether an operation only renames or rearranges the entries of its operand."""
    if op.name == "broadcast_in_dim":
        return _size(op.ins[0]) == _size(op.outs[0])
    return op.name in VIEWS and len(op.outs) == 1


def is_layout(op: Op) -> bool:
    """Whether an operation only renames, rearranges or repeats the entries of its operand."""
    return op.name == "broadcast_in_dim" or is_view(op)


def _size(value: Value) -> int:
    size = 1
    for n in value.shape:
        size *= n
    return size
