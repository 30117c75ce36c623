"""Where the network multiplies by its parameters.

A *use* is a matrix product one of whose operands is a view (reshape, transpose, cast, slice of a scan) of a parameter
leaf. Each use knows how the leaf, the other operand and the result are laid out as matrices. A leaf that reaches a
product through anything else than views is *obstructed*: no input or V_goal can be attributed to it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tinyjax.core.layout import Layout
from tinyjax.core.windows import Window
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitives import contraction
from tinyjax.discovery.dimensions.unification import Atom, Axis, parts, root
from tinyjax.discovery.graph.def_use import DefUse, is_view
from tinyjax.discovery.graph.graph import ADDITIONS, MATMULS, Graph, Op, Value


@dataclasses.dataclass(eq=False, frozen=True)
class Product:
    """One matrix product with a parameter leaf.

    Attributes:
        op: the operation.
        operand: which of its operands is the kernel (0 or 1).
        kernel: layout of the leaf, rows contracted and cols kept.
        inputs: the other operand, rows = everything but the contracted axes, cols = contracted, in the kernel's order.
        outputs: the result, rows = those of `inputs` in the same order, cols = the kernel's.
        rows: for each row factor of `inputs` and `outputs` its atom, None for a scan around the operation whose steps
            are no samples.
        input_atoms: for every factor of `inputs` its atom, None for such a scan or an axis of length one.
        output_atoms: the same for `outputs`.
        window: geometry of a convolution, None for a matrix product.
        bias: layout of the vector that is added to the product, or None.
        refusal: why the product cannot be read as a plain matrix product, or "".
    """

    op: Op
    operand: int
    kernel: Layout
    inputs: Layout
    outputs: Layout
    rows: tuple[Atom | None, ...]
    input_atoms: tuple[Atom | None, ...]
    output_atoms: tuple[Atom | None, ...]
    window: Window | None
    bias: Layout | None
    refusal: str

    @property
    def leaf(self) -> str:
        """Path of the kernel."""
        return self.kernel.leaf

    @property
    def input_value(self) -> Value:
        """The operand that is not the kernel."""
        return self.op.ins[1 - self.operand]


def find_products(
    graph: Graph, axes: Axes, def_use: DefUse, names: tuple[str, ...]
) -> tuple[list[Product], dict[Value, str]]:
    """All uses in order, and the operands made from parameters in a way no use can describe, with the reason."""
    uses, obstructed = [], {}
    for op in graph.ops:
        if op.name not in MATMULS:
            continue
        for k, value in enumerate(op.ins[:2]):
            other = def_use.views.get(op.ins[1 - k])
            if value in def_use.views and def_use.views[value] == other:
                continue  # a leaf with itself: a penalty (`vdot(w, w)`), no product of the network
            if value in def_use.views:
                uses.append(_use(graph, axes, def_use, names, op, k))
            elif axes.parameter_only(value) and (why := _obstruction(def_use, names, value)):
                obstructed[value] = why
    return uses, obstructed


def leaf_factors(axes: Axes, value: Value) -> tuple[list, tuple[int, ...], tuple[int, ...]]:
    """Atoms (None for an axis of length one), sizes and axis numbers of the factors of a tensor."""
    atoms, numbers = [], []
    for number, axis in enumerate(axes[value]):
        found = parts(axis) or [None]
        atoms += found
        numbers += [number] * len(found)
    return atoms, tuple(1 if a is None else a.size for a in atoms), tuple(numbers)


def leaf_layout(axes: Axes, leaf: Value, name: str, depth: int, rows: Axis = (), cols: Axis = ()) -> Layout | None:
    """The layout of a leaf given the atoms of its rows and columns; None if it has others besides."""
    atoms, sizes, numbers = leaf_factors(axes, leaf)
    stack = tuple(f for f, number in enumerate(numbers) if number < depth)
    index = {id(a): f for f, a in enumerate(atoms) if a is not None and f not in stack}
    if any(id(a) not in index for a in (*rows, *cols)):
        return None
    row_factors = tuple(index[id(a)] for a in rows)
    col_factors = tuple(index[id(a)] for a in cols)
    rest = [f for f in range(len(sizes)) if f not in (*stack, *row_factors, *col_factors)]
    if any(sizes[f] != 1 for f in rest):
        return None
    return Layout(name, sizes, numbers, None, stack, (*rest, *row_factors), col_factors)


def aligned(use: Product, order: Sequence[Atom]) -> Product:
    """The same use with its rows in the order of the given dimensions; scans and axes of length one come last."""
    position = {root(atom): i for i, atom in reversed(list(enumerate(order)))}
    ranks = [len(order) if atom is None else position[root(atom)] for atom in use.rows]
    by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
    rows = tuple(use.rows[i] for i in by_rank)
    layouts = (
        dataclasses.replace(layout, rows=tuple(layout.rows[i] for i in by_rank)) for layout in (use.inputs, use.outputs)
    )
    inputs, outputs = layouts
    return dataclasses.replace(use, rows=rows, inputs=inputs, outputs=outputs)


def _use(graph: Graph, axes: Axes, def_use: DefUse, names: tuple[str, ...], op: Op, k: int) -> Product:
    leaf, depth = def_use.views[op.ins[k]]
    refusal = f"`{names[leaf]}` is used inside `{op.inside[-1]}`, which cannot be probed" if op.inside else ""
    sides = _sides(op, k)
    refusal = refusal or sides.refusal.format(leaf=names[leaf])
    kernel_axes = axes[op.ins[k]]
    row_atoms = tuple(a for d in sides.kernel_rows for a in parts(kernel_axes[d]))
    col_atoms = tuple(a for d in sides.kernel_cols for a in parts(kernel_axes[d]))
    stacked = depth > 0
    kernel = leaf_layout(axes, graph.params[leaf], names[leaf], depth, row_atoms, col_atoms)
    if kernel is None or (stacked and depth != len(op.stack)):
        refusal = refusal or f"`{names[leaf]}` is sliced in a way that cannot be followed"
        kernel = kernel or Layout(names[leaf], (), ())
    inputs, input_atoms = array_layout(
        f"input of {names[leaf]}", op, stacked, axes[op.ins[1 - k]], sides.input_rows, sides.input_cols, axes.steps
    )
    outputs, output_atoms = array_layout(
        f"output of {names[leaf]}", op, stacked, axes[op.outs[0]], sides.output_rows, sides.output_cols, axes.steps
    )
    rows = tuple(input_atoms[f] for f in inputs.rows)
    bias = _bias(graph, axes, def_use, names, op, k, col_atoms, depth)
    return Product(op, k, kernel, inputs, outputs, rows, input_atoms, output_atoms, sides.window, bias, refusal)


class _Sides(NamedTuple):
    """Which axes of the kernel, of the other operand and of the result are rows and columns, in matching order."""

    kernel_rows: tuple[int, ...]
    kernel_cols: tuple[int, ...]
    input_rows: tuple[int, ...]
    input_cols: tuple[int, ...]
    output_rows: tuple[int, ...]
    output_cols: tuple[int, ...]
    window: Window | None
    refusal: str


def _sides(op: Op, k: int) -> _Sides:
    if op.name == "conv_general_dilated":
        return _convolution_sides(op, k)
    sides = contraction(op)
    rank = len(op.outs[0].shape)
    first = rank - len(sides.free[k]) if k == 1 else len(sides.batched[k])
    output_cols = tuple(range(first, first + len(sides.free[k])))
    return _Sides(
        kernel_rows=sides.contracted[k],
        kernel_cols=sides.free[k],
        input_rows=tuple(d for d in range(len(op.ins[1 - k].shape)) if d not in sides.contracted[1 - k]),
        input_cols=sides.contracted[1 - k],
        output_rows=tuple(d for d in range(rank) if d not in output_cols),
        output_cols=output_cols,
        window=None,
        refusal="`{leaf}` is a batch of kernels (one for each entry of another axis)" if sides.batched[k] else "",
    )


def _convolution_sides(op: Op, k: int) -> _Sides:
    """Rows of the kernel are (*window, input features): the order of a patch."""
    params, numbers = op.params, op.params["dimension_numbers"]
    batch, features, *space = numbers.lhs_spec
    kernel_out, kernel_in, *kernel_space = numbers.rhs_spec
    out_batch, out_features, *out_space = numbers.out_spec
    refusal = ""
    if k != 1:
        refusal = "`{leaf}` is the image of a convolution, not its kernel"
    elif any(d != 1 for d in params["lhs_dilation"]):
        refusal = "`{leaf}` is the kernel of a transposed convolution"
    window = Window(
        size=tuple(op.ins[1].shape[d] for d in kernel_space),
        strides=tuple(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        dilation=tuple(params["rhs_dilation"]),
    )
    return _Sides(
        (*kernel_space, kernel_in), (kernel_out,), (batch, *space), (features,), (out_batch, *out_space),
        (out_features,), window, refusal,
    )  # fmt: skip


def array_layout(
    name: str,
    op: Op,
    stacked: bool,
    tensor: list[Axis],
    rows: Sequence[int],
    cols: Sequence[int],
    steps: Mapping[tuple[int, ...], Axis],
) -> tuple[Layout, tuple[Atom | None, ...]]:
    """A captured array as a matrix, and the atom of each of its factors.

    A recorded array carries the scans around the operation in front. They are layers of a stack where the kernel is
    sliced by them (`stacked`), rows otherwise; `steps` are those of scans over samples.
    """
    scans = list(range(len(op.stack)))
    counted = [[] if stacked else parts(steps.get(scan.path, ())) for scan in op.scans]
    sizes, numbers = list(op.stack), list(scans)
    atoms: list[Atom | None] = [found[0] if len(found) == 1 else None for found in counted]
    factors_of: dict[int, list[int]] = {}
    for d, axis in enumerate(tensor):
        found: list[Atom | None] = [*parts(axis)] or [None]
        factors_of[d] = list(range(len(sizes), len(sizes) + len(found)))
        sizes += [1 if a is None else a.size for a in found]
        numbers += [len(scans) + d] * len(found)
        atoms += found
    layout = Layout(
        name,
        tuple(sizes),
        tuple(numbers),
        stack=tuple(scans) if stacked else (),
        rows=(*([] if stacked else scans), *(f for d in rows for f in factors_of[d])),
        cols=tuple(f for d in cols for f in factors_of[d]),
    )
    return layout, tuple(atoms)


def _bias(
    graph: Graph, axes: Axes, def_use: DefUse, names: tuple[str, ...], op: Op, k: int, cols: Axis, depth: int
) -> Layout | None:
    """The vector added to a product, found by following the product through views to the addition."""
    value = op.outs[0]
    while len(users := def_use.used_by.get(value, [])) == 1:
        (user,) = users
        if is_view(user) and user.name != "scan_in":
            value = user.outs[0]
            continue
        if user.name not in ADDITIONS or user.ins[0] is user.ins[1]:
            break
        found = def_use.vector(user.ins[1] if user.ins[0] is value else user.ins[0])
        if found is None or found[0].depth != depth:
            break
        view, vector = found
        own = {root(a): a for axis in axes[vector] for a in parts(axis)}
        wanted = [root(a) for a in cols]
        if len(set(wanted)) != len(wanted) or set(own) != set(wanted):
            break
        ordered = tuple(own[r] for r in wanted)
        return leaf_layout(axes, graph.params[view.leaf], names[view.leaf], view.depth, cols=ordered)
    return None


def _obstruction(def_use: DefUse, names: tuple[str, ...], value: Value) -> str:
    """Which leaf a parameter-only operand comes from, and the first operation that is not a view; "" if none.

    A matrix is named rather than a vector that scales it; a flat vector of parameters is all there is.
    """
    seen, queue, found = set(), [value], []
    while queue:
        v = queue.pop()
        op = def_use.made_by.get(v)
        if op is None or v in seen:
            continue
        seen.add(v)
        found += [(source, op) for source in op.ins if source in def_use.views and source.shape]
        queue += op.ins
    source, op = next((one for one in found if len(one[0].shape) > 1), found[0] if found else (None, None))
    if source is None or op is None:
        return ""
    return f"`{names[def_use.views[source].leaf]}` reaches the matrix product through `{op.name}`"
