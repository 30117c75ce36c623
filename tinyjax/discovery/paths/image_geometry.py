"""How a producer and its consumers are laid over images: windows, poolings, and the order of their pixels.

A pair of plain matrix products works row by row. As soon as a convolution, a pooling or a flatten is involved, the rows
of the consumer are other pixels than those of the producer; a `Geometry` says which, and the uses of a path are brought
into the layout `(samples, *pixels, channels)` that `patches` works on.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from tinyjax.core.layout import Layout
from tinyjax.core.windows import Window, out_shape
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.primitives import REDUCTIONS
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.graph import Op
from tinyjax.discovery.paths.refusals import CannotGrow


class Geometry(NamedTuple):
    """The windows of a path, over images of `space` pixels.

    Attributes:
        producer: window of the producer.
        consumer: window of the consumers.
        between: windows of the poolings between the two, in order.
        space: pixels of the producer's input.
        hidden: pixels of the consumers' input.
        out: pixels of the consumers' output.
    """

    producer: Window
    consumer: Window
    between: tuple[Window, ...]
    space: tuple[int, ...]
    hidden: tuple[int, ...]
    out: tuple[int, ...]


class _Pixels(NamedTuple):
    """The spatial axes of a tensor: their lengths, and the dimensions each is made of (none for length one)."""

    shape: tuple[int, ...]
    dimensions: tuple[tuple[Atom, ...], ...]


def whole(shape: tuple[int, ...]) -> Window:
    """The window that reads a whole image at once."""
    rank = len(shape)
    return Window(shape, (1,) * rank, ((0, 0),) * rank, (1,) * rank)


def pixelwise(rank: int) -> Window:
    """The window that reads one pixel."""
    return whole((1,) * rank)


def is_rowwise(producer: Product, consumers: Sequence[Product], pools: Sequence[Op]) -> bool:
    """Whether a path is made of plain matrix products that work on the same rows."""
    if producer.window is not None or pools or any(c.window is not None for c in consumers):
        return False
    wanted = {root(a) for a in producer.rows if a is not None}
    return all({root(a) for a in c.rows if a is not None} == wanted for c in consumers)


def lay_out(
    axes: Axes, producer: Product, consumers: Sequence[Product], pools: Sequence[Op], slots: Atom
) -> tuple[Geometry, Product, tuple[Product, ...]]:
    """The geometry of a path, and its uses with rows `(samples, *pixels)`.

    Raises:
        CannotGrow: with the reason.
    """
    samples = root(axes.samples)
    if producer.op.stack or any(c.op.stack for c in consumers):
        raise CannotGrow("a convolution, a pooling or a flatten inside a scan")
    pixels, space, window, producer = _producer_pixels(axes, producer, samples)
    between = []
    for pool in pools:
        pixels, windows = _pool(axes, pool, pixels)
        between += windows
    read = [_consumer_pixels(axes, c, pixels, samples, slots) for c in consumers]
    windows = {w for w, _ in read}
    if len(windows) > 1:
        raise CannotGrow("its consumers read it through different windows")
    (consumer_window,) = windows
    geometry = Geometry(
        window, consumer_window, tuple(between), space, pixels.shape, out_shape(pixels.shape, consumer_window)
    )
    return geometry, producer, tuple(use for _, use in read)


def _producer_pixels(axes: Axes, use: Product, samples: Atom) -> tuple[_Pixels, tuple[int, ...], Window, Product]:
    """Pixels of the producer's output and of its input, its window, and the use in order."""
    if use.window is None:
        own = [a for a in use.rows if a is not None and root(a) is not samples]
        pixels = _Pixels(tuple(a.size for a in own), tuple((root(a),) for a in own))
        order = [samples, *(root(a) for a in own)]
        return pixels, pixels.shape, pixelwise(len(own)), _with_rows(use, order)
    _check_batch(axes, use, samples)
    _, _, *space = use.op.params["dimension_numbers"].lhs_spec
    _, _, *out_space = use.op.params["dimension_numbers"].out_spec
    (image, _), (out,) = use.op.ins, use.op.outs
    pixels = _Pixels(tuple(out.shape[d] for d in out_space), tuple(tuple(roots(axes[out][d])) for d in out_space))
    return pixels, tuple(image.shape[d] for d in space), use.window, use


