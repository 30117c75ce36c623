"""What is no hidden layer and grows: recurrent units, residual streams, query-key dimensions, whole heads."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from tinyjax.atoms import Atom, root, roots
from tinyjax.attention import Head, find_replay, find_scores, require_same_heads, value_product
from tinyjax.bilinear import find_pair
from tinyjax.dimensions import Dimensions
from tinyjax.geometry import Unaligned
from tinyjax.hidden import find_layer, static_reason
from tinyjax.path import Path, Verdict, readers
from tinyjax.recurrence import Cell, find_recurrence
from tinyjax.rules import BETWEEN_ACTIVATIONS, contraction
from tinyjax.stream import find_stream, is_residual, num_writers, sums_along
from tinyjax.tangent import heads_as_layers, heads_first
from tinyjax.trace import Op
from tinyjax.uses import Use, aligned


def recurs(model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]) -> bool:
    """Whether a leaf reads the dimension along one of its axes and writes it along another."""
    both = {use.leaf for use in producers} & {use.leaf for use in consumers}
    times = Counter(model.names[leaf] for leaf, _ in model.leaves[dimension])
    return dimension not in model.obstructed and any(times[leaf] > 1 for leaf in both)


def find_recurrent_units(
    model: Dimensions, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]
) -> Verdict:
    """The cells of a recurrent dimension, or why it cannot grow."""
    try:
        found = find_recurrence(model, dimension, producers, consumers)
    except Unaligned as unaligned:
        return Verdict(f"{_how_it_recurs(model, producers, consumers)}, and {unaligned}")
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in found.seen:
                return Verdict(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    paths = tuple(
        Path(next(iter(cell.terms.values())), uses, cell=cell, slope=partial(_slope, cell))
        for cell, uses in found.cells
    )
    leaves = list(dict.fromkeys(use.leaf for use in producers))
    terms = [use for cell, _ in found.cells for use in cell.terms.values()]
    return Verdict("", paths, sorted(terms, key=lambda use: leaves.index(use.leaf)), readers(paths), found.found)


def _how_it_recurs(model: Dimensions, producers: Sequence[Use], consumers: Sequence[Use]) -> str:
    """A recurrence takes several steps; a kernel that reads and writes once may be all of a residual block."""
    both = [use.leaf for use in producers if any(use.leaf == other.leaf for other in consumers)]
    steps = any(use.op.scans for use in (*producers, *consumers)) or len(set(both)) < len(both)
    return "it recurs" if steps else f"`{both[0]}` both reads and writes it"


def _slope(cell: Cell) -> float | None:
    return cell.slope


def may_be_stream(model: Dimensions, dimension: Atom, consumers: Sequence[Use]) -> bool:
    """Whether a dimension that is no hidden layer may be a stream: written or read several times, or an embedding."""
    if dimension in model.obstructed or BETWEEN_ACTIVATIONS in dimension.marks:
        return False
    producers = model.producing.get(dimension, [])
    if {use.leaf for use in producers} & {use.leaf for use in consumers}:
        return False
    written = num_writers(model, dimension)
    embedding = written == 1 and not producers
    return written > 1 or embedding or len({model.wiring.origin(use.input_value) for use in consumers}) > 1


def find_residual_stream(model: Dimensions, dimension: Atom, consumers: Sequence[Use], reason: str) -> Verdict:
    """The paths of a residual stream, one for each tensor that is read, or why it cannot grow."""
    try:
        found = find_stream(model, dimension)
    except Unaligned as unaligned:
        count = num_writers(model, dimension)
        if "tied embeddings" in str(unaligned) and "its consumers" in reason:  # each reads what another writes
            return Verdict(str(unaligned))
        sums = sums_along(model, dimension)
        plain = count < 2 or not consumers or not sums or "meet again" in reason or "gate" in reason
        # Streams of images never grow: what else is wrong with one says more.
        plain |= "producers" not in reason and any(use.window for use in model.producing.get(dimension, []))
        how = " (a residual stream)" if is_residual(model, sums) else ", added up"
        return Verdict(reason if plain else f"{count} producers{how}: {unaligned}")
    pairs = zip(found.branches, found.readers)
    paths = tuple(Path(found.writers[0], group, branches=branches) for branches, group in pairs)
    return Verdict("", paths, found.writers, readers(paths), found.roles, powers=found.powers, stream=found.stream)


def find_query_key(model: Dimensions, scores: Op, producers: Sequence[Use], dimension: Atom) -> Verdict:
    """The path of a query-key dimension, or why it cannot grow."""
    try:
        producer, consumer, pair, found, seen = find_pair(model, scores, producers, dimension)
    except Unaligned as unaligned:
        return Verdict(str(unaligned))
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in seen:
                return Verdict(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    scaled = [layout.leaf for layout in (producer.kernel, producer.bias) if layout is not None and pair.power]
    powers = tuple((leaf, pair.power) for leaf in scaled)
    return Verdict("", (Path(producer, (consumer,), pair=pair),), [producer], [pair.key], found, powers=powers)


def find_whole_heads(model: Dimensions, dimension: Atom) -> Verdict:
    """The path of whole attention heads, or why none can be added."""
    other = next((why for why in dimension.marks if why != BETWEEN_ACTIVATIONS), "")
    if other:
        return Verdict(f"it counts attention heads, and {other}")
    try:
        op, inner = find_scores(model, dimension)
        scored = find_query_key(model, op, model.producing[inner], inner)
        if scored.reason:
            raise Unaligned(f"of its queries and keys: {scored.reason}")
        pair_uses = _pair_uses(scored.paths[0])
        query, key = (next(u for u in model.producing[dimension] if u.op is x.op) for x in pair_uses)
        value, inner = value_product(model, dimension, (query.op, key.op))
        producers, consumers = model.producing[inner], model.consuming.get(inner, [])
        reason = static_reason(model, inner, producers, consumers)
        read = Verdict(reason) if reason else find_layer(model, inner, producers, consumers)
        if read.reason or len(read.paths) != 1 or read.paths[0].tangent is None:
            raise Unaligned(f"of its values: {read.reason or 'more than one product makes them'}")
        path = _head_path(model, dimension, inner, op, scored.paths[0], read.paths[0], (query, key, value))
    except Unaligned as unaligned:
        return Verdict(f"it counts attention heads; {unaligned}")
    known, met = {use.leaf for use in (query, key, value, *path.consumers)}, {**scored.roles, **read.roles}
    for leaf, _ in model.leaves[dimension]:
        if model.names[leaf] not in known and met.get(leaf) != "shift":
            return Verdict(f"it counts attention heads, and `{model.names[leaf]}` has an entry for each")
    return Verdict("", (path,), [path.producer], path.consumers, met)


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
