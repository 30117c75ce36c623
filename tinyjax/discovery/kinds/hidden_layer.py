"""Hidden layers: one product writes the dimension, aligned products read it, empty slots are silent; or why not."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from jaxtyping import Array

from tinyjax.core.kinds import HIDDEN_LAYER
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS, INPUT, SAMPLES, SHARED_HEADS
from tinyjax.discovery.dimensions.products import Product, aligned
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.graph import VIEWS, Address, Value
from tinyjax.discovery.kinds.attention_scores import is_shared
from tinyjax.discovery.kinds.attention_values import find_values_path
from tinyjax.discovery.kinds.convolution import find_convolution_path
from tinyjax.discovery.kinds.gated_units import Gate, GatedPath, pair_up
from tinyjax.discovery.paths.activations import activation_between
from tinyjax.discovery.paths.batch_norm import find_norm, roles
from tinyjax.discovery.paths.flow import Flow, follow_product
from tinyjax.discovery.paths.image_geometry import is_rowwise
from tinyjax.discovery.paths.kept_rows import ROW_BY_ROW
from tinyjax.discovery.paths.path import Path, Verdict, readers
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.row_factors import RowFactorLayout, lay_out_row_factor
from tinyjax.discovery.paths.slopes import slope_at_empty


@dataclasses.dataclass(frozen=True)
class HiddenPath(Path):
    """A path between two matrix products that work on the same rows.

    Attributes:
        activation: elementwise, of the producer's output on its way to the consumers; None if more than elementwise
            operations lie there.
        weights: what every row was multiplied by between the two.
        measure: the slope, see `slope_at_empty`.
    """

    activation: Callable[[Array], Array] | None
    weights: tuple[RowFactorLayout, ...]
    measure: Callable[[], float | None]

    kind = HIDDEN_LAYER
    between = "more than an elementwise activation"

    def slope(self) -> float | None:
        """See `Path`."""
        return self.measure()

    def taps(self) -> dict[Address, int]:
        """What rows are multiplied by."""
        return {weight.address: weight.operand for weight in self.weights}


def static_reason(model: Dimensions, dimension: Atom) -> str:
    """Why the dimension cannot grow, as far as the shapes of its kernels tell."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    if dimension in model.obstructed:
        return model.obstructed[dimension]
    if not producers:
        return unwritten(model, dimension, consumers)
    if BETWEEN_ACTIVATIONS in dimension.marks:
        return SHARED_HEADS if is_shared(model, dimension) else BETWEEN_ACTIVATIONS
    written, read = list(dict.fromkeys(u.leaf for u in producers)), list(dict.fromkeys(u.leaf for u in consumers))
    both = [leaf for leaf in written if leaf in set(read)]
    if both:
        return f"`{both[0]}` both writes and reads it: a fan-out would have to be its own fan-in"
    if len(written) > 2:
        return f"{len(written)} producers, more than a hidden layer has"
    for use in (*producers, *consumers):
        if use.refusal:
            return use.refusal
    if dimension.marks:
        return next(iter(dimension.marks))
    repeated = [leaf for leaf, _ in model.leaves[dimension]]
    twice = next((leaf for leaf, times in Counter(repeated).items() if times > 1), None)
    if twice is not None:
        return f"it runs twice through `{model.names[twice]}`"
    return ""


def unwritten(model: Dimensions, dimension: Atom, consumers: Sequence[Product]) -> str:
    """Where a dimension that no product writes comes from."""
    reading = {use.op for use in consumers}
    for leaf, _ in model.leaves[dimension]:
        for op, through in model.entries.get(leaf, ()):
            if op not in reading or through:
                how = ", ".join(f"`{name}`" for name in sorted({*(through - VIEWS), op.name}))
                what = " (an embedding)" if op.name == "gather" else ""
                return f"no matrix product with a parameter writes it: `{model.names[leaf]}` enters through {how}{what}"
    return "no matrix product with a parameter writes it"


