"""The sums of a pair of convolutions by correlations at lags, see `tinyjax.correlations`, and when that is cheaper.

Nothing here repeats a pixel for each kernel offset that reads it. Constants (biases) need no correlations: sums of
images over samples suffice.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.correlations import (
    Plan,
    against_constant,
    assemble,
    cross_plan,
    goal_plan,
    gram_plan,
    lag_sums,
    link_plan,
    products,
    table_size,
)
from tinyjax.window import Window, num_offsets, out_shape, reads

COPY = 16  # multiplications in the time that a number of a temporary takes to be written and read (measured)
ADD = 64  # the same for a number of the table of correlations, read and written for every chunk (measured)


class Plans(NamedTuple):
    """The correlations of one pair, on two axes.

    Attributes:
        gram_prev: of S.
        goal: of N~.
        link: of P.
        gram: of G.
        cross: of M.
        reads: how often a pixel between the two is read, for each axis.
        offsets: O.
    """

    gram_prev: Plan
    goal: Plan
    link: Plan
    gram: Plan
    cross: Plan
    reads: tuple[np.ndarray, ...]
    offsets: int


def plans(space: tuple[int, ...], producer: Window, consumer: Window) -> Plans:
    """The plans for one or two axes, all strides 1."""
    space, producer, consumer = (*space, 1)[:2], _on_two_axes(producer), _on_two_axes(consumer)
    middle = out_shape(space, producer)
    out = out_shape(middle, consumer)
    weights = reads(middle, consumer)
    return Plans(
        gram_prev=gram_plan(space, producer, weights),
        goal=goal_plan(space, producer, consumer),
        link=link_plan(space, producer, consumer),
        gram=gram_plan(middle, consumer, [np.ones(size, int) for size in out]),
        cross=cross_plan(out, consumer),
        reads=weights,
        offsets=num_offsets(consumer),
    )


def applies(producer: Window, consumer: Window) -> bool:
    """Whether lags are differences of offsets: one or two axes, nothing strided."""
    return len(producer.size) in (1, 2) and set(producer.strides + consumer.strides) == {1}


def temporaries(plans: Plans, channels: int, slots: int, *, linked: bool) -> int:
    """Numbers a sample takes while it is summed: images repeated for each lag."""
    seen = [(plans.gram_prev, channels), (plans.goal, channels), (plans.gram, slots), (plans.cross, slots)]
    seen += [(plans.link, channels)] * linked
    return sum(_lags(plan) * plan.rows.weights.shape[-1] * plan.columns.weights.shape[-1] * c for plan, c in seen)


def work(plans: Plans, channels: int, slots: int, outputs: int, *, linked: bool, chunk: int) -> float:
    """Multiplications for each sample, with what moving numbers costs instead.

    Args:
        plans: of the pair.
        channels: of the producer's input.
        slots: channels of the consumer's input.
        outputs: of the consumer.
        linked: whether P is summed.
        chunk: samples a pass.
    """
    sums = [
        (plans.gram_prev, channels * channels),
        (plans.goal, outputs * channels),
        (plans.gram, slots * slots),
        (plans.cross, outputs * slots),
    ] + [(plans.link, slots * channels)] * linked
    total = sum((products(plan) + ADD * table_size(plan) / chunk) * each for plan, each in sums)
    return total + COPY * temporaries(plans, channels, slots, linked=linked)


def consumer_sums(plans: Plans, h: Array, v: Array, live: Array, *, bias: bool) -> tuple:
    """What makes G and M: h (n, *space, C), v (n, *out, M), live (n,)."""
    h, goal = _image(h), _goal(v, live, bias)
    return lag_sums(h, h, plans.gram), lag_sums(goal, h, plans.cross), jnp.sum(goal, axis=(0, 1, 2))


def consumer_done(plans: Plans, raw: tuple, *, bias: bool) -> tuple[Array, Array]:
    """G (H, H) and M (H, M) from the total of `consumer_sums`."""
    gram_raw, cross_raw, total = raw
    gram = _gram(gram_raw, plans.gram)
    cross = assemble(cross_raw, plans.cross)  # (o, o, M [+ 1], C)
    cross = jnp.swapaxes(cross, 2, 3).reshape(len(gram), -1)
    if not bias:
        return gram, cross
    return _bordered(gram, cross[:, -1], total[-1]), jnp.concatenate([cross[:, :-1], total[None, :-1]])


def producer_sums(plans: Plans, x: Array, h: Array | None, v: Array, live: Array, *, bias: bool) -> tuple:
    """What makes S, N~ and, if `h` is given, P: x (n, *space0, C_in), the rest as in `consumer_sums`."""
    x, goal = _image(x), _goal(v, live, bias and h is not None)
    linked = None if h is None else (lag_sums(_image(h), x, plans.link), jnp.sum(_image(h), axis=0))
    sums = lag_sums(x, x, plans.gram_prev), lag_sums(goal, x, plans.goal)
    return *sums, linked, jnp.sum(x, axis=0), jnp.sum(goal, axis=0), jnp.sum(live)


def producer_done(plans: Plans, raw: tuple, *, bias_prev: bool, bias: bool) -> tuple[Array, Array, Array | None]:
    """S without r (D, D), N~ (D, M, O) and P (O, D, H) from the total of `producer_sums`."""
    gram_raw, goal_raw, linked, x, goal, count = raw
    gram = _gram(gram_raw, plans.gram_prev)
    cross = assemble(goal_raw, plans.goal).transpose(0, 2, 5, 4, 1, 3)  # (k, k, C_in, M [+ 1], o, o)
    cross = cross.reshape(len(gram), goal.shape[-1], plans.offsets)
    if bias_prev:
        constant = against_constant(x, plans.gram_prev, lambda weights: weights[:, 0])
        times = int(np.prod([np.sum(axis) for axis in plans.reads]))
        gram = _bordered(gram, constant.reshape(-1), times * count)
        constant = against_constant(goal, plans.goal, lambda weights: weights[0])  # (o, o, M [+ 1])
        cross = jnp.concatenate([cross, constant.reshape(1, plans.offsets, -1).swapaxes(1, 2)])
    if linked is None:
        return gram, cross, None
    link_raw, h = linked
    link = assemble(link_raw, plans.link).transpose(0, 3, 1, 4, 7, 2, 5, 6)  # (o, o, k, k, C_in, o', o', C)
    link = link.reshape(plans.offsets, -1, plans.offsets * h.shape[-1])
    if bias_prev:
        constant = against_constant(h, plans.link, lambda weights: weights[:, 0]).transpose(0, 2, 1, 3, 4)
        link = jnp.concatenate([link, constant.reshape(plans.offsets, 1, -1)], axis=1)
    if bias:
        link = jnp.concatenate([link, cross[:, -1:].transpose(2, 0, 1)], axis=2)
        cross = cross[:, :-1]
    return gram, cross, link


def _lags(plan: Plan) -> int:
    return len(plan.rows.distinct) * len(plan.columns.distinct)


def _gram(raw: tuple, plan: Plan) -> Array:
    """The Gram matrix of patches; blocks of negative lag are transposes of those that were summed."""
    terms = assemble(raw, plan)  # (k, k', k, k', C, C)
    upper = terms.transpose(0, 2, 4, 1, 3, 5).reshape(terms.shape[0] * terms.shape[2] * terms.shape[4], -1)
    row = np.repeat(np.arange(len(terms)), len(upper) // len(terms))
    return jnp.where(jnp.asarray(plan.rows.lags[row[:, None], row] >= 0), upper, upper.T)


def _bordered(gram: Array, column: Array, corner: Array) -> Array:
    return jnp.block([[gram, column[:, None]], [column[None], corner.reshape(1, 1)]])


def _goal(v: Array, live: Array, constant: bool) -> Array:
    """V_goal as an image with two axes, with a channel of ones where the consumer's constant is summed along."""
    v = _image(v)
    if not constant:
        return v
    ones = jnp.broadcast_to(live.reshape(-1, 1, 1, 1), (*v.shape[:-1], 1))
    return jnp.concatenate([v, ones], axis=-1)


def _image(x: Array) -> Array:
    """(n, *space, C) with two spatial axes."""
    return x if x.ndim == 4 else x[:, :, None]


def _on_two_axes(window: Window) -> Window:
    size, strides, padding, dilation = window
    return Window((*size, 1)[:2], (*strides, 1)[:2], (*padding, (0, 0))[:2], (*dilation, 1)[:2])
