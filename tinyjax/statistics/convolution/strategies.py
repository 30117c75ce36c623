"""Two ways to the sums of a pair of convolutions, and the choice between them by shape alone.

By patches: matrix products of patches, for any geometry. By lags: correlations of images, where nothing is strided or
pooled; fewer products, more sums to keep. Both see one chunk of samples and give what adds up over chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.linalg import matmul
from tinyjax.core.windows import Window, num_offsets, out_shape, over_image, patches, pool_mean, reads
from tinyjax.statistics.convolution import lags

_ENTRIES = 2**23  # temporary numbers a chunk may hold
_WORTH = 2**28  # multiplications to save by a program that takes seconds more to compile


class ConvPair(NamedTuple):
    """A producer, what is pooled, and a consumer.

    Attributes:
        space: of the producer's input.
        producer: its geometry.
        between: poolings between the two, in order.
        consumer: its geometry.
        bias_prev: whether the producer has a bias.
        bias: whether the consumer has a bias.
    """

    space: tuple[int, ...]
    producer: Window
    between: tuple[Window, ...]
    consumer: Window
    bias_prev: bool
    bias: bool


class Sizes(NamedTuple):
    """What else the cost depends on: channels of the producer's input, of the consumer's input and of its output."""

    samples: int
    channels: int
    slots: int
    outputs: int
    linked: bool


class Way(NamedTuple):
    """How to sum; `..._done` turns totals over samples into moments.

    Attributes:
        consumer: (h, v, live) -> sums.
        consumer_done: sums -> G (H, H), M (H, M).
        producer: (x, h or None, v, live) -> sums; without h there is no P.
        producer_done: sums -> S without its factor r (D, D), N~ (D, M, O), P (O, D, H) or None.
        chunk: samples a pass.
        work: multiplications a sample, with what copies cost instead.
    """

    consumer: Callable[..., Any]
    consumer_done: Callable[[Any], tuple[Array, Array]]
    producer: Callable[..., Any]
    producer_done: Callable[[Any], tuple[Array, Array, Array | None]]
    chunk: int
    work: float


def choose(pair: ConvPair, sizes: Sizes, chunk: int | None) -> Way:
    """The way with the least work, a pure function of shapes.

    Measured in one process on a shared 2-core CPU (float32, 16 x 16 images, n = 128, 3x3 SAME kernels, biases), best of
    4, in ms: all sums without P, then with it; the plain matrix products of the same dense FLOPs for S, N and G.

    | C | products | patches | lags | patches, P | lags, P |
    |---|---|---|---|---|---|
    | 16 | 36 | 107 | 87 | 245 | 161 |
    | 64 | 476 | 1512 | 811 | 3139 | 1810 |
    | 128 | 807 | 1516 | 993 | | |
    """
    patched = by_patches(pair, sizes, chunk)
    if pair.between or not lags.applies(pair.producer, pair.consumer):
        return patched
    shifted = by_lags(pair, sizes, chunk)
    return shifted if (patched.work - shifted.work) * sizes.samples > _WORTH else patched


def by_lags(pair: ConvPair, sizes: Sizes, chunk: int | None = None) -> Way:
    """Correlations at lags; `tinyjax.statistics.convolution.lags.applies` says where."""
    plans = lags.plans(pair.space, pair.producer, pair.consumer)
    cost = lags.work(plans, *sizes[1:4], linked=sizes.linked)
    chunk = _chunk(sizes, chunk, cost.temporaries)
    bind = functools.partial
    return Way(
        consumer=bind(lags.consumer_sums, plans, bias=pair.bias),
        consumer_done=bind(lags.consumer_done, plans, bias=pair.bias),
        producer=bind(lags.producer_sums, plans, bias=pair.bias),
        producer_done=bind(lags.producer_done, plans, bias_prev=pair.bias_prev, bias=pair.bias),
        chunk=chunk,
        work=cost.products + lags.COPY * cost.temporaries + lags.ADD * cost.sums / chunk,
    )


def by_patches(pair: ConvPair, sizes: Sizes, chunk: int | None = None) -> Way:
    """Products of patches."""
    middle = out_shape(pair.space, pair.producer)
    for window in pair.between:
        middle = out_shape(middle, window)
    pixels, out = (int(np.prod(shape)) for shape in (middle, out_shape(middle, pair.consumer)))
    offsets = num_offsets(pair.consumer)
    inputs, hidden = num_offsets(pair.producer) * sizes.channels, offsets * sizes.slots
    right = sizes.outputs + hidden * sizes.linked
    temporaries = 2 * pixels * inputs + out * (offsets * inputs + hidden + sizes.outputs)
    chunk = _chunk(sizes, chunk, temporaries)
    sums = inputs**2 + offsets * inputs * right + hidden * (hidden + sizes.outputs)
    work = pixels * inputs**2 + out * (offsets * inputs * right + hidden * (hidden + sizes.outputs))
    return Way(
        consumer=functools.partial(_consumer_sums, pair),
        consumer_done=lambda sums: sums,
        producer=functools.partial(_producer_sums, pair, reads(middle, pair.consumer)),
        producer_done=functools.partial(_producer_done, sizes.outputs),
        chunk=chunk,
        work=work + lags.COPY * temporaries + lags.ADD * sums / chunk,
    )


def producer_image(pair: ConvPair, x: Array, live: Array) -> Array:
    """What the consumer reads of a new channel, before its fan-in: the producer's patches, pooled; (n, *space1, D)."""
    image = _with_constant(patches(x, pair.producer), live, pair.bias_prev)
    for window in pair.between:
        image = pool_mean(image, window)
    return image


