"""How a hidden dimension lies in a parameter leaf.

A hidden dimension may be a whole axis of a leaf (the columns of a kernel), or one factor of an axis (the channels in a
flattened feature map). A `Layout` writes the leaf's shape as a product of *factors* and says which factor counts the
slots of the site and which ones form the rows and the columns of the matrix that the network multiplies by. Everything
that touches user parameters (surgery, writing new neurons, reading weights) goes through the four views below.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """One leaf, factored.

    Attributes:
        leaf: path of the leaf in the parameters, components joined by "/".
        factors: the leaf's shape with every axis split into its factors, row-major.
        axes: for each factor, the axis of the leaf it belongs to.
        slot: which factor counts the slots of the site, or None for a leaf the site does not run through.
        stack: factors that count the layers of an enclosing `scan`, outermost first.
        rows: factors contracted with the layer's input, in the order of that input.
        cols: factors that remain in the layer's output, in the order of that output.
    """

    leaf: str
    factors: tuple[int, ...]
    axes: tuple[int, ...]
    slot: int | None = None
    stack: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        rank = max(self.axes, default=-1) + 1
        return tuple(math.prod(f for f, a in zip(self.factors, self.axes) if a == axis) for axis in range(rank))

    def to_matrix(self, leaf: Array) -> Array:
        """The leaf `(shape)` as the matrix `(*stack, rows, cols)` that multiplies the layer's input from the right."""
        lead = [self.factors[f] for f in self.stack]
        x = leaf.reshape(self.factors).transpose(self.stack + self.rows + self.cols)
        return x.reshape(*lead, math.prod(self.factors[f] for f in self.rows), -1)

    def from_matrix(self, matrix: Array) -> Array:
        """Inverse of `to_matrix`."""
        return self._restore(matrix, self.stack + self.rows + self.cols)

    def to_slots(self, leaf: Array) -> Array:
        """The leaf as `(*stack, slots, rest)`: all entries that belong to one slot in one row."""
        order = self._slot_order()
        lead = [self.factors[f] for f in self.stack]
        x = leaf.reshape(self.factors).transpose(order)
        return x.reshape(*lead, self.factors[order[len(lead)]], -1)

    def from_slots(self, slots: Array) -> Array:
        """Inverse of `to_slots`."""
        return self._restore(slots, self._slot_order())

    def _slot_order(self) -> tuple[int, ...]:
        if self.slot is None:
            raise ValueError(f"the leaf `{self.leaf}` has no axis along the site's hidden dimension")
        first = self.stack + (self.slot,)
        return first + tuple(f for f in range(len(self.factors)) if f not in first)

    def _restore(self, x: Array, order: tuple[int, ...]) -> Array:
        inverse = tuple(order.index(f) for f in range(len(order)))
        return x.reshape([self.factors[f] for f in order]).transpose(inverse).reshape(self.shape)


@jax.jit
def live(slots: Array) -> Array:
    """Which rows of `(*stack, slots, rest)` hold anything but zeros, in any layer of a stack: `(slots,)` booleans."""
    used = jnp.any(slots != 0, axis=-1)
    return jnp.any(used.reshape(-1, used.shape[-1]), axis=0)
