"""Geometries of pairs of convolutions, and their sums by loops over samples, pixels and offsets."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jax import lax

from tinyjax.core.windows import Window, out_shape


def window(size, strides=1, padding="VALID", dilation=1):
    """A window from sizes and numbers; `padding` for a given image is resolved by `resolve`."""
    axes = len(size)
    each = [s if isinstance(s, tuple) else (s,) * axes for s in (strides, dilation)]
    return Window(size, each[0], padding, each[1])


def resolve(space, win):
    if not isinstance(win.padding, str):
        return win
    dilated = [(k - 1) * d + 1 for k, d in zip(win.size, win.dilation)]
    return win._replace(padding=tuple(tuple(p) for p in lax.padtype_to_pads(space, dilated, win.strides, win.padding)))


class Geometry(NamedTuple):
    space: tuple
    producer: Window
    consumer: Window
    between: tuple = ()


def geometry(space, producer, consumer, *between):
    producer = resolve(space, producer)
    space1, pools = out_shape(space, producer), []
    for pool in between:
        pools.append(resolve(space1, pool))
        space1 = out_shape(space1, pools[-1])
    return Geometry(space, producer, resolve(space1, consumer), tuple(pools))


ASYMMETRIC = ((2, 0), (0, 1))
GRID = {
    f"{stride}-{next_stride}-{padding}-{next_padding}": geometry(
        (5, 4), window((3, 3), stride, padding), window((3, 3), next_stride, next_padding)
    )
    for stride, next_stride, (padding, next_padding) in itertools.product(
        (1, 2), (1, 2), (("SAME", "SAME"), ("SAME", ASYMMETRIC))
    )
}
ODD = {
    "valid-valid": geometry((6, 5), window((3, 3)), window((2, 3))),
    "dilated-producer": geometry((5, 5), window((3, 2), 1, "SAME", 2), window((3, 3), 1, "SAME")),
    "dilated-consumer": geometry((5, 5), window((3, 3), 1, "SAME"), window((3, 3), 1, "SAME", (2, 1))),
    "dilated-strided": geometry((7, 6), window((3, 2), (2, 1), "SAME", 2), window((2, 3), (1, 2), "SAME", (1, 2))),
    "even": geometry((4, 5), window((2, 2), 1, "SAME"), window((4, 2), 1, "SAME")),
    "kernel-larger-than-image": geometry((2, 3), window((5, 5), 1, "SAME"), window((5, 7), 1, "SAME")),
    "more-padding-than-kernel": geometry(
        (3, 2), window((2, 2), 1, ((3, 1), (2, 3))), window((3, 3), 2, ((4, 3), (3, 4)))
    ),
    "cropped": geometry((6, 6), window((3, 3), 1, ((-1, 1), (0, -2))), window((2, 2), 1, ((1, -1), (-1, 1)))),
    "pointwise-consumer": geometry((4, 3), window((3, 3), 1, "SAME"), window((1, 1))),
    "pointwise-producer": geometry((4, 3), window((1, 1)), window((3, 3), 1, "SAME")),
    "pointwise-strided": geometry((5, 4), window((1, 1), 2), window((1, 1), 2)),
    "flatten": geometry((4, 4), window((3, 3), 2, "SAME"), window((2, 2))),
    "one-axis": geometry((7,), window((3,), 1, "SAME"), window((4,), 2, "SAME")),
    "one-axis-dilated": geometry((8,), window((2,), 1, ((1, 0),), 3), window((3,), 1, "SAME", 2)),
    "dense": geometry((), window(()), window(())),
    "pool": geometry((6, 4), window((3, 3), 1, "SAME"), window((2, 2), 1, "SAME"), window((2, 2), 2)),
    "pool-padded": geometry((5, 5), window((3, 3), 1, "SAME"), window((3, 3), 1, "SAME"), window((3, 3), 2, "SAME")),
    "pool-global": geometry((4, 4), window((2, 2), 1, "SAME"), window((1, 1)), window((2, 2), 2), window((2, 2))),
}
GEOMETRIES = GRID | ODD


def arrays(geo, *, n=5, c_in=2, c=2, m=3, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    space1 = out_shape(geo.space, geo.producer)
    for pool in geo.between:
        space1 = out_shape(space1, pool)
    shapes = (*geo.space, c_in), (*space1, c), (*out_shape(space1, geo.consumer), m)
    return tuple(rng.normal(size=(n, *shape)).astype(dtype) for shape in shapes)


def pixels(space):
    return list(itertools.product(*(range(s) for s in space)))


def read(image, win, pixel, offset):
    """One pixel of an image (*space, C) as a window sees it, or zeros in the padding."""
    at = tuple(
        j * s + o * d - before for j, o, s, (before, _), d in zip(pixel, offset, win.strides, win.padding, win.dilation)
    )
    inside = all(0 <= i < size for i, size in zip(at, image.shape))
    return (image[at], True) if inside else (np.zeros(image.shape[-1]), False)


def slow_patches(image, win, bias):
    """(*out, size * C [+ 1])."""
    out = out_shape(image.shape[:-1], win)
    rows = [
        np.concatenate([read(image, win, j, o)[0] for o in pixels(win.size)] + [np.ones(1)] * bias) for j in pixels(out)
    ]
    return np.reshape(rows, (*out, -1))


def slow_pool(image, win):
    out = out_shape(image.shape[:-1], win)
    means = []
    for j in pixels(out):
        seen = [value for value, inside in (read(image, win, j, o) for o in pixels(win.size)) if inside]
        means.append(np.mean(seen, axis=0))
    return np.reshape(means, (*out, -1))


def slow_image(x, geo, bias_prev):
    """What the consumer reads instead of a channel: the producer's patches after the poolings, of one sample."""
    image = slow_patches(x, geo.producer, bias_prev)
    return functools.reduce(slow_pool, geo.between, image)


