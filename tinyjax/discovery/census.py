"""A census of the axes of all parameters: no hidden dimension is missed in silence.

Every axis of everything made of parameters, where it meets the activations, is accounted for: it is one of the data
(`observed`), an output of the model, a part of a listed dimension, or counts layers, pixels or entries of a store. What
is left is a hidden dimension that no product with a parameter writes and reads, and is listed with what does so
instead. The census is one sweep over the operations forward and one back.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.observed import Observed
from tinyjax.discovery.dimensions.primitive_rules import INDEXED, PIXELS, RULES, STACK, STEPS
from tinyjax.discovery.dimensions.primitives import ALONG, JOINED, REDUCTIONS, contraction
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.graph import MATMULS, VIEWS, Op, Value
from tinyjax.discovery.graph.liveness import behind_loss

_Axes = Sequence[Sequence[Atom]]
_LINEAR = VIEWS | frozenset(
    """add add_any sub neg reduce_sum broadcast_in_dim concatenate stack unstack scan_out scan_carry cond_out cumsum rev
    stop_gradient psum reduce_precision""".split()
)
_PICKING = frozenset("slice split dynamic_slice gather select_n pad".split())
_MIXING = frozenset("sort cumsum cumprod cummax cummin cumlogsumexp".split())
_CUTTING = ALONG | {"concatenate", "gather", "stack", "unstack", "reshape", "squeeze"}


class Missed(NamedTuple):
    """A hidden dimension that no product with a parameter writes and reads.

    Attributes:
        dimension: the dimension.
        leaf: a leaf it comes from.
        op: the operation in which it first meets the activations.
        reason: why it cannot grow.
    """

    dimension: Atom
    leaf: int
    op: Op
    reason: str


class _Ending(NamedTuple):
    """An operation behind which a tensor of activations no longer has a dimension, and which operand that was."""

    op: Op
    operand: int


class Census:
    """What becomes of the axes of all parameters.

    Attributes:
        missed: the hidden dimensions that are not among those listed already, in the order of the model.
        unseen: leaves that meet no activation in an operation that can be looked into.
    """

    def __init__(self, model: Dimensions, listed: Iterable[Atom]):
        self._model, self._axes, self._origin = model, model.axes, model.def_use.origin
        self._observed = Observed(model.graph, model.axes)
        needed = behind_loss(model.graph)
        self._ops = [op for op in model.graph.ops if any(v in needed for v in op.outs)]
        self._source = {value: leaf for leaf, value in enumerate(model.graph.params)}
        self._useful: set[Value] = set()  # made of parameters, and meets the activations
        self._open = self._find_open()
        self._endings: dict[Atom, list[_Ending]] = {}
        self._entered: dict[Atom, tuple[int, Op]] = {}  # with the leaf behind it, and the operation that meets it first
        self._pieces: dict[Atom, dict[Atom, None]] = {}  # what becomes of a dimension that is cut or concatenated
        self._cuts: set[Op] = set()
        self._mixed: set[Atom] = set()  # entries that depend on all of another dimension
        self._whole: dict[Atom, dict[Atom, None]] = {}  # the other way round
        self._reached: set[Atom] = set()  # by activations
        for op in self._ops:
            self._look_at(op)
        for op in reversed(self._ops):
            if any(v in self._useful for v in op.outs):
                self._useful.update(v for v in op.ins if v in self._source)
        self.unseen = [leaf for leaf, value in enumerate(model.graph.params) if value not in self._useful]
        self._accounted: dict[Atom, bool] = {}
        self.missed = self._find_missed({root(dimension) for dimension in listed})

    def _find_missed(self, listed: set[Atom]) -> list[Missed]:
        left = [atom for atom in self._entered if atom not in listed and not self._is_accounted(atom)]
        left = [atom for atom in left if not self._joined(atom) & listed]
        among = set(left)  # of a dimension and what it is cut into the first is listed
        first = [a for a in left if not any(b in among and b is not a for b in self._whole.get(a, ()))]
        return [Missed(atom, *self._entered[atom], self._reason(atom)) for atom in first]

    def _find_open(self) -> set[Value]:
        """Values behind which the model goes on: something else follows than sums and means on the way to the loss."""
        found: set[Value] = set()
        samples = set(self._axes.sample_atoms())
        for op in reversed(self._ops):
            goes_on = any(v in found for v in op.outs)
            rows = bool(op.scans) or any(a in samples for v in op.outs for axis in self._axes[v] for a in roots(axis))
            found.update(v for i, v in enumerate(op.ins) if goes_on or (rows and not self._is_linear(op, i)))
        return found

    def _is_linear(self, op: Op, operand: int) -> bool:
        """Whether an operation only adds up an operand, or weights it by what no parameter is in."""
        if op.name in _LINEAR:
            return True
        if op.name in _PICKING:
            return operand > 0 if op.name == "select_n" else operand == 0
        if op.name in ("mul", "dot_general") or (op.name == "div" and operand == 0):
            return not any(v in self._observed.of_parameters for i, v in enumerate(op.ins) if i != operand)
        return False

    def _look_at(self, op: Op) -> None:
        before = [[roots(axis) for axis in self._axes[v]] for v in op.ins]
        after = [[roots(axis) for axis in self._axes[v]] for v in op.outs]
        kept = {a for axes in after for axis in axes for a in axis}
        alone = all(self._axes.parameter_only(v) for v in op.ins)
        if alone:
            sources = [v for v in op.ins if v in self._source]
            if sources:
                leaf = self._source[max(sources, key=lambda v: len(v.shape))]
                self._source.update(dict.fromkeys(op.outs, leaf))
        for i, (value, axes) in enumerate(zip(op.ins, before)):
            if value in self._source and op.name in RULES and (self._multiplies(op) if alone else value.shape):
                self._useful.add(value)
                for a in _flat(axes):
                    self._entered.setdefault(a, (self._source[value], op))
            elif not alone and value in self._observed.of_parameters and value not in self._source:
                for atom in set(_flat(axes)) - kept - self._observed.copies:
                    self._endings.setdefault(atom, []).append(_Ending(op, i))
        if not alone:
            self._reached |= kept.union(*map(_flat, before)) if op.name in RULES else kept
            self._connect(op, before, after)

    def _multiplies(self, op: Op) -> bool:
        """Whether an operation multiplies two tensors and sums along what they share."""
        if op.name == "reduce_sum":
            maker = self._model.def_use.made_by.get(self._origin(op.ins[0]))
            return maker is not None and maker.name == "mul" and self._are_two(maker)
        return op.name in MATMULS and self._are_two(op)

    def _are_two(self, op: Op) -> bool:
        """Whether the operands of a product are two tensors, both made with parameters."""
        first, second = (self._origin(v) for v in op.ins[:2])
        return first is not second and all(v in self._observed.of_parameters for v in (first, second))

    def _connect(self, op: Op, before: Sequence[_Axes], after: Sequence[_Axes]) -> None:
        """Notes what a cut or a join makes of the dimension that it works along."""
        for old_axes, new_axes in self._turned(op, before, after):
            pairs = zip(old_axes, new_axes)
            if len(old_axes) != len(new_axes):
                pairs = [(_flat(old_axes), _flat(new_axes))]
            for old, new in pairs:
                for a, b in ((a, b) for a in old if a not in new for b in new if b not in old):
                    self._cuts.add(op)
                    if op.name in _MIXING:
                        self._mixed.add(b)
                    self._pieces.setdefault(a, {})[b] = None
                    self._whole.setdefault(b, {})[a] = None

    def _turned(self, op: Op, before: Sequence[_Axes], after: Sequence[_Axes]) -> list[tuple[_Axes, _Axes]]:
        """The axes that an operation makes of others: cuts and joins, windows, groups, a product with a constant."""
        if op.name == "conv_general_dilated":
            numbers, new = op.params["dimension_numbers"], [after[0][op.params["dimension_numbers"].out_spec[1]]]
            return [([before[0][numbers.lhs_spec[1]]], new), ([before[1][numbers.rhs_spec[0]]], new)]
        if op.name == "dot_general":
            sides = contraction(op)
            summed, free = (
                [_flat([before[k][d] for d in dims[k]]) for k in (0, 1)] for dims in (sides.contracted, sides.free)
            )
            return [([summed[1 - k]], [free[k]]) for k in (0, 1) if self._observed.is_constant(op.ins[k])]
        if op.name in _CUTTING or op.name not in RULES or op.name.startswith("reduce_window"):
            return [(old, new) for old in (before[:1] if op.name == "gather" else before) for new in after]
        return []

    def _joined(self, atom: Atom) -> set[Atom]:
        """All that a dimension is cut into or joined with."""
        found, queue = {atom}, [atom]
        while queue:
            a = queue.pop()
            near = [*self._pieces.get(a, ()), *self._whole.get(a, ())]
            new = [b for b in near if b not in found and b not in self._observed]
            found.update(new)
            queue += new
        return found

    def _is_accounted(self, atom: Atom) -> bool:
        """Whether a dimension is one of the data, an output, or counts layers, pixels or entries of a store."""
        if atom not in self._accounted:
            self._accounted[atom] = False  # while it is looked into
            self._accounted[atom] = self._is_known(atom) or self._is_output(atom)
        return self._accounted[atom]

    def _is_known(self, atom: Atom) -> bool:
        if atom in self._observed or STEPS in atom.marks or (INDEXED in atom.marks and atom not in self._endings):
            return True
        if PIXELS in atom.marks and atom not in self._model.producing:
            return True
        if atom not in self._reached:  # inputs that are constants
            return atom in self._observed.constant
        if atom not in self._endings:  # copies of one entry
            return True
        whole = self._whole.get(atom, ())
        joined = bool(whole) or JOINED in atom.marks or STACK in atom.marks  # of tensors without this axis
        return joined and all(self._is_accounted(source) for source in whole)

    def _is_output(self, atom: Atom) -> bool:
        """Whether all that follows where a dimension ends is sums and means on the way to the loss."""
        endings = self._endings.get(atom, ())
        for op, _ in endings:
            pieces = self._pieces.get(atom, ()) if op in self._cuts else ()
            cut = bool(pieces) or (op.name in _PICKING and atom not in self._mixed)  # entries told apart by code
            if cut and all(self._is_accounted(piece) for piece in pieces):
                continue
            if any(out in self._open for out in op.outs) or self._multiplies(op):
                return False
        return bool(endings)

    def _reason(self, atom: Atom) -> str:
        """What writes or reads a dimension in the place of a product with a parameter."""
        leaf, op = self._entered[atom]
        name = self._model.names[leaf]
        if atom in self._model.obstructed:
            return self._model.obstructed[atom]
        if atom not in self._reached:
            return f"`{name}` is multiplied by other parameters along it, in `{op.name}`, before it meets an activation"
        if atom not in self._model.producing:
            return f"no matrix product with a parameter writes it: `{name}` meets the activations in `{op.name}`"
        readers = [ending.op for ending in self._endings.get(atom, ())]
        reader = next((r for r in readers if r.name not in MATMULS or self._are_two(r)), None)
        if reader is None:
            return f"`{name}` writes it, and nothing reads it"
        return f"no matrix product with a parameter reads it: {_reads(reader)}"


def _reads(op: Op) -> str:
    if op.name in MATMULS:
        return f"`{op.name}` multiplies two activations along it"
    return f"`{op.name}` is taken over it" if op.name in REDUCTIONS else f"`{op.name}` does"


def _flat(axes: _Axes) -> list[Atom]:
    return [a for axis in axes for a in axis]