def _pool(axes: Axes, op: Op, pixels: _Pixels) -> tuple[_Pixels, tuple[Window, ...]]:
    """The pixels after a pooling or a reduction over pixels, and its windows."""
    rank = len(pixels.shape)
    (value, out), names = (op.ins[0], op.outs[0]), [tuple(roots(axis)) for axis in axes[op.ins[0]]]
    axis_of = {p: names.index(d) for p, d in enumerate(pixels.dimensions) if d and d in names}
    if op.name in REDUCTIONS:
        return _reduce(op, pixels, names)
    if op.name == "pad":
        window = pixelwise(rank)._replace(padding=tuple(_padding(op, axis_of.get(p)) for p in range(rank)))
        padded = tuple(tuple(roots(axes[out][axis_of[p]])) if p in axis_of else () for p in range(rank))
        if any(_padding(op, d) != (0, 0) for d in range(len(value.shape)) if d not in axis_of.values()):
            raise CannotGrow("`pad` widens more than the pixels between producer and consumer")
        return _Pixels(out_shape(pixels.shape, window), padded), (window,)
    params = op.params
    dilated = any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    others = set(range(len(value.shape))) - set(axis_of.values())
    if dilated or any(params["window_dimensions"][d] != 1 or params["window_strides"][d] != 1 for d in others):
        raise CannotGrow(f"`{op.name}` with dilation, or over more than the pixels")

    def along(name: str, default: object) -> tuple:
        return tuple(params[name][axis_of[p]] if p in axis_of else default for p in range(rank))

    window = Window(along("window_dimensions", 1), along("window_strides", 1), along("padding", (0, 0)), (1,) * rank)
    dimensions = tuple(tuple(roots(axes[out][axis_of[p]])) if p in axis_of else () for p in range(rank))
    windows = _counting_padding(window) if op.name == "reduce_window_sum" else (window,)
    return _Pixels(out_shape(pixels.shape, window), dimensions), windows


def _reduce(op: Op, pixels: _Pixels, names: Sequence[tuple[Atom, ...]]) -> tuple[_Pixels, tuple[Window, ...]]:
    """The pixels after a reduction over whole axes, or over the inner factor of an axis: a window as long as its step.

    Args:
        op: the reduction.
        pixels: before it.
        names: for every axis of its operand the dimensions it is made of.
    """
    reduced = set(op.params["axes"])
    sizes, dimensions, seen = [], [], {d for d, name in enumerate(names) if not name}
    for dimension in pixels.dimensions:
        segments = _segments(dimension, names)
        kept = [d for d in segments if d not in reduced]
        if kept != segments[: len(kept)]:
            raise CannotGrow(f"`{op.name}` is taken over the outer factor of an axis of pixels")
        seen.update(segments)
        sizes.append(math.prod(atom.size for d in segments if d in reduced for atom in names[d]))
        dimensions.append(tuple(atom for d in kept for atom in names[d]))
    if not reduced <= seen:
        raise CannotGrow(f"`{op.name}` is taken over more than the pixels between producer and consumer")
    window = whole(tuple(sizes))._replace(strides=tuple(max(size, 1) for size in sizes))
    return _Pixels(out_shape(pixels.shape, window), tuple(dimensions)), (window,)


def _segments(dimension: tuple[Atom, ...], names: Sequence[tuple[Atom, ...]]) -> list[int]:
    """The axes that a pixel axis is spread over, outermost first; none where it cannot be told."""
    found, at = [], 0
    while at < len(dimension):
        hit = next((d for d, name in enumerate(names) if name and dimension[at : at + len(name)] == name), None)
        if hit is None:
            return []
        found.append(hit)
        at += len(names[hit])
    return found


def _padding(op: Op, axis: int | None) -> tuple[int, int]:
    low, high, _ = (0, 0, 0) if axis is None else op.params["padding_config"][axis]
    return low, high


