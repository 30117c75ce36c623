"""The values computed from one product along one hidden dimension, in the order of the graph.

A site can grow when the consumer reads, row by row and slot by slot, what the producer wrote: then the producer's input
is the tangent of a new neuron's fan-in, and an empty neuron (fan-in and bias zero) must arrive at the consumer as zero.
Which values these are is found here; what becomes of their rows and slots is found by one analysis each, see `flow`.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence, Set

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.graph.def_use import DefUse, is_layout
from tinyjax.discovery.graph.graph import Op, Scan, Value


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """The values that follow one product along one hidden dimension.

    Attributes:
        axes: of the graph's tensors.
        def_use: of its values.
        slots: the dimension.
        gates: values that multiply the flow slot by slot, and which are given with each new neuron.
        starts: what the product makes, and the results of further products that write the dimension, in the same rows.
        row_scans: scans around the product whose steps are rows.
        ops: the operations that read any of the values, in order.
        values: all that depend on the product and have slots.
    """

    axes: Axes
    def_use: DefUse
    slots: Atom
    gates: Set[Value]
    starts: tuple[Value, ...]
    row_scans: Set[Scan]
    ops: Sequence[Op]
    values: Set[Value]

    def inside(self, op: Op) -> list[Value]:
        """The operands that follow the product."""
        return [v for v in op.ins if v in self.values]

    @functools.cached_property
    def steps(self) -> list[tuple[Op, list[Value], list[Value]]]:
        """The operations that go on along the dimension, with the operands and the results that follow the product.

        At any other the dimension ends: it is a consumer, or a reduction over it.
        """
        steps = ((op, [v for v in op.outs if v in self.values]) for op in self.ops)
        return [(op, self.inside(op), outs) for op, outs in steps if outs]

    def has_slots(self, value: Value) -> bool:
        """Whether the dimension is among those of a value."""
        return self.axes.has(value, self.slots)

    def is_vector(self, value: Value) -> bool:
        """Whether a value is a parameter vector along the slots, the same in all rows."""
        found = self.def_use.vector(value)
        return found is not None and self.has_slots(found[1]) and self._has_only_slots(found[1])

    def factored(self, value: Value) -> tuple[Op, int] | None:
        """Of a vector along the slots times something else, the product and which operand is the other.

        A root-mean-square norm may multiply what it divides by with its scale first.
        """
        op = self.def_use.made_by.get(value)
        if op is None or op.name != "mul":
            return None
        vectors = [i for i, v in enumerate(op.ins) if self.has_slots(v) and self.def_use.vector(v) is not None]
        return (op, 1 - vectors[0]) if len(vectors) == 1 else None

    def selected(self, op: Op) -> int | None:
        """Which of two cases of a `select_n` is the flow, the other one being zero."""
        cases = op.ins[1:]
        inside = [i for i, v in enumerate(cases) if v in self.values]
        zero = [i for i, v in enumerate(cases) if v not in self.values and self.def_use.scalar(v) == 0]
        return inside[0] if len(cases) == 2 and len(inside) == len(zero) == 1 else None

    def is_same_in_all_rows(self, value: Value) -> bool:
        """Whether an operand from outside treats all rows of the product alike (it may differ between slots)."""
        queue, seen = deque([value]), {value}
        while queue:  # the nearest first: what differs is mostly near, and what lies behind it may be the whole network
            value = queue.popleft()
            if self.def_use.steps.get(value, frozenset()) & self.row_scans:
                return False
            if self._has_only_slots(value):
                continue
            op = self.def_use.made_by.get(value)
            if op is None or not (op.name in ELEMENTWISE or is_layout(op)):
                return False
            queue += [v for v in op.ins if v not in seen]
            seen.update(op.ins)
        return True

    def _has_only_slots(self, value: Value) -> bool:
        return all(a is self.slots for axis in self.axes.dimensions(value) for a in axis)


def follow_values(
    axes: Axes, def_use: DefUse, producer: Product, slots: Atom, gates: Set[Value], others: Sequence[Value]
) -> Dataflow:
    """The values that follow a product along a dimension; see `Dataflow`."""
    starts = (*producer.op.outs, *others)
    ops, walk = [], def_use.walk(starts)
    for op in walk:
        ops.append(op)
        walk.reach(out for out in op.outs if axes.has(out, slots))
    # Steps of the scans around the producer are rows, unless its kernel has one layer for each.
    row_scans = frozenset() if producer.kernel.stack else frozenset(producer.op.scans)
    return Dataflow(axes, def_use, slots, gates, starts, row_scans, ops, walk.reached)
