"""Roots, solves and truncated SVDs against NumPy, at the scales and ranks where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.core import linalg


def gram(seed, n, d, scale=1.0):
    b = np.random.default_rng(seed).normal(size=(n, d)) * scale
    return b, b.T @ b / n


@pytest.mark.parametrize("n", [4, 30], ids=["rank deficient", "full rank"])
def test_exact_solve_is_the_pseudo_inverse(n):
    b, s = gram(0, n, 8, scale=np.logspace(-2, 1, 8))
    rhs = b.T @ np.random.default_rng(1).normal(size=(n, 3)) / n
    got = jax.jit(linalg.solve)(s, rhs)
    want = np.linalg.lstsq(b, np.linalg.lstsq(b.T, rhs * n, rcond=1e-12)[0], rcond=1e-12)[0]
    np.testing.assert_allclose(got, want, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5, 10.0])
def test_root_of_the_ridged_matrix(ridge):
    _, s = gram(0, 30, 6)

    def product(s):
        root = linalg.root_of(s, ridge)
        return root.whiten(root.whiten(s + ridge * jnp.diag(jnp.diagonal(s))).T), root.rank

    identity, rank = jax.jit(product)(s)
    np.testing.assert_allclose(identity, np.eye(6), atol=1e-12)
    assert rank == 6


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_dead_inputs_stay_out(ridge):
    _, s = gram(0, 30, 4)
    padded = np.zeros((7, 7))
    live = [0, 2, 3, 6]
    padded[np.ix_(live, live)] = s
    rhs = np.zeros((7, 2))
    rhs[live] = np.random.default_rng(1).normal(size=(4, 2))
    got = np.asarray(linalg.solve(jnp.asarray(padded), jnp.asarray(rhs), ridge))
    np.testing.assert_allclose(got[live], linalg.solve(jnp.asarray(s), jnp.asarray(rhs[live]), ridge), atol=1e-12)
    assert np.all(got[[1, 4, 5]] == 0)
    assert linalg.root_of(jnp.asarray(padded), ridge).rank == 4


def test_all_inputs_dead():
    got = linalg.solve(jnp.zeros((3, 3)), jnp.zeros((3, 2)))
    np.testing.assert_array_equal(got, np.zeros((3, 2)))
    assert linalg.root_of(jnp.zeros((3, 3))).rank == 0


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_float32_solves_know_no_unit(scale, ridge):
    _, s = gram(0, 40, 5)
    rhs = np.random.default_rng(1).normal(size=(5, 2))
    want = linalg.solve(jnp.asarray(s), jnp.asarray(rhs), ridge)
    unit = np.array([scale, 1, scale, 1, 1])
    small = jnp.asarray(s * np.outer(unit, unit), jnp.float32)
    got = jax.jit(lambda s, x: linalg.solve(s, x, ridge))(small, jnp.asarray(rhs * unit[:, None], jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, float) * unit[:, None], want, rtol=2e-5, atol=2e-5)


def test_near_duplicates_do_not_explode_in_float32():
    rng = np.random.default_rng(0)
    b = rng.normal(size=(200, 4))
    b = np.concatenate([b, b[:, :1] + 1e-5 * rng.normal(size=(200, 1))], axis=1).astype(np.float32)
    v = b[:, :2] @ np.array([[0.05], [0.03]], np.float32)
    got = linalg.solve(jnp.asarray(b.T @ b / 200), jnp.asarray(b.T @ v / 200))
    assert np.linalg.norm(got) < 0.07


def test_singular_triplets_small_and_large():
    rng = np.random.default_rng(0)
    for shape in [(9, 5), (5, 9), (90, 70), (70, 90)]:
        matrix = rng.normal(size=shape)
        u, values, vt = jax.jit(linalg.top_singular, static_argnums=1)(matrix, 4)
        np.testing.assert_allclose(values, np.linalg.svd(matrix, compute_uv=False)[:4], rtol=1e-12)
        np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(u.T @ matrix, values[:, None] * vt, atol=1e-9)
        largest = np.take_along_axis(np.asarray(vt), np.abs(vt).argmax(axis=1)[:, None], axis=1)
        assert np.all(largest > 0)


@pytest.mark.parametrize("size", [10, 80])
def test_singular_triplets_beyond_the_rank_are_zero(size):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(size, 3)) @ rng.normal(size=(3, size + 5)))
    u, values, vt = linalg.top_singular(matrix, size + 7)
    assert u.shape == (size, size + 7) and vt.shape == (size + 7, size + 5)
    assert np.all(values[:3] > 0) and np.all(values[3:] == 0) and np.all(u[:, 3:] == 0) and np.all(vt[3:] == 0)


def test_floor_turns_rounding_errors_into_zeros():
    matrix = 1e-13 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    assert np.all(linalg.top_singular(matrix, 2, floor=1.0)[1] == 0)
    assert np.all(linalg.top_singular(matrix, 2)[1] > 0)


@pytest.mark.parametrize("size", [4, 80])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_nan_in_nan_out(ridge, size):
    _, s = gram(0, 2 * size, size)
    rhs = np.ones((size, size))
    for where in [(0, 0), (2, 1)]:
        bad = s.copy()
        bad[where] = bad[where[::-1]] = np.nan
        assert np.isnan(linalg.solve(jnp.asarray(bad), jnp.asarray(rhs), ridge)).any()
    bad = rhs.copy()
    bad[1, 1] = np.nan
    root = linalg.root_of(jnp.asarray(s), ridge)
    assert np.isnan(root.unwhiten(root.whiten(jnp.asarray(bad)))).any()
    for part in linalg.top_singular(root.whiten(jnp.asarray(bad)), 2):
        assert np.isnan(part).any()


def test_negative_ridge_is_refused():
    with pytest.raises(ValueError, match="`ridge` must be >= 0"):
        linalg.root_of(jnp.eye(2), -1.0)
