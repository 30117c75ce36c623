"""Embeddings as products: a lookup reads a row of a table as a one-hot vector would."""

from collections.abc import Sequence

import numpy as np

from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitive_rules import whole_in_gather
from tinyjax.discovery.dimensions.products import Product, array_layout, leaf_layout
from tinyjax.discovery.dimensions.unification import Atom, parts, root, roots
from tinyjax.discovery.graph.graph import ADDITIONS, Op
from tinyjax.discovery.paths.flow import Flow
from tinyjax.discovery.paths.refusals import CannotGrow


def lookups(model: Dimensions, dimension: Atom) -> list[Product]:
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
        leaf, depth = model.def_use.views[table]
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
) -> Product:
    """An operation by which rows of a table enter."""
    outputs, atoms = array_layout(
        f"rows of {kernel.leaf}", op, False, model.axes[op.outs[0]], rows, cols, model.axes.steps
    )
    of_rows = tuple(atoms[f] for f in outputs.rows)
    return Product(op, operand, kernel, inputs, outputs, of_rows, input_atoms, atoms, None, None, "")


def added_positions(
    model: Dimensions, flow: Flow, dimension: Atom, found: dict[int, str], biases: set[str]
) -> list[tuple[Product, tuple[int, ...] | None]]:
    """Leaves added to the stream (position embeddings, vectors): the addition as a use, and which row goes where."""
    positions = []
    for leaf, entries in flow.vectors.entries.items():
        atoms, _, _ = model.factors[leaf]
        (op, _), *more = entries
        if found.get(leaf) != "shift" or model.names[leaf] in biases:
            continue
        (out,) = op.outs
        slots = [d for d, axis in enumerate(model.axes[out]) if dimension in roots(axis)]
        rows = tuple(a for a in atoms if a is not None and root(a) is not dimension)
        cols = tuple(a for a in atoms if a is not None and root(a) is dimension)
        kernel = leaf_layout(model.axes, model.graph.params[leaf], model.names[leaf], 0, rows, cols)
        if more or op.name not in ADDITIONS or kernel is None or len(cols) != 1 or op.inside or op.scans:
            raise CannotGrow(f"`{model.names[leaf]}` is added to it in a way that cannot be followed")
        others = tuple(d for d in range(len(out.shape)) if d not in slots)
        use = _as_use(model, op, 0, kernel, others, slots, Layout("", (), ()), ())
        positions.append((use, _which_row(use, [root(a) for a in rows])))
    return positions


def _which_row(use: Product, table: Sequence[Atom]) -> tuple[int, ...]:
    """The row of a table that every row of a use takes."""
    sizes = [use.outputs.factors[f] for f in use.outputs.rows]
    along = [None if a is None else root(a) for a in use.rows]
    if any(along.count(a) != 1 for a in table):
        raise CannotGrow(f"`{use.leaf}` is added to it in rows that cannot be told apart")
    index = np.zeros(sizes, int)
    for atom in table:
        grid = np.arange(atom.size).reshape([-1 if a is atom else 1 for a in along])
        index = index * atom.size + grid
    return tuple(int(i) for i in np.broadcast_to(index, sizes).ravel())


def num_inputs(use: Product) -> int:
    """Rows of a writer's matrix, the bias counted."""
    return int(np.prod([use.kernel.factors[f] for f in use.kernel.rows])) + (use.bias is not None)