def _counting_padding(window: Window) -> tuple[Window, ...]:
    """A window whose mean counts the zeros outside the image, as two: the first makes them pixels."""
    rank = len(window.size)
    if not any(low or high for low, high in window.padding):
        return (window,)
    return pixelwise(rank)._replace(padding=window.padding), window._replace(padding=((0, 0),) * rank)


def _consumer_pixels(axes: Axes, use: Product, pixels: _Pixels, samples: Atom, slots: Atom) -> tuple[Window, Product]:
    """The window through which a consumer reads these pixels, and the use in order."""
    flat = [d for dimensions in pixels.dimensions for d in dimensions]
    if use.window is not None:
        _check_batch(axes, use, samples)
        _, _, *space = use.op.params["dimension_numbers"].lhs_spec
        read = tuple(tuple(roots(axes[use.op.ins[0]][d])) for d in space)
        if read != pixels.dimensions:
            raise CannotGrow(f"`{use.leaf}` reads other pixels than were written")
        return use.window, use
    rows = [root(a) for a in use.rows if a is not None]
    contracted = [root(a) for f, a in enumerate(use.input_atoms) if f in use.inputs.cols and a is not None]
    if len(set(rows)) != len(rows) or len(set(contracted)) != len(contracted):
        raise CannotGrow(f"`{use.leaf}` reads rows that cannot be told apart")
    order = [samples, *flat]
    if set(rows) == set(order) and contracted == [slots]:
        return pixelwise(len(pixels.shape)), _with_rows(use, order)
    if rows == [samples] and set(contracted) == {slots, *flat}:
        return whole(pixels.shape), _flattened(use, order, slots)
    raise CannotGrow(f"`{use.leaf}` reads it in other rows than it was written in")


def _check_batch(axes: Axes, use: Product, samples: Atom) -> None:
    batch = use.op.params["dimension_numbers"].lhs_spec[0]
    if roots(axes[use.op.ins[0]][batch]) != [samples]:
        raise CannotGrow(f"the convolution `{use.leaf}` has not the samples, each once, as its batch")


def _with_rows(use: Product, order: Sequence[Atom]) -> Product:
    """The use with the rows of input and output in the given order, axes of length one last."""
    inputs = dataclasses.replace(use.inputs, rows=_ordered(use.inputs.rows, use.input_atoms, order))
    outputs = dataclasses.replace(use.outputs, rows=_ordered(use.outputs.rows, use.output_atoms, order))
    return dataclasses.replace(use, inputs=inputs, outputs=outputs)


def _flattened(use: Product, order: Sequence[Atom], slots: Atom) -> Product:
    """A consumer of flattened pixels, as one that reads the whole image: rows of the kernel are (*pixels, slots)."""
    pixels = _ordered((*use.inputs.rows, *use.inputs.cols), use.input_atoms, [*order, slots])
    column = next(f for f, a in enumerate(use.input_atoms) if a is not None and root(a) is slots)
    inputs = dataclasses.replace(use.inputs, rows=tuple(f for f in pixels if f != column), cols=(column,))
    # Rows of the kernel and columns of the input were paired in order: carry the new order over.
    paired = dict(zip([f for f in use.inputs.cols if use.inputs.factors[f] > 1], _long(use.kernel)))
    ones = tuple(f for f in use.kernel.rows if use.kernel.factors[f] == 1)
    kernel_rows = tuple(paired[f] for f in (*inputs.rows, column) if f in paired)
    return dataclasses.replace(use, inputs=inputs, kernel=dataclasses.replace(use.kernel, rows=(*ones, *kernel_rows)))


def _long(kernel: Layout) -> list[int]:
    return [f for f in kernel.rows if kernel.factors[f] > 1]


def _ordered(factors: Sequence[int], atoms: Sequence[Atom | None], order: Sequence[Atom]) -> tuple[int, ...]:
    position = {atom: i for i, atom in reversed(list(enumerate(order)))}

    def rank(factor: int) -> int:
        atom = atoms[factor]
        return len(order) if atom is None else position[root(atom)]

    return tuple(sorted(factors, key=rank))
