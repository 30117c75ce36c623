"""Dimensions of the data: the inputs, targets and labels of a model, which are no hidden dimensions.

An axis is one of the data where a tensor made of the batch alone varies along it (features, targets, classes of one-hot
labels), or where entries are picked by the data (the rows of an embedding). Axes that data is merely broadcast along
are not, nor are those of random draws, whatever the batch holds as key.
"""

from collections.abc import Mapping

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitive_rules import whole_in_gather
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, INPUT, RANDOM, REDUCTIONS, contraction
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.graph import Graph, Op, Value

NOTHING = frozenset[int]()


class Observed:
    """What the data says about dimensions.

    Attributes:
        of_data: values that depend on the batch.
        of_parameters: values that depend on parameters.
        constant: dimensions along which a constant varies.
        copies: dimensions along which everything is one entry broadcast.
    """

    def __init__(self, graph: Graph, axes: Axes):
        self.of_data = {value for value in graph.batch if _is_number(value)}
        self.of_parameters = set(graph.params)
        self._axes = axes
        varies = {value: _every(value) for value in (*graph.params, *graph.batch)}
        seen: list[Atom] = []
        constant: list[Atom] = []
        for op in graph.ops:
            for values, known in ((op.ins, self.of_data), (op.ins, self.of_parameters)):
                if any(v in known for v in values):
                    known.update(v for v in op.outs if _is_number(v))
            seen += self._looked_up(op)
            constant += [a for v in op.ins if v.kind == "const" and v.shape for axis in axes[v] for a in roots(axis)]
            varies.update((out, self._along(op, out, varies)) for out in op.outs)
        copied, varied = set[Atom](), set[Atom]()
        for value, dims in varies.items():
            for d, axis in enumerate(axes[value]):
                found = roots(axis)
                if len(found) == 1:
                    (varied if d in dims else copied).update(found)
                if d in dims and value not in self.of_parameters:
                    (seen if value in self.of_data else constant).extend(found)
        self._seen = {root(atom) for atom in seen}
        self.constant = {root(atom) for atom in constant}
        self.copies = copied - varied

    def __contains__(self, dimension: Atom) -> bool:
        return dimension in self._seen or INPUT in dimension.marks or dimension in self._axes.sample_atoms()

    def is_constant(self, value: Value) -> bool:
        """Whether neither data nor parameters are in a value."""
        return value not in self.of_data and value not in self.of_parameters

    def _along(self, op: Op, out: Value, varies: Mapping[Value, frozenset[int]]) -> frozenset[int]:
        """The axes along which a result varies."""
        ins = [varies.get(v, _every(v) if v.kind == "const" else NOTHING) for v in op.ins]
        if op.name in RANDOM or not _is_number(out):
            return NOTHING
        if op.name == "iota":
            return frozenset({op.params["dimension"]})
        if op.name == "broadcast_in_dim":
            targets = op.params["broadcast_dimensions"]
            return frozenset(targets[d] for d in ins[0] if op.ins[0].shape[d] == out.shape[targets[d]])
        if op.name == "transpose":
            return frozenset(d for d, source in enumerate(op.params["permutation"]) if source in ins[0])
        if op.name in ELEMENTWISE:
            return NOTHING.union(*(dims for dims, v in zip(ins, op.ins) if len(v.shape) == len(out.shape)))
        if op.name == "dot_general":
            sides = contraction(op)
            order = [(0, d) for d in sides.batched[0]] + [(k, d) for k in (0, 1) for d in sides.free[k]]
            return frozenset(i for i, (k, d) in enumerate(order) if d in ins[k])
        if op.name in REDUCTIONS:
            kept = [d for d in range(len(op.ins[0].shape)) if d not in op.params["axes"]]
            return frozenset(i for i, d in enumerate(kept) if d in ins[0])
        if op.name in ("reshape", "squeeze"):
            varying = {a for d in ins[0] for a in roots(self._axes[op.ins[0]][d])}
            return frozenset(d for d, axis in enumerate(self._axes[out]) if varying & set(roots(axis)))
        return _every(out) if any(ins) else NOTHING

    def _looked_up(self, op: Op) -> list[Atom]:
        """The axes of a table along which entries are picked by the data."""
        if op.name == "gather" and op.ins[1] in self.of_data:
            picked = [d for d in op.params["dimension_numbers"].start_index_map if not whole_in_gather(op, d)]
        elif op.name == "dynamic_slice" and any(v in self.of_data for v in op.ins[1:]):
            picked = [d for d, n in enumerate(op.ins[0].shape) if op.params["slice_sizes"][d] < n]
        else:
            return []
        return [a for d in picked for a in roots(self._axes[op.ins[0]][d])]


def _every(value: Value) -> frozenset[int]:
    return frozenset(d for d, n in enumerate(value.shape) if n > 1)


def _is_number(value: Value) -> bool:
    """Whether a value is an array of numbers, no random key."""
    return not str(value.dtype).startswith("key")
