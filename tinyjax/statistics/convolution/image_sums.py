"""A convolution as a matrix product, and the sums of a pair of convolutions.

The move of a new channel is linear in patches of patches: output pixel j of the consumer reads, through offset o, the
new channel at the intermediate pixel p(j, o), which reads the producer's patch there. Summed over samples, that makes S
a *weighted* sum over intermediate pixels, with the number w_p of pairs (j, o) that read p as the weight, and N a sum
over output pixels for every offset. No tensor that selects pixels is ever formed. Samples pass in chunks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, some_solution
from tinyjax.core.windows import Window, convolve, num_offsets, patches
from tinyjax.statistics.convolution.linear_map import require_shapes
from tinyjax.statistics.convolution.strategies import ConvPair, Sizes, Way, by_patches, choose, producer_image
from tinyjax.statistics.sums import USUAL, Extras, Null, Sums

LINK_LIMIT = 2**24  # entries of one half of `link`: 64 MiB in float32


class Projection(NamedTuple):
    """What N is summed against where no `link` is formed.

    Attributes:
        update: (H, M) of the consumer.
        ridge: () at which it is the best update; None: exactly.
    """

    update: Array
    ridge: Array | None = None


def exact_projection(gram: Array, cross: Array) -> Projection:
    """The best update (eq. 41) of both halves, from G (2, H, H) and M (2, H, M)."""
    return Projection(some_solution(gram.sum(0), cross.sum(0)))


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
    extras: Extras = USUAL,
    chunk: int | None = None,
    link_limit: int = LINK_LIMIT,
    project: Callable[[Array, Array], Projection] = exact_projection,
    asked: bool = True,
    way: Callable[[ConvPair, Sizes, int | None], Way] = choose,
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
        extras: what else to give; the `energy_matrix` is E[v v'] (x) identity over offsets and acts on columns (m, o).
        chunk: samples a pass; default as many as keep the temporaries small.
        link_limit: largest number of entries O D H for which `link` is formed.
        project: (G (2, H, H), M (2, H, M)) -> the update that is taken out of `v` where `link` is not formed; default
            the best update, eq. 41. A caller with more samples than these must pass the update of all of them.
        asked: there also sum N~ itself, in a pass of its own.
        way: `by_patches`, `by_lags`, or the choice between them by shape.

    Returns:
        `Sums`, in the widest dtype of the arguments and at least float32.

    Raises:
        ValueError: shapes that do not follow from the windows, no samples, a `chunk` below 1, null draws where `link`
            is not formed, an `offset_gram` that would be as large.

    Example:
        >>> sums = conv_sums(x, h, v, window, window, bias_prev=True, bias=True)

    Reference: Verbockhaven et al., TMLR 2024, eq. 41, lemma C.2 and eq. 71.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"`chunk` must be at least one sample, got {chunk}")
    require_shapes(x, h, v, producer, between, consumer)
    dtype = jnp.result_type(jnp.float32, x.dtype, h.dtype, v.dtype)
    x, h, v = (a.astype(dtype) for a in (x, h, v))
    offsets = num_offsets(consumer)
    inputs, hidden = num_offsets(producer) * x.shape[-1] + bias_prev, offsets * h.shape[-1] + bias
    linked = offsets * inputs * hidden <= link_limit
    pair = ConvPair(x.shape[1:-1], producer, tuple(between), consumer, bias_prev, bias)
    sizes = Sizes(len(x), x.shape[-1], h.shape[-1], v.shape[-1], linked)
    chosen = way(pair, sizes, chunk)

    def consumer_part(x: Array, h: Array, v: Array, live: Array):
        goal = v.reshape(-1, v.shape[-1])
        return chosen.consumer(h, v, live), matmul(goal.T, goal) if extras.energy_matrix else jnp.sum(goal**2)

    def consumer_done(total: tuple[Any, Array]) -> tuple[tuple[Array, Array], Array]:
        return chosen.consumer_done(total[0]), total[1]

    def both_done(total: tuple[Any, Any]):
        return consumer_done(total[0]), chosen.producer_done(total[1])

    def both(x: Array, h: Array, v: Array, live: Array):
        return consumer_part(x, h, v, live), chosen.producer(x, h, v, live)

    def projected(x: Array, h: Array, v: Array, live: Array):
        return chosen.producer(x, None, _residual(h, v, live, delta, pair), live)

    def unprojected(x: Array, h: Array, v: Array, live: Array):
        del h
        return chosen.producer(x, None, v, live)

    cross_asked, ridge_update = None, None
    if linked:
        ((gram, cross), energy), produced = _by_half(both, (x, h, v), chosen.chunk, both_done)
    elif extras.signs is not None:
        raise ValueError("this site is too wide for null draws: its `link` would not fit")
    else:
        (gram, cross), energy = _by_half(consumer_part, (x, h, v), chosen.chunk, consumer_done)
        delta, ridge_update = project(gram, cross)
        produced = _by_half(projected, (x, h, v), chosen.chunk, chosen.producer_done)
        if asked:
            _, cross_asked, _ = _by_half(unprojected, (x, h, v), chosen.chunk, chosen.producer_done)
            cross_asked = cross_asked.reshape(2, inputs, -1)
    gram_prev, cross_prev, link = produced
    identity = jnp.eye(offsets, dtype=dtype)

    def drawn(sign: Array) -> Null:
        """Twice the sums of the samples with sign 1, less the sums of all."""
        kept = (sign > 0).astype(dtype)
        only = (a * kept.reshape(-1, *[1] * (a.ndim - 1)) for a in (x, h, v))
        ((found_gram, found_cross), _), produced = _by_half(both, tuple(only), chosen.chunk, both_done, kept)
        _, found_prev, found_link = produced
        assert link is not None and found_link is not None, "the pair is linked"
        found = Null(found_prev, found_gram, found_cross, found_link)
        flipped = jax.tree.map(lambda a, b: 2 * a - b, found, Null(cross_prev, gram, cross, link))
        return flipped._replace(cross_prev=flipped.cross_prev.reshape(2, inputs, -1))

    null = None
    if extras.signs is not None:
        null = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(drawn, extras.signs))
    return Sums(
        gram_prev=min(offsets, inputs) * gram_prev,
        cross_prev=cross_prev.reshape(2, inputs, -1),
        gram=gram,
        cross=cross,
        link=link,
        energy=jnp.trace(energy, axis1=1, axis2=2) if extras.energy_matrix else energy,
        energy_matrix=jax.vmap(jnp.kron, (0, None))(energy, identity) if extras.energy_matrix else None,
        cross_asked=cross_asked,
        null=null,
        offset_gram=_offset_gram(pair, sizes, (x, h, v), chunk, inputs) if extras.offset_gram else None,
        ridge_update=ridge_update,
    )


def _offset_gram(
    pair: ConvPair, sizes: Sizes, arrays: tuple[Array, Array, Array], chunk: int | None, inputs: int
) -> Array:
    """The sum over output pixels of seen seen', seen what all offsets read of the producer: (2, O, D, O, D)."""
    rows = num_offsets(pair.consumer) * inputs
    if rows**2 > LINK_LIMIT:
        raise ValueError(f"this site is too wide for `offset_gram`: {rows} x {rows} numbers")

    def part(x: Array, h: Array, v: Array, live: Array) -> Array:
        del h, v
        seen = patches(producer_image(pair, x, live), pair.consumer).reshape(-1, rows)
        return matmul(seen.T, seen)

    sums = _by_half(part, arrays, by_patches(pair, sizes, chunk).chunk, lambda total: total)
    return sums.reshape(2, *2 * (num_offsets(pair.consumer), inputs))


