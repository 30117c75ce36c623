"""Gated units: two products of the same shape that multiply, one of them through an activation (GLU, SwiGLU, GEGLU).

A unit of such a layer is omega g(beta'x)(mu'x). Given its gate beta it is an ordinary neuron that reads g(beta'x) x.
The operand nearest to a plain product is the one that new neurons are computed for, the other is their gate.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array

from tinyjax.core.kinds import GATED_UNITS
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import Address, Op, Value
from tinyjax.discovery.paths.activations import activation_between
from tinyjax.discovery.paths.flow import Flow, follow_product
from tinyjax.discovery.paths.kept_rows import ROW_BY_ROW
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.row_factors import RowFactorLayout


@dataclasses.dataclass(frozen=True)
class GatedPath(Path):
    """A path from the product that new neurons are computed for, given its gate.

    Attributes:
        gate: the product whose activation multiplies the producer's, slot by slot, rows in the same order.
        activation: elementwise, of the gate.
        weights: what every row was multiplied by, besides.
        measure: the slope, see `slope_at_empty`.
    """

    gate: Product
    activation: Callable[[Array], Array]
    weights: tuple[RowFactorLayout, ...]
    measure: Callable[[], float | None]

    kind = GATED_UNITS
    between = "a gate"

    def slope(self) -> float | None:
        """See `Path`."""
        return self.measure()

    def recorded(self) -> list[Product]:
        """The unit's product and its gate's."""
        return [self.producer, self.gate]

    def taps(self) -> dict[Address, int]:
        """What rows are multiplied by."""
        return {weight.address: weight.operand for weight in self.weights}


class Gate(NamedTuple):
    """What multiplies the output of a product, slot by slot.

    Attributes:
        use: the gate's own product.
        flow: of that product, up to the multiplication and beyond.
        value: the operand of the multiplication.
        activation: elementwise, from the gate's pre-activation (its bias added) to the factor.
    """

    use: Product
    flow: Flow
    value: Value
    activation: Callable[[Array], Array]


def pair_up(axes: Axes, def_use: DefUse, producers: Sequence[Product], dimension: Atom) -> list[tuple[Product, Gate]]:
    """The products that new neurons are computed for, each with its gate.

    Args:
        axes: of its tensors.
        def_use: of its values.
        producers: the products that write the dimension, with two kernels between them.
        dimension: the hidden dimension.

    Raises:
        CannotGrow: with the reason.
    """
    flows = [follow_product(axes, def_use, use, dimension) for use in producers]
    follows: dict[Value, list[int]] = {}
    for i, flow in enumerate(flows):
        for value in flow.values:
            follows.setdefault(value, []).append(i)
    pairs, left = [], dict.fromkeys(range(len(producers)))
    while left:
        first = next(iter(left))
        del left[first]
        near = {i for op in flows[first].ops for v in op.ins for i in follows.get(v, ())}
        joins = {second: _first_joint(flows[first], flows[second]) for second in sorted(near & left.keys())}
        partners = [second for second, op in joins.items() if op is not None]
        if len(partners) != 1 or producers[first].leaf == producers[partners[0]].leaf:
            raise CannotGrow("2 producers, which do not meet pair by pair")
        (second,) = partners
        del left[second]
        pairs.append(_ordered(def_use, joins[second], *((producers[i], flows[i]) for i in (first, second))))
    if len({use.leaf for use, _ in pairs}) > 1:
        raise CannotGrow("2 producers, each of which gates the other")
    return pairs


def _first_joint(a: Flow, b: Flow) -> Op | None:
    """The first operation in which two products meet."""
    for op in a.ops:
        if any(v in a.values and v not in b.values for v in op.ins) and any(
            v in b.values and v not in a.values for v in op.ins
        ):
            return op
    return None


def _ordered(
    def_use: DefUse, op: Op | None, one: tuple[Product, Flow], other: tuple[Product, Flow]
) -> tuple[Product, Gate]:
    """Which of two products is the gate of the other."""
    assert op is not None
    if op.name != "mul":
        raise CannotGrow(f"2 producers, which meet in `{op.name}`")
    sides = []
    for use, flow in (one, other):
        (value,) = (v for v in op.ins if v in flow.values)
        if flow.rows.mixing[value] != ROW_BY_ROW:
            raise CannotGrow(f"2 producers of a gated unit; of `{use.leaf}`: {flow.rows.mixing[value]}")
        if flow.poolings.before[value] or flow.factors.of[value] or flow.rows.modulated or flow.vectors.counted:
            raise CannotGrow(f"2 producers of a gated unit, and more than an activation behind `{use.leaf}`")
        silent = (empty := flow.empty.at.get(value)) is not None and float(empty) == 0
        sides.append(((not silent, flow.degrees.of.get(value) != 1), use, flow, value))
    if all(side[0][0] for side in sides):
        raise CannotGrow("an empty neuron is not silent: neither factor of the gated unit is 0 at 0")
    (_, up, _, _), (_, gate, flow, value) = sides if sides[0][0] <= sides[1][0] else sides[::-1]
    _require_single_joint(op, one[1], other[1])
    try:
        activation = activation_between(def_use, gate, value)
    except CannotGrow as reason:
        raise CannotGrow(f"2 producers of a gated unit, whose gate {reason}") from None
    return up, Gate(gate, flow, value, activation)


def _require_single_joint(joint: Op, a: Flow, b: Flow) -> None:
    """The two flows must become one through the multiplication alone."""
    for op in a.ops:  # an operation that makes a value of both reads one of `a`
        one_sided = any((v in a.values) != (v in b.values) for v in op.ins)
        if one_sided and op is not joint and any(v in a.values and v in b.values for v in op.outs):
            raise CannotGrow(f"2 producers, which meet again in `{op.name}`")
