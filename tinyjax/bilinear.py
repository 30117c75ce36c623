"""The query-key dimension of attention: two products contracted with each other, token by token.

A slot adds (alpha' x_i)(omega' x_j) to the score of query i and key j. V_goal is taken at the scores, alpha is the
fan-in of the query's slot and omega, the fan-in of the key's, takes the place of a fan-out: its kernel is read with
slots as rows. Every head has scores of its own, so heads are layers of a stack. A head of keys that several queries
share has one omega, and one alpha for each of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tinyjax.atoms import Atom, root, roots
from tinyjax.capture import Address
from tinyjax.dimensions import Dimensions
from tinyjax.flow import Flow
from tinyjax.geometry import Unaligned
from tinyjax.layout import Layout
from tinyjax.rules import ELEMENTWISE, REDUCTIONS, contraction
from tinyjax.tangent import Tangent, slot_path
from tinyjax.trace import VIEWS, Op, Value
from tinyjax.uses import Use, array_layout
from tinyjax.wiring import is_view

_LAYOUT = VIEWS | {"broadcast_in_dim"}
SAMPLE, HEAD, QUERY_HEAD, TOKEN, KEY = range(5)  # what a factor of the scores counts; KEY: the tokens of the keys


ROTARY = (
    "between queries or keys and their scores (a rotary embedding, whose angles follow from the dimension? The values "
    "can grow)"
)
NORMED = (
    "between queries or keys and their scores (a norm of them, which would count empty dimensions? The values can grow)"
)

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


class Pair(NamedTuple):
    """What a path of queries and keys has besides the product that makes the queries.

    Attributes:
        key: the product that makes the keys, its kernel read with slots as rows.
        projected: the same product as it stands.
        queries: from the query's product to the scores.
        keys: from the key's product to the scores.
        sizes: samples, heads, queries a head, tokens of the queries, tokens of the keys.
        repeated: how often the keys of a head are repeated before the scores (1 or the queries a head).
        attention: the weights, None where they are not found.
        power: p where scores are multiplied by capacity^-p (1/2, or 1), which follows the capacity; 0 elsewhere.
    """

    key: Use
    projected: Use
    queries: Tangent
    keys: Tangent
    sizes: tuple[int, int, int, int, int]
    repeated: int
    attention: Attention | None
    power: float


def score_op(model: Dimensions, dimension: Atom) -> Op | None:
    """The product of two activations that contracts a dimension, and nothing else; None if there is none or several."""
    found = []
    for op in model.graph.ops:
        if op.name != "dot_general" or any(model.axes.parameter_only(v) for v in op.ins):
            continue
        gone = zip(op.ins, contraction(op).contracted)
        summed = [[a for d in dims for a in roots(model.axes[v][d])] for v, dims in gone]
        if any(a is dimension for side in summed for a in side):
            found.append((op, summed))
    if len(found) != 1:
        return None
    ((op, summed),) = found
    return op if all(side == [dimension] for side in summed) else None


def find_pair(
    model: Dimensions, op: Op, producers: Sequence[Use], dimension: Atom
) -> tuple[Use, Use, Pair, dict[int, str], set[Op]]:
    """The query's product and the scores as its consumer, the keys, the roles of vectors met, the operations seen.

    Raises:
        Unaligned: with the reason.
    """
    if len(producers) != 2:
        raise Unaligned(f"it is made by {len(producers)} products where a query and a key are two")
    for use in producers:
        if use.trouble:
            raise Unaligned(use.trouble)
    flows = [Flow(model.graph, model.axes, model.wiring, use, dimension) for use in producers]
    sides = [next((i for i, v in enumerate(op.ins) if v in flow.mixing), None) for flow in flows]
    if sorted(map(str, sides)) != ["0", "1"] or op.inside:
        raise Unaligned("its scores are not the product of one query and one key")
    marks = [why for why in dimension.marks if "pairs two activations" not in why]
    if marks:
        raise Unaligned(f"{marks[0]}; {NORMED}" if "are mixed by" in marks[0] else marks[0])
    heads = [_columns(use, dimension) for use in producers]
    # the side with more heads are the queries; of equals, the first
    order = (0, 1) if len(heads[0]) >= len(heads[1]) else (1, 0)
    query, key = (producers[i] for i in order)
    query_flow, key_flow = (flows[i] for i in order)
    query_side, key_side = (sides[i] for i in order)
    assert query_side is not None and key_side is not None
    shared, own = heads[order[1]], [a for a in heads[order[0]] if a not in heads[order[1]]]
    if not set(shared) <= set(heads[order[0]]) or len(shared) > 1 or len(own) > 1 or (own and query.bias is not None):
        raise Unaligned(f"`{query.leaf}` and `{key.leaf}` come in heads that cannot be paired")
    samples = root(model.axes.samples)
    if query.op.scans != op.scans or key.op.scans != op.scans or bool(query.kernel.stack) != bool(op.scans):
        raise Unaligned("its scores are made in another scan than its queries and keys")
    if len(query.kernel.stack) != len(key.kernel.stack):
        raise Unaligned("its queries and keys come from layers of different stacks")

    def kind(atom: Atom | None, side: int) -> int:
        if atom is None or root(atom) is samples:
            return SAMPLE
        if root(atom) in shared:
            return HEAD
        if root(atom) in own or (side == key_side and root(atom) in heads[order[0]]):
            return QUERY_HEAD
        return TOKEN

    layouts = _Layouts(model, op, bool(query.kernel.stack), query_side, kind)
    pair_sizes, repeated = layouts.sizes, layouts.repeated
    if pair_sizes[0] != samples.size:
        raise Unaligned("its scores do not have the samples as rows")
    kept = {dimension, *heads[0], *heads[1]}
    kernels = frozenset(use.op for use in model.uses)
    queries, keys = (
        slot_path(model.graph, model.axes, model.wiring, flow, use, dimension, op.ins[side], layout, kept, kernels)
        for flow, use, side, layout in (
            (query_flow, query, query_side, layouts.queries),
            (key_flow, key, key_side, layouts.keys),
        )
    )
    met = {leaf: found for flow in flows for leaf, found in flow.met.items()}
    for leaf, found in met.items():
        if len(found) > 1 or found[0].op.name not in ("add", "add_any") or found[0].through - _LAYOUT:
            acts = f"`{model.names[leaf]}` acts on queries or keys by `{found[0].op.name}`"
            raise Unaligned(f"{acts} (a norm of them?)")

    attention = layouts.attention()
    scores = dataclasses.replace(
        query, op=op, operand=key_side, inputs=layouts.queries, outputs=layouts.scores, bias=None, rows=()
    )
    power = _power(model, op, (*queries.ops, *keys.ops), dimension.size)
    pair = Pair(_as_fan_out(key, dimension), key, queries, keys, pair_sizes, repeated, attention, power)
    seen = {query.op, key.op, *(found[0].op for found in met.values())}
    return _as_fan_in(query, dimension, shared), scores, pair, dict.fromkeys(met, "shift"), seen


class _Layouts:
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
            raise Unaligned("its scores are taken within windows of tokens")
        key_kinds = {k for d in self._key_axes for k in self._kinds(op.outs[0], d, key_side, kind)}
        if not key_kinds <= {TOKEN}:
            raise Unaligned("its scores have heads of keys that no query has")
        self._kind, self._side = kind, query_side
        self.scores, sizes, _ = self._score_layout(op.outs[0], "scores", self._key_axes)
        self.sizes = (found[SAMPLE], found[HEAD], found[QUERY_HEAD], found[TOKEN], sizes[KEY])
        self.repeated = key_found[QUERY_HEAD]
        if key_found[TOKEN] != sizes[KEY] or found[SAMPLE] != key_found[SAMPLE] or found[HEAD] != key_found[HEAD]:
            raise Unaligned("its queries and keys have other rows than their scores")

    def _kinds(self, value: Value, axis: int, side: int, kind: Kind) -> list[int]:
        return [kind(atom, side) for atom in roots(self._model.axes[value][axis])]

    def _lay_out(self, name: str, cols: tuple[int, ...], side: int, kind: Kind) -> tuple[Layout, list[int]]:
        value = self._op.ins[side]
        rows = tuple(d for d in range(len(value.shape)) if d not in cols)
        layout, atoms = array_layout(name, self._op, self._stacked, self._model.axes[value], rows, cols)
        return _sorted(layout, [kind(atoms[f], side) for f in layout.rows])

    def _score_layout(self, value: Value, name: str, key_axes: Sequence[int]) -> tuple[Layout, list[int], list[Atom]]:
        """The layout, the number of entries of each kind, and what the rows count where they count several."""
        every = tuple(range(len(value.shape)))
        layout, atoms = array_layout(name, self._op, self._stacked, self._model.axes[value], every, ())
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
        for op in self._model.graph.ops[self._model.order[self._op] + 1 :]:
            hit = [i for i, v in enumerate(op.ins) if v in reached]
            if hit and op.name == "dot_general":
                return self._read_by(op, hit[0], reached[op.ins[hit[0]]]) if len(hit) == 1 else None
            if hit:
                axes = [moved for i in hit if (moved := _moved(op, i, reached[op.ins[i]])) is not None]
                reached.update({out: max(axes, key=len) for out in op.outs if axes})
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


def _power(model: Dimensions, op: Op, before: Sequence[Op], capacity: int) -> float:
    """The p of a factor capacity^-p on queries, keys or scores; 0 where the factor is another."""
    value, after = op.outs[0], []
    while len(users := model.wiring.used_by.get(value, [])) == 1 and len(users[0].outs) == 1:
        if not (is_view(users[0]) or users[0].name in ("mul", "div", "broadcast_in_dim")):
            break
        after.append(users[0])
        value = users[0].outs[0]
    factors = [1.0]
    for scaling in (*before, *after):
        if scaling.name in ("mul", "div"):
            numbers = [found for v in scaling.ins if (found := _number(model, v)) is not None]
            factors += [float(numbers[0]) ** (-1 if scaling.name == "div" else 1)] if numbers else []
    # all together (both sides scaled by the fourth root), or one of them (a cap of scores brings numbers of its own)
    factors = [math.prod(factors), *factors[1:]]
    return next((p for p in (0.5, 1.0) for x in factors if abs(x * capacity**p - 1) < 1e-4), 0.0)


def _number(model: Dimensions, value: Value) -> Any:
    """What a value holds throughout, where it is computed from numbers alone (`1 / jnp.sqrt(depth)`)."""
    if value.const is not None:
        return np.asarray(value.const, value.dtype)
    op = model.wiring.made_by.get(value)
    if op is None or op.name == "scan_in":
        return None
    if is_view(op) or op.name == "broadcast_in_dim":
        return _number(model, op.ins[0])
    operands = [_number(model, v) for v in op.ins]
    if op.eqn is None or op.name not in ELEMENTWISE or any(x is None for x in operands):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(op.eqn.primitive.bind(*operands, **op.params))


def _columns(use: Use, dimension: Atom) -> list[Atom]:
    """The dimensions that a product makes next to its slots."""
    atoms = [use.output_atoms[f] for f in use.outputs.cols]
    return [root(a) for a in atoms if a is not None and root(a) is not dimension]


def _as_fan_in(use: Use, dimension: Atom, shared: Sequence[Atom]) -> Use:
    """The query's kernel with heads as layers, and the queries of a head in front of its rows."""
    columns = [root(a) for f in use.outputs.cols if (a := use.output_atoms[f]) is not None]

    def lift(layout: Layout) -> Layout:
        long = [f for f in layout.cols if layout.factors[f] > 1]
        layers = tuple(f for f, a in zip(long, columns) if a in shared)
        others = tuple(f for f, a in zip(long, columns) if a not in shared and a is not dimension)
        slots = tuple(f for f, a in zip(long, columns) if a is dimension)
        ones = tuple(f for f in layout.cols if f not in long)
        return dataclasses.replace(
            layout, stack=(*layout.stack, *layers), rows=(*ones, *others, *layout.rows), cols=slots
        )

    return dataclasses.replace(use, kernel=lift(use.kernel), bias=None if use.bias is None else lift(use.bias))


def _as_fan_out(use: Use, dimension: Atom) -> Use:
    """The key's kernel with heads as layers, slots as rows and its inputs as columns; without its bias."""
    columns = [root(a) for f in use.outputs.cols if (a := use.output_atoms[f]) is not None]
    layout = use.kernel
    long = [f for f in layout.cols if layout.factors[f] > 1]
    layers = tuple(f for f, a in zip(long, columns) if a is not dimension)
    slots = tuple(f for f, a in zip(long, columns) if a is dimension)
    ones = tuple(f for f in layout.cols if f not in long)
    kernel = dataclasses.replace(layout, stack=(*layout.stack, *layers), rows=(*ones, *slots), cols=layout.rows)
    return dataclasses.replace(use, kernel=kernel, bias=None)
