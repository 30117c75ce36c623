"""Which input pixels each output pixel of a convolution or a pooling reads.

One entry per spatial axis; all that follows is integer arithmetic on shapes, done at trace time. Axes are independent
of each other, so every quantity here is a product over axes. No axis at all is a dense layer.
"""

from typing import NamedTuple

import numpy as np


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
