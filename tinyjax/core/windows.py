"""Which input pixels each output pixel of a convolution or a pooling reads, and reading them.

One entry per spatial axis; no axis at all is a dense layer. Axes are independent of each other: counts are products
over axes, and patches are cut one axis after the other. Counts are integers known at trace time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Window(NamedTuple):
    """The geometry of one convolution or pooling, hashable.

    Output pixel j reads, through kernel offset o, the input pixel `j * stride + o * dilation - padding[0]`; what lies
    outside of the image is zero.

    Attributes:
        size: kernel size along each spatial axis.
        strides: steps between output pixels.
        padding: (before, after) along each axis; negative values crop.
        dilation: steps between the pixels a kernel reads.

    Example:
        >>> Window(size=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def out_shape(space: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """The spatial shape of the output.

    Raises:
        ValueError: the window has another number of axes than the image, or does not fit into it anywhere.
    """
    if any(len(entry) != len(space) for entry in window):
        raise ValueError(f"{window} does not have one entry for each of the {len(space)} spatial axes of {space}")
    shape = []
    for pixels, size, stride, (before, after), dilation in zip(space, *window):
        slack = pixels + before + after - (size - 1) * dilation - 1
        if slack < 0:
            raise ValueError(f"no output pixel: {window} is larger than an image of shape {space}; pad the image")
        shape.append(slack // stride + 1)
    return tuple(shape)


def num_offsets(window: Window) -> int:
    """The number of kernel offsets O; 1 for a dense layer."""
    return int(np.prod(window.size, dtype=int))


def first_read(window: Window, axis: int, offset: int) -> int:
    """The pixel that output pixel 0 reads through a kernel offset of one axis; may lie outside of the image."""
    return offset * window.dilation[axis] - window.padding[axis][0]


def reads(space: tuple[int, ...], window: Window) -> tuple[np.ndarray, ...]:
    """How often each pixel is read: for each axis, the number of pairs (output pixel, offset) that meet a pixel.

    The w_p of a pixel p is the product over the axes.
    """
    counts = []
    for axis, (pixels, outputs) in enumerate(zip(space, out_shape(space, window))):
        count = np.zeros(pixels, int)
        for offset in range(window.size[axis]):
            met = first_read(window, axis, offset) + np.arange(outputs) * window.strides[axis]
            np.add.at(count, met[(met >= 0) & (met < pixels)], 1)
        counts.append(count)
    return tuple(counts)


def over_image(per_axis: tuple[np.ndarray, ...]) -> np.ndarray:
    """The product of one vector per axis as an image with one channel, `(*space, 1)`."""
    image = np.ones(1, int)
    for vector in reversed(per_axis):
        image = vector.reshape(-1, *[1] * image.ndim) * image
    return image


def patches(x: Array, window: Window) -> Array:
    """What each output pixel reads, as rows of a matrix; zeros outside of the image.

    Args:
        x: (n, *space, C).
        window: geometry of the convolution.

    Returns:
        (n, *out, prod(size) * C), ordered (kh, kw, C).

    Raises:
        ValueError: the window does not fit the image.

    Example:
        >>> patches(x, window) @ kernel.reshape(-1, kernel.shape[-1])  # the convolution
    """
    shape = out_shape(x.shape[1:-1], window)
    for axis, size in enumerate(window.size):
        # offsets go in front of the channels, after those of the axes before: already the order of the rows
        x = jnp.stack([_read(x, window, axis, offset, shape[axis]) for offset in range(size)], axis=-2)
    return x.reshape(len(x), *shape, -1)


def convolve(x: Array, matrix: Array, window: Window) -> Array:
    """The convolution whose kernel is a matrix, `patches(x, window) @ matrix`, without forming the patches.

    Args:
        x: (n, *space, C).
        matrix: (prod(size) * C, k), rows ordered (kh, kw, C).
        window: geometry of the convolution.

    Returns:
        (n, *out, k).
    """
    axes = tuple(range(1, 1 + len(window.size)))
    outer = 1 + len(axes)
    kernel = matrix.reshape(*window.size, x.shape[-1], -1)
    numbers = jax.lax.ConvDimensionNumbers((0, outer, *axes), (outer, outer - 1, *range(outer - 1)), (0, outer, *axes))
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=numbers,
        precision=jax.lax.Precision.HIGHEST,
    )


def pool_mean(x: Array, window: Window) -> Array:
    """The mean over each window, of its pixels inside the image: (n, *out, C).

    It stands for average and for maximum pooling where they lie between a producer and its consumer.
    """
    space = x.shape[1:-1]
    shape = out_shape(space, window)
    for axis, size in enumerate(window.size):
        x = functools.reduce(jnp.add, (_read(x, window, axis, offset, shape[axis]) for offset in range(size)))
    inside = over_image(_inside(space, window))
    return x / np.maximum(inside, 1).astype(x.dtype)


def _read(x: Array, window: Window, axis: int, offset: int, outputs: int) -> Array:
    """What all output pixels read through one offset of an axis: that axis becomes the output's."""
    start, stride, pixels = first_read(window, axis, offset), window.strides[axis], x.shape[axis + 1]
    config = [(0, 0, 0)] * x.ndim
    config[axis + 1] = (-start, start + (outputs - 1) * stride + 1 - pixels, 0)
    return jax.lax.slice_in_dim(jax.lax.pad(x, jnp.zeros((), x.dtype), config), 0, None, stride, axis + 1)


def _inside(space: tuple[int, ...], window: Window) -> tuple[np.ndarray, ...]:
    """For each axis, how many of the pixels a window reads are inside the image."""
    counts = []
    for axis, (pixels, outputs) in enumerate(zip(space, out_shape(space, window))):
        start = np.array([first_read(window, axis, offset) for offset in range(window.size[axis])])
        met = start + window.strides[axis] * np.arange(outputs)[:, None]
        counts.append(np.sum((met >= 0) & (met < pixels), axis=1))
    return tuple(counts)