def _residual(h: Array, v: Array, live: Array, delta: Array, pair: ConvPair) -> Array:
    """What an update of the consumer leaves of V_goal; zero for samples that fill a chunk."""
    move = convolve(h, delta[:-1], pair.consumer) + delta[-1] if pair.bias else convolve(h, delta, pair.consumer)
    return (v - move) * live.reshape(-1, *[1] * (v.ndim - 1))


def _by_half(function: Callable, arrays: tuple[Array, ...], chunk: int, done: Callable, kept: Array | None = None):
    """`done` of the sums of `function(*arrays, live)` over chunks of the even samples, and of the odd.

    Axis 0 of every leaf is the half. Halves pass one after the other, so that chunks are as long as they can be. The
    last chunk is filled with zeros; `live` (chunk,) is 1 for samples (those of `kept` (n,) if given), 0 for what fills.
    """
    num_samples = len(arrays[0])
    pairs = -(-num_samples // 2)
    num_chunks = -(-pairs // chunk)
    size = -(-pairs // num_chunks)  # chunks of equal size leave the least to fill

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 2 * size * num_chunks - num_samples)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, size, 2, *x.shape[1:])

    def chunk_of(half: Array, index: Array) -> list[Array]:
        at = [jax.lax.dynamic_slice(x, (index, 0, half, *[0] * (x.ndim - 3)), (1, size, 1, *x.shape[3:])) for x in cuts]
        return [x.reshape(size, *x.shape[3:]) for x in at]

    def total(half: Array):
        if num_chunks == 1:
            return done(function(*chunk_of(half, jnp.zeros_like(half))))
        shapes = jax.eval_shape(lambda: function(*chunk_of(half, half)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda sums, index: (jax.tree.map(jnp.add, sums, function(*chunk_of(half, index))), None)  # noqa: E731
        return done(jax.lax.scan(add, zeros, jnp.arange(num_chunks))[0])

    cuts = [cut(x) for x in (*arrays, jnp.ones(num_samples, arrays[0].dtype) if kept is None else kept)]
    return jax.lax.map(total, jnp.arange(2))
