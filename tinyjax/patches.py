"""A convolution as a matrix product, and the sums of a pair of convolutions.

The move of a new channel is linear in patches of patches: output pixel j of the consumer reads, through offset o, the
new channel at the intermediate pixel p(j, o), which reads the producer's patch there. Summed over samples, that makes S
a *weighted* sum over intermediate pixels, with the number w_p of pairs (j, o) that read p as the weight, and N a sum
over output pixels for every offset. No tensor that selects pixels is ever formed. Samples pass in chunks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.linalg import matmul, solve
from tinyjax.window import Window, num_offsets, out_shape, over_image, patches, pool_mean, reads

LINK_LIMIT = 2**24  # entries of one half of `link`: 64 MiB in float32
_ENTRIES = 2**22  # temporary numbers a chunk may hold, where `chunk` is not given


class Sums(NamedTuple):
    """The raw sums of `Statistics`, axis 0 is (even samples, odd samples); see there."""

    gram_prev: Array
    cross_prev: Array
    gram: Array
    cross: Array
    link: Array | None
    energy: Array
    energy_matrix: Array | None


def conv_sums(
    x: Array,
    h: Array,
    v: Array,
    producer: Window,
    consumer: Window,
    *,
    bias_prev: bool,
    bias: bool,
    between: Sequence[Window] = (),
    energy_matrix: bool = False,
    chunk: int | None = None,
    link_limit: int = LINK_LIMIT,
    project: Callable[[Array, Array], Array] = solve,
) -> Sums:
    r"""The sums of `Statistics` for a producer convolution and its consumer, with any number of spatial axes.

    With patch_p the producer's patch at intermediate pixel p (constant 1 last iff it has a bias; all of it 0 where the
    consumer reads its own padding), hpatch_j the consumer's patch at output pixel j and O its number of offsets:

        S = r sum_p w_p patch_p patch_p',           r = min(O, D),
        N~[:, (m, o)] = sum_j v[j, m] patch_p(j,o),
        G = sum_j hpatch_j hpatch_j',   M = sum_j hpatch_j v_j',   P[o] = sum_j patch_p(j,o) hpatch_j'.

    r is the paper's min of the shape of B^t, which has a row for each offset and a column for each input of the
    producer. The constant is one of those columns: without it, eq. 71 would not hold for producers with a bias. The
    same r holds after a pooling, which only changes what a patch is; after global pooling O is 1, and r with it.

    Where `link` would have more than `link_limit` entries, `cross_prev` is projected instead: a first pass gives G and
    M of all samples, `project` an update from them, and a second pass sums patches against what the update leaves.

    Args:
        x: (n, *space0, C_in) input of the producer.
        h: (n, *space1, C) input of the consumer, a flattened one as the image it was.
        v: (n, *space2, M) V_goal at the consumer's output; (n, 1, .., M) for a dense layer after a flatten.
        producer: geometry of the producer.
        consumer: geometry of the consumer; for a dense layer after a flatten, a window as large as the image.
        bias_prev: whether the producer has a bias.
        bias: whether the consumer has a bias.
        between: poolings between the two, in order, see `pool_mean`.
        energy_matrix: also give E[v v'] (x) identity over offsets, which acts on columns (m, o).
        chunk: samples a pass, even; default as many as keep the temporaries small.
        link_limit: largest number of entries O D H for which `link` is formed.
        project: (G (H, H), M (H, M)) -> update (H, M) that is taken out of `v` where `link` is not formed; default
            the best update, eq. 41. A caller with more samples than these must pass the update of all of them.

    Returns:
        `Sums`, in the widest dtype of the arguments and at least float32.

    Raises:
        ValueError: shapes that do not follow from the windows, an odd `chunk`, no samples.

    Example:
        >>> sums = conv_sums(x, h, v, window, window, bias_prev=True, bias=True)

    Reference: Verbockhaven et al., TMLR 2024, eq. 41, lemma C.2 and eq. 71.
    """
    if chunk is not None and (chunk < 2 or chunk % 2):
        raise ValueError(f"`chunk` must be an even number of samples, got {chunk}")
    _require_shapes(x, h, v, producer, between, consumer)
    dtype = jnp.result_type(jnp.float32, x.dtype, h.dtype, v.dtype)
    x, h, v = (a.astype(dtype) for a in (x, h, v))
    offsets = num_offsets(consumer)
    inputs, hidden = num_offsets(producer) * x.shape[-1] + bias_prev, offsets * h.shape[-1] + bias
    linked = offsets * inputs * hidden <= link_limit
    chunk = chunk or _default_chunk(h.shape[1:-1], v.shape[1:-1], inputs, offsets, hidden + v.shape[-1])

    def consumer_part(x: Array, h: Array, v: Array, live: Array) -> tuple[Array, Array, Array]:
        rows, goal = _rows(h, consumer, live, bias), _flat(v)
        return _gram(rows, rows), _gram(rows, goal), _gram(goal, goal) if energy_matrix else jnp.sum(goal**2, (1, 2))

    def producer_part(x: Array, h: Array, v: Array, live: Array, delta: Array | None) -> tuple[Array, Array]:
        image = _producer_rows(x, producer, between, live, bias_prev)
        right = _flat(v)
        if delta is not None:
            right = right - matmul(_rows(h, consumer, live, bias), delta)
        elif linked:
            right = jnp.concatenate([right, _rows(h, consumer, live, bias)], axis=-1)
        weights = over_image(reads(h.shape[2:-1], consumer)).astype(dtype)
        gram = _gram(_flat(image), _flat(image * weights))
        return min(offsets, inputs) * gram, _by_offset(image, right, consumer)

    def both(x: Array, h: Array, v: Array, live: Array):
        return consumer_part(x, h, v, live), producer_part(x, h, v, live, None)

    if linked:
        (gram, cross, energy), (gram_prev, by_offset) = _over_chunks(both, (x, h, v), chunk)
    else:
        gram, cross, energy = _over_chunks(consumer_part, (x, h, v), chunk)
        delta = project(gram.sum(0), cross.sum(0))
        gram_prev, by_offset = _over_chunks(functools.partial(producer_part, delta=delta), (x, h, v), chunk)
    outputs = v.shape[-1]
    cross_prev = by_offset[..., :outputs].transpose(0, 2, 3, 1).reshape(2, inputs, outputs * offsets)
    return Sums(
        gram_prev=gram_prev,
        cross_prev=cross_prev,
        gram=gram,
        cross=cross,
        link=by_offset[..., outputs:] if linked else None,
        energy=jnp.trace(energy, axis1=1, axis2=2) if energy_matrix else energy,
        energy_matrix=jnp.stack([jnp.kron(e, jnp.eye(offsets, dtype=dtype)) for e in energy])
        if energy_matrix
        else None,
    )


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


def linear_move(
    x: Array,
    alpha: Array,
    omega: Array,
    producer: Window,
    consumer: Window,
    *,
    bias_prev: bool,
    between: Sequence[Window] = (),
) -> Array:
    """V(theta): the first-order move of the consumer's output when channels (alpha, omega) are added.

    Args:
        x: (n, *space0, C_in) input of the producer.
        alpha: (D, k) fan-in, bias row last iff `bias_prev`.
        omega: (k, M * O) fan-out, columns (output, offset).
        producer: geometry of the producer.
        consumer: geometry of the consumer.
        bias_prev: whether the producer has a bias.
        between: poolings between the two.

    Returns:
        (n, *space2, M).
    """
    channels = convolve(x, alpha[:-1], producer) + alpha[-1] if bias_prev else convolve(x, alpha, producer)
    for window in between:
        channels = pool_mean(channels, window)
    offsets = num_offsets(consumer)
    fan_out = omega.reshape(len(omega), -1, offsets).transpose(2, 0, 1)  # rows of a patch are (offset, channel)
    return convolve(channels, fan_out.reshape(offsets * len(omega), -1), consumer)


def _producer_rows(x: Array, producer: Window, between: Sequence[Window], live: Array, bias: bool) -> Array:
    """The producer's patches as an image of the consumer's input, `(2, samples, *space1, D)`."""
    image = _with_constant(patches(_merged(x), producer), live, bias)
    for window in between:
        image = pool_mean(image, window)
    return image.reshape(*x.shape[:2], *image.shape[1:])


def _rows(h: Array, consumer: Window, live: Array, bias: bool) -> Array:
    """The consumer's patches as rows, `(2, rows, H)`."""
    image = _with_constant(patches(_merged(h), consumer), live, bias)
    return image.reshape(2, -1, image.shape[-1])


def _with_constant(image: Array, live: Array, bias: bool) -> Array:
    """The image with a channel of ones, zero for the samples that only fill a chunk."""
    if not bias:
        return image
    constant = jnp.broadcast_to(live.reshape(-1, *[1] * (image.ndim - 1)), (*image.shape[:-1], 1))
    return jnp.concatenate([image, constant], axis=-1)


def _by_offset(image: Array, right: Array, consumer: Window) -> Array:
    """For each offset of the consumer, the sum over its output pixels of what they read times a row: (2, O, D, q)."""
    seen = patches(_merged(image), consumer).reshape(2, right.shape[1], num_offsets(consumer), image.shape[-1])
    return jnp.einsum("hnod,hnq->hodq", seen, right, precision="highest")


def _gram(a: Array, b: Array) -> Array:
    return jnp.einsum("hni,hnj->hij", a, b, precision="highest")


def _merged(x: Array) -> Array:
    """(2, samples, ...) as (2 * samples, ...)."""
    return x.reshape(-1, *x.shape[2:])


def _flat(x: Array) -> Array:
    """(2, samples, *space, C) as (2, rows, C)."""
    return x.reshape(2, -1, x.shape[-1])


def _over_chunks(function: Callable, arrays: tuple[Array, ...], chunk: int):
    """The sum of `function(*arrays, live)` over chunks of samples, each `(2, chunk / 2, ...)`: even and odd samples.

    The last chunk is filled with zeros; `live` (2, chunk / 2) is 1 for samples and 0 for what fills.
    """
    num_samples = len(arrays[0])
    num_chunks = -(-num_samples // chunk)
    pairs = -(-num_samples // (2 * num_chunks))  # chunks of equal size leave the least to fill

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 2 * pairs * num_chunks - num_samples)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(num_chunks, pairs, 2, *x.shape[1:]), 1, 2)

    cuts = tuple(cut(x) for x in (*arrays, jnp.ones(num_samples, arrays[0].dtype)))
    if num_chunks == 1:
        return function(*(x[0] for x in cuts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *(x[0] for x in cuts)))
    return jax.lax.scan(lambda total, xs: (jax.tree.map(jnp.add, total, function(*xs)), None), zeros, cuts)[0]


def _default_chunk(space: tuple[int, ...], out: tuple[int, ...], inputs: int, offsets: int, columns: int) -> int:
    per_sample = 2 * int(np.prod(space)) * inputs + int(np.prod(out)) * (offsets * inputs + columns)
    return max(2, _ENTRIES // per_sample // 2 * 2)


def _require_shapes(
    x: Array, h: Array, v: Array, producer: Window, between: Sequence[Window], consumer: Window
) -> None:
    space = out_shape(x.shape[1:-1], producer)
    for window in between:
        space = out_shape(space, window)
    if h.shape[1:-1] != space:
        raise ValueError(f"`h` has shape {h.shape}; the producer and the poolings give images of shape {space}")
    out = out_shape(space, consumer)
    if v.shape[1:-1] != out:
        raise ValueError(f"`v` has shape {v.shape}; the consumer gives images of shape {out}")
    if not len(x) == len(h) == len(v) or not len(x):
        raise ValueError(f"`x`, `h`, `v` must have the same samples, at least one; got {len(x)}, {len(h)}, {len(v)}")
