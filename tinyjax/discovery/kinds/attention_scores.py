"""Queries, keys and scores of attention as matrices, and the weights made of the scores."""

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.dimensions import Dimensions, kernel_atoms
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, REDUCTIONS, contraction
from tinyjax.discovery.dimensions.products import Product, array_layout
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.def_use import is_view
from tinyjax.discovery.graph.graph import Address, Op, Value
from tinyjax.discovery.paths.refusals import CannotGrow

SAMPLE, HEAD, QUERY_HEAD, TOKEN, KEY = range(5)  # what a factor of the scores counts; KEY: the tokens of the keys

Kind = Callable[[Atom | None, int], int]


class Attention(NamedTuple):
    """The weights that a softmax makes of the scores, where they are found.

    Attributes:
        address: of the operation that reads them.
        operand: which operand of it.
        layout: of the weights, rows in the order of the scores.
    """

    address: Address
    operand: int
    layout: Layout


class ScoreLayouts:
    """Queries, keys and scores as matrices whose rows are (samples, heads, queries a head, tokens)."""

    def __init__(self, model: Dimensions, op: Op, stacked: bool, query_side: int, kind: Kind):
        self._model, self._op, self._stacked = model, op, stacked
        key_side = 1 - query_side
        sides = contraction(op)
        self.queries, found = self._lay_out("queries", sides.contracted[query_side], query_side, kind)
        self.keys, key_found = self._lay_out("keys", sides.contracted[key_side], key_side, kind)
        rank = len(op.outs[0].shape)
        free = (len(sides.free[0]), len(sides.free[1]))
        batch = rank - sum(free)
        left = tuple(range(batch, batch + free[0]))
        right = tuple(range(batch + free[0], rank))
        self._key_axes = right if query_side == 0 else left
        if any(k == TOKEN for d in range(batch) for k in self._kinds(op.outs[0], d, query_side, kind)):
            raise CannotGrow("its scores are taken within windows of tokens")
        key_kinds = {k for d in self._key_axes for k in self._kinds(op.outs[0], d, key_side, kind)}
        if not key_kinds <= {TOKEN}:
            raise CannotGrow("its scores have heads of keys that no query has")
        self._kind, self._side = kind, query_side
        self.scores, sizes, _ = self._score_layout(op.outs[0], "scores", self._key_axes)
        self.sizes = (found[SAMPLE], found[HEAD], found[QUERY_HEAD], found[TOKEN], sizes[KEY])
        self.repeated = key_found[QUERY_HEAD]
        if key_found[TOKEN] != sizes[KEY] or found[SAMPLE] != key_found[SAMPLE] or found[HEAD] != key_found[HEAD]:
            raise CannotGrow("its queries and keys have other rows than their scores")

    def _kinds(self, value: Value, axis: int, side: int, kind: Kind) -> list[int]:
        return [kind(atom, side) for atom in roots(self._model.axes[value][axis])]

    def _lay_out(self, name: str, cols: tuple[int, ...], side: int, kind: Kind) -> tuple[Layout, list[int]]:
        value = self._op.ins[side]
        rows = tuple(d for d in range(len(value.shape)) if d not in cols)
        layout, atoms = array_layout(
            name, self._op, self._stacked, self._model.axes[value], rows, cols, self._model.axes.steps
        )
        return _sorted(layout, [kind(atoms[f], side) for f in layout.rows])

    def _score_layout(self, value: Value, name: str, key_axes: Sequence[int]) -> tuple[Layout, list[int], list[Atom]]:
        """The layout, the number of entries of each kind, and what the rows count where they count several."""
        every = tuple(range(len(value.shape)))
        layout, atoms = array_layout(
            name, self._op, self._stacked, self._model.axes[value], every, (), self._model.axes.steps
        )
        depth = len(self._op.scans)
        keys = {depth + d for d in key_axes}
        kinds = [
            KEY if layout.axes[f] in keys and layout.factors[f] > 1 else self._kind(atoms[f], self._side)
            for f in layout.rows
        ]
        layout, sizes = _sorted(layout, kinds)
        counted = [root(a) for f in layout.rows if (a := atoms[f]) is not None]
        return layout, sizes, counted

    def attention(self) -> Attention | None:
        """The weights in the order of the scores; None where they are not found or their axes are others.

        They are what the first product of activations reads that is computed from scores entry by entry, or normalised.
        """
        scores = self._op.outs[0]
        reached: dict[Value, tuple[int, ...]] = {scores: self._key_axes}
        walk = self._model.def_use.walk(reached)
        for op in walk:
            hit = [i for i, v in enumerate(op.ins) if v in reached]
            if op.name == "dot_general":
                return self._read_by(op, hit[0], reached[op.ins[hit[0]]]) if len(hit) == 1 else None
            axes = [moved for i in hit if (moved := _moved(op, i, reached[op.ins[i]])) is not None]
            if axes:
                reached.update(dict.fromkeys(op.outs, max(axes, key=len)))
                walk.reach(op.outs)
        return None

    def _read_by(self, op: Op, operand: int, key_axes: tuple[int, ...]) -> Attention | None:
        if op.scans != self._op.scans or op.inside or not key_axes:
            return None
        layout, *rest = self._score_layout(op.ins[operand], "attention", key_axes)
        _, *wanted = self._score_layout(self._op.outs[0], "scores", self._key_axes)
        return Attention(op.path, operand, layout) if rest == wanted else None


