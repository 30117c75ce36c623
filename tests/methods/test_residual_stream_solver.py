"""The width of a residual stream as a problem of sums: the closed form against brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import tinyjax
from tinyjax import methods
from tinyjax.methods.solvers.gains import effect
from tinyjax.methods.solvers.residual_stream import alternate_readers
from tinyjax.statistics.record import Statistics

SAMPLES, WRITERS, READERS = 160, (3, 4), (2, 5, 3)
BEFORE = np.array([[1, 1, 1], [0, 1, 1]])  # the second writer comes after the first reader


def rows(seed=0, noise=0.3):
    """What writers write from, what every reader sees of it, and what readers are asked for."""
    rng = np.random.default_rng(seed)
    h = [rng.normal(size=(SAMPLES, d)) @ rng.normal(size=(d, d)) for d in WRITERS]
    sigma = [np.exp(0.5 * rng.normal(size=(SAMPLES, 1))) for _ in READERS]
    seen = [np.concatenate([h[i] * BEFORE[i, m] / sigma[m] for i in range(2)], axis=1) for m in range(3)]
    v = [s @ rng.normal(size=(7, n)) + noise * rng.normal(size=(SAMPLES, n)) for s, n in zip(seen, READERS)]
    return seen, v


def halves(x):
    return np.stack([x[::2], x[1::2]])


def record(seen, v, normed=False):
    """The sums, by NumPy."""
    grams = np.stack([np.einsum("hni,hnj->hij", halves(s), halves(s)) for s in seen], axis=1)
    cross = np.concatenate([np.einsum("hni,hnj->hij", halves(s), halves(x)) for s, x in zip(seen, v)], axis=-1)
    outputs = cross.shape[-1]
    reads = np.repeat(np.eye(len(v)), [x.shape[1] for x in v], axis=1)
    nothing = np.zeros
    return Statistics(
        count=jnp.full(2, SAMPLES / 2), gram_prev=jnp.asarray(grams.sum(1)), cross_prev=jnp.asarray(cross),
        gram=jnp.asarray(nothing((2, 1, 1))), cross=jnp.asarray(nothing((2, 1, outputs))),
        link=jnp.asarray(nothing((2, 1, grams.shape[-1], 1))),
        energy=jnp.asarray([sum((x[i::2] ** 2).sum() for x in v) for i in (0, 1)]),
        energy_matrix=None, weight_prev=jnp.zeros((grams.shape[-1], 1)), weight=jnp.zeros((1, outputs)),
        width=jnp.asarray(0), bias_prev=False, bias=False, grams=jnp.asarray(grams),
        reads=jnp.asarray(reads), normed=normed,
    )  # fmt: skip


def loss_left(seen, v, alpha, omega):
    """Mean |v - what the readers are given|^2 over samples, by loops."""
    total, first = 0.0, 0
    for s, x in zip(seen, v):
        mine = omega[:, first : first + x.shape[1]]
        for row, goal in zip(s, x):
            total += np.sum((goal - (row @ alpha) @ mine) ** 2)
        first += x.shape[1]
    return total / SAMPLES


def lbfgs(seen, v, starts=12):
    """The largest decrease that one coordinate can bring."""
    rng = np.random.default_rng(1)
    inputs, outputs = seen[0].shape[1], sum(x.shape[1] for x in v)
    grams = [s.T @ s / SAMPLES for s in seen]
    cross = np.concatenate([s.T @ x / SAMPLES for s, x in zip(seen, v)], axis=1)
    cuts = np.cumsum([0, *(x.shape[1] for x in v)])

    def minus_gain(z):
        a, o = z[:inputs], z[inputs:]
        value, da, do = 2 * a @ cross @ o, 2 * cross @ o, 2 * cross.T @ a
        for m, gram in enumerate(grams):
            w = o[cuts[m] : cuts[m + 1]]
            value -= w @ w * (a @ gram @ a)
            da = da - 2 * w @ w * gram @ a
            do[cuts[m] : cuts[m + 1]] -= 2 * w * (a @ gram @ a)
        return -value, -np.concatenate([da, do])

    found = [
        minimize(minus_gain, rng.normal(size=inputs + outputs), jac=True, method="L-BFGS-B") for _ in range(starts)
    ]
    return max(-one.fun for one in found)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_alternating_least_squares_finds_what_gradient_ascent_finds(seed):
    seen, v = rows(seed)
    neurons = jax.jit(partial(tinyjax.methods.tiny, num_neurons=1, ridge=0.0))(record(seen, v))
    gain = float(neurons.singular_values[0] ** 2)
    np.testing.assert_allclose(gain, lbfgs(seen, v), rtol=1e-6)


def test_what_the_coordinates_gain_is_what_the_bottleneck_loses():
    seen, v = rows()
    statistics = record(seen, v)
    neurons = jax.jit(partial(tinyjax.methods.tiny, num_neurons=3, ridge=0.0))(statistics)
    alpha, omega, values = (np.asarray(x) for x in neurons[:3])
    for k in (1, 2, 3):
        before, after = (loss_left(seen, v, alpha[:, :j], omega[:j]) for j in (0, k))
        np.testing.assert_allclose(before - after, np.sum(values[:k] ** 2), rtol=1e-9)
    np.testing.assert_allclose(np.sum(omega**2, 1), values, rtol=1e-9)
    np.testing.assert_allclose(
        tinyjax.methods.predicted_gain(tinyjax.statistics.moments(statistics), neurons), np.sum(values**2)
    )
    first = neurons._replace(alpha=neurons.alpha[:, :1], omega=neurons.omega[:1])
    np.testing.assert_allclose(effect(tinyjax.statistics.moments(statistics), first).best_amplitude, 1)


def test_a_single_reader_is_the_closed_form():
    seen, v = rows()
    one = record(seen[1:2], v[1:2])
    plain = Statistics(**{**vars(one), "grams": None, "reads": None})
    method = jax.jit(partial(tinyjax.methods.tiny, num_neurons=4, ridge=0.0))
    found, exact = method(one), method(plain)
    np.testing.assert_allclose(found.singular_values, exact.singular_values, rtol=1e-6)
    np.testing.assert_allclose(found.alpha @ found.omega, exact.alpha @ exact.omega, atol=1e-5)
    held_out = jax.jit(tinyjax.methods.held_out_ridge)
    np.testing.assert_allclose(held_out(one), held_out(plain))


def test_the_best_reader_alone_is_where_it_starts():
    """Nothing is lost against the best single reader, which an ordinary site would be."""
    seen, v = rows(3)
    gains = []
    for s, x in zip(seen, v):
        basis = np.linalg.qr(s[:, np.any(s, axis=0)])[0]
        gains.append(np.linalg.norm(basis.T @ x, 2) ** 2 / SAMPLES)
    value = jax.jit(partial(tinyjax.methods.tiny, num_neurons=1, ridge=0.0))(record(seen, v)).singular_values[0]
    assert max(gains) < value**2 < sum(gains)


def test_beyond_the_rank_there_is_nothing():
    seen, v = rows(noise=0.0)
    v = [np.zeros_like(v[0]), np.outer(seen[1][:, 0] - 2 * seen[1][:, 5], [1.0, 2, 0, 0, 1]), np.zeros_like(v[2])]
    neurons = jax.jit(partial(tinyjax.methods.tiny, num_neurons=3, ridge=0.0))(record(seen, v))
    assert neurons.singular_values[0] > 1 and not np.any(neurons.singular_values[1:])
    assert not np.any(neurons.alpha[:, 1:]) and not np.any(neurons.omega[1:])
    assert not np.any(neurons.omega[:, :2]) and not np.any(neurons.omega[:, 7:])


@pytest.mark.parametrize("method", [tinyjax.methods.tiny0, tinyjax.methods.random0, tinyjax.methods.gradmax])
def test_under_a_norm_a_birth_that_keeps_the_function_has_no_fan_in(method):
    neurons = jax.jit(partial(method, num_neurons=2))(record(*rows(), normed=True), key=jax.random.key(0))
    assert not np.any(neurons.alpha)
    assert np.all(np.linalg.norm(neurons.omega, axis=1) > 0)
    if method is not tinyjax.methods.gradmax:
        np.testing.assert_allclose(np.linalg.norm(neurons.omega, axis=1), 2**0.5)


def test_fan_ins_are_refitted_for_the_readers():
    """A birth without a fan-in is worth what its best fan-in brings."""
    statistics = record(*rows())
    mean = tinyjax.statistics.moments(statistics)
    full = jax.jit(partial(tinyjax.methods.tiny, num_neurons=2, ridge=0.0))(statistics)
    refit = jax.jit(partial(methods.refit_fan_in, ridge=0.0))
    again = refit(statistics, full._replace(alpha=jnp.zeros_like(full.alpha)))
    np.testing.assert_allclose(again.alpha, full.alpha, rtol=1e-3, atol=1e-3)
    out = jax.jit(methods.refit)(statistics, full._replace(omega=jnp.zeros_like(full.omega)))
    assert tinyjax.methods.predicted_gain(mean, out) >= 0.999 * tinyjax.methods.predicted_gain(mean, full)


def test_in_float32_the_gain_is_the_same():
    seen, v = rows()
    arrays = (jnp.asarray(np.stack([s.T @ s for s in seen]) / SAMPLES),)
    exact = record(seen, v)
    single = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, exact)
    method = jax.jit(partial(tinyjax.methods.tiny, num_neurons=2, ridge=0.0))
    np.testing.assert_allclose(method(single).singular_values, method(exact).singular_values, rtol=1e-3)
    assert alternate_readers(arrays[0], exact.reads, exact.cross_prev[0], num_neurons=1).alpha.shape == (7, 1)
