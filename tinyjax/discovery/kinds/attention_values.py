"""Attention values: a dimension whose rows are mixed, head by head, on their way to the products that read it."""

import dataclasses

from tinyjax.core.kinds import ATTENTION_VALUES
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.products import Product, aligned
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.graph import Address
from tinyjax.discovery.paths.flow import Flow
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slot_paths import Tangent, find_tangent


@dataclasses.dataclass(frozen=True)
class ValuesPath(Path):
    """A path along which rows are mixed, or slots come in heads: its rows are tangents, in those of the consumers.

    Attributes:
        tangent: what lies between producer and consumers.
    """

    tangent: Tangent

    kind = ATTENTION_VALUES
    between = "heads or mixed rows"
    signed = True

    def slope(self) -> float:
        """The sign of the slope, which the tangents hold already."""
        return self.tangent.sign

    def taps(self) -> dict[Address, int]:
        """What the values are multiplied by."""
        return dict(self.tangent.taps)


def find_values_path(
    model: Dimensions, producer: Product, consumers: tuple[Product, ...], flow: Flow, dimension: Atom
) -> ValuesPath:
    """The path of mixed rows, in the rows of the consumers.

    Raises:
        CannotGrow: with the reason.
    """
    if producer.window is not None or any(c.window is not None for c in consumers):
        raise CannotGrow(flow.rows.mixing[consumers[0].input_value] or f"`{producer.leaf}` produces it in groups")
    order = [*model.axes.sample_atoms(), *(a for a in consumers[0].rows if a is not None)]
    if any({root(a) for a in c.rows if a is not None} != {root(a) for a in order} for c in consumers):
        raise CannotGrow("its consumers read it in different rows")
    read = tuple(aligned(c, order) for c in consumers)
    tangent, producer, read = find_tangent(model.axes, model.def_use, flow, producer, read, dimension, model.kernels)
    return ValuesPath(producer, read, tangent)
