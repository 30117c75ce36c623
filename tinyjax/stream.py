"""A residual stream: a dimension that several products write and several read, block after block.

A new coordinate is written by all writers together, s = sum_l alpha_l.h_l, and read by each reader behind what lies
between, which must be linear but for root-mean-square norms. Such a norm divides by a sum of squares: a coordinate as
small as gamma changes it by gamma^2, so that the slope is exact when writers take gamma and readers none of it. Token
and position embeddings are writers whose inputs are one-hot rows.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, overload

import numpy as np

from tinyjax.atoms import Atom, parts, root, roots
from tinyjax.dimensions import Dimensions
from tinyjax.flow import Flow
from tinyjax.geometry import Unaligned
from tinyjax.layout import Layout
from tinyjax.mixing import is_taken_off
from tinyjax.norms import roles
from tinyjax.rules import REDUCTIONS, whole_in_gather
from tinyjax.site import Stream
from tinyjax.tangent import Tangent, between, follow, slot_path
from tinyjax.trace import MATMULS, OWN, Op, Value
from tinyjax.uses import Use, aligned, array_layout, leaf_layout
from tinyjax.wiring import is_view

LARGEST = 2**26
"""Numbers in the second moments of all readers: beyond it a stream is not grown."""

_SQUARES = ("square", "integer_pow", "mul")
_LINEAR = frozenset("add add_any sub mul div neg broadcast_in_dim reduce_sum slice rev cumsum".split())
_LAYER_NORM = (
    "`{op}` over it is no mean square (a layer norm): a new coordinate would move the mean; centre what is written to "
    "the stream and use an RMS norm, the same function"
)


_Writer = tuple[Use, tuple[int, ...] | None]
"""A writer, and of a table that is added as it is which of its rows go where."""


class Branch(NamedTuple):
    """A writer of a stream on its way to one reader.

    Attributes:
        use: the product that writes; of a table, the operation by which its rows enter.
        rows: of a table that is added as it is (position embeddings, vectors), which of its rows every row of
            `use.outputs` takes; None elsewhere.
        tangent: what lies between writer and reader; None where the reader comes first.
    """

    use: Use
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

    def __init__(self, writers: Sequence[_Writer], tangent: Callable[[Use], Tangent | None]):
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


class Found(NamedTuple):
    """A stream that can grow.

    Attributes:
        writers: the products and tables that write it, in order.
        branches: for every tensor that is read, the writers on their way to it.
        readers: for every tensor that is read, the products that read it, rows in one order.
        roles: of the vectors on the stream.
        powers: see `Site`: the norm divides by the capacity.
        stream: for the site.
    """

    writers: tuple[Use, ...]
    branches: tuple[Branches, ...]
    readers: tuple[tuple[Use, ...], ...]
    roles: dict[int, str]
    powers: tuple[tuple[str, float], ...]
    stream: Stream


def sums_along(model: Dimensions, dimension: Atom) -> list[Op]:
    """The additions of two tensors of activations along a dimension."""
    return [
        op
        for op in model.graph.ops
        if op.name in ("add", "add_any", "sub")
        and not any(model.axes.parameter_only(v) or v in model.graph.batch for v in op.ins)
        and all(any(dimension in roots(axis) for axis in model.axes[v]) for v in op.ins)
    ]


def is_residual(model: Dimensions, sums: Sequence[Op]) -> bool:
    """Whether what is added is read by something else too: a block that adds to what it reads."""
    readers = model.wiring.used_by
    return any(len({*readers[v], *readers[model.wiring.origin(v)]}) > 1 for op in sums for v in op.ins)


def num_writers(model: Dimensions, dimension: Atom) -> int:
    """How many leaves write a dimension: kernels of products, and tables that rows are looked up in."""
    return len({use.leaf for use in (*model.producing.get(dimension, []), *_lookups(model, dimension))})


def find_stream(model: Dimensions, dimension: Atom) -> Found:
    """The writers and readers of a residual stream.

    Raises:
        Unaligned: with the reason why it cannot grow.
    """
    consumers = model.consuming.get(dimension, [])
    writers = [*model.producing.get(dimension, []), *_lookups(model, dimension)]
    writers.sort(key=lambda use: model.order[use.op])
    _require_plain(writers, consumers)
    starts = [use.op.outs[0] for use in writers]
    flow = Flow(model.axes, model.wiring, writers[0], dimension, frozenset(), starts[1:])
    if flow.trouble:
        raise Unaligned(flow.trouble)
    divided = _norms(model, flow, dimension, consumers)
    found = roles(flow)
    kernels = {use.leaf for use in writers}
    found |= {leaf: "fan_in" for leaf, _ in model.leaves[dimension] if model.names[leaf] in kernels}
    biases = {use.bias.leaf for use in writers if use.bias is not None}
    positions = _added(model, flow, dimension, found, biases)
    _require_accounted(model, flow, dimension, found, (*writers, *consumers))
    products = {use.op for use in writers}
    writers = sorted([(use, None) for use in writers] + positions, key=lambda one: model.order[one[0].op])
    groups = _grouped(model, consumers, flow, divided is not None)
    if (count := len(groups) * sum(num_inputs(use) for use, _ in writers) ** 2) > LARGEST:
        raise Unaligned(f"the second moments of what its {len(groups)} readers see would hold {count} numbers")
    uses = tuple(use for use, _ in writers)
    _require_followed(model, flow, dimension, uses, products, [group[0].input_value for group in groups])
    powers = _powers(model, flow, found, uses, groups) if divided else ()
    normed = divided is not None
    parts = functools.cache(flow.downstream)
    branches = tuple(
        Branches(writers, functools.partial(_tangent, model, parts, dimension, group[0])) for group in groups
    )
    return Found(uses, branches, groups, found, powers, Stream(tuple(map(len, groups)), normed))


def _require_plain(writers: Sequence[Use], consumers: Sequence[Use]) -> None:
    """Raises unless every kernel is used once, as a plain matrix outside of scans."""
    written, read = [use.leaf for use in writers], {use.leaf for use in consumers}
    times = Counter(use.leaf for use in (*writers, *consumers))
    for leaf in written:
        if leaf in read:
            table = any(use.leaf == leaf and use.op.name not in MATMULS for use in writers)
            raise Unaligned(f"`{leaf}` both writes and reads it" + (" (tied embeddings)" if table else ""))
    if not writers or not consumers:
        raise Unaligned(f"no product with a parameter {'reads' if writers else 'writes'} it")
    for use in (*writers, *consumers):
        if use.trouble:
            raise Unaligned(use.trouble)
        if use.op.scans:
            raise Unaligned(f"`{use.leaf}` is used in a scan")
        if use.window is not None:
            raise Unaligned(f"`{use.leaf}` is a convolution")
        if times[use.leaf] > 1:
            raise Unaligned(f"`{use.leaf}` is used more than once")
    for use in writers:
        if len([f for f in use.kernel.cols if use.kernel.factors[f] > 1]) > 1:
            raise Unaligned(f"`{use.leaf}` writes it together with another axis")
    for use in consumers:
        if len([f for f in use.inputs.cols if use.input_atoms[f] is not None]) > 1:
            raise Unaligned(f"`{use.leaf}` reads every coordinate more than once")


def _lookups(model: Dimensions, dimension: Atom) -> list[Use]:
    """Tables whose rows are looked up by index, each as a use: what is recorded are the indices."""
    found = []
    for op in model.tables.get(dimension, ()):
        if op.inside or op.scans:
            continue
        numbers, (table, indices) = op.params["dimension_numbers"], op.ins
        if len(table.shape) != 2 or numbers.operand_batching_dims:
            continue
        looked_up = [d for d in (0, 1) if not whole_in_gather(op, d) and op.params["slice_sizes"][d] == 1]
        if len(looked_up) != 1 or roots(model.axes[table][1 - looked_up[0]]) != [dimension]:
            continue
        (entry,), rank = looked_up, len(op.outs[0].shape)
        leaf, depth = model.wiring.views[table]
        rows, cols = (tuple(parts(model.axes[table][d])) for d in (entry, 1 - entry))
        kernel = leaf_layout(model.axes, model.graph.params[leaf], model.names[leaf], depth, rows, cols)
        if kernel is None or depth:
            continue
        window = [d for d in (0, 1) if d not in numbers.collapsed_slice_dims]
        features = dict(zip(window, numbers.offset_dims))[1 - entry]
        out_rows = tuple(d for d in range(rank) if d != features)
        inputs, input_atoms = array_layout(
            "indices",
            op,
            False,
            model.axes[indices],
            tuple(range(len(indices.shape) - 1)),
            (len(indices.shape) - 1,),
            model.axes.steps,
        )
        found.append(_as_use(model, op, 0, kernel, out_rows, (features,), inputs, input_atoms))
    return found


def index_column(lookup: Op) -> int:
    """Which column of its indices says the row of the table."""
    (entry,) = (d for d in (0, 1) if not whole_in_gather(lookup, d))
    return lookup.params["dimension_numbers"].start_index_map.index(entry)


def _as_use(
    model: Dimensions,
    op: Op,
    operand: int,
    kernel: Layout,
    rows: Sequence[int],
    cols: Sequence[int],
    inputs: Layout,
    input_atoms: tuple[Atom | None, ...],
) -> Use:
    """An operation by which rows of a table enter."""
    outputs, atoms = array_layout(
        f"rows of {kernel.leaf}", op, False, model.axes[op.outs[0]], rows, cols, model.axes.steps
    )
    of_rows = tuple(atoms[f] for f in outputs.rows)
    return Use(op, operand, kernel, inputs, outputs, of_rows, input_atoms, atoms, None, None, "")


def _added(
    model: Dimensions, flow: Flow, dimension: Atom, found: dict[int, str], biases: set[str]
) -> list[tuple[Use, tuple[int, ...] | None]]:
    """Leaves added to the stream (position embeddings, vectors): the addition as a use, and which row goes where."""
    positions = []
    for leaf, meetings in flow.met.items():
        atoms, _, _ = model.factors[leaf]
        (op, _), *more = meetings
        if found.get(leaf) != "shift" or model.names[leaf] in biases:
            continue
        (out,) = op.outs
        slots = [d for d, axis in enumerate(model.axes[out]) if dimension in roots(axis)]
        rows = tuple(a for a in atoms if a is not None and root(a) is not dimension)
        cols = tuple(a for a in atoms if a is not None and root(a) is dimension)
        kernel = leaf_layout(model.axes, model.graph.params[leaf], model.names[leaf], 0, rows, cols)
        if more or op.name not in ("add", "add_any") or kernel is None or len(cols) != 1 or op.inside or op.scans:
            raise Unaligned(f"`{model.names[leaf]}` is added to it in a way that cannot be followed")
        others = tuple(d for d in range(len(out.shape)) if d not in slots)
        use = _as_use(model, op, 0, kernel, others, slots, Layout("", (), ()), ())
        positions.append((use, _which_row(use, [root(a) for a in rows])))
    return positions


def _which_row(use: Use, table: Sequence[Atom]) -> tuple[int, ...]:
    """The row of a table that every row of a use takes."""
    sizes = [use.outputs.factors[f] for f in use.outputs.rows]
    along = [None if a is None else root(a) for a in use.rows]
    if any(along.count(a) != 1 for a in table):
        raise Unaligned(f"`{use.leaf}` is added to it in rows that cannot be told apart")
    index = np.zeros(sizes, int)
    for atom in table:
        grid = np.arange(atom.size).reshape([-1 if a is atom else 1 for a in along])
        index = index * atom.size + grid
    return tuple(int(i) for i in np.broadcast_to(index, sizes).ravel())


def _norms(model: Dimensions, flow: Flow, dimension: Atom, consumers: Sequence[Use]) -> bool | None:
    """Whether norms divide by the number of coordinates; None without a norm.

    Raises:
        Unaligned: something else than linear operations, readers and root-mean-square norms sees the stream.
    """
    reading, needed = {use.op for use in consumers}, model.axes.needed
    squared: set[Value] = set()
    divided: set[bool] = set()
    for op in flow.ops:
        inside = [v for v in op.ins if v in flow.mixing]
        if op in reading or not any(v in needed for v in op.outs):
            continue
        if op.name in OWN:
            raise Unaligned("a norm of `tinyjax.models` counts its coordinates; a plain RMS norm can grow")
        along = any(v in flow.mixing for v in op.outs)
        if _is_square(op, flow):
            squared.update(op.outs)
        elif any(v in squared for v in inside):
            over = [d for d, axis in enumerate(model.axes[inside[0]]) if dimension in roots(axis)]
            if is_view(op) and along:
                squared.update(op.outs)
            elif op.name == "reduce_sum" and sorted(op.params["axes"]) == over:
                divided.add(_divides(model, op.outs[0], dimension.size))
            else:
                raise Unaligned(f"its squares go into `{op.name}`, which is no mean over them")
        elif not along and op.name in REDUCTIONS:
            centres = is_taken_off(model.wiring, op)
            raise Unaligned((_LAYER_NORM if centres else "`{op}` over it is no mean square").format(op=op.name))
        elif not along:
            raise Unaligned(f"`{op.name}` reads it, which is no product with a parameter")
        elif not (is_view(op) or op.name in _LINEAR) or (len(inside) > 1 and op.name in ("mul", "div")):
            raise Unaligned(f"`{op.name}` lies on it: a stream is linear between its writers and readers")
    for why in dimension.marks:
        if not (divided and why.startswith("its entries are mixed by `reduce_sum`")):
            raise Unaligned(why)
    if len(divided) > 1:
        raise Unaligned("one norm divides by its width and another does not")
    return next(iter(divided), None)


def _is_square(op: Op, flow: Flow) -> bool:
    """Whether an operation squares the stream."""
    if op.name not in _SQUARES or op.ins[0] not in flow.mixing:
        return False
    return op.name == "square" or (op.params["y"] == 2 if op.name == "integer_pow" else op.ins[0] is op.ins[1])


def _divides(model: Dimensions, value: Value, size: int) -> bool:
    """Whether a sum of squares is divided by the number of coordinates; it may be used as it is."""
    found = set()
    queue = [value]
    while queue:
        for user in model.wiring.used_by.get(v := queue.pop(), []):
            if is_view(user) or user.name == "broadcast_in_dim":
                queue += user.outs
                continue
            number = next((c for other in user.ins if (c := model.wiring.scalar(other)) is not None), None)
            if number is not None and (user.name == "mul" or (user.name == "div" and user.ins[0] is v)):
                found.add(float(number) if user.name == "div" else 1 / float(number))
            else:
                found.add(1.0)
    if len(found) == 1 and abs(next(iter(found)) / size - 1) < 1e-6:
        return True
    if found == {1.0}:
        return False
    raise Unaligned("a norm divides its sum of squares by another number than its width")


def _require_accounted(
    model: Dimensions, flow: Flow, dimension: Atom, found: dict[int, str], kernels: Sequence[Use]
) -> None:
    """Raises unless every leaf along the dimension is a kernel, a shift or a scale, and enters nowhere else."""
    accounted = {use.op for use in kernels} | {meetings[0].op for meetings in flow.met.values()} | flow.beside
    names = {use.leaf for use in kernels}
    times = Counter(leaf for leaf, _ in model.leaves[dimension])
    for leaf in times:
        name = model.names[leaf]
        if times[leaf] > 1:
            raise Unaligned(f"it runs twice through `{name}`")
        for op, _ in model.entries.get(leaf, ()):
            if op not in accounted:
                raise Unaligned(f"`{name}` also enters the model through `{op.name}`")
        if name in names:
            continue
        if found.get(leaf) not in ("shift", "scale"):
            raise Unaligned(f"`{name}` is neither a plain shift nor a plain scale")
        if len(flow.met[leaf]) > 1:
            raise Unaligned(f"`{name}` acts on it more than once")
        if found[leaf] == "shift" and _is_behind_norm(flow, leaf):
            raise Unaligned(f"`{name}` is added behind a norm")


def _is_behind_norm(flow: Flow, leaf: int) -> bool:
    """Whether a vector meets the stream where its rows have been multiplied by a factor of their own."""
    return bool(flow.weights[flow.met[leaf][0].op.outs[0]])


def _grouped(model: Dimensions, consumers: Sequence[Use], flow: Flow, normed: bool) -> tuple[tuple[Use, ...], ...]:
    """The readers tensor by tensor, rows in one order."""
    groups: dict[Value, list[Use]] = {}
    for use in sorted(consumers, key=lambda use: model.order[use.op]):
        if flow.mixing.get(use.input_value, "").startswith("its rows are weighted"):
            where = " (a norm on the stream itself)" if normed else ""
            raise Unaligned(f"{flow.mixing[use.input_value]}{where}")
        if use.input_value not in flow.mixing:
            raise Unaligned(f"`{use.leaf}` reads it from something that no writer writes")
        culprit = flow.culprit.get(use.input_value)
        if culprit is not None:
            raise Unaligned(f"an empty coordinate is not silent: `{culprit}` moves it away from 0")
        groups.setdefault(model.wiring.origin(use.input_value), []).append(use)
    found = []
    for group in groups.values():
        order = [root(model.axes.samples), *(root(a) for a in group[0].rows if a is not None)]
        for use in group:
            rows = [root(a) for a in use.rows if a is not None]
            if len(set(rows)) != len(rows) or set(rows) != set(order):
                raise Unaligned(f"`{use.leaf}` reads it in rows that cannot be told apart, or not for every sample")
        found.append(tuple(aligned(use, order) for use in group))
    return tuple(found)


def _require_followed(
    model: Dimensions, flow: Flow, dimension: Atom, writers: Sequence[Use], products: Set[Op], read: Sequence[Value]
) -> None:
    """Raises unless every writer is read, and what lies between writers and readers can be followed.

    Each operation is looked at once, whichever writers and readers it lies between.
    """
    ops = between(model.wiring, flow, products, read)
    follow(model.axes, model.wiring, flow, writers[0], dimension, ops, {dimension}, model.kernels)
    leading = {*read, *(v for op in ops for v in op.ins)}
    for use in writers:
        if use.op.outs[0] not in leading:
            raise Unaligned(f"nothing reads what `{use.leaf}` writes")


def _tangent(
    model: Dimensions, parts: Callable[[Value], Flow], dimension: Atom, reader: Use, writer: Use
) -> Tangent | None:
    """What lies between a writer and a reader; None where the reader comes first."""
    own, read = parts(writer.op.outs[0]), reader.input_value
    if read not in own.mixing:
        return None
    return slot_path(model.axes, model.wiring, own, writer, dimension, read, reader.inputs, {dimension}, model.kernels)


def _powers(
    model: Dimensions,
    flow: Flow,
    found: dict[int, str],
    writers: Sequence[Use],
    groups: Sequence[Sequence[Use]],
) -> tuple[tuple[str, float], ...]:
    """Which leaves follow the capacity where norms divide by it.

    With c^2 = new / old capacity: what is written is multiplied by c, so that the mean square stays; the scale behind
    every norm by 1 / c, or the kernel of a reader without one.
    """
    powers = {use.leaf: 0.5 for use in writers} | {use.bias.leaf: 0.5 for use in writers if use.bias is not None}
    scales = {leaf for leaf, role in found.items() if role == "scale" and _is_behind_norm(flow, leaf)}
    powers |= {model.names[leaf]: 0.5 for leaf, role in found.items() if role == "shift"}
    powers |= {model.names[leaf]: -0.5 for leaf in scales}
    scaled: Counter[Value] = Counter()
    for leaf in scales:
        behind = flow.downstream(flow.met[leaf][0].op.outs[0])
        scaled.update(behind.mixing.keys())
        for op in behind.ops:
            joined = any(v in flow.mixing and v not in behind.mixing for v in op.ins)
            if joined or _is_square(op, flow):
                raise Unaligned(f"what `{model.names[leaf]}` scales behind a norm meets the stream or a norm again")
    for group in groups:
        if scaled[group[0].input_value] > 1:
            raise Unaligned(f"`{group[0].leaf}` reads it through several scales")
        if not scaled[group[0].input_value]:
            powers |= {use.leaf: -0.5 for use in group}
    return tuple(powers.items())


def num_inputs(use: Use) -> int:
    """Rows of a writer's matrix, the bias counted."""
    return int(np.prod([use.kernel.factors[f] for f in use.kernel.rows])) + (use.bias is not None)
