"""Sums of a pair of convolutions against loops over samples, pixels and offsets."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.conv_oracle import (
    GEOMETRIES,
    arrays,
    geometry,
    pixels,
    read,
    slow_image,
    slow_patches,
    slow_pool,
    slow_sums,
    window,
)
from tinyjax.core.windows import convolve, patches, pool_mean
from tinyjax.statistics.convolution.image_sums import Projection, conv_sums
from tinyjax.statistics.convolution.lags import applies
from tinyjax.statistics.convolution.linear_map import linear_move
from tinyjax.statistics.convolution.strategies import ConvPair, Sizes, by_lags, by_patches, choose
from tinyjax.statistics.sums import Extras

EVERY = pytest.mark.parametrize("name", GEOMETRIES)


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
    found = fast_sums(*data, geo, bias_prev, bias, (("extras", Extras(energy_matrix=True)), ("chunk", 2), ("way", way)))
    for field, expected in slow_sums(*data, geo, bias_prev, bias).items():
        assert_close(getattr(found, field), expected)


@EVERY
def test_new_channels_move_the_output_as_n_and_s_say(name):
    geo = GEOMETRIES[name]
    x, h, v = arrays(geo, n=5, seed=1)
    sums = jax.tree.map(np.asarray, fast_sums(x, h, v, geo))
    rng = np.random.default_rng(2)
    alpha, omega = (rng.normal(size=s) for s in ((sums.cross_prev.shape[1], 2), (2, sums.cross_prev.shape[2])))
    moved = functools.partial(linear_move, producer=geo.producer, consumer=geo.consumer, between=geo.between)
    move = np.asarray(jax.jit(functools.partial(moved, bias_prev=True))(x, alpha, omega))
    fan_out = omega.reshape(2, v.shape[-1], -1)
    expected = np.zeros(v.shape)
    for i, j in itertools.product(range(len(x)), pixels(v.shape[1:-1])):
        image = slow_image(x[i], geo, True)
        for o, offset in enumerate(pixels(geo.consumer.size)):
            expected[i][j] += read(image, geo.consumer, j, offset)[0] @ alpha @ fan_out[..., o]
    assert_close(move, expected)
    # its slope is exactly <N~, alpha omega>
    slope, product = np.sum(v * move), alpha @ omega
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
    assert_close(projected.cross_asked, linked.cross_prev)
    assert linked.cross_asked is None
    own = fast_sums(
        *data, geo, options=(("link_limit", 0), ("project", lambda g, c: Projection(c.sum(0) * 0.1)), ("asked", False))
    )
    expected = slow_sums(*data, geo, True, True, 0.1 * np.asarray(linked.cross.sum(0)))["cross_prev"]
    assert_close(own.cross_prev, expected)
    assert own.cross_asked is None


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


@pytest.mark.parametrize("way", [by_patches, by_lags])
@pytest.mark.parametrize(
    "dtype, expected", [(np.float32, "float32"), (jnp.bfloat16, "float32"), (np.float64, "float64")]
)
def test_sums_are_at_least_float32(dtype, expected, way):
    geo = GEOMETRIES["1-1-SAME-SAME"]
    data = [jnp.asarray(a, dtype) for a in arrays(geo)]
    found = fast_sums(*data, geo, options=(("extras", Extras(energy_matrix=True)), ("way", way)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {expected}
    exact = slow_sums(*(np.asarray(a, np.float64) for a in data), geo, True, True)
    assert_close(found.gram_prev, exact["gram_prev"], 1e-5 if expected == "float32" else 1e-12)


@pytest.mark.parametrize("way", [by_patches, by_lags])
def test_empty_channels_give_exact_zeros(way):
    geo = GEOMETRIES["1-1-SAME-SAME"]
    x, h, v = arrays(geo)
    h[..., 1] = 0
    found = fast_sums(x, h, v, geo, options=(("way", way),))
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


@pytest.mark.parametrize(
    "channels, samples, producer_strides, pooled, lags",
    [
        (64, 128, (1, 1), False, True),
        (64, 128, (2, 2), False, False),  # lags are no longer differences of offsets
        (64, 128, (1, 1), True, False),
        (2, 8, (1, 1), False, False),  # not worth the compilation
    ],
)
def test_the_way_is_chosen_by_shape(channels, samples, producer_strides, pooled, lags):
    same = window((3, 3), 1, ((1, 1), (1, 1)))
    between = (same,) if pooled else ()
    pair = ConvPair((16, 16), same._replace(strides=producer_strides), between, same, True, True)
    way = choose(pair, Sizes(samples, channels, channels, channels, True), None)
    assert (way.work == by_patches(pair, Sizes(samples, channels, channels, channels, True)).work) is not lags
