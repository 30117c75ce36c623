"""Factors that differ from row to row: masks, gates, what a norm of `tinyjax.models` divides by.

Where a row of the hidden layer is multiplied by a factor of its own before the consumer reads it, the tangent of a new
neuron's fan-in is the producer's input times that factor. A `RowWeight` says where the factor is found in a run of the
model, and brings it into the order of the producer's rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.atoms import Atom, root
from tinyjax.axes import Axes
from tinyjax.flow import Weight
from tinyjax.geometry import Unaligned
from tinyjax.layout import Layout
from tinyjax.uses import Use, array_layout


class RowWeight(NamedTuple):
    """A factor of the rows of a path.

    Attributes:
        address: of the operation that reads it.
        operand: which operand of it.
        factor: from the recorded tensor to the factor.
        layout: of the recorded tensor, rows in the order of the producer's.
        shape: for every factor of the producer's rows its length, or 1 where the tensor does not depend on it.
        rows: for every factor of the producer's rows its length.
    """

    address: tuple[int, ...]
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


def lay_out_weight(axes: Axes, weight: Weight, producer: Use) -> RowWeight:
    """A factor in the order of the rows of a producer.

    Raises:
        Unaligned: with the reason.
    """
    op, tensor = weight.op, axes[weight.value]
    if op.inside or op.scans != producer.op.scans:
        raise Unaligned(f"its rows are weighted one by one in `{op.name}`, where the weights cannot be seen")
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
        raise Unaligned(f"its rows are weighted one by one in `{op.name}` by something that has other rows")
    ones = [f for f in layout.rows if layout.factors[f] == 1]
    ordered = Layout(layout.leaf, layout.factors, layout.axes, None, layout.stack, (*order, *ones), ())
    return RowWeight(op.path, weight.operand, weight.factor, ordered, tuple(shape), tuple(rows))


def _key(atom: Atom | None, factor: int) -> Atom | int:
    """What a factor of rows is known by: its dimension, or for a scan its depth."""
    return factor if atom is None else root(atom)
