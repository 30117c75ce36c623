"""Whether a hidden dimension can grow: one producer, aligned consumers, silent empty slots, or the reason why not."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array

from tinyjax.activation import NotElementwise, activation_between
from tinyjax.atoms import Atom, root, roots
from tinyjax.attention import (
    Head,
    counts_heads,
    find_replay,
    find_scores,
    is_shared,
    is_turned,
    require_same_heads,
    value_product,
)
from tinyjax.bilinear import NORMED, ROTARY, Pair, find_pair, score_op
from tinyjax.dimensions import Dimensions
from tinyjax.flow import ROW_BY_ROW, Flow
from tinyjax.gating import Gate, Ungated, pair_up
from tinyjax.geometry import Geometry, Unaligned, is_rowwise, lay_out
from tinyjax.layout import Layout
from tinyjax.norms import find_norm, roles
from tinyjax.recurrence import Cell, find_recurrence
from tinyjax.rowweights import RowWeight, lay_out_weight
from tinyjax.rules import BETWEEN_ACTIVATIONS, SHARED_HEADS, contraction
from tinyjax.site import Kernel, Member, Norm, Site, Stream
from tinyjax.stream import Branch, find_stream, num_writers
from tinyjax.tangent import Tangent, find_tangent, heads_as_layers, heads_first
from tinyjax.trace import MATMULS, Op, Value
from tinyjax.uses import Use, aligned


class Path(NamedTuple):
    """One way through a site: a product that writes the dimension and the products that read it.

    Attributes:
        producer: the use that writes.
        consumers: the uses that read, their rows in the order of the producer's.
        geometry: how rows are pixels of images, or None where all of them are the same rows.
        weights: what every row was multiplied by between the two.
        gate: the product whose activation multiplies the producer's slot by slot, rows in the same order, or None.
        activation: elementwise, of the gate; where there is none, of the producer's own output on its way to the
            consumers, or None if more than elementwise operations lie there.
        pair: the keys, where the producer makes queries and the consumer is the product of both.
        cell: of recurrent units, what the producer is added to and which of its results the consumers read, or None.
        tangent: what lies between the two where rows are mixed or slots come in heads; None where rows are kept.
        head: queries, keys and what becomes of them, where a slot is a whole attention head; the producer makes values.
        branches: of a residual stream, all its writers on their way to the consumers, which read one tensor.
    """

    producer: Use
    consumers: tuple[Use, ...]
    geometry: Geometry | None = None
    weights: tuple[RowWeight, ...] = ()
    gate: Use | None = None
    activation: Callable[[Array], Array] | None = None
    tangent: Tangent | None = None
    pair: Pair | None = None
    cell: Cell | None = None
    head: Head | None = None
    branches: tuple[Branch, ...] = ()

    def taps(self) -> dict[tuple[int, ...], int]:
        """The operands to record besides those of the uses, by address."""
        weights = {weight.address: weight.operand for weight in self.weights}
        taps = dict(weights) | ({} if self.head is None else self.head.taps())
        tangents: list[Tangent | None] = [] if self.pair is None else [self.pair.queries, self.pair.keys]
        tangents += [self.tangent, *(branch.tangent for branch in self.branches)]
        for tangent in tangents:
            taps |= {} if tangent is None else tangent.taps
        if self.pair is not None and self.pair.attention is not None:
            taps[self.pair.attention.address] = self.pair.attention.operand
        return taps


def judge(model: Dimensions, dimension: Atom) -> tuple[Site, tuple[Path, ...]]:
    """The site of one dimension, still without a name, and the ways through it if it can grow."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    reason = _static_reason(model, dimension, producers, consumers)
    paths: tuple[Path, ...] = ()
    found: dict[int, str] = {}
    norm = None
    scores = score_op(model, dimension)
    whole_heads = counts_heads(model, dimension)
    if whole_heads and dimension not in model.obstructed:
        reason, paths, found, norm = _whole_heads(model, dimension)
    elif scores is not None and not consumers and dimension not in model.obstructed:
        reason, paths, found, norm = _query_key(model, scores, producers, dimension)
    elif _recurs(model, dimension, producers, consumers):
        reason, paths, found, norm = _recurrent(model, dimension, producers, consumers)
    elif not reason:
        reason, paths, found, norm = _paths(model, dimension, producers, consumers)
    stream: Stream | None = None
    if reason and _may_be_stream(model, dimension, consumers):
        reason, paths, found, stream = _stream(model, dimension, reason)
    if paths and stream is not None:
        producers = [branch.use for branch in paths[0].branches]
        consumers = [consumer for path in paths for consumer in path.consumers]
    elif paths and paths[0].pair is not None:
        producers, consumers = [paths[0].producer], [paths[0].pair.key]
    elif paths and paths[0].cell is not None:
        leaves = list(dict.fromkeys(use.leaf for use in producers))
        made = [use for path in paths if path.cell is not None for use in path.cell.terms.values()]
        producers = sorted(made, key=lambda use: leaves.index(use.leaf))
        consumers = [consumer for path in paths for consumer in path.consumers]
    elif paths:
        producers = [path.producer for path in paths]
        consumers = [consumer for path in paths for consumer in path.consumers]
    if reason and NORMED not in reason and is_turned(model, producers):
        reason = f"{reason}; {ROTARY}"
    every = (*producers, *consumers)
    if paths and paths[0].head is not None:
        producers, consumers = [paths[0].producer], paths[0].consumers
    gates = [path.gate for path in paths if path.gate is not None]
    pattern = [use for path in paths if path.head is not None for use in (path.head.query, path.head.key)]
    gate_leaf = gates[0].leaf if gates else None
    members = tuple(
        _member(model, leaf, factor, dimension, found, gate_leaf) for leaf, factor in model.leaves[dimension]
    )
    layers = consumers or producers  # heads are in front of a producer's layers, not of its consumers'
    stack = tuple(layers[0].kernel.factors[f] for f in layers[0].kernel.stack) if layers else ()
    site = Site(
        name=_heads_name([use.leaf for use in every]) if whole_heads else "",
        capacity=dimension.size,
        growable=not reason,
        reason=reason,
        members=members,
        producers=_kernels(model, producers, dimension, "cols"),
        consumers=_kernels(model, consumers, dimension, "rows"),
        stack=stack,
        norm=norm,
        power=paths[0].pair.power if paths and paths[0].pair is not None else 0.0,
        gate=next(iter(_kernels(model, gates, dimension, "cols")), None),
        pattern=_kernels(model, pattern, dimension, "cols"),
        stream=stream,
    )
    return site, paths


