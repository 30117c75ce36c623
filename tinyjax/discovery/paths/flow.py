"""One product followed along one hidden dimension: the values, and what each analysis says of them."""

import dataclasses
from collections.abc import Sequence, Set

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import Op, Value
from tinyjax.discovery.paths.dataflow import Dataflow, follow_values
from tinyjax.discovery.paths.degrees import Degrees, find_degrees
from tinyjax.discovery.paths.empty_slots import EmptySlots, find_empty_slots
from tinyjax.discovery.paths.kept_rows import KeptRows, find_kept_rows
from tinyjax.discovery.paths.poolings import Poolings, find_poolings
from tinyjax.discovery.paths.row_factors import RowFactors, find_row_factors
from tinyjax.discovery.paths.vectors import Vectors, find_vectors


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of the values that follow one product.

    Attributes:
        along: the values themselves.
        poolings: the poolings on the way to them.
        degrees: the powers of the product that they scale with.
        factors: what their rows were multiplied by.
        rows: whether their rows are still the product's.
        empty: what an empty slot holds there.
        vectors: the parameters that act on them slot by slot.
    """

    along: Dataflow
    poolings: Poolings
    degrees: Degrees
    factors: RowFactors
    rows: KeptRows
    empty: EmptySlots
    vectors: Vectors

    @property
    def ops(self) -> Sequence[Op]:
        """The operations that read any of the values, in order."""
        return self.along.ops

    @property
    def values(self) -> Set[Value]:
        """The values."""
        return self.along.values

    @property
    def refusal(self) -> str:
        """Why the dimension cannot grow wherever it is read, or ""."""
        return self.vectors.refusal or self.empty.refusal

    def downstream(self, start: Value) -> "Flow":
        """The same from one of its values on."""
        ops, walk = [], self.along.def_use.walk([start])
        for op in walk:
            ops.append(op)
            walk.reach(v for v in op.outs if v in self.values)
        values = {v for v in walk.reached if v in self.values}
        return dataclasses.replace(self, along=dataclasses.replace(self.along, ops=ops, values=values))


def follow_product(
    axes: Axes,
    def_use: DefUse,
    producer: Product,
    slots: Atom,
    gates: Set[Value] = frozenset(),
    others: Sequence[Value] = (),
) -> Flow:
    """Follows a product forward along a hidden dimension.

    Args:
        axes: of the graph's tensors.
        def_use: of its values.
        producer: the product.
        slots: the dimension.
        gates: values that multiply what is followed slot by slot, and which are given with each new neuron.
        others: the results of further products that write the dimension, in the same rows, empty where its slots are.
    """
    along = follow_values(axes, def_use, producer, slots, gates, others)
    poolings = find_poolings(along)
    degrees = find_degrees(along, poolings)
    factors = find_row_factors(along, poolings)
    rows = find_kept_rows(along, poolings, degrees, factors)
    return Flow(along, poolings, degrees, factors, rows, find_empty_slots(along), find_vectors(along, factors))