def _consumer_sums(pair: ConvPair, h: Array, v: Array, live: Array) -> tuple[Array, Array]:
    rows = _rows(h, pair.consumer, live, pair.bias)
    return matmul(rows.T, rows), matmul(rows.T, _flat(v))


def _producer_sums(
    pair: ConvPair, reads: tuple[np.ndarray, ...], x: Array, h: Array | None, v: Array, live: Array
) -> tuple[Array, Array]:
    image = producer_image(pair, x, live)
    right = _flat(v)
    if h is not None:
        right = jnp.concatenate([right, _rows(h, pair.consumer, live, pair.bias)], axis=-1)
    weighted = _flat(image * np.sqrt(over_image(reads)).astype(image.dtype))  # a matrix times its own transpose: faster
    seen = patches(image, pair.consumer).reshape(len(right), -1, image.shape[-1])
    return matmul(weighted.T, weighted), jnp.einsum("nod,nq->odq", seen, right, precision="highest")


def _producer_done(outputs: int, sums: tuple[Array, Array]) -> tuple[Array, Array, Array | None]:
    gram, by_offset = sums
    link = by_offset[..., outputs:] if by_offset.shape[-1] > outputs else None
    return gram, by_offset[..., :outputs].transpose(1, 2, 0), link


def _chunk(sizes: Sizes, chunk: int | None, temporaries: int) -> int:
    return chunk or min(-(-sizes.samples // 2), max(1, _ENTRIES // temporaries))


def _rows(h: Array, consumer: Window, live: Array, bias: bool) -> Array:
    """The consumer's patches as rows, `(rows, H)`."""
    return _flat(_with_constant(patches(h, consumer), live, bias))


def _with_constant(image: Array, live: Array, bias: bool) -> Array:
    """The image with a channel of ones, zero for the samples that only fill a chunk."""
    if not bias:
        return image
    constant = jnp.broadcast_to(live.reshape(-1, *[1] * (image.ndim - 1)), (*image.shape[:-1], 1))
    return jnp.concatenate([image, constant], axis=-1)


def _flat(x: Array) -> Array:
    """Images as rows: (n, *space, C) -> (n * pixels, C)."""
    return x.reshape(-1, x.shape[-1])
