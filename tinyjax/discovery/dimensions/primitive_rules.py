"""Which axes of operands and results are the same dimension: one rule a primitive.

Elementwise operations unify axes, views pass them on, contractions unify the two sides; whatever ties an axis to its
length (a reduction, an iota, a sort, an unknown primitive) leaves a mark that says so.
"""

from collections.abc import Callable, Sequence

from jax import lax

from tinyjax.discovery.dimensions.primitives import (
    ALONG,
    ELEMENTWISE,
    JOINED,
    RANDOM,
    REDUCTIONS,
    SAMPLES,
    contraction,
    sample_blocks,
    size_of,
)
from tinyjax.discovery.dimensions.unification import Atom, Axis, mark, regroup, roots, unify
from tinyjax.discovery.graph.graph import Op

STEPS = "it counts the steps of a scan"
PIXELS = "it is a spatial axis of a convolution"
INDEXED = "it is indexed (`gather`)"
STACK = "it is a stack of tensors"

Rule = Callable[[Op, list[list[Axis]], list[list[Axis]]], list[list[Axis]]]


def _mark_all(axes: Sequence[Sequence[Axis]], why: str) -> None:
    for tensor in axes:
        for axis in tensor:
            mark(axis, why)


def unknown(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    """The rule of a primitive nobody has described: its axes keep their lengths."""
    _mark_all([*ins, *outs], f"it passes through `{op.name}`")
    return outs


def _elementwise(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    for d, size in enumerate(op.outs[0].shape):  # operands have the rank of the result, or are scalars
        full = [axes[d] for axes, value in zip(ins, op.ins) if value.shape and value.shape[d] == size]
        for other in full[1:]:
            unify(full[0], other)
        outs[0][d] = full[0]
    return outs


def _many_elementwise(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    return ins  # optimization_barrier: as many results as operands


def _random(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    shared = num_keyed(op)
    why = "random numbers are drawn along it: a wider layer would draw others"
    _mark_all([out[shared:] for out in outs], why)
    return [[*ins[0][:shared], *out[shared:]] for out in outs]


def num_keyed(op: Op) -> int:
    """How many leading axes of what is drawn are those of typed keys (or of what they are made from)."""
    if not op.name.startswith("random_"):
        return 0
    keys, *_ = op.outs if op.name in ("random_seed", "random_wrap") else op.ins
    return len(keys.shape)


def _iota(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    mark(outs[0][op.params["dimension"]], "its positions are numbered (`iota`)")
    return outs


def _broadcast(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    for axis, target in enumerate(op.params["broadcast_dimensions"]):
        if op.ins[0].shape[axis] == op.outs[0].shape[target]:
            outs[0][target] = ins[0][axis]
    return outs


def _reshape(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    order = op.params["dimensions"]  # `order="F"` reads the axes backwards
    flat = [atom for d in (range(len(ins[0])) if order is None else order) for atom in ins[0][d]]
    axes = regroup(flat, op.outs[0].shape) if 0 not in op.outs[0].shape else None
    if axes is None:
        _mark_all([*ins, *outs], "it passes through a `reshape` that does not factor")
        return outs
    return [axes]


def _transpose(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    return [[ins[0][axis] for axis in op.params["permutation"]]]


def _squeeze(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    gone = {axis % len(ins[0]) for axis in op.params["dimensions"]}
    return [[a for axis, a in enumerate(ins[0]) if axis not in gone]]


def _reduce(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    for axis in op.params["axes"]:
        mark(ins[0][axis], f"its entries are mixed by `{op.name}`")
    return reduce_parameters(op, ins, outs)


def reduce_parameters(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    """The rule of a reduction that ties nothing: a penalty on parameters."""
    gone = op.params["axes"]
    return [[a for axis, a in enumerate(ins[0]) if axis not in gone] for _ in outs]


def _dot(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    sides = contraction(op)
    left, right = ins
    for x, y in ((sides.contracted[0], sides.contracted[1]), (sides.batched[0], sides.batched[1])):
        for a, b in zip(x, y):
            unify(left[a], right[b])
    return [[left[d] for d in sides.batched[0]] + [left[d] for d in sides.free[0]] + [right[d] for d in sides.free[1]]]


def _convolution(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    numbers, (image, kernel), out = op.params["dimension_numbers"], ins, outs[0]
    batch, features, *space = numbers.lhs_spec
    kernel_out, kernel_in, *window = numbers.rhs_spec
    out_batch, out_features, *out_space = numbers.out_spec
    out[out_batch] = image[batch]
    if op.params["feature_group_count"] == 1 and op.params["batch_group_count"] == 1:
        unify(image[features], kernel[kernel_in])
        out[out_features] = kernel[kernel_out]
    else:
        for axis in (image[features], kernel[kernel_in], kernel[kernel_out], out[out_features]):
            mark(axis, "it passes through a grouped convolution")
    for axes, tensor in ((space, image), (window, kernel), (out_space, out)):
        for d in axes:
            mark(tensor[d], PIXELS)
    return outs


def _side_by_side(count: int, block: Axis, why: str) -> Axis:
    """An axis of so many blocks, one after the other."""
    return block if count == 1 else (Atom(count, why), *block)


def _cut(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    """The rule of `split` and `slice`: whole blocks of samples that were put side by side are samples again."""
    cut = [d for d, size in enumerate(op.ins[0].shape) if any(out.shape[d] != size for out in op.outs)]
    blocks = sample_blocks(ins[0][cut[0]]) if len(cut) == 1 else None
    if blocks is None:
        return _along(op, ins, outs)
    (d,), length = cut, size_of(blocks[1])
    starts = (0,) if op.name == "split" else op.params["start_indices"][d : d + 1]
    strides = op.params.get("strides")
    if any(n % length for n in (*starts, *(out.shape[d] for out in op.outs))) or (strides and strides[d] != 1):
        return _along(op, ins, outs)
    why = f"it passes through `{op.name}`"
    mark([atom for atom in roots(ins[0][d]) if atom not in blocks[1]], why)
    made = [_side_by_side(out.shape[d] // length, blocks[1], why) for out in op.outs]
    return [[*ins[0][:d], axis, *ins[0][d + 1 :]] for axis in made]


def _along(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    worked = op.params.get("dimensions", op.params.get("dimension", op.params.get("axis", ())))
    worked = {worked} if isinstance(worked, int) else set(worked)
    worked |= {d for d, (low, high, inner) in enumerate(op.params.get("padding_config", ())) if low or high or inner}
    for d, axis in enumerate(ins[0]):
        kept = op.ins[0].shape[d] == op.outs[0].shape[d] and d not in worked
        for operand, value in zip(ins, op.ins):  # sort and dynamic_update_slice have several operands of full rank
            if operand is not ins[0] and len(operand) == len(ins[0]):
                kept = kept and value.shape[d] == op.ins[0].shape[d]
        for tensor in [*ins[1:], *outs]:
            if len(tensor) != len(ins[0]):
                continue
            if kept:
                unify(axis, tensor[d])
            else:
                mark(tensor[d], f"it passes through `{op.name}`")
        if not kept:
            mark(axis, f"it passes through `{op.name}`")
    return outs


def _window(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    for d, size in enumerate(op.params["window_dimensions"]):
        if size == 1 and op.ins[0].shape[d] == op.outs[0].shape[d]:
            unify(ins[0][d], outs[0][d])
        else:
            mark(ins[0][d], f"it passes through `{op.name}`")
            mark(outs[0][d], f"it passes through `{op.name}`")
    return outs


def _concatenate(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    along = op.params["dimension"]
    blocks = [sample_blocks(tensor[along]) for tensor in ins]
    same = {None if found is None else found[1] for found in blocks}
    for tensor in ins:
        for d, axis in enumerate(tensor):
            if d != along:
                unify(axis, outs[0][d])
            elif len(same) > 1 or None in same:
                mark(axis, "it is concatenated with another")
            else:
                mark([atom for atom in roots(axis) if SAMPLES not in atom.marks], "it is concatenated with another")
    block, *_ = same
    if len(same) > 1 or block is None:
        mark(outs[0][along], JOINED)
    else:  # two views, real and generated samples: the samples several times over
        outs[0][along] = _side_by_side(op.outs[0].shape[along] // size_of(block), block, JOINED)
    return outs


def whole_in_gather(op: Op, axis: int) -> bool:
    """Whether every lookup returns an axis of the table whole: a clipped start leaves it no choice."""
    numbers = op.params["dimension_numbers"]
    full = op.params["slice_sizes"][axis] == op.ins[0].shape[axis]
    return full and (axis not in numbers.start_index_map or op.params["mode"] == lax.GatherScatterMode.CLIP)


def _gather(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    numbers, table, indices, out = op.params["dimension_numbers"], ins[0], ins[1], outs[0]
    batching, index_batching = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    window = [d for d in range(len(table)) if d not in (*numbers.collapsed_slice_dims, *batching)]
    looked_up = [d for d in range(len(out)) if d not in numbers.offset_dims]
    kept = set()
    for target, d in zip(numbers.offset_dims, window):
        if whole_in_gather(op, d):
            unify(table[d], out[target])  # an embedding lookup keeps its features
            kept.add(d)
        else:
            mark(out[target], "it passes through `gather`")
    for axis, target in zip(indices[:-1], looked_up):
        unify(axis, out[target])
    for d, index_axis in zip(batching, index_batching):
        unify(table[d], indices[index_axis])
        kept.add(d)
    for d, axis in enumerate(table):
        if d not in kept:
            mark(axis, INDEXED)
    return outs


def _scan_in(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    mark(ins[0][0], STEPS)
    return [ins[0][1:]]


def _scan_out(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    mark(outs[0][0], STEPS)
    return [[outs[0][0], *ins[0]]]


def _stack(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    new = op.params["axis"] % len(outs[0])
    mark(outs[0][new], STACK)
    for tensor in ins:
        for x, y in zip(ins[0], tensor):
            unify(x, y)
    return [[*ins[0][:new], outs[0][new], *ins[0][new:]]]


def _unstack(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    gone = op.params["axis"] % len(ins[0])
    mark(ins[0][gone], "it passes through `unstack`")
    return [[*ins[0][:gone], *ins[0][gone + 1 :]] for _ in outs]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(RANDOM, _random),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(("slice", "split"), _cut),
    **dict.fromkeys(
        ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window", "reduce_and_window"), _window
    ),
    "optimization_barrier": _many_elementwise,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "iota": _iota,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "gather": _gather,
    "scan_carry": _elementwise,
    "cond_out": _elementwise,
    "scan_in": _scan_in,
    "scan_out": _scan_out,
    "stack": _stack,
    "unstack": _unstack,
}
