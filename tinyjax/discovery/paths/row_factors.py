"""Factors that differ from row to row: masks, gates, what a norm of `tinyjax.models` divides by.

Where a row of the hidden layer is multiplied by a factor of its own before the consumer reads it, the tangent of a new
neuron's fan-in is the producer's input times that factor. `find_row_factors` says which factors lie on the way to each
value. A `RowFactorLayout` says where one is found in a run of the model, and brings it into the order of the producer's
rows.
"""

from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitives import is_elementwise
from tinyjax.discovery.dimensions.products import Product, array_layout
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import SUMS, Address, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.paths.dataflow import Dataflow
from tinyjax.discovery.paths.poolings import Poolings
from tinyjax.discovery.paths.refusals import CannotGrow


class RowFactor(NamedTuple):
    """A factor that differs between the rows of a product and not between its slots.

    Attributes:
        op: the operation that reads it.
        operand: which operand of it.
        value: the tensor.
        factor: from the tensor to the factor: itself, its reciprocal, or whether it selects the product.
    """

    op: Op
    operand: int
    value: Value
    factor: Callable[[Array], Array]


class RowFactors(NamedTuple):
    """The factors of the rows on the way to each value.

    Attributes:
        of: for every value, the factors that its rows were multiplied by one by one, in order.
        scales: by operation that reads a factor, vectors along the slots that the factor was multiplied by before, each
            as the product and the vector.
        opaque: operations that weight rows one by one and not by such a factor.
        twofold: operations whose operands were weighted in two ways.
    """

    of: Mapping[Value, tuple[RowFactor, ...]]
    scales: Mapping[Op, list[tuple[Op, Value]]]
    opaque: Set[Op]
    twofold: Set[Op]

    def is_one(self, op: Op, value: Value, flow: Dataflow) -> bool:
        """Whether an operand from outside is a factor of the rows."""
        (out,) = op.outs
        before = min(len(self.of[v]) for v in op.ins if v in self.of)
        return len(self.of[out]) > before and not flow.is_same_in_all_rows(value)


def find_row_factors(flow: Dataflow, poolings: Poolings) -> RowFactors:
    """The factors of the rows on the way to each value that follows a product."""
    factors: dict[Value, tuple[RowFactor, ...]] = dict.fromkeys(flow.starts, ())
    scales: dict[Op, list[tuple[Op, Value]]] = {}
    opaque, twofold = set[Op](), set[Op]()
    for op, inside, outs in flow.steps:
        # Told apart by identity: what adds none hands on the very tuple, as streams collect many.
        before = list({id(factors[v]): factors[v] for v in inside}.values())
        if len(before) > 1:
            twofold.add(op)
        differing = [] if op in poolings.counts else _differing(flow, op)
        found = [factor for i in differing if (factor := _factor(flow, op, i, scales)) is not None]
        if len(found) < len(differing):
            opaque.add(op)
        factors.update(dict.fromkeys(outs, (*before[0], *found) if found else before[0]))
    return RowFactors(factors, scales, opaque, twofold)


def _differing(flow: Dataflow, op: Op) -> list[int]:
    """The operands from outside by which an elementwise operation treats rows differently."""
    if op.name in KNOWN_FUNCTIONS or op.name in SUMS or not is_elementwise(op):
        return []
    outside = [i for i, v in enumerate(op.ins) if v not in flow.values and v not in flow.gates]
    return [i for i in outside if not flow.is_same_in_all_rows(op.ins[i])]


def _factor(flow: Dataflow, op: Op, operand: int, scales: dict[Op, list[tuple[Op, Value]]]) -> RowFactor | None:
    """An operand that differs between rows, as a factor of the rows; None where it is no such thing."""
    if op.name == "mul":
        factor = _itself
    elif op.name == "div" and operand == 1:
        factor = jnp.reciprocal
    elif op.name == "select_n" and operand == 0 and (which := flow.selected(op)) is not None:
        factor = (_is_zero, _is_one)[which]
    else:
        return None
    reader, value = op, op.ins[operand]
    while flow.has_slots(value):
        found = flow.factored(value)
        if found is not None:
            op, operand = found
            scales.setdefault(reader, []).append((op, op.ins[1 - operand]))
        else:
            maker = flow.def_use.made_by.get(value)
            if maker is None or not is_layout(maker):
                return None
            op, operand = maker, 0
        value = op.ins[operand]
    return RowFactor(op, operand, value, factor)


class RowFactorLayout(NamedTuple):
    """A factor of the rows of a path.

    Attributes:
        address: of the operation that reads it.
        operand: which operand of it.
        factor: from the recorded tensor to the factor.
        layout: of the recorded tensor, rows in the order of the producer's.
        shape: for every factor of the producer's rows its length, or 1 where the tensor does not depend on it.
        rows: for every factor of the producer's rows its length.
    """

    address: Address
    operand: int
    factor: Callable[[Array], Array]
    layout: Layout
    shape: tuple[int, ...]
    rows: tuple[int, ...]

    def column(self, recorded: Array) -> Array:
        """The factor of every row, `(*stack, rows, 1)`."""
        matrix = self.layout.to_matrix(recorded)
        lead = matrix.shape[: len(self.layout.stack)]
        column = jnp.broadcast_to(matrix.reshape(*lead, *self.shape), (*lead, *self.rows))
        return self.factor(column.reshape(*lead, -1, 1))


def lay_out_row_factor(axes: Axes, weight: RowFactor, producer: Product) -> RowFactorLayout:
    """A factor in the order of the rows of a producer.

    Raises:
        CannotGrow: with the reason.
    """
    op, tensor = weight.op, axes[weight.value]
    if op.inside or op.scans != producer.op.scans:
        raise CannotGrow(f"its rows are weighted one by one in `{op.name}`, where the weights cannot be seen")
    stacked = bool(producer.kernel.stack)
    layout, atoms = array_layout("row weights", op, stacked, tensor, tuple(range(len(tensor))), (), axes.steps)
    found = {_key(atoms[f], f): f for f in layout.rows if layout.factors[f] > 1}
    order, shape, rows = [], [], []
    for f, atom in zip(producer.inputs.rows, producer.rows):
        at = found.pop(_key(atom, f), None)
        order += [] if at is None else [at]
        shape.append(1 if at is None else layout.factors[at])
        rows.append(producer.inputs.factors[f])
    if found or len(order) + sum(layout.factors[f] == 1 for f in layout.rows) != len(layout.rows):
        raise CannotGrow(f"its rows are weighted one by one in `{op.name}` by something that has other rows")
    ones = [f for f in layout.rows if layout.factors[f] == 1]
    ordered = Layout(layout.leaf, layout.factors, layout.axes, None, layout.stack, (*order, *ones), ())
    return RowFactorLayout(op.path, weight.operand, weight.factor, ordered, tuple(shape), tuple(rows))


def _key(atom: Atom | None, factor: int) -> Atom | int:
    """What a factor of rows is known by: its dimension, or for a scan its depth."""
    return factor if atom is None else root(atom)


def _itself(x: Array) -> Array:
    return x


def _is_zero(x: Array) -> Array:
    return x == 0


def _is_one(x: Array) -> Array:
    return x == 1
