"""A residual stream: a dimension that several products write and several read, block after block.

A new coordinate is written by all writers together, s = sum_l alpha_l.h_l, and read by each reader behind what lies
between, which must be linear but for root-mean-square norms. Such a norm divides by a sum of squares: a coordinate as
small as gamma changes it by gamma^2, so that the slope is exact when writers take gamma and readers none of it. Token
and position embeddings are writers whose inputs are one-hot rows.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, overload

from tinyjax.core.kinds import RESIDUAL_STREAM
from tinyjax.core.site import Stream
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS
from tinyjax.discovery.dimensions.products import Product, aligned
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.graph import MATMULS, SUMS, Address, Op, Value
from tinyjax.discovery.kinds.embeddings import added_positions, lookups, num_inputs
from tinyjax.discovery.kinds.rms_norm import is_behind_norm, is_divided, norm_powers
from tinyjax.discovery.paths.batch_norm import roles
from tinyjax.discovery.paths.flow import Flow, follow_product
from tinyjax.discovery.paths.path import Path, Verdict, readers
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slot_paths import Tangent, between, follow, slot_path

LARGEST = 2**26
"""Numbers in the second moments of all readers: beyond it a stream is not grown."""

_Writer = tuple[Product, tuple[int, ...] | None]
"""A writer, and of a table that is added as it is which of its rows go where."""


class Branch(NamedTuple):
    """A writer of a stream on its way to one reader.

    Attributes:
        use: the product that writes; of a table, the operation by which its rows enter.
        rows: of a table that is added as it is (position embeddings, vectors), which of its rows every row of
            `use.outputs` takes; None elsewhere.
        tangent: what lies between writer and reader; None where the reader comes first.
    """

    use: Product
    rows: tuple[int, ...] | None
    tangent: Tangent | None

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.use.op.name not in MATMULS


class Branches(Sequence[Branch]):
    """The writers of a stream on their way to one reader.

    They are found when they are first asked for: all of them are as many as writers times readers.
    """

    def __init__(self, writers: Sequence[_Writer], tangent: Callable[[Product], Tangent | None]):
        self._writers, self._tangent = writers, tangent

    @functools.cached_property
    def _found(self) -> tuple[Branch, ...]:
        return tuple(Branch(use, rows, self._tangent(use)) for use, rows in self._writers)

    @overload
    def __getitem__(self, index: int) -> Branch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Branch]: ...
    def __getitem__(self, index: int | slice) -> Branch | Sequence[Branch]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._writers)


@dataclasses.dataclass(frozen=True)
class StreamPath(Path):
    """One tensor that is read, all writers on their way to it; the producer is the first of them.

    Attributes:
        branches: the writers.
    """

    branches: Branches

    kind = RESIDUAL_STREAM
    between = "a residual stream"

    def recorded(self) -> list[Product]:
        """All writers but tables that are added as they are."""
        return [branch.use for branch in self.branches if branch.rows is None]

    def taps(self) -> dict[Address, int]:
        """What lies between writers and readers."""
        between = [branch.tangent.taps for branch in self.branches if branch.tangent is not None]
        return {address: operand for taps in between for address, operand in taps.items()}


def sums_along(model: Dimensions, dimension: Atom) -> list[Op]:
    """The additions of two tensors of activations along a dimension."""
    return [
        op
        for op in model.graph.ops
        if op.name in SUMS
        and not any(model.axes.parameter_only(v) or v in model.graph.batch for v in op.ins)
        and all(any(dimension in roots(axis) for axis in model.axes[v]) for v in op.ins)
    ]


def is_residual(model: Dimensions, sums: Sequence[Op]) -> bool:
    """Whether what is added is read by something else too: a block that adds to what it reads."""
    readers = model.def_use.used_by
    return any(len({*readers[v], *readers[model.def_use.origin(v)]}) > 1 for op in sums for v in op.ins)


def num_writers(model: Dimensions, dimension: Atom) -> int:
    """How many leaves write a dimension: kernels of products, and tables that rows are looked up in."""
    return len({use.leaf for use in (*model.producing.get(dimension, []), *lookups(model, dimension))})


def find_stream(model: Dimensions, dimension: Atom) -> Verdict:
    """The writers and readers of a residual stream, a path for each tensor that is read.

    Raises:
        CannotGrow: with the reason why it cannot grow.
    """
    consumers = model.consuming.get(dimension, [])
    writers = [*model.producing.get(dimension, []), *lookups(model, dimension)]
    writers.sort(key=lambda use: model.order[use.op])
    _require_plain(writers, consumers)
    starts = [use.op.outs[0] for use in writers]
    flow = follow_product(model.axes, model.def_use, writers[0], dimension, others=starts[1:])
    if flow.refusal:
        raise CannotGrow(flow.refusal)
    divided = is_divided(model, flow, dimension, consumers)
    found = roles(flow)
    kernels = {use.leaf for use in writers}
    found |= {leaf: "fan_in" for leaf, _ in model.leaves[dimension] if model.names[leaf] in kernels}
    biases = {use.bias.leaf for use in writers if use.bias is not None}
    positions = added_positions(model, flow, dimension, found, biases)
    _require_accounted(model, flow, dimension, found, (*writers, *consumers))
    products = {use.op for use in writers}
    writers = sorted([(use, None) for use in writers] + positions, key=lambda one: model.order[one[0].op])
    groups = _grouped(model, consumers, flow, divided is not None)
    if (count := len(groups) * sum(num_inputs(use) for use, _ in writers) ** 2) > LARGEST:
        raise CannotGrow(f"the second moments of what its {len(groups)} readers see would hold {count} numbers")
    uses = tuple(use for use, _ in writers)
    _require_followed(model, flow, dimension, uses, products, [group[0].input_value for group in groups])
    powers = norm_powers(model, flow, found, uses, groups) if divided else ()
    stream = Stream(tuple(map(len, groups)), normed=divided is not None)
    parts = functools.cache(flow.downstream)
    paths = []
    for group in groups:
        branches = Branches(writers, functools.partial(_tangent, model, parts, dimension, group[0]))
        paths.append(StreamPath(uses[0], group, branches))
    return Verdict("", paths, uses, readers(paths), found, powers=powers, stream=stream)


def _require_plain(writers: Sequence[Product], consumers: Sequence[Product]) -> None:
    """Raises unless every kernel is used once, as a plain matrix outside of scans."""
    written, read = [use.leaf for use in writers], {use.leaf for use in consumers}
    times = Counter(use.leaf for use in (*writers, *consumers))
    for leaf in written:
        if leaf in read:
            table = any(use.leaf == leaf and use.op.name not in MATMULS for use in writers)
            raise CannotGrow(f"`{leaf}` both writes and reads it" + (" (tied embeddings)" if table else ""))
    if not writers or not consumers:
        raise CannotGrow(f"no product with a parameter {'reads' if writers else 'writes'} it")
    for use in (*writers, *consumers):
        if use.refusal:
            raise CannotGrow(use.refusal)
        if use.op.scans:
            raise CannotGrow(f"`{use.leaf}` is used in a scan")
        if use.window is not None:
            raise CannotGrow(f"`{use.leaf}` is a convolution")
        if times[use.leaf] > 1:
            raise CannotGrow(f"`{use.leaf}` is used more than once")
    for use in writers:
        if len([f for f in use.kernel.cols if use.kernel.factors[f] > 1]) > 1:
            raise CannotGrow(f"`{use.leaf}` writes it together with another axis")
    for use in consumers:
        if len([f for f in use.inputs.cols if use.input_atoms[f] is not None]) > 1:
            raise CannotGrow(f"`{use.leaf}` reads every coordinate more than once")


def _require_accounted(
    model: Dimensions, flow: Flow, dimension: Atom, found: dict[int, str], kernels: Sequence[Product]
) -> None:
    """Raises unless every leaf along the dimension is a kernel, a shift or a scale, and enters nowhere else."""
    accounted = {use.op for use in kernels} | {found[0].op for found in flow.vectors.entries.values()}
    accounted |= {op for scales in flow.factors.scales.values() for op, _ in scales}
    names = {use.leaf for use in kernels}
    times = Counter(leaf for leaf, _ in model.leaves[dimension])
    for leaf in times:
        name = model.names[leaf]
        if times[leaf] > 1:
            raise CannotGrow(f"it runs twice through `{name}`")
        for op, _ in model.entries.get(leaf, ()):
            if op not in accounted:
                raise CannotGrow(f"`{name}` also enters the model through `{op.name}`")
        if name in names:
            continue
        if found.get(leaf) not in ("shift", "scale"):
            raise CannotGrow(f"`{name}` is neither a plain shift nor a plain scale")
        if len(flow.vectors.entries[leaf]) > 1:
            raise CannotGrow(f"`{name}` acts on it more than once")
        if found[leaf] == "shift" and is_behind_norm(flow, leaf):
            raise CannotGrow(f"`{name}` is added behind a norm")


def _grouped(
    model: Dimensions, consumers: Sequence[Product], flow: Flow, normed: bool
) -> tuple[tuple[Product, ...], ...]:
    """The readers tensor by tensor, rows in one order."""
    groups: dict[Value, list[Product]] = {}
    for use in sorted(consumers, key=lambda use: model.order[use.op]):
        if flow.rows.mixing.get(use.input_value, "").startswith("its rows are weighted"):
            where = " (a norm on the stream itself)" if normed else ""
            raise CannotGrow(f"{flow.rows.mixing[use.input_value]}{where}")
        if use.input_value not in flow.values:
            raise CannotGrow(f"`{use.leaf}` reads it from something that no writer writes")
        unsilent_op = flow.empty.unsilent_op.get(use.input_value)
        if unsilent_op is not None:
            raise CannotGrow(f"an empty coordinate is not silent: `{unsilent_op}` moves it away from 0")
        groups.setdefault(model.def_use.origin(use.input_value), []).append(use)
    found = []
    for group in groups.values():
        order = [root(model.axes.samples), *(root(a) for a in group[0].rows if a is not None)]
        for use in group:
            rows = [root(a) for a in use.rows if a is not None]
            if len(set(rows)) != len(rows) or set(rows) != set(order):
                raise CannotGrow(f"`{use.leaf}` reads it in rows that cannot be told apart, or not for every sample")
        found.append(tuple(aligned(use, order) for use in group))
    return tuple(found)


def _require_followed(
    model: Dimensions, flow: Flow, dimension: Atom, writers: Sequence[Product], products: Set[Op], read: Sequence[Value]
) -> None:
    """Raises unless every writer is read, and what lies between writers and readers can be followed.

    Each operation is looked at once, whichever writers and readers it lies between.
    """
    ops = between(model.def_use, flow, products, read)
    follow(model.axes, model.def_use, flow, writers[0], dimension, ops, {dimension}, model.kernels)
    leading = {*read, *(v for op in ops for v in op.ins)}
    for use in writers:
        if use.op.outs[0] not in leading:
            raise CannotGrow(f"nothing reads what `{use.leaf}` writes")


def _tangent(
    model: Dimensions, parts: Callable[[Value], Flow], dimension: Atom, reader: Product, writer: Product
) -> Tangent | None:
    """What lies between a writer and a reader; None where the reader comes first."""
    own, read = parts(writer.op.outs[0]), reader.input_value
    if read not in own.values:
        return None
    return slot_path(model.axes, model.def_use, own, writer, dimension, read, reader.inputs, {dimension}, model.kernels)


def may_be_stream(model: Dimensions, dimension: Atom) -> bool:
    """Whether a dimension that is no hidden layer may be a stream: written or read several times, or an embedding."""
    if BETWEEN_ACTIVATIONS in dimension.marks:
        return False
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    if {use.leaf for use in producers} & {use.leaf for use in consumers}:
        return False
    written = num_writers(model, dimension)
    embedding = written == 1 and not producers
    return written > 1 or embedding or len({model.def_use.origin(use.input_value) for use in consumers}) > 1


def find_residual_stream(model: Dimensions, dimension: Atom, reason: str) -> Verdict:
    """The paths of a residual stream, one for each tensor that is read, or why it cannot grow."""
    consumers = model.consuming.get(dimension, [])
    try:
        return find_stream(model, dimension)
    except CannotGrow as refusal:
        count = num_writers(model, dimension)
        if "tied embeddings" in str(refusal) and "its consumers" in reason:  # each reads what another writes
            return Verdict(str(refusal))
        sums = sums_along(model, dimension)
        plain = count < 2 or not consumers or not sums or "meet again" in reason or "gate" in reason
        # Streams of images never grow: what else is wrong with one says more.
        plain |= "producers" not in reason and any(use.window for use in model.producing.get(dimension, []))
        how = " (a residual stream)" if is_residual(model, sums) else ", added up"
        return Verdict(reason if plain else f"{count} producers{how}: {refusal}")
