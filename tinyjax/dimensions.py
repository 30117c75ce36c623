"""The dimensions of a traced model: which leaves each runs through, which products write and read it."""

from collections.abc import Mapping, Sequence

from tinyjax.atoms import Atom, parts, root
from tinyjax.axes import Axes, contraction
from tinyjax.meetings import entries
from tinyjax.rules import BETWEEN_ACTIVATIONS, INPUT
from tinyjax.trace import Graph, Value
from tinyjax.uses import Use, leaf_factors
from tinyjax.wiring import Wiring


class Dimensions:
    """Everything a single dimension is judged by.

    Attributes:
        leaves: for every dimension, the leaves it runs through as `(leaf, factor)`.
        factors: for every leaf, the atoms, sizes and axis numbers of its factors.
        producing: for every dimension, the uses that write it.
        consuming: for every dimension, the uses that read it.
        obstructed: dimensions of operands that are made from parameters in a way no use can describe, with the reason.
        matrices: paths of the leaves that some product multiplies by.
        entries: for every leaf, where it enters the activations.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        wiring: Wiring,
        names: Sequence[str],
        uses: Sequence[Use],
        obstructed: Mapping[Value, str],
    ):
        self.graph, self.axes, self.wiring, self.names, self.uses = graph, axes, wiring, names, uses
        self.leaves: dict[Atom, list[tuple[int, int]]] = {}  # dimension -> (leaf, factor)
        self.factors = [leaf_factors(axes, value) for value in graph.params]
        for leaf, (atoms, _, _) in enumerate(self.factors):
            for factor, atom in enumerate(atoms):
                if atom is not None:
                    self.leaves.setdefault(root(atom), []).append((leaf, factor))
        self.producing: dict[Atom, list[Use]] = {}
        self.consuming: dict[Atom, list[Use]] = {}
        for use in uses:
            kept, contracted = kernel_atoms(axes, use)
            for atom in kept:
                self.producing.setdefault(root(atom), []).append(use)
            for atom in contracted:
                self.consuming.setdefault(root(atom), []).append(use)
        self.obstructed: dict[Atom, str] = {}
        for value, why in obstructed.items():
            for axis in axes[value]:
                for atom in parts(axis):
                    self.obstructed.setdefault(root(atom), why)
        self.matrices = {use.leaf for use in uses}
        self.entries = entries(graph, axes, wiring)
        self.order = {op: i for i, op in enumerate(graph.ops)}

    def is_hidden(self, dimension: Atom) -> bool:
        """Whether a dimension lies inside the model: neither its input nor its output."""
        if INPUT in dimension.marks:
            return False
        produced, consumed = dimension in self.producing, dimension in self.consuming
        if produced and (consumed or dimension in self.obstructed):
            return True
        if produced and any(self.feeds(use) for use in self.producing[dimension]):
            return True
        matrices = {leaf for leaf, _ in self.leaves[dimension] if len(self.graph.params[leaf].shape) > 1}
        used = consumed or dimension in self.obstructed or BETWEEN_ACTIVATIONS in dimension.marks
        return len(matrices) > 1 and used

    def feeds(self, producer: Use) -> bool:
        """Whether anything computed from a product enters another product: then it is no output of the model."""
        return bool(self.fed(producer))

    def fed(self, producer: Use) -> list[Use]:
        """The uses that read anything computed from a product."""
        reached = set(producer.op.outs)
        for op in self.graph.ops:
            if any(v in reached for v in op.ins):
                reached.update(op.outs)
        return [use for use in self.uses if use.input_value in reached]

    def first_op(self, dimension: Atom) -> int:
        """Position of the first product that writes or reads a dimension."""
        uses = self.producing.get(dimension, []) + self.consuming.get(dimension, [])
        return min((self.order[use.op] for use in uses), default=len(self.order))

    def depth(self, leaf: int) -> int:
        """Number of scans that slice a leaf."""
        return max(view.depth for view in self.wiring.views.values() if view.leaf == leaf)

    def first_user(self, leaf: int) -> str:
        """Words for the first operation that is more than a view of a leaf."""
        for view, info in self.wiring.views.items():
            for op in self.wiring.used_by.get(view, []):
                if info.leaf == leaf and op.outs[0] not in self.wiring.views:
                    return f": it goes into `{op.name}`"
        return ""


def kernel_atoms(axes: Axes, use: Use) -> tuple[list[Atom], list[Atom]]:
    """Atoms of the kept and of the contracted axes of a use's kernel, whether or not it is a plain matrix."""
    kernel = axes[use.op.ins[use.operand]]
    if use.op.name == "dot_general":
        sides = contraction(use.op)
        kept, summed = sides.free[use.operand], sides.contracted[use.operand]
    else:
        kernel_out, kernel_in, *_ = use.op.params["dimension_numbers"].rhs_spec
        kept, summed = (kernel_out,), (kernel_in,)
    return [a for d in kept for a in parts(kernel[d])], [a for d in summed for a in parts(kernel[d])]
