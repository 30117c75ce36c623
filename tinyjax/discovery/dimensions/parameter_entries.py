"""Where parameter leaves enter the activations."""

from typing import NamedTuple

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import Graph, Op, Value
from tinyjax.discovery.graph.liveness import behind_loss


class Entry(NamedTuple):
    """A parameter leaf enters the activations: in which operation, and through which others on its way there."""

    op: Op
    through: frozenset[str]


def leaves_behind(def_use: DefUse, axes: Axes, value: Value) -> dict[int, frozenset[str]]:
    """Parameter leaves from which a parameter-only value is made, with the operations on the way."""
    found: dict[int, frozenset[str]] = {}
    seen: set[Value] = set()
    queue: list[tuple[Value, frozenset[str]]] = [(value, frozenset())]
    while queue:
        v, through = queue.pop()
        if v in seen or v not in def_use.learned:
            continue
        seen.add(v)
        if v in def_use.views:
            found[def_use.views[v].leaf] = through
        elif (op := def_use.made_by.get(v)) is not None and axes.parameter_only(v):
            queue += [(source, through | {op.name}) for source in op.ins]
    return found


def entries(graph: Graph, axes: Axes, def_use: DefUse) -> dict[int, list[Entry]]:
    """For every leaf, where a tensor made of parameters alone first meets one that is not, on the way to the loss.

    Scalars are left out: a penalty is added to the loss and moves no activation.
    """
    needed, found = behind_loss(graph), {}
    for op in graph.ops:
        if all(axes.parameter_only(v) for v in op.ins) or not any(v in needed and v.shape for v in op.outs):
            continue
        for value in op.ins:
            for leaf, through in leaves_behind(def_use, axes, value).items():
                found.setdefault(leaf, []).append(Entry(op, through))
    return found
