"""Which state of a recurrence each product reads at each of its steps.

A state is made at one place of the graph, step after step. `States` follows it to the products that read it: around a
scan (one step later), out of it (all steps along a new axis, or the last one), into another one, through slices, stacks
and flips of that axis. Everything on the way must treat units one by one, and leave an empty one silent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyjax.discovery.dimensions.constant_folding import at_numbers, is_steep
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import Op, Scan, Value
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slopes import step_of

Along = Scan | Atom | None
"""What counts the steps of a tensor: a scan around its operation, an axis, or nothing (a single step)."""

NONE = -1
"""A step at which something else than a state of this place is read: an initial state, another place."""


class Held(NamedTuple):
    """A tensor of states.

    Attributes:
        steps: which state it holds, for each of its steps.
        along: what counts these.
        source: the last tensor on its way that is more than a rearrangement of states.
        empty: what an empty unit holds.
        unsilent_op: the operation by which that is not zero, or "".
        near: what it holds where the sum of products is a little above 0, and a little below, see `step_of`.
    """

    steps: tuple[int, ...]
    along: Along
    source: Value
    empty: Any
    unsilent_op: str = ""
    near: tuple[Any, Any] = (0.0, 0.0)


class States:
    """The tensors of the states made from one sum of products.

    Attributes:
        length: how many states there are.
        along: the scan around the sum, or None.
        held: what each tensor holds.
        reads: for the products that read states, what they read.
    """

    def __init__(self, model: Dimensions, dimension: Atom, start: Value, readers: Mapping[Value, Sequence[Product]]):
        scans = model.def_use.made_by[start].scans
        if len(scans) > 1:
            raise CannotGrow("it recurs inside nested loops")
        self.along: Scan | None = scans[0] if scans else None
        self.length = 1 if self.along is None else self.along.length
        self._model, self._dimension = model, dimension
        step = step_of(start.dtype)
        near = (np.asarray(step, start.dtype), np.asarray(-step, start.dtype))
        first = Held(tuple(range(self.length)), self.along, start, np.zeros((), start.dtype), near=near)
        self.held: dict[Value, Held] = {start: first}
        self.reads: dict[Product, Held] = {}
        done, fresh = set[Op](), [start]
        # What a scan hands to its next step is read above where it is made: round by round, until it settles.
        while fresh:
            found = {op for v in fresh for op in model.def_use.used_by.get(v, ())} - done
            done |= found
            fresh = []
            for op in sorted(found, key=model.order.__getitem__):
                if not any(use.op is op for v in op.ins for use in readers.get(v, ())):
                    fresh += [v for v in (*op.outs, *op.ins) if v not in self.held]
                    self._follow(op)
            fresh = [v for v in fresh if v in self.held]
        for use in sorted((use for v in self.held for use in readers.get(v, ())), key=lambda use: model.order[use.op]):
            self.reads[use] = self._readable(self.held[use.input_value])

    def _readable(self, held: Held) -> Held:
        if held.unsilent_op:
            arrives = f"`{held.unsilent_op}` maps 0 to {float(held.empty):.3g}"
            raise CannotGrow(f"an empty neuron is not silent: {arrives} (use sigma(x) - sigma(0))")
        return held

    def _follow(self, op: Op) -> None:
        if not any(self._has_units(out) for out in op.outs):
            return
        if op.name == "scan_carry":
            self._carried(op)
        elif op.name in ("scan_in", "scan_out"):
            self._sliced(op)
        elif op.name in ("slice", "rev", "concatenate", "stack"):
            self._cut(op)
        elif op.name in ELEMENTWISE or is_layout(op):
            self._mapped(op)
        else:
            raise CannotGrow(f"its states are mixed by `{op.name}` before they are read")

    def _has_units(self, value: Value) -> bool:
        return any(self._dimension in roots(axis) for axis in self._model.axes[value])

    def _axis(self, value: Value, along: Along) -> int | None:
        """The axis that an atom alone makes up."""
        axes = self._model.axes[value]
        return next(
            (d for d, axis in enumerate(axes) if isinstance(along, Atom) and roots(axis) == [root(along)]), None
        )

    def _counter(self, value: Value, axis: int) -> Atom | None:
        """What counts the entries of an axis; None where there is but one."""
        found = roots(self._model.axes[value][axis])
        return found[0] if len(found) == 1 else None

    def _mapped(self, op: Op) -> None:
        moving = [v in self.held for v in op.ins]
        inside = [self.held[v] for v in op.ins if v in self.held]
        first = inside[0]
        numbers = [self.held[v].empty if v in self.held else self._model.def_use.scalar(v) for v in op.ins]
        if len({(held.steps, held.along) for held in inside}) > 1 or any(k is None for k in numbers):
            raise CannotGrow(f"its states meet another tensor in `{op.name}`")
        if is_layout(op):
            self.held[op.outs[0]] = first
            return
        if is_steep(op, numbers, moving):
            raise CannotGrow(f"the gradient of `{op.name}` is not finite where a neuron is empty")
        empty = at_numbers(op, numbers)
        unsilent_op = next((held.unsilent_op for held in inside if held.unsilent_op), op.name) if empty != 0 else ""
        beside = [[self.held[v].near[i] if v in self.held else k for v, k in zip(op.ins, numbers)] for i in (0, 1)]
        near = (at_numbers(op, beside[0]), at_numbers(op, beside[1]))
        self.held[op.outs[0]] = Held(first.steps, first.along, op.outs[0], empty, unsilent_op, near)

    def _carried(self, op: Op) -> None:
        """The result of a step is what the next one begins with, and that of the last one is left."""
        if len(op.ins) == 1:
            raise CannotGrow("its states begin another loop")
        result, entered = op.ins
        held = self.held.get(result)
        if held is None or not isinstance(held.along, Scan) or held.along.path != op.path:
            raise CannotGrow("its states are carried through a loop that does not make them")
        if self._model.def_use.scalar(self._model.def_use.made_by[entered].ins[0]) != 0:
            raise CannotGrow("its initial state is not zero")
        steps = held.steps
        before = (*steps[1:], NONE) if held.along.reverse else (NONE, *steps[:-1])
        self.held[entered] = held._replace(steps=before)
        self.held[op.outs[0]] = held._replace(steps=(steps[0 if held.along.reverse else -1],), along=None)

    def _sliced(self, op: Op) -> None:
        """All steps of a scan along an axis, or an axis step by step into a scan."""
        (held,), (out,) = [self.held[v] for v in op.ins], op.outs
        if op.name == "scan_out":
            if not isinstance(held.along, Scan) or held.along.path != op.path:
                raise CannotGrow("its states are stacked by a loop that does not make them")
            self.held[out] = held._replace(along=self._counter(out, 0))
        elif self._axis(op.ins[0], held.along) == 0:
            self.held[out] = held._replace(along=op.scans[-1])
        else:
            raise CannotGrow("its states are read in a loop over something else than their steps")

    def _cut(self, op: Op) -> None:
        """Some steps, in another order, or beside other tensors."""
        (out,), steps = op.outs, []
        first = next(self.held[v] for v in op.ins if v in self.held)
        worked = _worked_along(op)
        if not worked:
            self.held[out] = first
            return
        for value in op.ins:
            held, size = self.held.get(value), 1 if op.name == "stack" else value.shape[worked[0]]
            single = held is not None and held.along is None and size == 1
            if held is not None and not single and (op.name == "stack" or [self._axis(value, held.along)] != worked):
                raise CannotGrow(f"its states are mixed by `{op.name}` before they are read")
            steps += held.steps if held is not None else [NONE] * size
        if op.name == "rev":
            steps = steps[::-1]
        if op.name == "slice":
            start, stop = (op.params[name][worked[0]] for name in ("start_indices", "limit_indices"))
            steps = steps[start : stop : 1 if op.params["strides"] is None else op.params["strides"][worked[0]]]
        self.held[out] = first._replace(steps=tuple(steps), along=self._counter(out, worked[0]))


def _worked_along(op: Op) -> list[int]:
    """The axes along which a slice, a flip or a concatenation works."""
    if op.name == "concatenate":
        return [op.params["dimension"]]
    if op.name == "stack":
        return [op.params["axis"] % len(op.outs[0].shape)]
    if op.name == "rev":
        return list(op.params["dimensions"])
    return [d for d, (before, after) in enumerate(zip(op.ins[0].shape, op.outs[0].shape)) if before != after]
