"""The sums of a pair of convolutions by correlations along rows, see `correlations`, and what they cost.

Constants (biases) need no correlations: sums of images over samples suffice.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.windows import Window, num_offsets, out_shape, patches, reads
from tinyjax.statistics.convolution.correlations import (
    Plan,
    against_constant,
    cross_plan,
    goal_plan,
    gram_plan,
    lag_sums,
    lags,
    link_plan,
    products,
)

COPY = 16  # multiplications in the time that a number of a temporary takes to be written and read (measured)
ADD = 64  # the same for a sum, read and written for every chunk (measured)


class Plans(NamedTuple):
    """The correlations of one pair, on two axes.

    Attributes:
        gram_prev: of S.
        goal: of N~.
        link: of P.
        gram: of G.
        cross: of M.
        reads: how often a pixel between the two is read, for each axis.
        producer: the columns of the producer's kernel.
        consumer: the columns of the consumer's.
        spread: which output pixels read a column between the two; offsets in reverse.
    """

    gram_prev: Plan
    goal: Plan
    link: Plan
    gram: Plan
    cross: Plan
    reads: tuple[np.ndarray, ...]
    producer: Window
    consumer: Window
    spread: Window


class Work(NamedTuple):
    """What a sample costs.

    Attributes:
        products: multiplications.
        temporaries: numbers written and read.
        sums: numbers added to, once a chunk.
    """

    products: int
    temporaries: int
    sums: int


def plans(space: tuple[int, ...], producer: Window, consumer: Window) -> Plans:
    """The plans for one or two axes, all strides 1."""
    space, producer, consumer = (*space, 1)[:2], _on_two_axes(producer), _on_two_axes(consumer)
    middle = out_shape(space, producer)
    out = out_shape(middle, consumer)
    weights = reads(middle, consumer)
    return Plans(
        gram_prev=gram_plan(space[0], producer, weights[0]),
        goal=goal_plan(space[0], producer, consumer),
        link=link_plan(space[0], producer, consumer),
        gram=gram_plan(middle[0], consumer, np.ones(out[0], int)),
        cross=cross_plan(out[0], consumer),
        reads=weights,
        producer=_columns(producer),
        consumer=_columns(consumer),
        spread=_reverse(_columns(consumer), middle[1], out[1]),
    )


def applies(producer: Window, consumer: Window) -> bool:
    """Whether lags are differences of offsets: one or two axes, nothing strided."""
    return len(producer.size) in (1, 2) and set(producer.strides + consumer.strides) == {1}


def work(plans: Plans, channels: int, slots: int, outputs: int, *, linked: bool) -> Work:
    """What the sums cost.

    Args:
        plans: of the pair.
        channels: of the producer's input.
        slots: channels of the consumer's input.
        outputs: of the consumer.
        linked: whether P is summed.
    """
    x, h = num_offsets(plans.producer) * channels, num_offsets(plans.consumer) * slots
    v, linking = num_offsets(plans.consumer) * outputs, num_offsets(plans.consumer) * h
    middle = len(plans.reads[1])
    pairs = [(plans.gram_prev, x, x), (plans.goal, v, x), (plans.gram, h, h), (plans.cross, outputs, h)]
    pairs += [(plans.link, linking, x)] * linked
    rows = plans.goal.weights.shape[-1]
    return Work(
        products=sum(middle * products(plan) * a * b for plan, a, b in pairs),
        temporaries=middle * rows * (sum(a + lags(plan) * b for plan, a, b in pairs)),
        sums=sum(int(plan.summed.sum()) * a * b for plan, a, b in pairs),
    )


def consumer_sums(plans: Plans, h: Array, v: Array, live: Array, *, bias: bool) -> tuple:
    """What makes G and M: h (n, *space, C), v (n, *out, M), live (n,)."""
    h, goal = patches(_image(h), plans.consumer), _goal(v, live, bias)
    return lag_sums(h, h, plans.gram), lag_sums(goal, h, plans.cross), jnp.sum(goal, axis=(0, 1, 2))


def consumer_done(plans: Plans, raw: tuple, *, bias: bool) -> tuple[Array, Array]:
    """G (H, H) and M (H, M) from the total of `consumer_sums`."""
    gram_terms, cross, total = raw
    gram = _gram(gram_terms, plans.gram)
    cross = jnp.swapaxes(cross, 1, 2).reshape(len(gram), -1)  # from (o, M [+ 1], (o, C))
    if not bias:
        return gram, cross
    return _bordered(gram, cross[:, -1], total[-1]), jnp.concatenate([cross[:, :-1], total[None, :-1]])


def producer_sums(plans: Plans, x: Array, h: Array | None, v: Array, live: Array, *, bias: bool) -> tuple:
    """What makes S, N~ and, if `h` is given, P: x (n, *space0, C_in), the rest as in `consumer_sums`."""
    goal = _spread(_goal(v, live, bias and h is not None), plans)
    x = patches(_image(x), plans.producer)
    root = np.sqrt(plans.reads[1])[:, None].astype(x.dtype)
    weighted = x * root
    sums = lag_sums(weighted, weighted, plans.gram_prev), lag_sums(goal, x, plans.goal)
    linked = None
    if h is not None:
        h = _spread(patches(_image(h), plans.consumer), plans)
        linked = lag_sums(h, x, plans.link), jnp.sum(h, axis=(0, 2))
    return *sums, linked, jnp.sum(weighted * root, axis=(0, 2)), jnp.sum(goal, axis=(0, 2)), jnp.sum(live)


def producer_done(plans: Plans, raw: tuple, *, bias_prev: bool, bias: bool) -> tuple[Array, Array, Array | None]:
    """S without r (D, D), N~ (D, M, O) and P (O, D, H) from the total of `producer_sums`."""
    gram_terms, goal_terms, linked, x, goal, count = raw
    gram, (k, o) = _gram(gram_terms, plans.gram_prev), plans.goal.lags.shape
    columns = num_offsets(plans.spread)
    cross = goal_terms.reshape(k, o, columns, -1, goal_terms.shape[-1])[:, :, ::-1]
    cross = cross.transpose(0, 4, 3, 1, 2).reshape(len(gram), -1, o * columns)  # ((k, k, C_in), M [+ 1], (o, o))
    if bias_prev:
        constant = against_constant(x, plans.gram_prev.weights[:, 0])
        times = int(np.prod([np.sum(axis) for axis in plans.reads]))
        gram = _bordered(gram, constant.reshape(-1), times * count)
        constant = against_constant(goal, plans.goal.weights[0]).reshape(o, columns, -1)[:, ::-1]
        cross = jnp.concatenate([cross, constant.reshape(1, o * columns, -1).swapaxes(1, 2)])
    if linked is None:
        return gram, cross, None
    link_terms, h = linked
    link = link_terms.reshape(o, k, o, columns, -1, link_terms.shape[-1])  # (o, k, o', o, (o', C), (k, C_in))
    link = link[:, :, :, ::-1].transpose(0, 3, 1, 5, 2, 4).reshape(o * columns, gram_terms.shape[-1] * k, -1)
    if bias_prev:
        constant = against_constant(h, plans.link.weights[:, 0]).reshape(o, o, columns, -1)[:, :, ::-1]
        link = jnp.concatenate([link, constant.swapaxes(1, 2).reshape(o * columns, 1, -1)], axis=1)
    if bias:
        link = jnp.concatenate([link, cross[:, -1:].transpose(2, 0, 1)], axis=2)
        cross = cross[:, :-1]
    return gram, cross, link


def _gram(terms: Array, plan: Plan) -> Array:
    """The Gram matrix of patches; a block that was not summed is the transpose of its mirror image."""
    found = {tuple(at): term for at, term in zip(np.argwhere(plan.summed).tolist(), terms)}
    size = range(len(plan.summed))
    return jnp.block([[found[i, j] if (i, j) in found else found[j, i].T for j in size] for i in size])


def _bordered(gram: Array, column: Array, corner: Array) -> Array:
    return jnp.block([[gram, column[:, None]], [column[None], corner.reshape(1, 1)]])


def _goal(v: Array, live: Array, constant: bool) -> Array:
    """V_goal as an image with two axes, with a channel of ones where the consumer's constant is summed along."""
    v = _image(v)
    if not constant:
        return v
    ones = jnp.broadcast_to(live.reshape(-1, 1, 1, 1), (*v.shape[:-1], 1))
    return jnp.concatenate([v, ones], axis=-1)


def _spread(image: Array, plans: Plans) -> Array:
    """The output pixels that read each column between the two, (n, rows, columns, (o, channels)), last offset first."""
    return patches(image, plans.spread)


def _image(x: Array) -> Array:
    """(n, *space, C) with two spatial axes."""
    return x if x.ndim == 4 else x[:, :, None]


def _on_two_axes(window: Window) -> Window:
    size, strides, padding, dilation = window
    return Window((*size, 1)[:2], (*strides, 1)[:2], (*padding, (0, 0))[:2], (*dilation, 1)[:2])


def _columns(window: Window) -> Window:
    """The window along the columns alone."""
    return Window((1, window.size[1]), (1, 1), ((0, 0), window.padding[1]), (1, window.dilation[1]))


def _reverse(window: Window, read: int, outputs: int) -> Window:
    """The window through which a column that is read sees the outputs that read it."""
    reach = (window.size[1] - 1) * window.dilation[1]
    before = reach - window.padding[1][0]
    return window._replace(padding=((0, 0), (before, read + reach - before - outputs)))
