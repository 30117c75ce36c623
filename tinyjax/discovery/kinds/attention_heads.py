"""A whole attention head as a slot: which products make its queries, keys and values, and how scores become weights.

Three products write the dimension that counts heads (queries, keys, values) and one reads it. Given its pattern of
attention a new head is a neuron with several value dimensions, whose fan-in reads what the pattern collects. Patterns
of new heads are computed by the model's own operations between scores and weights, so that scales, masks and dropout
are what they are.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tinyjax.core.kinds import ATTENTION_HEADS
from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.dimensions import Dimensions, kernel_atoms
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS, ELEMENTWISE, REDUCTIONS, contraction
from tinyjax.discovery.dimensions.products import Product, aligned
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import Address, Op, Value
from tinyjax.discovery.kinds.attention_scores import Attention, scores_beside
from tinyjax.discovery.kinds.attention_values import ValuesPath
from tinyjax.discovery.kinds.hidden_layer import find_hidden_layer
from tinyjax.discovery.kinds.query_key import QueryKeyPath, find_scored
from tinyjax.discovery.paths.path import Path, Verdict
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slot_paths import Tangent, heads_as_layers, heads_first, same_along

_BENDS = frozenset("exp exp2 logistic".split())


class Replay(NamedTuple):
    """The operations between scores and the weights of the attention.

    Attributes:
        ops: in order.
        taps: by address, which operand comes from outside (a mask, a bias, dropout).
        scalars: for every other operand from outside, the number it holds everywhere.
        scores: the value they start from.
        weights: the value they end in.
    """

    ops: tuple[Op, ...]
    taps: Mapping[Address, int]
    scalars: Mapping[Value, Any]
    scores: Value
    weights: Value


@dataclasses.dataclass(frozen=True)
class HeadsPath(Path):
    """Whole attention heads: the producer makes values, the consumers read them head by head.

    Attributes:
        query: the product that makes the queries, its kernel with the query-key dimension as layers.
        key: the same of the keys.
        pair: the path of queries and keys to their scores.
        scores: layout of the scores, rows being samples, heads, tokens of the queries, tokens of the keys.
        replay: from scores to weights.
        attention: where the weights are read.
        values: the path from values to the outputs, columns being heads and value dimensions.
    """

    query: Product
    key: Product
    pair: QueryKeyPath
    scores: Layout
    replay: Replay
    attention: Attention
    values: Tangent

    kind = ATTENTION_HEADS
    between = "heads or mixed rows"

    def recorded(self) -> list[Product]:
        """Values, queries and keys."""
        return [self.producer, self.query, self.pair.projected]

    def taps(self) -> dict[Address, int]:
        """What queries, keys and values are multiplied by, and what the scores meet on their way to weights."""
        parts = (self.pair.queries.taps, self.pair.keys.taps, self.values.taps, self.replay.taps)
        return {address: operand for taps in parts for address, operand in taps.items()}


def find_scores(model: Dimensions, dimension: Atom) -> tuple[Op, Atom]:
    """The product of queries and keys of all heads, and the dimension it contracts.

    Raises:
        CannotGrow: with the reason.
    """
    found = scores_beside(model, dimension)
    if len(found) != 1:
        raise CannotGrow(f"{len(found)} products of activations look like their scores")
    return found[0]


def value_product(model: Dimensions, dimension: Atom, pair_ops: Sequence[Op]) -> tuple[Product, Atom]:
    """The product that makes the values of all heads, and the dimension of a head's values.

    Raises:
        CannotGrow: with the reason.
    """
    values = [use for use in model.producing[dimension] if use.op not in pair_ops]
    if len(values) != 1:
        raise CannotGrow(f"{len(values)} products make its values")
    (use,) = values
    inner = [root(a) for a in kernel_atoms(model.axes, use)[0] if root(a) is not dimension]
    if len(inner) != 1:
        raise CannotGrow(f"`{use.leaf}` does not make one dimension of values a head")
    return use, inner[0]


def find_replay(model: Dimensions, scores: Op, attention: Attention | None, dimension: Atom) -> Replay:
    """What the model does between scores and weights, head by head.

    Raises:
        CannotGrow: with the reason.
    """
    if attention is None:
        raise CannotGrow("the weights of its attention are not found")
    walk, behind = model.def_use.walk(scores.outs), list[Op]()
    while (reader := next(walk)).path != attention.address:
        behind.append(reader)
        walk.reach(reader.outs)
    weights, reached = reader.ins[attention.operand], walk.reached
    ops, needed = [], {weights}
    for op in reversed(behind):
        if any(v in needed for v in op.outs):
            ops.append(op)
            needed.update(v for v in op.ins if v in reached)
    if not any(op.name in _BENDS for op in ops):
        raise CannotGrow("its scores are its weights (no softmax): a new head would attend to nothing")
    taps: dict[Address, int] = {}
    scalars: dict[Value, Any] = {}
    for op in ops[::-1]:
        _require_apart(model, op, scores, dimension)
        for i, value in enumerate(op.ins):
            if value in reached:
                continue
            number = model.def_use.scalar(value)
            if number is not None:
                scalars[value] = number
            elif op.path in taps or op.inside:
                raise CannotGrow(f"its scores become weights through `{op.name}`, which cannot be followed")
            else:
                _require_same(model, value, dimension, op)
                taps[op.path] = i
    return Replay(tuple(ops[::-1]), taps, scalars, scores.outs[0], weights)


def require_same_heads(model: Dimensions, pair: QueryKeyPath, values: Tangent, dimension: Atom) -> None:
    """Raises unless whatever meets queries, keys and values on their way is the same for every head."""
    assert pair.attention is not None
    for path in (pair.queries, pair.keys, values):
        for op in path.ops:
            if op.path in path.taps and op.path != pair.attention.address:
                _require_same(model, op.ins[path.taps[op.path]], dimension, op)


def _require_same(model: Dimensions, value: Value, dimension: Atom, op: Op) -> None:
    if not same_along(model.axes, model.def_use, value, dimension):
        raise CannotGrow(f"what `{op.name}` adds or multiplies differs between heads")


def _require_apart(model: Dimensions, op: Op, scores: Op, dimension: Atom) -> None:
    """Raises unless an operation treats the scores of every head on their own."""
    followed = op.name in ELEMENTWISE | REDUCTIONS or is_layout(op)
    if op.eqn is None or op.scans != scores.scans or not followed:
        raise CannotGrow(f"its scores become weights through `{op.name}`, which cannot be followed")
    for axis in op.params["axes"] if op.name in REDUCTIONS else ():
        if any(a is dimension for a in roots(model.axes[op.ins[0]][axis])):
            raise CannotGrow(f"its heads are mixed by `{op.name}`")


def find_whole_heads(model: Dimensions, dimension: Atom) -> Verdict:
    """The path of whole attention heads, or why none can be added."""
    other = next((why for why in dimension.marks if why != BETWEEN_ACTIVATIONS), "")
    if other:
        return Verdict(f"it counts attention heads, and {other}")
    try:
        op, inner = find_scores(model, dimension)
        scored = find_scored(model, op, inner)
        if scored.reason:
            raise CannotGrow(f"of its queries and keys: {scored.reason}")
        (pair,) = scored.paths
        assert isinstance(pair, QueryKeyPath)
        query, key = (
            next(u for u in model.producing[dimension] if u.op is x.op) for x in (pair.producer, pair.projected)
        )
        value, inner = value_product(model, dimension, (query.op, key.op))
        read = find_hidden_layer(model, inner)
        if read.reason or len(read.paths) != 1 or not isinstance(values := read.paths[0], ValuesPath):
            raise CannotGrow(f"of its values: {read.reason or 'more than one product makes them'}")
        path = _head_path(model, dimension, inner, op, pair, values, (query, key, value))
    except CannotGrow as refusal:
        return Verdict(f"it counts attention heads; {refusal}")
    known, roles = {use.leaf for use in (query, key, value, *path.consumers)}, {**scored.roles, **read.roles}
    for leaf, _ in model.leaves[dimension]:
        if model.names[leaf] not in known and roles.get(leaf) != "shift":
            return Verdict(f"it counts attention heads, and `{model.names[leaf]}` has an entry for each")
    return Verdict("", (path,), [path.producer], path.consumers, roles, pattern=(path.query, path.key))


def _head_path(
    model: Dimensions,
    dimension: Atom,
    inner: Atom,
    op: Op,
    pair: QueryKeyPath,
    read: ValuesPath,
    uses: tuple[Product, Product, Product],
) -> HeadsPath:
    """The path of whole heads from those of their query-key and value dimensions.

    Raises:
        CannotGrow: with the reason.
    """
    tangent, value = read.tangent, uses[2]
    (scores,) = pair.consumers
    samples, heads, shared, _, _ = pair.sizes
    if shared != 1 or pair.repeated != 1 or heads != dimension.size or samples != model.axes.samples.size:
        raise CannotGrow("several queries share a head of keys")
    replay = find_replay(model, op, pair.attention, dimension)
    assert pair.attention is not None
    if tangent.taps.get(pair.attention.address) != pair.attention.operand:
        raise CannotGrow("its weights are not what mixes its values")
    layers = [heads_as_layers(use, dimension) for use in uses]
    consumers = tuple(heads_first(use, [inner], dimension, value.leaf) for use in read.consumers)
    if any(len(use.kernel.rows) - use.kernel.rows.index(_slots(use, dimension)) != 1 for use in consumers):
        raise CannotGrow(f"`{consumers[0].leaf}` does not read it head by head")
    require_same_heads(model, pair, tangent, dimension)
    side = scores.operand  # of the keys
    tokens = [[a for d in contraction(op).free[k] for a in roots(model.axes[op.ins[k]][d])] for k in (1 - side, side)]
    if [root(a) for a in consumers[0].rows if a is not None] != [root(model.axes.samples), *tokens[0]]:
        raise CannotGrow("its outputs have other rows than its queries")
    if {root(a) for a in value.rows if a is not None} != {root(model.axes.samples), *tokens[1]}:
        raise CannotGrow("its values come from other tokens than its keys")
    values = aligned(layers[2], [model.axes.samples, *tokens[1]])
    return HeadsPath(values, consumers, layers[0], layers[1], pair, scores.outputs, replay, pair.attention, tangent)


def _slots(use: Product, dimension: Atom) -> int:
    """The factor of a consumer's kernel that counts the slots."""
    columns = [f for f in use.inputs.cols if use.inputs.factors[f] > 1]
    place = next(i for i, f in enumerate(columns) if (a := use.input_atoms[f]) is not None and root(a) is dimension)
    return [f for f in use.kernel.rows if use.kernel.factors[f] > 1][place]
