"""The dimensions of a traced model: which leaves each runs through, which products write and read it."""

from collections.abc import Iterable, Mapping, Sequence

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.parameter_entries import entries
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS, INPUT, contraction
from tinyjax.discovery.dimensions.products import Product, leaf_factors
from tinyjax.discovery.dimensions.unification import Atom, parts, root
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import Graph, Op, Value


class Dimensions:
    """Everything by which a single dimension is classified.

    Attributes:
        leaves: for every dimension, the leaves it runs through as `(leaf, factor)`.
        factors: for every leaf, the atoms, sizes and axis numbers of its factors.
        producing: for every dimension, the uses that write it.
        consuming: for every dimension, the uses that read it.
        obstructed: dimensions of operands that are made from parameters in a way no use can describe, with the reason.
        matrices: paths of the leaves that some product multiplies by.
        entries: for every leaf, where it enters the activations.
        kernels: the operations of all uses.
        summed: for every dimension, the products of two activations that contract it.
        paired: for every dimension, the products of two activations that are taken side by side along it.
        tables: for every dimension, the lookups in a leaf that it runs through.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        def_use: DefUse,
        names: Sequence[str],
        uses: Sequence[Product],
        obstructed: Mapping[Value, str],
    ):
        self.graph, self.axes, self.def_use, self.names, self.uses = graph, axes, def_use, names, uses
        self.leaves: dict[Atom, list[tuple[int, int]]] = {}  # dimension -> (leaf, factor)
        self.factors = [leaf_factors(axes, value) for value in graph.params]
        for leaf, (atoms, _, _) in enumerate(self.factors):
            for factor, atom in enumerate(atoms):
                if atom is not None:
                    self.leaves.setdefault(root(atom), []).append((leaf, factor))
        self.producing: dict[Atom, list[Product]] = {}
        self.consuming: dict[Atom, list[Product]] = {}
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
        self.entries = entries(graph, axes, def_use)
        self.kernels = frozenset(use.op for use in uses)
        self.order = def_use.order
        self.summed: dict[Atom, list[Op]] = {}
        self.paired: dict[Atom, list[Op]] = {}
        self.tables: dict[Atom, list[Op]] = {}
        for op in graph.ops:
            self._index(op)
        self._fed = _first_readers(graph, enumerate(uses))
        narrow = ((i, use) for i, use in enumerate(uses) if not kernel_atoms(axes, use)[1])
        self._fed_narrow = _first_readers(graph, narrow)

    def _index(self, op: Op) -> None:
        """Notes along which dimensions an operation looks up, or multiplies two activations."""
        if op.name == "gather" and op.ins[0] in self.def_use.views:
            for dimension in dict.fromkeys(a for axis in self.axes.dimensions(op.ins[0]) for a in axis):
                self.tables.setdefault(dimension, []).append(op)
        if op.name != "dot_general" or any(self.axes.parameter_only(v) for v in op.ins):
            return
        sides = contraction(op)
        for along, found in ((sides.contracted, self.summed), (sides.batched, self.paired)):
            axes = [self.axes.dimensions(v)[d] for v, dims in zip(op.ins, along) for d in dims]
            for dimension in dict.fromkeys(a for axis in axes for a in axis):
                found.setdefault(dimension, []).append(op)

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

    def feeds(self, producer: Product) -> bool:
        """Whether anything computed from a product enters another product: then it is no output of the model."""
        return any(v in self._fed for v in producer.op.outs)

    def fed_narrow(self, producer: Product) -> Product | None:
        """The first use that reads anything computed from a product and contracts nothing longer than one."""
        found = [self._fed_narrow[v] for v in producer.op.outs if v in self._fed_narrow]
        return self.uses[min(found)] if found else None

    def first_op(self, dimension: Atom) -> int:
        """Position of the first product that writes or reads a dimension."""
        uses = self.producing.get(dimension, []) + self.consuming.get(dimension, [])
        return min((self.order[use.op] for use in uses), default=len(self.order))

    def depth(self, leaf: int) -> int:
        """Number of scans that slice a leaf."""
        return max(self.def_use.views[value].depth for value in self.def_use.views_of[leaf])

    def first_user(self, leaf: int) -> str:
        """Words for the first operation that is more than a view of a leaf."""
        for view in self.def_use.views_of[leaf]:
            for op in self.def_use.used_by.get(view, []):
                if op.outs[0] not in self.def_use.views:
                    return f": it goes into `{op.name}`"
        return ""


def _first_readers(graph: Graph, uses: Iterable[tuple[int, Product]]) -> dict[Value, int]:
    """For every value from which one of these uses is computed, the first of them by number."""
    first: dict[Value, int] = {}
    for number, use in uses:
        first.setdefault(use.input_value, number)
    for op in reversed(graph.ops):
        found = [first[v] for v in op.outs if v in first]
        for value in op.ins if found else ():
            first[value] = min(first.get(value, found[0]), *found)
    return first


def kernel_atoms(axes: Axes, use: Product) -> tuple[list[Atom], list[Atom]]:
    """Atoms of the kept and of the contracted axes of a use's kernel, whether or not it is a plain matrix."""
    kernel = axes[use.op.ins[use.operand]]
    if use.op.name == "dot_general":
        sides = contraction(use.op)
        kept, summed = sides.free[use.operand], sides.contracted[use.operand]
    else:
        kernel_out, kernel_in, *_ = use.op.params["dimension_numbers"].rhs_spec
        kept, summed = (kernel_out,), (kernel_in,)
    return [a for d in kept for a in parts(kernel[d])], [a for d in summed for a in parts(kernel[d])]
