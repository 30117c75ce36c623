"""Factors that differ from row to row: masks, gates, what a norm of `tinyjax.models` divides by.

Where a row of the hidden layer is multiplied by a factor of its own before the consumer reads it, the tangent of a new
neuron's fan-in is the producer's input times that factor. A `RowFactorLayout` says where the factor is found in a run
of the model, and brings it into the order of the producer's rows.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.products import Product, array_layout
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.graph import Op, Value
from tinyjax.discovery.paths.path import RowFactorLayout
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
