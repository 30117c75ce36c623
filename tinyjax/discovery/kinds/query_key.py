"""The query-key dimension of attention: two products contracted with each other, token by token.

A slot adds (alpha' x_i)(omega' x_j) to the score of query i and key j. V_goal is taken at the scores, alpha is the
fan-in of the query's slot and omega, the fan-in of the key's, takes the place of a fan-out: its kernel is read with
slots as rows. Every head has scores of its own, so heads are layers of a stack. A head of keys that several queries
share has one omega, and one alpha for each of them.
"""

import dataclasses
import math
from collections.abc import Sequence

from tinyjax.core.kinds import QUERY_KEY
from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.constant_folding import number_of
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS, has_views
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import ADDITIONS, LAYOUTS, Address, Op
from tinyjax.discovery.kinds.attention_scores import (
    HEAD,
    NORMED,
    QUERY_HEAD,
    SAMPLE,
    TOKEN,
    Attention,
    ScoreLayouts,
    score_op,
)
from tinyjax.discovery.kinds.hidden_layer import static_reason
from tinyjax.discovery.paths.flow import follow_product
from tinyjax.discovery.paths.mixing import is_norm
from tinyjax.discovery.paths.path import Path, Verdict
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slot_paths import Tangent, slot_path


@dataclasses.dataclass(frozen=True)
class QueryKeyPath(Path):
    """Queries and keys on their way to their product; the producer makes queries, the consumer is the product.

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

    key: Product
    projected: Product
    queries: Tangent
    keys: Tangent
    sizes: tuple[int, int, int, int, int]
    repeated: int
    attention: Attention | None
    power: float

    kind = QUERY_KEY
    between = "heads or mixed rows"

    def recorded(self) -> list[Product]:
        """Queries and keys."""
        return [self.producer, self.projected]

    def taps(self) -> dict[Address, int]:
        """What queries and keys are multiplied by, and the weights."""
        weights = {} if self.attention is None else {self.attention.address: self.attention.operand}
        return {**self.queries.taps, **self.keys.taps, **weights}


def attends(model: Dimensions, scores: Op) -> bool:
    """Whether scores become weights of other activations, as in attention."""
    reached = set(scores.outs)
    for op in model.graph.ops[model.order[scores] + 1 :]:
        if any(v in reached for v in op.ins):
            if op.name == "dot_general" and not any(model.axes.parameter_only(v) for v in op.ins):
                return True
            reached.update(op.outs)
    return False


def find_pair(
    model: Dimensions, op: Op, producers: Sequence[Product], dimension: Atom
) -> tuple[QueryKeyPath, dict[int, str], set[Op]]:
    """The queries and keys that are contracted in an operation, the roles of vectors, the operations seen.

    Raises:
        CannotGrow: with the reason.
    """
    if len(producers) != 2:
        raise CannotGrow(f"it is made by {len(producers)} products where a query and a key are two")
    for use in producers:
        if use.refusal:
            raise CannotGrow(use.refusal)
    flows = [follow_product(model.axes, model.def_use, use, dimension) for use in producers]
    sides = [next((i for i, v in enumerate(op.ins) if v in flow.values), None) for flow in flows]
    if sorted(map(str, sides)) != ["0", "1"] or op.inside:
        raise CannotGrow("its scores are not the product of one query and one key")
    marks = [why for why in dimension.marks if why != BETWEEN_ACTIVATIONS]
    if marks:
        raise CannotGrow(f"{marks[0]}; {NORMED}" if is_norm(model, dimension) else marks[0])
    heads = [_columns(use, dimension) for use in producers]
    # the side with more heads are the queries; of equals, the first
    order = (0, 1) if len(heads[0]) >= len(heads[1]) else (1, 0)
    query, key = (producers[i] for i in order)
    query_flow, key_flow = (flows[i] for i in order)
    query_side, key_side = (sides[i] for i in order)
    assert query_side is not None and key_side is not None
    shared, own = heads[order[1]], [a for a in heads[order[0]] if a not in heads[order[1]]]
    if not set(shared) <= set(heads[order[0]]) or len(shared) > 1 or len(own) > 1 or (own and query.bias is not None):
        raise CannotGrow(f"`{query.leaf}` and `{key.leaf}` come in heads that cannot be paired")
    samples = root(model.axes.samples)
    if query.op.scans != op.scans or key.op.scans != op.scans:
        raise CannotGrow("its scores are made in another scan than its queries and keys")
    if query.op.scans and not query.kernel.stack:
        raise CannotGrow("its scores are made in a scan that is not over layers")
    if len(query.kernel.stack) != len(key.kernel.stack):
        raise CannotGrow("its queries and keys come from layers of different stacks")

    if any(has_views(axis) for value in op.ins for axis in model.axes[value]):
        raise CannotGrow("its scores are those of several batches side by side")

    def kind(atom: Atom | None, side: int) -> int:
        if atom is None or root(atom) is samples:
            return SAMPLE
        if root(atom) in shared:
            return HEAD
        if root(atom) in own or (side == key_side and root(atom) in heads[order[0]]):
            return QUERY_HEAD
        return TOKEN

    layouts = ScoreLayouts(model, op, bool(query.kernel.stack), query_side, kind)
    pair_sizes, repeated = layouts.sizes, layouts.repeated
    if pair_sizes[0] != samples.size:
        raise CannotGrow("its scores do not have the samples as rows")
    kept = {dimension, *heads[0], *heads[1]}
    queries, keys = (
        slot_path(model.axes, model.def_use, flow, use, dimension, op.ins[side], layout, kept, model.kernels)
        for flow, use, side, layout in (
            (query_flow, query, query_side, layouts.queries),
            (key_flow, key, key_side, layouts.keys),
        )
    )
    entries = {leaf: found for flow in flows for leaf, found in flow.vectors.entries.items()}
    for leaf, found in entries.items():
        if len(found) > 1 or found[0].op.name not in ADDITIONS or found[0].through - LAYOUTS:
            acts = f"`{model.names[leaf]}` acts on queries or keys by `{found[0].op.name}`"
            raise CannotGrow(f"{acts}")

    attention = layouts.attention()
    scores = dataclasses.replace(
        query, op=op, operand=key_side, inputs=layouts.queries, outputs=layouts.scores, bias=None, rows=()
    )
    power = _power(model, op, (*queries.ops, *keys.ops), dimension.size)
    path = QueryKeyPath(
        producer=_as_fan_in(query, dimension, shared),
        consumers=(scores,),
        key=_as_fan_out(key, dimension),
        projected=key,
        queries=queries,
        keys=keys,
        sizes=pair_sizes,
        repeated=repeated,
        attention=attention,
        power=power,
    )
    return path, dict.fromkeys(entries, "shift"), {query.op, key.op, *(found[0].op for found in entries.values())}


def _power(model: Dimensions, op: Op, before: Sequence[Op], capacity: int) -> float:
    """The p of a factor capacity^-p on queries, keys or scores; 0 where the factor is another."""
    value, after = op.outs[0], []
    while len(users := model.def_use.used_by.get(value, [])) == 1 and len(users[0].outs) == 1:
        if not (is_layout(users[0]) or users[0].name in ("mul", "div")):
            break
        after.append(users[0])
        value = users[0].outs[0]
    factors = [1.0]
    for scaling in (*before, *after):
        if scaling.name in ("mul", "div"):
            numbers = [found for v in scaling.ins if (found := number_of(model.def_use, v)) is not None]
            factors += [float(numbers[0]) ** (-1 if scaling.name == "div" else 1)] if numbers else []
    # all together (both sides scaled by the fourth root), or one of them (a cap of scores brings numbers of its own)
    factors = [math.prod(factors), *factors[1:]]
    return next((p for p in (0.5, 1.0) for x in factors if abs(x * capacity**p - 1) < 1e-4), 0.0)


def _columns(use: Product, dimension: Atom) -> list[Atom]:
    """The dimensions that a product makes next to its slots."""
    atoms = [use.output_atoms[f] for f in use.outputs.cols]
    return [root(a) for a in atoms if a is not None and root(a) is not dimension]


def _as_fan_in(use: Product, dimension: Atom, shared: Sequence[Atom]) -> Product:
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


def _as_fan_out(use: Product, dimension: Atom) -> Product:
    """The key's kernel with heads as layers, slots as rows and its inputs as columns; without its bias."""
    columns = [root(a) for f in use.outputs.cols if (a := use.output_atoms[f]) is not None]
    layout = use.kernel
    long = [f for f in layout.cols if layout.factors[f] > 1]
    layers = tuple(f for f, a in zip(long, columns) if a is not dimension)
    slots = tuple(f for f, a in zip(long, columns) if a is dimension)
    ones = tuple(f for f in layout.cols if f not in long)
    kernel = dataclasses.replace(layout, stack=(*layout.stack, *layers), rows=(*ones, *slots), cols=layout.rows)
    return dataclasses.replace(use, kernel=kernel, bias=None)


def is_query_key(model: Dimensions, dimension: Atom) -> bool:
    """Whether two activations are contracted over the dimension, and nothing else reads it."""
    return score_op(model, dimension) is not None and not model.consuming.get(dimension)


def find_query_key(model: Dimensions, dimension: Atom) -> Verdict:
    """The path of a query-key dimension, or why it cannot grow."""
    scores = score_op(model, dimension)
    assert scores is not None
    found = find_scored(model, scores, dimension)
    if found.reason and not attends(model, scores):
        return Verdict(static_reason(model, dimension))
    return found


def find_scored(model: Dimensions, scores: Op, dimension: Atom) -> Verdict:
    """The path of the dimension that some scores contract, or why it cannot grow."""
    try:
        path, found, seen = find_pair(model, scores, model.producing.get(dimension, []), dimension)
    except CannotGrow as refusal:
        return Verdict(str(refusal))
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in seen:
                return Verdict(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    query = path.producer
    scaled = [layout.leaf for layout in (query.kernel, query.bias) if layout is not None and path.power]
    powers = tuple((leaf, path.power) for leaf in scaled)
    return Verdict("", (path,), [query], [path.key], found, powers=powers)