def find_hidden_layer(model: Dimensions, dimension: Atom) -> Verdict:
    """The aligned producer-consumer pairs, the roles of the vectors along it, or why there are none."""
    if reason := static_reason(model, dimension):
        return Verdict(reason)
    producers, consumers = model.producing[dimension], model.consuming.get(dimension, [])
    paths, found, norms = [], {}, []
    kernels = (*producers, *consumers)
    accounted, kernel_leaves = {use.op for use in kernels}, {use.leaf for use in kernels}
    read, wanted = _by_input(consumers), sorted({c.leaf for c in consumers})
    try:
        pairs = _with_gates(model, dimension, producers)
    except CannotGrow as refusal:
        return Verdict(str(refusal))
    flows = []
    for producer, gate in pairs:
        gates = frozenset() if gate is None else frozenset({gate.value})
        flows.append(follow_product(model.axes, model.def_use, producer, dimension, gates))
    reason = _joint_reason(model, producers, consumers, flows)
    if reason:
        return Verdict(reason)
    for (producer, gate), flow in zip(pairs, flows):
        mine = tuple(consumers[i] for i in sorted(i for v in flow.values for i in read.get(v, ())))
        if sorted(c.leaf for c in mine) != wanted:
            return Verdict("its consumers do not each read the output of one producer operation once")
        reason = _row_reason(model, producer, mine, flow) or _vector_reason(model, flow, kernel_leaves)
        if reason:
            return Verdict(reason)
        found |= roles(flow)
        accounted |= {entries[0].op for entries in flow.vectors.entries.values()}
        accounted |= {op for ops in flow.vectors.counted.values() for op in ops}
        if gate is not None:
            theirs, ours = gate.flow.vectors.entries, flow.vectors.entries
            biases = {leaf: entries for leaf, entries in theirs.items() if leaf not in ours}
            found |= dict.fromkeys(biases, "shift")
            accounted |= {entries[0].op for entries in biases.values()}
        bias = None if producer.bias is None else producer.bias.leaf
        norm, reason = find_norm(flow, model.def_use, model.axes, found, model.names, bias, dimension.size)
        mixed = any(flow.rows.mixing[c.input_value] != ROW_BY_ROW for c in mine) or len(producer.kernel.cols) != 1
        if norm is not None and mixed:
            reason = "a batch normalisation where rows are mixed"
        if norm is not None and (len(producers) > 1 or producer.op.stack):
            reason = "a batch normalisation inside a scan, behind a gate or a kernel that is used more than once"
        if norm is not None and mine and flow.factors.of[mine[0].input_value]:
            reason = "its rows are weighted one by one before or after a batch normalisation"
        if reason:
            return Verdict(reason)
        norms.append(norm)
        try:
            paths.append(_path(model, producer, mine, flow, dimension, gate))
        except CannotGrow as refusal:
            return Verdict(str(refusal))
    reached = [id(c) for path in paths for c in path.consumers]
    if len(reached) != len(consumers) or len(set(norms)) > 1:
        return Verdict("its consumers do not each read the output of one producer operation")
    known = ("shift", "scale", "counted") + (() if norms[0] is None else ("mean", "var"))
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in accounted:
                return Verdict(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
        if model.names[leaf] not in kernel_leaves and found.get(leaf) not in known:
            return Verdict(f"`{model.names[leaf]}` is neither a plain shift nor a plain scale")
    gates = [path.gate for path in paths if isinstance(path, GatedPath)]
    return Verdict("", paths, [path.producer for path in paths], readers(paths), found, norms[0], gates=gates)


def _by_input(uses: Sequence[Product]) -> dict[Value, list[int]]:
    """Which of some uses read a value, by number."""
    found: dict[Value, list[int]] = {}
    for i, use in enumerate(uses):
        found.setdefault(use.input_value, []).append(i)
    return found


def _with_gates(model: Dimensions, dimension: Atom, producers: Sequence[Product]) -> list[tuple[Product, Gate | None]]:
    """The products to compute neurons for, each with its gate if the dimension is one of gated units.

    Raises:
        CannotGrow: two producers that are no gated unit.
    """
    if len({use.leaf for use in producers}) == 1:
        return [(use, None) for use in producers]
    return [*pair_up(model.axes, model.def_use, producers, dimension)]


def _path(
    model: Dimensions,
    producer: Product,
    consumers: tuple[Product, ...],
    flow: Flow,
    dimension: Atom,
    gate: Gate | None,
) -> Path:
    """The uses of a path with their rows in one order."""
    read = consumers[0].input_value
    if flow.rows.mixing[read] != ROW_BY_ROW or len(producer.kernel.cols) != 1:
        if gate is not None:
            raise CannotGrow(flow.rows.mixing[read] or f"`{producer.leaf}` produces it together with another axis")
        return find_values_path(model, producer, consumers, flow, dimension)
    slope = partial(slope_at_empty, model.def_use, flow, producer.op.outs[0], read)
    if not is_rowwise(producer, consumers, flow.poolings.before[read]):
        if gate is not None:
            raise CannotGrow("a gated unit between convolutions or poolings")
        return find_convolution_path(model, producer, consumers, flow, dimension, slope)
    for use in consumers:
        if len([f for f in use.inputs.cols if use.input_atoms[f] is not None]) > 1:
            raise CannotGrow(f"`{use.leaf}` reads every neuron more than once")
    order = [*model.axes.sample_atoms(), *(a for a in producer.rows if a is not None)]
    producer, readers = aligned(producer, order), tuple(aligned(c, order) for c in consumers)
    weights = tuple(lay_out_row_factor(model.axes, weight, producer) for weight in flow.factors.of[read])
    if gate is None:
        return HiddenPath(producer, readers, _activation(model, producer, read), weights, slope)
    if not is_rowwise(producer, [gate.use], ()) or gate.use.op.scans != producer.op.scans:
        raise CannotGrow(f"its gate `{gate.use.leaf}` has other rows than `{producer.leaf}`")
    return GatedPath(producer, readers, aligned(gate.use, order), gate.activation, weights, slope)


def _activation(model: Dimensions, producer: Product, read: Value) -> Callable[[Array], Array] | None:
    """The elementwise function between a product and what its consumers read, or None."""
    try:
        return activation_between(model.def_use, producer, read)
    except CannotGrow:
        return None


def _vector_reason(model: Dimensions, flow: Flow, kernels: set[str]) -> str:
    """Why a leaf that acts on it slot by slot makes the dimension other than a plain hidden layer."""
    if flow.refusal:
        return flow.refusal
    for leaf, entries in flow.vectors.entries.items():
        if model.names[leaf] in kernels:
            return f"`{model.names[leaf]}` also enters the model through `{entries[0].op.name}`"
        if len(entries) > 1 or leaf in flow.vectors.counted:
            return f"`{model.names[leaf]}` acts on it more than once"
    return ""


def _joint_reason(
    model: Dimensions, producers: Sequence[Product], consumers: Sequence[Product], flows: Sequence[Flow]
) -> str:
    """Why no neuron can be computed for a consumer that several products reach: its rows would have to be joined."""
    reached = Counter(value for flow in flows for value in flow.values)
    for consumer in consumers:
        if reached[consumer.input_value] < 2:
            continue
        one, other = [flow for flow in flows if consumer.input_value in flow.values][:2]
        first, second = one.values, other.values
        meet = (op for op in one.ops if {v in first for v in op.ins if v in first or v in second} == {True, False})
        name = next((op.name for op in meet if any(v in first for v in op.outs)), "add")
        return f"`{consumer.leaf}` reads two products of `{producers[0].leaf}` at once, which meet in `{name}`"
    return ""


def _other_rows(model: Dimensions, consumer: Product) -> str:
    """Why the rows of a consumer are not those of the samples."""
    if not model.axes.depends_on_batch(consumer.input_value):
        return f"the input of `{consumer.leaf}` does not depend on the samples"
    marks = [why for a in consumer.rows if a is not None for why in root(a).marks if why not in (INPUT, SAMPLES)]
    return f"`{consumer.leaf}` reads rows that are not all the samples" + (f": of them, {marks[0]}" if marks else "")


def _row_reason(model: Dimensions, producer: Product, consumers: Sequence[Product], flow: Flow) -> str:
    """Why the consumers do not read what the producer wrote, slot by slot, with empty slots at zero."""
    if len({model.def_use.origin(c.input_value) for c in consumers}) > 1:
        return "its consumers read different tensors"
    for consumer in consumers:
        same_scans = producer.op.scans == consumer.op.scans
        if not same_scans or len(producer.kernel.stack) != len(consumer.kernel.stack):
            return f"`{consumer.leaf}` reads it in another scan than `{producer.leaf}` writes it"
        rows = [root(a) for a in consumer.rows if a is not None]
        mixed = flow.rows.mixing[consumer.input_value]
        if len(set(rows)) != len(rows):
            return mixed or f"`{consumer.leaf}` reads rows that cannot be told apart"
        if not {*model.axes.sample_atoms()} <= {*rows}:
            return mixed or _other_rows(model, consumer)
        unsilent_op = flow.empty.unsilent_op.get(consumer.input_value)
        if unsilent_op is not None and mixed:
            return mixed
        if unsilent_op is not None:
            value = flow.empty.at.get(consumer.input_value)
            arrives = "something unknown" if value is None else f"{float(value):.3g}"
            return f"an empty neuron is not silent: `{unsilent_op}` maps 0 to {arrives} (use sigma(x) - sigma(0))"
    return ""