def _heads_name(leaves: Sequence[str]) -> str:
    """A name for the heads of an attention: `heads` in the module that all of its kernels are in."""
    parts = [leaf.removeprefix("params/").split("/")[:-1] for leaf in leaves]
    shared = [names[0] for names in zip(*parts) if len(set(names)) == 1]
    return "/".join([*shared, "heads"])


def _static_reason(model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]) -> str:
    """Why the dimension cannot grow, as far as the shapes of its kernels tell."""
    if dimension in model.obstructed:
        return model.obstructed[dimension]
    if BETWEEN_ACTIVATIONS in dimension.marks:
        return SHARED_HEADS if is_shared(model, dimension) else BETWEEN_ACTIVATIONS
    written, read = list(dict.fromkeys(u.leaf for u in producers)), list(dict.fromkeys(u.leaf for u in consumers))
    both = [leaf for leaf in written if leaf in read]
    if both:
        return f"`{both[0]}` both writes and reads it (tied weights): a fan-out would have to be its own fan-in"
    if len(written) not in (1, 2):
        return f"{len(written)} producers" + (" (a residual stream?)" if written else " (an embedding?)")
    for use in (*producers, *consumers):
        if use.trouble:
            return use.trouble
    if dimension.marks:
        return next(iter(dimension.marks))
    repeated = [leaf for leaf, _ in model.leaves[dimension]]
    twice = next((leaf for leaf in repeated if repeated.count(leaf) > 1), None)
    if twice is not None:
        return f"it runs twice through `{model.names[twice]}`"
    return ""


def _recurs(model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]) -> bool:
    """Whether a leaf reads the dimension along one of its axes and writes it along another."""
    both = {use.leaf for use in producers} & {use.leaf for use in consumers}
    repeated = [model.names[leaf] for leaf, _ in model.leaves[dimension]]
    return dimension not in model.obstructed and any(repeated.count(leaf) > 1 for leaf in both)


