"""Sums of a pair of convolutions against loops over samples, pixels and offsets."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tinyjax.pair import by_lags, by_patches
from tinyjax.patches import conv_sums, convolve, linear_move
from tinyjax.shifts import applies
from tinyjax.window import Window, out_shape, patches, pool_mean


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
EVERY = pytest.mark.parametrize("name", GEOMETRIES)


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


@functools.partial(jax.jit, static_argnames=("geo", "bias_prev", "bias", "options"))
def fast_sums(x, h, v, geo, bias_prev=True, bias=True, options=()):
    return conv_sums(
        x, h, v, geo.producer, geo.consumer, between=geo.between, bias_prev=bias_prev, bias=bias, **dict(options)
    )


def assert_close(found, expected, tolerance=1e-10):
    assert found.shape == expected.shape
    scale = max(1.0, np.max(np.abs(expected), initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


UNSTRIDED = [name for name, geo in GEOMETRIES.items() if not geo.between and applies(geo.producer, geo.consumer)]


@pytest.mark.parametrize(
    "name, way", [(name, by_patches) for name in GEOMETRIES] + [(name, by_lags) for name in UNSTRIDED]
)
def test_sums_equal_loops_over_pixels(name, way):
    geo, index = GEOMETRIES[name], list(GEOMETRIES).index(name)
    bias_prev, bias = index % 2 == 0, index // 2 % 2 == 0  # both, either, none, in turn
    data = arrays(geo, n=5)
    found = fast_sums(*data, geo, bias_prev, bias, (("energy_matrix", True), ("chunk", 2), ("way", way)))
    for field, expected in slow_sums(*data, geo, bias_prev, bias).items():
        assert_close(getattr(found, field), expected)


@EVERY
def test_new_channels_move_the_output_as_n_and_s_say(name):
    geo = GEOMETRIES[name]
    x, h, v = (jnp.asarray(a) for a in arrays(geo, n=5, seed=1))
    sums = fast_sums(x, h, v, geo)
    rng = np.random.default_rng(2)
    alpha = jnp.asarray(rng.normal(size=(sums.cross_prev.shape[1], 2)))
    omega = jnp.asarray(rng.normal(size=(2, sums.cross_prev.shape[2])))
    move = jax.jit(
        lambda: linear_move(x, alpha, omega, geo.producer, geo.consumer, bias_prev=True, between=geo.between)
    )()
    fan_out = np.asarray(omega).reshape(2, v.shape[-1], -1)
    expected = np.zeros(v.shape)
    for i, j in itertools.product(range(len(x)), pixels(v.shape[1:-1])):
        image = slow_image(np.asarray(x[i]), geo, True)
        for o, offset in enumerate(pixels(geo.consumer.size)):
            expected[i][j] += read(image, geo.consumer, j, offset)[0] @ alpha @ fan_out[..., o]
    assert_close(move, expected)
    # its slope is exactly <N~, alpha omega>
    slope, product = np.sum(v * move), np.asarray(alpha @ omega)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, np.sum(sums.cross_prev.sum(0) * product), rtol=1e-10)
    # and its square at most <alpha omega, S alpha omega>: lemma C.2, with the constant counted in r
    assert np.sum(move**2) <= np.sum(product * (sums.gram_prev.sum(0) @ product)) * (1 + 1e-12)


def test_the_factor_r_counts_the_constant():
    """One sample with B^t = [[1, 1], [-1, 1]] and F its inverse: lemma C.7 is an equality at r = 2 inputs."""
    x, v = jnp.array([[[1.0], [-1.0]]]), jnp.ones((1, 1, 1))
    geo = geometry((2,), window((1,)), window((2,)))
    gram_prev = fast_sums(x, x, v, geo).gram_prev.sum(0)
    seen = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    omega = jnp.linalg.inv(seen)
    move = linear_move(x, jnp.eye(2), omega, geo.producer, geo.consumer, bias_prev=True)
    np.testing.assert_allclose(np.sum(move**2), 4, rtol=1e-12)
    np.testing.assert_allclose(jnp.sum(omega * (gram_prev @ omega)), 4, rtol=1e-12)


@pytest.mark.parametrize("name", ["1-1-SAME-SAME", "dilated-strided", "flatten", "pool-padded", "one-axis"])
def test_without_link_n_is_taken_against_the_residual(name):
    geo = GEOMETRIES[name]
    data = arrays(geo, n=7, seed=5)
    linked = fast_sums(*data, geo)
    way = by_lags if name in UNSTRIDED else by_patches
    projected = fast_sums(*data, geo, options=(("link_limit", 0), ("chunk", 2), ("way", way)))
    assert projected.link is None
    delta = np.linalg.lstsq(linked.gram.sum(0), linked.cross.sum(0), rcond=1e-12)[0]
    assert_close(projected.cross_prev, slow_sums(*data, geo, True, True, delta)["cross_prev"], 1e-8)
    for field in ("gram_prev", "gram", "cross", "energy"):
        assert_close(getattr(projected, field), getattr(linked, field))
    own = fast_sums(*data, geo, options=(("link_limit", 0), ("project", lambda g, c: c * 0.1)))
    expected = slow_sums(*data, geo, True, True, 0.1 * np.asarray(linked.cross.sum(0)))["cross_prev"]
    assert_close(own.cross_prev, expected)


def test_a_dense_layer_has_the_dense_sums():
    x, h, v = arrays(GEOMETRIES["dense"], n=6, c_in=4)
    found = fast_sums(x, h, v, GEOMETRIES["dense"], True, False)
    b_prev = np.concatenate([x, np.ones((6, 1))], axis=1)
    for half in range(2):
        rows = slice(half, None, 2)
        assert_close(found.gram_prev[half], b_prev[rows].T @ b_prev[rows])
        assert_close(found.cross_prev[half], b_prev[rows].T @ v[rows])
        assert_close(found.link[half], (b_prev[rows].T @ h[rows])[None])


def test_a_global_mean_leaves_one_pixel_and_no_factor():
    geo = GEOMETRIES["pool-global"]
    x, h, v = arrays(geo, n=4)
    mean_patch = np.asarray(patches(x, geo.producer)).mean((1, 2))
    b_prev = np.concatenate([mean_patch, np.ones((4, 1))], axis=1)
    found = fast_sums(x, h, v, geo)
    assert_close(found.gram_prev.sum(0), b_prev.T @ b_prev)
    assert_close(found.cross_prev.sum(0), b_prev.T @ v[:, 0, 0])


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_change_nothing(chunk):
    geo = GEOMETRIES["2-1-SAME-SAME"]
    data = arrays(geo, n=7)
    found, whole = fast_sums(*data, geo, options=(("chunk", chunk),)), fast_sums(*data, geo)
    jax.tree.map(assert_close, found, whole)


def test_one_sample_is_the_even_half():
    geo = GEOMETRIES["even"]
    data = arrays(geo, n=1)
    found = fast_sums(*data, geo)
    assert_close(found.gram, slow_sums(*data, geo, True, True)["gram"])
    assert all(not np.any(np.asarray(leaf)[1]) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "dtype, expected", [(np.float32, "float32"), (jnp.bfloat16, "float32"), (np.float64, "float64")]
)
def test_sums_are_at_least_float32(dtype, expected):
    geo = GEOMETRIES["1-1-SAME-SAME"]
    data = [jnp.asarray(a, dtype) for a in arrays(geo)]
    found = fast_sums(*data, geo, options=(("energy_matrix", True),))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {expected}
    exact = slow_sums(*(np.asarray(a, np.float64) for a in data), geo, True, True)
    assert_close(found.gram_prev, exact["gram_prev"], 1e-5 if expected == "float32" else 1e-12)


def test_empty_channels_give_exact_zeros():
    geo = GEOMETRIES["1-1-SAME-SAME"]
    x, h, v = arrays(geo)
    h[..., 1] = 0
    found = fast_sums(x, h, v, geo)
    empty = np.append(np.arange(found.gram.shape[1] - 1) % 2 == 1, False)
    assert not np.any(np.asarray(found.gram)[:, empty]) and not np.any(np.asarray(found.link)[..., empty])


@pytest.mark.parametrize("name", ["2-2-SAME-SAME", "more-padding-than-kernel", "cropped", "one-axis-dilated", "dense"])
def test_patches_and_pooling_equal_loops(name):
    geo = GEOMETRIES[name]
    x, h, _ = arrays(geo)
    for image, win in ((x, geo.producer), (h, geo.consumer)):
        rows = np.stack([slow_patches(one, win, False) for one in image])
        assert_close(patches(image, win), rows)
        matrix = np.random.default_rng(0).normal(size=(rows.shape[-1], 2))
        assert_close(convolve(image, matrix, win), rows @ matrix)
    pool = window((2,) * len(geo.space), 1, ((1, 0),) * len(geo.space))
    assert_close(pool_mean(x, pool), np.stack([slow_pool(one, pool) for one in x]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, h, v, geo: (x, h[:, :-1], v, geo), "`h` has shape"),
        (lambda x, h, v, geo: (x, h, v[:, :-1], geo), "`v` has shape"),
        (lambda x, h, v, geo: (x[:-1], h, v, geo), "same samples"),
        (lambda x, h, v, geo: (x[:0], h[:0], v[:0], geo), "at least one"),
        (lambda x, h, v, geo: (x, h, v, geo._replace(producer=window((3,), 1, ((0, 0),)))), "one entry for each"),
        (lambda x, h, v, geo: (x, h, v, geo._replace(consumer=window((9, 9), 1, ((0, 0),) * 2))), "no output pixel"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(change, message):
    geo = GEOMETRIES["1-1-SAME-SAME"]
    with pytest.raises(ValueError, match=message):
        fast_sums(*change(*arrays(geo), geo))


@pytest.mark.parametrize("chunk", [0, -2])
def test_a_chunk_has_samples(chunk):
    geo = GEOMETRIES["dense"]
    with pytest.raises(ValueError, match="at least one sample"):
        fast_sums(*arrays(geo), geo, options=(("chunk", chunk),))
