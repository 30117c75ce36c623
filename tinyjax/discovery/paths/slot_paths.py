"""What a new neuron's fan-in does to the consumer's input where more than slot-wise operations lie between the two.

Attention mixes the values of all tokens before the output projection reads them, so the rows of the producer's input
are not the rows of V_goal. What is aligned with V_goal is the tangent of the slot's path: the derivative of the
consumer's input with respect to the fan-in, at an empty slot. It is computed by carrying the producer's inputs, as many
columns at a time as there are slots, through the operations of the path, each replaced by its derivative.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, contraction
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.def_use import DefUse, is_layout, is_view
from tinyjax.discovery.graph.graph import SUMS, Address, Op, Value
from tinyjax.discovery.paths.flow import Flow
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slopes import carried_near

_AXES = {"reduce_sum": "axes", "rev": "dimensions", "cumsum": "axis"}  # by which parameter they name their axes
_ALONG_ROWS = ("dot_general", "reduce_sum", "broadcast_in_dim", "slice", "rev", "cumsum")


class Tangent(NamedTuple):
    """The path of a slot from a product to its consumers.

    Attributes:
        ops: the operations on the way, in order.
        taps: for every operation that multiplies by a tensor from outside, by address, which operand that is.
        factors: for every operand that is a tapped tensor times a scale, which is 1 for a newborn, where it is tapped.
        scalars: for every other operand from outside, the number it holds everywhere.
        empty: what an empty slot holds, for every value on the way.
        producer: the product, its columns being heads and slots.
        slot: factor of the product's output that counts slots.
        read: the value it ends in.
        layout: of that value; its columns are (heads, offsets, slots).
        near: what a slot holds, for every value on the way, where the product is a little above 0 and a little below.
    """

    ops: tuple[Op, ...]
    taps: Mapping[Address, int]
    factors: Mapping[Value, Address]
    scalars: Mapping[Value, Any]
    empty: Mapping[Value, Any]
    producer: Product
    slot: int
    read: Value
    layout: Layout
    near: tuple[Mapping[Value, Any], Mapping[Value, Any]]

    @property
    def sign(self) -> float:
        """Of the slope, which what is carried along the path holds; 1 where there is none."""
        above, below = (float(side[self.read]) for side in self.near)
        return -1.0 if above < below else 1.0


def find_tangent(
    axes: Axes,
    def_use: DefUse,
    flow: Flow,
    producer: Product,
    consumers: Sequence[Product],
    dimension: Atom,
    kernels: frozenset[Op],
) -> tuple[Tangent, Product, tuple[Product, ...]]:
    """The path of a slot, and its uses: heads as layers of the producer's kernel, and in front of the consumers' rows.

    Args:
        axes: of its tensors.
        def_use: of its values.
        flow: from the producer along the dimension.
        producer: the product that writes the dimension.
        consumers: those that read it, rows aligned.
        dimension: counts the slots.
        kernels: all products with a parameter.

    Raises:
        CannotGrow: with the reason.
    """
    columns = [a for f, a in enumerate(producer.output_atoms) if f in producer.outputs.cols and a is not None]
    heads = [root(a) for a in columns if root(a) is not dimension]
    if len(heads) > 1 or len(columns) != len(heads) + 1:
        raise CannotGrow(f"`{producer.leaf}` produces it together with several other axes")
    consumers = tuple(heads_first(use, heads, dimension, producer.leaf) for use in consumers)
    first = consumers[0]
    kept = {dimension, *heads}
    found = slot_path(axes, def_use, flow, producer, dimension, first.input_value, first.inputs, kept, kernels)
    if heads and not any(op.name == "dot_general" for op in found.ops):
        # A view into heads whose sizes the model may have written out (pixels of a shuffle): not one to make room in.
        raise CannotGrow(f"`{producer.leaf}` produces it together with another axis, not mixed by attention")
    return found, heads_as_layers(producer, dimension), consumers


def slot_path(
    axes: Axes,
    def_use: DefUse,
    flow: Flow,
    producer: Product,
    dimension: Atom,
    read: Value,
    layout: Layout,
    kept: set[Atom],
    kernels: frozenset[Op],
) -> Tangent:
    """The path of a slot from a product to a value, `layout` being that value's; the `kept` dimensions stay apart.

    Raises:
        CannotGrow: with the reason.
    """
    ops = between(def_use, flow, {producer.op}, [read])
    taps, scalars, factors = follow(axes, def_use, flow, producer, dimension, ops, kept, kernels)
    slot = next(
        f for f, a in enumerate(producer.output_atoms) if f in producer.outputs.cols and a and root(a) is dimension
    )
    empty = {v: flow.empty.at[v] for op in ops for v in op.ins if v in flow.values}
    start = producer.op.outs[0]
    near = (carried_near(def_use, flow, start, ops, 1), carried_near(def_use, flow, start, ops, -1))
    return Tangent(tuple(ops), taps, factors, scalars, empty, producer, slot, read, layout, near)


def follow(
    axes: Axes,
    def_use: DefUse,
    flow: Flow,
    producer: Product,
    dimension: Atom,
    ops: Sequence[Op],
    kept: set[Atom],
    kernels: frozenset[Op],
) -> tuple[dict[Address, int], dict[Value, Any], dict[Value, Address]]:
    """The taps, scalars and factors of a `Tangent` along some operations.

    Raises:
        CannotGrow: with the reason.
    """
    taps: dict[Address, int] = {}
    scalars: dict[Value, Any] = {}
    factors: dict[Value, Address] = {}
    for op in ops:
        _require_slotwise(axes, flow, producer.op, op, kept, dimension)
        if op.name in SUMS:
            continue
        for i, value in enumerate(op.ins):
            if value in flow.values:
                continue
            scalar = def_use.scalar(value)
            if scalar is not None or (op.name in ("mul", "div") and flow.along.is_vector(value)):
                scalars[value] = 1 if scalar is None else scalar  # the scale of a newborn is 1
                continue
            if op.name == "mul" and (scaled := flow.along.factored(value)) is not None:
                inner, operand = scaled
                if not inner.inside and same_along(axes, def_use, inner.ins[operand], dimension):
                    taps[inner.path], factors[value] = operand, inner.path
                    continue
            if op.path in taps or op.inside or op in kernels or not same_along(axes, def_use, value, dimension):
                why = f"its rows are mixed by `{op.name}` in a way that cannot be followed"
                raise CannotGrow(flow.rows.mixing[op.outs[0]] or why)
            taps[op.path] = i
    return taps, scalars, factors


def between(def_use: DefUse, flow: Flow, producers: Set[Op], read: Iterable[Value]) -> list[Op]:
    """The operations from some products to some values, in order."""
    found, queue = set[Op](), [*read]
    while queue:
        op = def_use.made_by.get(queue.pop())
        if op is not None and op not in producers and op not in found:
            found.add(op)
            queue += [v for v in op.ins if v in flow.values]
    return sorted(found, key=def_use.order.__getitem__)


def _require_slotwise(axes: Axes, flow: Flow, producer: Op, op: Op, kept: set[Atom], dimension: Atom) -> None:
    """Raises unless an operation treats slots (and heads) one by one and has a derivative where they are empty."""
    why = f"its rows are mixed by `{op.name}`, which has no derivative at an empty neuron that can be followed"
    if op.eqn is None or op.scans != producer.scans or len(op.outs) != 1:
        raise CannotGrow(f"its rows are mixed across the steps of a scan (`{op.name}`)")
    if not (op.name in ELEMENTWISE or op.name in _ALONG_ROWS or is_view(op)):
        raise CannotGrow(why)
    for i, value in enumerate(op.ins):
        if value not in flow.values:
            continue
        if value not in flow.empty.at:
            raise CannotGrow(why)
        mixed = [a for d in _worked_along(op, i) for a in roots(axes[value][d]) if a in kept]
        if mixed:
            what = "entries" if dimension in mixed else "heads"
            raise CannotGrow(f"its {what} are mixed by `{op.name}`")


def _worked_along(op: Op, operand: int) -> tuple[int, ...]:
    """The axes of an operand along which an operation does not keep its entries apart and in order."""
    if op.name == "dot_general":
        return contraction(op).contracted[operand]
    if op.name == "slice":
        (before,), (after,) = op.ins, op.outs
        return tuple(d for d, size in enumerate(before.shape) if size != after.shape[d])
    along = op.params[_AXES[op.name]] if op.name in _AXES else ()
    return (along,) if isinstance(along, int) else tuple(along)


def same_along(axes: Axes, def_use: DefUse, value: Value, dimension: Atom) -> bool:
    """Whether a tensor holds the same along a dimension, which it is broadcast over or does not have."""
    while any(a is dimension for axis in axes[value] for a in roots(axis)):
        op = def_use.made_by.get(value)
        if op is None or not is_layout(op):
            return False
        value = op.ins[0]
    return True


def heads_first(use: Product, heads: Sequence[Atom], dimension: Atom, producer: str) -> Product:
    """A consumer whose rows are (heads, offsets, slots): what it reads of a head at several places are its offsets."""
    order: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    for f in use.inputs.cols:
        atom = use.input_atoms[f]
        place = 0 if atom is None else 3 if root(atom) is dimension else 1 if root(atom) in heads else 2
        order[place].append(f)
    if len(order[3]) != 1:
        raise CannotGrow(f"`{use.leaf}` reads every neuron more than once")
    if len(order[1]) != len(heads):
        raise CannotGrow(f"`{producer}` produces it together with another axis")
    cols = (*order[0], *order[1], *order[2], *order[3])
    # Rows of the kernel and columns of the input were paired in order: carry the new order over.
    long = [f for f in use.kernel.rows if use.kernel.factors[f] > 1]
    paired = dict(zip([f for f in use.inputs.cols if use.inputs.factors[f] > 1], long))
    rows = (*(f for f in use.kernel.rows if use.kernel.factors[f] == 1), *(paired[f] for f in cols if f in paired))
    inputs, kernel = dataclasses.replace(use.inputs, cols=cols), dataclasses.replace(use.kernel, rows=rows)
    return dataclasses.replace(use, inputs=inputs, kernel=kernel)


def heads_as_layers(use: Product, dimension: Atom) -> Product:
    """A producer whose heads are layers of a stack: a neuron has a fan-in in each."""
    columns = [f for f in use.outputs.cols if use.output_atoms[f] is not None]
    is_slot = [root(a) is dimension for f in columns if (a := use.output_atoms[f]) is not None]

    def lift(layout: Layout) -> Layout:
        long = [f for f in layout.cols if layout.factors[f] > 1]
        heads = tuple(f for f, slot in zip(long, is_slot) if not slot)
        slots = tuple(f for f, slot in zip(long, is_slot) if slot)
        ones = tuple(f for f in layout.cols if f not in long)
        return dataclasses.replace(layout, stack=(*layout.stack, *heads), rows=(*ones, *layout.rows), cols=slots)

    return dataclasses.replace(use, kernel=lift(use.kernel), bias=None if use.bias is None else lift(use.bias))