def _recurrent(
    model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]
) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    """The cells of a recurrent dimension, or why it cannot grow."""
    try:
        found = find_recurrence(model, dimension, producers, consumers)
    except Unaligned as unaligned:
        return _refusal(f"it recurs, and {unaligned}")
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in found.seen:
                return _refusal(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    paths = (Path(next(iter(cell.terms.values())), readers, cell=cell) for cell, readers in found.cells)
    return "", tuple(paths), found.found, None


def _may_be_stream(model: Dimensions, dimension: Atom, consumers: Sequence[Use]) -> bool:
    """Whether a dimension that is no hidden layer may be a stream: written or read several times, or an embedding."""
    if dimension in model.obstructed or BETWEEN_ACTIVATIONS in dimension.marks:
        return False
    producers = model.producing.get(dimension, [])
    if {use.leaf for use in producers} & {use.leaf for use in consumers}:
        return False
    written = num_writers(model, dimension)
    embedding = written == 1 and not producers
    return written > 1 or embedding or len({model.wiring.origin(use.input_value) for use in consumers}) > 1


def _stream(
    model: Dimensions, dimension: Atom, reason: str
) -> tuple[str, tuple[Path, ...], dict[int, str], Stream | None]:
    """The paths of a residual stream, one for each tensor that is read, or why it cannot grow."""
    try:
        found = find_stream(model, dimension)
    except Unaligned as unaligned:
        count = num_writers(model, dimension)
        plain = count < 2 or "highway" in reason or ("gate" in reason and "residual stream" not in reason)
        return reason if plain else f"{count} producers (a residual stream?): {unaligned}", (), {}, None
    pairs = zip(found.branches, found.readers)
    paths = tuple(Path(branches[0].use, group, branches=branches) for branches, group in pairs)
    return "", paths, found.roles, found.stream


def _query_key(
    model: Dimensions, scores: Op, producers: Sequence[Use], dimension: Atom
) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    """The path of a query-key dimension, or why it cannot grow."""
    try:
        producer, consumer, pair, found, seen = find_pair(model, scores, producers, dimension)
    except Unaligned as unaligned:
        return _refusal(str(unaligned))
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in seen:
                return _refusal(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    return "", (Path(producer, (consumer,), pair=pair),), found, None


def _whole_heads(model: Dimensions, dimension: Atom) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    """The path of whole attention heads, or why none can be added."""
    other = next((why for why in dimension.marks if why != BETWEEN_ACTIVATIONS), "")
    if other:
        return _refusal(f"it counts attention heads, and {other}")
    try:
        op, inner = find_scores(model, dimension)
        reason, (*scored,), met, _ = _query_key(model, op, model.producing[inner], inner)
        if reason:
            raise Unaligned(f"of its queries and keys: {reason}")
        query, key = (next(u for u in model.producing[dimension] if u.op is x.op) for x in _pair_uses(scored[0]))
        value, inner = value_product(model, dimension, (query.op, key.op))
        producers, consumers = model.producing[inner], model.consuming.get(inner, [])
        reason = _static_reason(model, inner, producers, consumers)
        (*read,), found = (), {}
        if not reason:
            reason, (*read,), found, _ = _paths(model, inner, producers, consumers)
        if reason or len(read) != 1 or read[0].tangent is None:
            raise Unaligned(f"of its values: {reason or 'more than one product makes them'}")
        path = _head_path(model, dimension, inner, op, scored[0], read[0], (query, key, value))
    except Unaligned as unaligned:
        return _refusal(f"it counts attention heads; {unaligned}")
    known = {use.leaf for use in (query, key, value, *path.consumers)}
    for leaf, _ in model.leaves[dimension]:
        if model.names[leaf] not in known and (met | found).get(leaf) != "shift":
            return _refusal(f"it counts attention heads, and `{model.names[leaf]}` has an entry for each")
    return "", (path,), met | found, None


def _pair_uses(path: Path) -> tuple[Use, Use]:
    assert path.pair is not None
    return path.producer, path.pair.projected


def _head_path(
    model: Dimensions, dimension: Atom, inner: Atom, op: Op, scored: Path, read: Path, uses: tuple[Use, Use, Use]
) -> Path:
    """The path of whole heads from those of their query-key and value dimensions.

    Raises:
        Unaligned: with the reason.
    """
    pair, tangent = scored.pair, read.tangent
    query, key, value = uses
    assert pair is not None and tangent is not None
    samples, heads, shared, _, _ = pair.sizes
    if shared != 1 or pair.repeated != 1 or heads != dimension.size or samples != model.axes.samples.size:
        raise Unaligned("several queries share a head of keys")
    replay = find_replay(model, op, pair.attention, dimension)
    assert pair.attention is not None
    if tangent.taps.get(pair.attention.address) != pair.attention.operand:
        raise Unaligned("its weights are not what mixes its values")
    layers = [heads_as_layers(use, dimension) for use in uses]
    consumers = tuple(heads_first(use, [inner], dimension, value.leaf) for use in read.consumers)
    if any(len(use.kernel.rows) - use.kernel.rows.index(_slots(use, dimension)) != 1 for use in consumers):
        raise Unaligned(f"`{consumers[0].leaf}` does not read it head by head")
    layout = scored.consumers[0].outputs
    head = Head(layers[0], layers[1], pair, layout, replay, pair.attention, tangent)
    require_same_heads(model, head, dimension)
    side = scored.consumers[0].operand  # of the keys
    tokens = [[a for d in contraction(op).free[k] for a in roots(model.axes[op.ins[k]][d])] for k in (1 - side, side)]
    if [root(a) for a in consumers[0].rows if a is not None] != [root(model.axes.samples), *tokens[0]]:
        raise Unaligned("its outputs have other rows than its queries")
    if {root(a) for a in value.rows if a is not None} != {root(model.axes.samples), *tokens[1]}:
        raise Unaligned("its values come from other tokens than its keys")
    return Path(aligned(layers[2], [model.axes.samples, *tokens[1]]), consumers, head=head)


def _slots(use: Use, dimension: Atom) -> int:
    """The factor of a consumer's kernel that counts the slots."""
    columns = [f for f in use.inputs.cols if use.inputs.factors[f] > 1]
    place = next(i for i, f in enumerate(columns) if (a := use.input_atoms[f]) is not None and root(a) is dimension)
    return [f for f in use.kernel.rows if use.kernel.factors[f] > 1][place]


def _paths(
    model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]
) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    """The aligned producer-consumer pairs, the roles of the vectors met on the way, or why there are none."""
    paths, found, norms = [], {}, []
    kernels = (*producers, *consumers)
    accounted = {use.op for use in kernels}
    try:
        pairs = _with_gates(model, dimension, producers)
    except Ungated as ungated:
        return _refusal(str(ungated))
    for producer, gate in pairs:
        gates = frozenset() if gate is None else frozenset({gate.value})
        flow = Flow(model.graph, model.axes, model.wiring, producer, dimension, gates)
        mine = tuple(c for c in consumers if c.input_value in flow.mixing)
        if sorted(c.leaf for c in mine) != sorted({c.leaf for c in consumers}):
            return _refusal("its consumers do not each read the output of one producer operation once")
        reason = _row_reason(model, producer, mine, flow) or _meeting_reason(model, flow, kernels)
        if reason:
            return _refusal(reason)
        found |= roles(flow)
        accounted |= {meetings[0].op for meetings in flow.met.values()}
        accounted |= {op for ops in flow.counted.values() for op in ops}
        if gate is not None:
            biases = {leaf: met for leaf, met in gate.flow.met.items() if leaf not in flow.met}
            found |= dict.fromkeys(biases, "shift")
            accounted |= {meetings[0].op for meetings in biases.values()}
        bias = None if producer.bias is None else producer.bias.leaf
        norm, reason = find_norm(flow, model.wiring, model.axes, found, model.names, bias, dimension.size)
        mixed = any(flow.mixing[c.input_value] != ROW_BY_ROW for c in mine) or len(producer.kernel.cols) != 1
        if norm is not None and mixed:
            reason = "a batch normalisation where rows are mixed"
        if norm is not None and (len(producers) > 1 or producer.op.stack):
            reason = "a batch normalisation inside a scan, behind a gate or a kernel that is used more than once"
        if norm is not None and mine and flow.weights[mine[0].input_value]:
            reason = "its rows are weighted one by one (a mask or a gate?) before or after a batch normalisation"
        if reason:
            return _refusal(reason)
        norms.append(norm)
        try:
            paths.append(_path(model, producer, mine, flow, dimension, gate))
        except Unaligned as unaligned:
            return _refusal(str(unaligned))
    reached = [id(c) for path in paths for c in path.consumers]
    if len(reached) != len(consumers) or len(set(norms)) > 1:
        return _refusal("its consumers do not each read the output of one producer operation")
    known = ("shift", "scale", "counted") + (() if norms[0] is None else ("mean", "var"))
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in accounted:
                return _refusal(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
        if model.names[leaf] not in {u.leaf for u in kernels} and found.get(leaf) not in known:
            return _refusal(f"`{model.names[leaf]}` is neither a plain shift nor a plain scale (a normalisation?)")
    return "", tuple(paths), found, norms[0]


def _with_gates(model: Dimensions, dimension: Atom, producers: Sequence[Use]) -> list[tuple[Use, Gate | None]]:
    """The products to compute neurons for, each with its gate if the dimension is one of gated units.

    Raises:
        Ungated: two producers that are no gated unit.
    """
    if len({use.leaf for use in producers}) == 1:
        return [(use, None) for use in producers]
    return [*pair_up(model.graph, model.axes, model.wiring, producers, dimension)]


def _path(
    model: Dimensions,
    producer: Use,
    consumers: tuple[Use, ...],
    flow: Flow,
    dimension: Atom,
    gate: Gate | None,
) -> Path:
    """The uses of a path with their rows in one order."""
    read = consumers[0].input_value
    if flow.mixing[read] != ROW_BY_ROW or len(producer.kernel.cols) != 1:
        if gate is not None:
            raise Unaligned(flow.mixing[read] or f"`{producer.leaf}` produces it together with another axis (heads?)")
        return _mixed_path(model, producer, consumers, flow, dimension)
    pools, weights = flow.pools[read], flow.weights[read]
    if is_rowwise(producer, consumers, pools):
        for use in consumers:
            if len([f for f in use.inputs.cols if use.input_atoms[f] is not None]) > 1:
                raise Unaligned(f"`{use.leaf}` reads every neuron more than once (a repeat?)")
        order = [model.axes.samples, *(a for a in producer.rows if a is not None)]
        producer = aligned(producer, order)
        laid = tuple(lay_out_weight(model.axes, weight, producer) for weight in weights)
        readers = tuple(aligned(c, order) for c in consumers)
        if gate is None:
            return Path(producer, readers, None, laid, activation=_activation(model, producer, read))
        if not is_rowwise(producer, [gate.use], ()) or gate.use.op.scans != producer.op.scans:
            raise Unaligned(f"its gate `{gate.use.leaf}` has other rows than `{producer.leaf}`")
        return Path(producer, readers, None, laid, aligned(gate.use, order), gate.activation)
    if gate is not None:
        raise Unaligned("a gated unit between convolutions or poolings")
    if weights:
        ops = ", ".join(f"`{weight.op.name}`" for weight in weights)
        raise Unaligned(f"its rows are weighted one by one in {ops}, between convolutions or poolings")
    geometry, producer, consumers = lay_out(model.axes, producer, consumers, pools, dimension)
    return Path(producer, consumers, geometry)


def _activation(model: Dimensions, producer: Use, read: Value) -> Callable[[Array], Array] | None:
    """The elementwise function between a product and what its consumers read, or None."""
    try:
        return activation_between(model.wiring, producer, read)
    except NotElementwise:
        return None


def _mixed_path(model: Dimensions, producer: Use, consumers: tuple[Use, ...], flow: Flow, dimension: Atom) -> Path:
    """A path along which rows are mixed, in the rows of the consumers."""
    if producer.window is not None or any(c.window is not None for c in consumers):
        raise Unaligned(flow.mixing[consumers[0].input_value] or f"`{producer.leaf}` produces it in groups")
    order = [model.axes.samples, *(a for a in consumers[0].rows if a is not None)]
    if any({root(a) for a in c.rows if a is not None} != {root(a) for a in order} for c in consumers):
        raise Unaligned("its consumers read it in different rows")
    read = tuple(aligned(c, order) for c in consumers)
    kernels = frozenset(use.op for use in model.uses)
    tangent, producer, read = find_tangent(
        model.graph, model.axes, model.wiring, flow, producer, read, dimension, kernels
    )
    return Path(producer, read, tangent=tangent)


def _meeting_reason(model: Dimensions, flow: Flow, kernels: Sequence[Use]) -> str:
    """Why a leaf that the flow met makes the dimension other than a plain hidden layer."""
    if flow.trouble:
        return flow.trouble
    for leaf, meetings in flow.met.items():
        if model.names[leaf] in {use.leaf for use in kernels}:
            return f"`{model.names[leaf]}` also enters the model through `{meetings[0].op.name}`"
        if len(meetings) > 1 or leaf in flow.counted:
            return f"`{model.names[leaf]}` acts on it more than once"
    return ""


def _row_reason(model: Dimensions, producer: Use, consumers: Sequence[Use], flow: Flow) -> str:
    """Why the consumers do not read what the producer wrote, slot by slot, with empty slots at zero."""
    if len({model.wiring.origin(c.input_value) for c in consumers}) > 1:
        return "its consumers read different tensors"
    for consumer in consumers:
        same_scans = producer.op.scans == consumer.op.scans
        if not same_scans or len(producer.kernel.stack) != len(consumer.kernel.stack):
            return f"`{consumer.leaf}` reads it in another scan than `{producer.leaf}` writes it"
        rows = [root(a) for a in consumer.rows if a is not None]
        mixed = flow.mixing[consumer.input_value]
        if len(set(rows)) != len(rows):
            return mixed or f"`{consumer.leaf}` reads rows that cannot be told apart"
        if root(model.axes.samples) not in rows:
            return mixed or f"the input of `{consumer.leaf}` does not depend on the samples"
        culprit = flow.culprit.get(consumer.input_value)
        if culprit is not None and mixed:
            return mixed
        if culprit is not None:
            value = flow.empty.get(consumer.input_value)
            arrives = "something unknown" if value is None else f"{float(value):.3g}"
            return f"an empty neuron is not silent: `{culprit}` maps 0 to {arrives} (use sigma(x) - sigma(0))"
    return ""


def _member(
    model: Dimensions, leaf: int, factor: int, dimension: Atom, found: dict[int, str], gate: str | None
) -> Member:
    _, sizes, numbers = model.factors[leaf]
    name = model.names[leaf]
    for uses, role, side in ((model.producing, "fan_in", "cols"), (model.consuming, "fan_out", "rows")):
        for use in uses.get(dimension, []):
            if use.leaf == name and factor in getattr(use.kernel, side):
                return Member(_with_slot(use.kernel, factor), "gate" if name == gate else role)
    stack = tuple(f for f, number in enumerate(numbers) if number < model.depth(leaf))
    rest = tuple(f for f in range(len(sizes)) if f not in (*stack, factor))
    return Member(Layout(name, sizes, numbers, factor, stack, rest, (factor,)), found.get(leaf, "other"))


def _kernels(model: Dimensions, uses: Sequence[Use], dimension: Atom, side: str) -> tuple[Kernel, ...]:
    """The kernels of some uses, whose slots are on one side of their matrices."""
    factors = [(model.names[leaf], factor) for leaf, factor in model.leaves[dimension]]

    def slotted(layout: Layout, among: tuple[int, ...]) -> Layout:
        return _with_slot(layout, next((f for leaf, f in factors if leaf == layout.leaf and f in among), None))

    kernels, positions = {}, {}
    for use in uses:
        bias = use.bias if use.bias is None else slotted(use.bias, use.bias.cols)
        kernels.setdefault(use.leaf, Kernel(slotted(use.kernel, getattr(use.kernel, side)), bias))
        times = math.prod(use.outputs.factors[f] for f in use.outputs.rows) if use.op.name in MATMULS else 0
        positions.setdefault(use.leaf, {})[use.op.path] = times
    num_samples = model.axes.samples.size
    return tuple(
        dataclasses.replace(kernel, positions=-(-sum(positions[leaf].values()) // num_samples))
        for leaf, kernel in kernels.items()
    )


def _refusal(reason: str) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    return reason, (), {}, None


def _with_slot(layout: Layout, slot: int | None) -> Layout:
    return dataclasses.replace(layout, slot=slot)