def slow_sums(x, h, v, geo, bias_prev, bias, delta=None):
    offsets, goals = pixels(geo.consumer.size), v.shape[-1]
    shape = slow_image(x[0], geo, bias_prev).shape[-1]
    hidden = len(offsets) * h.shape[-1] + bias
    sums = {
        "gram_prev": np.zeros((2, shape, shape)),
        "cross_prev": np.zeros((2, shape, goals, len(offsets))),
        "gram": np.zeros((2, hidden, hidden)),
        "cross": np.zeros((2, hidden, goals)),
        "link": np.zeros((2, len(offsets), shape, hidden)),
        "energy": np.zeros(2),
        "outputs": np.zeros((2, goals, goals)),
    }
    for i in range(len(x)):
        half, image, rows = i % 2, slow_image(x[i], geo, bias_prev), slow_patches(h[i], geo.consumer, bias)
        for j in pixels(out_shape(h.shape[1:-1], geo.consumer)):
            goal = v[i][j]
            sums["gram"][half] += np.outer(rows[j], rows[j])
            sums["cross"][half] += np.outer(rows[j], goal)
            sums["energy"][half] += goal @ goal
            sums["outputs"][half] += np.outer(goal, goal)
            left = goal if delta is None else goal - rows[j] @ delta
            for o, offset in enumerate(offsets):
                seen, _ = read(image, geo.consumer, j, offset)
                sums["gram_prev"][half] += min(len(offsets), shape) * np.outer(seen, seen)
                sums["cross_prev"][half, :, :, o] += np.outer(seen, left)
                sums["link"][half, o] += np.outer(seen, rows[j])
    sums["cross_prev"] = sums["cross_prev"].reshape(2, shape, -1)
    outputs = sums.pop("outputs")
    sums["energy_matrix"] = np.stack([np.kron(e, np.eye(len(offsets))) for e in outputs])
    return sums
