"""Ridges, tiny and its births: what the propositions do not say (see test_paper.py for what they do)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import oracles
from tests.support.oracles import make_samples, record
from tinyjax.methods import (
    best_update,
    bottleneck,
    held_out_gain,
    held_out_ridge,
    held_out_update,
    predicted_gain,
    random0,
    tiny,
    tiny0,
)
from tinyjax.methods.solvers.ridge import Fold
from tinyjax.statistics.averages import half, moments
from tinyjax.statistics.slices import keep_half

noisy = make_samples(0, n=40, inputs=8, slots=6, live=6, signal=2.0)
EXPONENTS = np.arange(-8, 2.1, 0.5)
fast_tiny = jax.jit(tiny, static_argnames=("num_neurons", "ridge", "update_ridge"))
fast_update = jax.jit(best_update, static_argnames="ridge")


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
def test_best_update_with_a_ridge(ridge):
    want = oracles.ridge_solution(noisy.b, noisy.v, ridge)
    np.testing.assert_allclose(best_update(record(noisy), ridge=ridge), want, atol=1e-10)
    traced = jax.jit(lambda s, r: best_update(s, ridge=r))(record(noisy), ridge)
    np.testing.assert_allclose(traced, want, atol=1e-10)


def test_held_out_score_of_every_ridge():
    ridges = np.logspace(-4, 2, 7)
    b, b_test, v, v_test = noisy.b[::2], noisy.b[1::2], noisy.v[::2], noisy.v[1::2]
    a, t = half(record(noisy), 0), half(record(noisy), 1)
    fold = Fold(a.gram, a.cross, jnp.diagonal(a.gram), t.gram, t.cross)
    got = [jax.jit(Fold.score)(fold, jnp.asarray(ridge)) for ridge in ridges]
    want = [oracles.held_out_score(b, v, b_test, v_test, ridge) for ridge in ridges]
    np.testing.assert_allclose(got, want, atol=1e-9)


def best_on_grid(scores):
    """Half of what is best for half of the samples."""
    return 10 ** max(EXPONENTS, key=lambda e: scores(10**e)) / 2


def test_held_out_update_is_the_best_of_the_grid():
    b, v = noisy.b, noisy.v
    rows = slice(0, None, 2), slice(1, None, 2)

    def scores(ridge):
        return sum(oracles.held_out_score(b[i], v[i], b[j], v[j], ridge) for i, j in (rows, rows[::-1]))

    np.testing.assert_allclose(jax.jit(held_out_update)(record(noisy)), best_on_grid(scores), rtol=1e-12)


def test_held_out_is_the_best_of_the_grid():
    update_ridge = float(held_out_update(record(noisy)))
    rows = slice(0, None, 2), slice(1, None, 2)

    def scores(ridge):
        total = 0
        for i, j in (rows, rows[::-1]):
            delta = oracles.ridge_solution(noisy.b[i], noisy.v[i], update_ridge)
            left = noisy.v - noisy.b @ delta
            total += oracles.held_out_score(noisy.b_prev[i], left[i], noisy.b_prev[j], left[j], ridge)
        return total

    np.testing.assert_allclose(jax.jit(held_out_ridge)(record(noisy)), best_on_grid(scores), rtol=1e-12)


def test_the_grid_is_extended_both_ways():
    pure = noisy._replace(v=noisy.b @ np.random.default_rng(0).normal(size=(noisy.b.shape[1], 4)))
    assert held_out_update(record(pure)) < 1e-4  # no noise at all: the smaller the better
    rng = np.random.default_rng(0)
    opposite = noisy._replace(v=noisy.b @ rng.normal(size=(noisy.b.shape[1], 4)))
    opposite.v[1::2] *= -1  # what one half learns is wrong on the other: the larger the better
    assert held_out_update(record(opposite)) == 5e3


def test_an_empty_half_decides_nothing():
    assert held_out_update(keep_half(record(noisy), 0)) == 1
    assert held_out_ridge(keep_half(record(noisy), 1)) == 1


def test_the_held_out_ridge_generalises():
    """Exact neurons of a noisy problem are worse than nothing on new samples; held-out ones are not."""
    fresh = make_samples(0, n=2000, inputs=25, slots=20, live=20, outputs=12, signal=2.0)
    few = fresh._replace(b_prev=fresh.b_prev[:40], b=fresh.b[:40], v=fresh.v[:40])
    new = moments(record(fresh._replace(b_prev=fresh.b_prev[40:], b=fresh.b[40:], v=fresh.v[40:])))
    exact, shrunk = best_update(record(few)), best_update(record(few), ridge=held_out_update)

    def gain(delta):
        return 2 * np.sum(new.cross * delta) - np.sum(delta * (new.gram @ delta))

    assert gain(shrunk) > gain(exact)
    gains = [
        predicted_gain(new, tiny(record(few), num_neurons=4, ridge=r, update_ridge=held_out_update), shrunk)
        for r in (0.0, held_out_ridge)
    ]
    assert gains[1] > max(gains[0], 0)


def test_held_out_gain_scores_each_half_on_the_other():
    statistics = record(noisy)

    def fit(statistics):
        return tiny(statistics, num_neurons=2, ridge=0.5), best_update(statistics, ridge=0.5)

    want = 0
    for i, j in [(0, 1), (1, 0)]:
        neurons, delta = fit(keep_half(statistics, i))
        rows = slice(j, None, 2)
        left = noisy.v[rows] - noisy.b[rows] @ delta
        move = noisy.b_prev[rows] @ neurons.alpha @ neurons.omega
        want += (oracles.psi(left) - oracles.psi(left, move)) / 2
    np.testing.assert_allclose(jax.jit(lambda s: held_out_gain(s, fit))(statistics), want, atol=1e-10)


def test_a_number_is_the_ridge_of_both_problems():
    statistics = record(noisy)
    one, two = (fast_tiny(statistics, num_neurons=2, ridge=0.3, update_ridge=u) for u in (None, 0.3))
    np.testing.assert_array_equal(one.alpha, two.alpha)
    chosen = fast_tiny(statistics, num_neurons=2)
    ridges = {"ridge": held_out_ridge(statistics), "update_ridge": held_out_update(statistics)}
    numbers = tiny(statistics, num_neurons=2, **ridges)
    np.testing.assert_allclose(chosen.alpha, numbers.alpha, atol=1e-12)


def test_loss_scale_changes_no_choice():
    statistics = [record(noisy._replace(v=noisy.v * c), jnp.float32) for c in (1e-3, 1.0, 1e3)]
    assert len({float(held_out_ridge(s)) for s in statistics}) == 1
    assert len({float(held_out_update(s)) for s in statistics}) == 1
    neurons = [fast_tiny(s, num_neurons=6) for s in statistics]
    assert len({int(np.sum(x.singular_values > 0)) for x in neurons}) == 1


def test_neurons_beyond_the_rank_are_zero():
    samples = make_samples(outputs=3)
    neurons = fast_tiny(record(samples), num_neurons=6, ridge=0.0)
    assert np.all(neurons.singular_values[:3] > 0) and np.all(neurons.singular_values[3:] == 0)
    assert np.all(neurons.alpha[:, 3:] == 0) and np.all(neurons.omega[3:] == 0)
    birth = tiny0(record(samples), num_neurons=6, ridge=0.0)
    assert np.all(birth.alpha[:, 3:] == 0)


def test_nothing_to_gain_gives_no_neurons():
    """The old neurons can do all that is asked for: the residual is rounding error, and stays without neurons."""
    samples = make_samples()
    done = samples._replace(v=samples.b @ np.random.default_rng(0).normal(size=(samples.b.shape[1], 4)))
    assert np.all(fast_tiny(record(done), num_neurons=3, ridge=0.0).singular_values == 0)
    assert np.all(bottleneck(record(done)).gains < 1e-20)


def with_dead_lines(samples, width):
    """Free slots in front of the producer (at its inputs), and in the next layer (at the consumer's outputs)."""
    b_prev = np.insert(samples.b_prev, 2, np.zeros((width, 1)), axis=1)
    return samples._replace(
        b_prev=b_prev,
        weight_prev=np.insert(samples.weight_prev, 2, np.zeros((width, 1)), axis=0),
        v=np.insert(samples.v, 1, np.zeros((width, 1)), axis=1),
        weight=np.insert(samples.weight, 1, np.zeros((width, 1)), axis=1),
    )


@pytest.mark.parametrize("ridge", [0.0, 0.1, held_out_ridge])
def test_free_slots_change_nothing_and_get_exact_zeros(ridge):
    samples = make_samples(n=60)
    padded = with_dead_lines(samples, 3)
    got, want = (fast_tiny(record(s), num_neurons=3, ridge=ridge) for s in (padded, samples))
    assert np.all(got.alpha[2:5] == 0) and np.all(got.omega[:, 1:4] == 0)
    np.testing.assert_allclose(np.delete(got.alpha, [2, 3, 4], axis=0), want.alpha, atol=1e-10)
    np.testing.assert_allclose(np.delete(got.omega, [1, 2, 3], axis=1), want.omega, atol=1e-10)


def test_tiny0_keeps_the_function_and_the_directions():
    statistics = record(noisy)
    birth, neurons = tiny0(statistics, num_neurons=3), fast_tiny(statistics, num_neurons=3)
    assert np.all(birth.omega == 0)
    np.testing.assert_allclose(np.linalg.norm(birth.alpha, axis=0), np.full(3, np.sqrt(2)), rtol=1e-12)
    cosines = np.sum(birth.alpha * neurons.alpha, axis=0) / np.sqrt(2) / np.linalg.norm(neurons.alpha, axis=0)
    np.testing.assert_allclose(cosines, np.ones(3), rtol=1e-12)
    np.testing.assert_allclose(birth.singular_values, neurons.singular_values, rtol=1e-12)


def test_random0_has_the_variance_of_he():
    statistics = record(with_dead_lines(make_samples(inputs=20), 4))
    neurons = random0(statistics, num_neurons=4000, key=jax.random.key(0))
    alpha = np.asarray(neurons.alpha)
    live = np.delete(alpha, [2, 3, 4, 5, -1], axis=0)
    assert np.all(alpha[[2, 3, 4, 5, -1]] == 0) and np.all(neurons.omega == 0)
    np.testing.assert_allclose(np.var(live), 2 / 20, rtol=0.02)
    np.testing.assert_allclose(np.mean(live), 0, atol=0.005)


def test_inputs_appended_change_no_earlier_draw():
    draws = [random0(record(make_samples(inputs=d)), num_neurons=5, key=jax.random.key(3)).alpha for d in (6, 9)]
    np.testing.assert_allclose(draws[0][:6] * np.sqrt(6 / 9), draws[1][:6], rtol=1e-12)


def test_wide_sites_come_projected():
    """Without `link`, `cross_prev` is N itself."""
    samples = make_samples()
    narrow = fast_tiny(record(samples), num_neurons=2, ridge=0.0)
    wide = fast_tiny(record(samples._replace(v=oracles.residual(samples)), link=False), num_neurons=2, ridge=0.0)
    np.testing.assert_allclose(narrow.alpha, wide.alpha, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_float32_survives_extreme_units(scale):
    unit = np.append(np.full(noisy.b_prev.shape[1] - 1, scale), 1.0)
    extreme = record(noisy._replace(b_prev=noisy.b_prev * unit), jnp.float32)
    usual = record(noisy, jnp.float32)
    for method in (tiny, tiny0):
        got = jax.jit(functools.partial(method, num_neurons=3))(extreme)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
    got, want = (fast_tiny(s, num_neurons=3) for s in (extreme, usual))
    np.testing.assert_allclose(unit[:, None] * got.alpha, want.alpha, atol=1e-3 * np.abs(want.alpha).max())


def test_near_duplicate_inputs_in_float32():
    rng = np.random.default_rng(0)
    samples = make_samples(n=200)
    twin = samples.b_prev[:, :1] + 1e-5 * rng.normal(size=(200, 1))
    doubled = samples._replace(
        b_prev=np.concatenate([twin, samples.b_prev], axis=1),
        weight_prev=np.concatenate([0 * samples.weight_prev[:1], samples.weight_prev]),
    )
    got, want = (
        {r: fast_tiny(record(s, dtype), num_neurons=3, ridge=r) for r in (0.0, 0.01, held_out_ridge)}
        for s, dtype in ((doubled, jnp.float32), (samples, jnp.float64))
    )
    np.testing.assert_allclose(got[0.0].singular_values, want[0.0].singular_values, rtol=1e-3)
    for ridge in got:  # a ridge shrinks the two copies of an input less than the one, so only sizes compare
        assert np.abs(got[ridge].alpha).max() < 1.1 * np.abs(want[ridge].alpha).max()


def test_nan_gives_nan():
    for field in ("gram_prev", "cross_prev", "gram", "cross"):
        statistics = record(noisy)
        bad = getattr(statistics, field).at[0, 1, 1].set(jnp.nan)
        bad = dataclasses.replace(statistics, **{field: bad})
        for ridge in (0.0, 0.1, held_out_ridge):
            assert np.isnan(fast_tiny(bad, num_neurons=2, ridge=ridge).alpha).any(), field


def test_misuse_is_named():
    statistics = record(noisy)
    with pytest.raises(ValueError, match="`random0` draws random numbers: pass `key=`"):
        random0(statistics, num_neurons=2)
    for method in (tiny, tiny0, functools.partial(random0, key=jax.random.key(0))):
        with pytest.raises(ValueError, match="`num_neurons` must be an int >= 1"):
            method(statistics, num_neurons=0)
    with pytest.raises(ValueError, match="`ridge` must be >= 0"):
        tiny(statistics, num_neurons=1, ridge=-1.0)