def _sorted(layout: Layout, kinds: Sequence[int]) -> tuple[Layout, list[int]]:
    """The layout with its rows in the order of their kinds, and the number of entries of each kind."""
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    sizes = [1] * (KEY + 1)
    for f, which in zip(layout.rows, kinds):
        sizes[which] *= layout.factors[f]
    return dataclasses.replace(layout, rows=tuple(layout.rows[i] for i in order)), sizes


def _moved(op: Op, operand: int, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where an operation between scores and weights puts some axes of an operand; None where that cannot be said."""
    before, after = op.ins[operand].shape, op.outs[0].shape
    if op.name == "transpose":
        return tuple(op.params["permutation"].index(d) for d in axes)
    if op.name == "broadcast_in_dim":
        return tuple(op.params["broadcast_dimensions"][d] for d in axes)
    if op.name in REDUCTIONS:
        left = [d for d in range(len(before)) if d not in op.params["axes"]]
        return tuple(left.index(d) for d in axes if d in left)
    if op.name in ELEMENTWISE:
        return axes
    long, now = [d for d, n in enumerate(before) if n > 1], [d for d, n in enumerate(after) if n > 1]
    if not is_view(op) or [before[d] for d in long] != [after[d] for d in now] or not set(axes) <= set(long):
        return None
    return tuple(now[long.index(d)] for d in axes)


_CUTS = frozenset("split stack slice dynamic_slice gather concatenate complex rev".split())
_TURNS = frozenset("mul add add_any sub neg convert_element_type broadcast_in_dim real imag conj pad".split())
_JOINS = frozenset("concatenate stack complex add add_any sub".split())


def counts_heads(model: Dimensions, dimension: Atom) -> bool:
    """Whether several products write a dimension along which scores are taken side by side, and another reads it."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    return (
        len(producers) > 1
        and bool(consumers)
        and score_op(model, dimension) is None
        and bool(scores_beside(model, dimension))
    )


def is_shared(model: Dimensions, dimension: Atom) -> bool:
    """Whether a dimension counts queries that share the keys of one head."""
    beside = [root(a) for use in model.producing.get(dimension, []) for a in kernel_atoms(model.axes, use)[0]]
    return bool(model.consuming.get(dimension)) and any(
        a is not dimension and score_op(model, a) is not None and not model.consuming.get(a) for a in beside
    )


def is_turned(model: Dimensions, producers: Sequence[Product]) -> bool:
    """Whether a product reaches scores through a cut and a join of its axes, as rotary embeddings do."""
    for use in producers:
        reached = dict.fromkeys(use.op.outs, frozenset[str]())
        walk = model.def_use.walk(use.op.outs)
        for op in walk:
            hit = [reached[v] for v in op.ins if v in reached]
            done = frozenset[str]().union(*hit)
            if op.name in _JOINS and _meets_activations(model, op, reached):
                continue  # a residual sum: what lies behind it may be the whole network
            if op.name in _CUTS | _TURNS or is_view(op):
                reached.update(dict.fromkeys(op.outs, done | _done_by(model, op, len(hit), done)))
                walk.reach(op.outs)
            elif op.name == "dot_general" and done == {"cut", "joined", "turned"}:
                return not any(model.axes.parameter_only(v) for v in op.ins)
    return False


def _meets_activations(model: Dimensions, op: Op, reached: Container[Value]) -> bool:
    """Whether an operation joins what is followed with other activations, as a residual sum does."""
    return any(v not in reached and v.shape and not model.axes.parameter_only(v) for v in op.ins)


def _done_by(model: Dimensions, op: Op, inside: int, done: frozenset[str]) -> frozenset[str]:
    """What an operation adds to a rotation: halves or pairs are cut, multiplied by angles and joined again."""
    if op.name in ("mul", "complex") and inside < len(op.ins):
        angles = [v for v in op.ins if v.shape and model.def_use.scalar(v) is None and not _is_learned(model, v)]
        return frozenset({"turned"} if angles else ())
    if inside > 1 and done and op.name in _JOINS:
        return frozenset({"joined"})
    return frozenset({"cut"} if op.name in _CUTS - {"concatenate", "stack", "complex"} else ())


def _is_learned(model: Dimensions, value: Value) -> bool:
    """Whether a value is a view or a broadcast of parameters."""
    return model.def_use.vector(value) is not None


def scores_beside(model: Dimensions, dimension: Atom) -> list[tuple[Op, Atom]]:
    """The scores that are taken along a dimension side by side, each with the dimension that they contract."""
    found = []
    for op in model.paired.get(dimension, []):
        sides = contraction(op)
        beside = [[a for d in dims for a in model.axes.dimensions(v)[d]] for v, dims in zip(op.ins, sides.batched)]
        summed = [a for d in sides.contracted[0] for a in model.axes.dimensions(op.ins[0])[d]]
        if all(any(a is dimension for a in side) for side in beside) and len(summed) == 1:
            (inner,) = summed
            if score_op(model, inner) is op and model.producing.get(inner):
                found.append((op, inner))
    return found


ROTARY = (
    "between queries or keys and their scores (a rotary embedding, whose angles follow from the dimension; the values "
    "can grow)"
)
NORMED = (
    "between queries or keys and their scores (a norm of them, which would count empty dimensions; the values can grow)"
)


def score_op(model: Dimensions, dimension: Atom) -> Op | None:
    """The product of two activations that contracts a dimension, and nothing else; None if there is none or several."""
    found = model.summed.get(dimension, [])
    if len(found) != 1:
        return None
    (op,) = found
    summed = [
        [a for d in dims for a in model.axes.dimensions(v)[d]] for v, dims in zip(op.ins, contraction(op).contracted)
    ]
    return op if all(side == [dimension] for side in summed) else None
