"""A whole attention head as a slot: which products make its queries, keys and values, and how scores become weights.

Three products write the dimension that counts heads (queries, keys, values) and one reads it. Given its pattern of
attention a new head is a neuron with several value dimensions, whose fan-in reads what the pattern collects. Patterns
of new heads are computed by the model's own operations between scores and weights, so that scales, masks and dropout
are what they are.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from tinyjax.atoms import Atom, root, roots
from tinyjax.bilinear import Pair, score_op
from tinyjax.capture import Address
from tinyjax.dimensions import Dimensions, kernel_atoms
from tinyjax.geometry import Unaligned
from tinyjax.layout import Layout
from tinyjax.rules import ELEMENTWISE, REDUCTIONS, contraction
from tinyjax.scorelayout import Attention
from tinyjax.tangent import Tangent, same_along
from tinyjax.trace import Op, Value
from tinyjax.uses import Use
from tinyjax.wiring import is_view

_CUTS = frozenset("split stack slice dynamic_slice gather concatenate complex rev".split())
_TURNS = frozenset("mul add add_any sub neg convert_element_type broadcast_in_dim real imag conj pad".split())
_JOINS = frozenset("concatenate stack complex add add_any sub".split())
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


class Head(NamedTuple):
    """What a site of whole heads has besides its values and outputs.

    Attributes:
        query: the product that makes the queries, its kernel with the query-key dimension as layers.
        key: the same of the keys.
        pair: the path of queries and keys to their scores.
        scores: layout of the scores, rows being samples, heads, tokens of the queries, tokens of the keys.
        replay: from scores to weights.
        attention: where the weights are read.
        values: the path from values to the outputs, columns being heads and value dimensions.
    """

    query: Use
    key: Use
    pair: Pair
    scores: Layout
    replay: Replay
    attention: Attention
    values: Tangent

    def taps(self) -> dict[Address, int]:
        """The operands to record, by address."""
        parts = (self.pair.queries.taps, self.pair.keys.taps, self.values.taps, self.replay.taps)
        return {address: operand for taps in parts for address, operand in taps.items()}


def counts_heads(model: Dimensions, dimension: Atom) -> bool:
    """Whether several products write a dimension along which scores are taken side by side, and another reads it."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    return (
        len(producers) > 1
        and bool(consumers)
        and score_op(model, dimension) is None
        and bool(_scores(model, dimension))
    )


def is_shared(model: Dimensions, dimension: Atom) -> bool:
    """Whether a dimension counts queries that share the keys of one head."""
    beside = [root(a) for use in model.producing.get(dimension, []) for a in kernel_atoms(model.axes, use)[0]]
    return bool(model.consuming.get(dimension)) and any(
        a is not dimension and score_op(model, a) is not None and not model.consuming.get(a) for a in beside
    )


def is_turned(model: Dimensions, producers: Sequence[Use]) -> bool:
    """Whether a product reaches scores through a cut and a join of its axes, as rotary embeddings do."""
    for use in producers:
        reached = dict.fromkeys(use.op.outs, frozenset[str]())
        walk = model.wiring.walk(use.op.outs)
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
        angles = [v for v in op.ins if v.shape and model.wiring.scalar(v) is None and not _is_learned(model, v)]
        return frozenset({"turned"} if angles else ())
    if inside > 1 and done and op.name in _JOINS:
        return frozenset({"joined"})
    return frozenset({"cut"} if op.name in _CUTS - {"concatenate", "stack", "complex"} else ())


def _is_learned(model: Dimensions, value: Value) -> bool:
    """Whether a value is a view or a broadcast of parameters."""
    return model.wiring.vector(value) is not None


def find_scores(model: Dimensions, dimension: Atom) -> tuple[Op, Atom]:
    """The product of queries and keys of all heads, and the dimension it contracts.

    Raises:
        Unaligned: with the reason.
    """
    found = _scores(model, dimension)
    if len(found) != 1:
        raise Unaligned(f"{len(found)} products of activations look like their scores")
    return found[0]


def _scores(model: Dimensions, dimension: Atom) -> list[tuple[Op, Atom]]:
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


def value_product(model: Dimensions, dimension: Atom, pair_ops: Sequence[Op]) -> tuple[Use, Atom]:
    """The product that makes the values of all heads, and the dimension of a head's values.

    Raises:
        Unaligned: with the reason.
    """
    values = [use for use in model.producing[dimension] if use.op not in pair_ops]
    if len(values) != 1:
        raise Unaligned(f"{len(values)} products make its values")
    (use,) = values
    inner = [root(a) for a in kernel_atoms(model.axes, use)[0] if root(a) is not dimension]
    if len(inner) != 1:
        raise Unaligned(f"`{use.leaf}` does not make one dimension of values a head")
    return use, inner[0]


def find_replay(model: Dimensions, scores: Op, attention: Attention | None, dimension: Atom) -> Replay:
    """What the model does between scores and weights, head by head.

    Raises:
        Unaligned: with the reason.
    """
    if attention is None:
        raise Unaligned("the weights of its attention are not found")
    walk, behind = model.wiring.walk(scores.outs), list[Op]()
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
        raise Unaligned("its scores are its weights (no softmax): a new head would attend to nothing")
    taps: dict[Address, int] = {}
    scalars: dict[Value, Any] = {}
    for op in ops[::-1]:
        _require_apart(model, op, scores, dimension)
        for i, value in enumerate(op.ins):
            if value in reached:
                continue
            number = model.wiring.scalar(value)
            if number is not None:
                scalars[value] = number
            elif op.path in taps or op.inside:
                raise Unaligned(f"its scores become weights through `{op.name}`, which cannot be followed")
            else:
                _require_same(model, value, dimension, op)
                taps[op.path] = i
    return Replay(tuple(ops[::-1]), taps, scalars, scores.outs[0], weights)


def require_same_heads(model: Dimensions, head: Head, dimension: Atom) -> None:
    """Raises unless whatever meets queries, keys and values on their way is the same for every head."""
    for path in (head.pair.queries, head.pair.keys, head.values):
        for op in path.ops:
            if op.path in path.taps and op.path != head.attention.address:
                _require_same(model, op.ins[path.taps[op.path]], dimension, op)


def _require_same(model: Dimensions, value: Value, dimension: Atom, op: Op) -> None:
    if not same_along(model.axes, model.wiring, value, dimension):
        raise Unaligned(f"what `{op.name}` adds or multiplies differs between heads")


def _require_apart(model: Dimensions, op: Op, scores: Op, dimension: Atom) -> None:
    """Raises unless an operation treats the scores of every head on their own."""
    followed = op.name in ELEMENTWISE | REDUCTIONS | {"broadcast_in_dim"} or is_view(op)
    if op.eqn is None or op.scans != scores.scans or not followed:
        raise Unaligned(f"its scores become weights through `{op.name}`, which cannot be followed")
    for axis in op.params["axes"] if op.name in REDUCTIONS else ():
        if any(a is dimension for a in roots(model.axes[op.ins[0]][axis])):
            raise Unaligned(f"its heads are mixed by `{op.name}`")
