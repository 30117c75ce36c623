"""Alternating least squares for convolutions: the objective by loops over raw patches, and what the bound costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.methods.base import Neurons
from tinyjax.methods.tiny_conv_als import (
    approximation,
    best_conv_gain,
    conv_bound,
    conv_gain,
    conv_gains,
    tiny_conv_als,
)
from tinyjax.patches import conv_problem, linear_move
from tinyjax.window import Window

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
POINT = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
gains_of = jax.jit(conv_gains, static_argnames=("num_neurons", "num_steps"))
als = jax.jit(tiny_conv_als, static_argnames=("num_neurons", "num_steps"))


def data(seed=0, n=30, size=5, channels=2, slots=2, outputs=3):
    """A goal that is the move of two channels that are missing, and noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size, size, channels))
    alpha, omega = rng.normal(size=(9 * channels + 1, 2)), rng.normal(size=(2, outputs * 9))
    x, h = jnp.asarray(x), jnp.tanh(jnp.asarray(rng.normal(size=(n, size, size, slots)))) + x[..., :slots]
    v = linear_move(x, jnp.asarray(alpha), jnp.asarray(omega), SAME, SAME, bias_prev=True)
    return x, h, v + jnp.asarray(rng.normal(size=v.shape)) * 3


@functools.cache
def problem(consumer=SAME):
    build = jax.jit(lambda x, h, v: conv_problem(x, h, v, SAME, consumer, bias_prev=True, bias=True))
    return build(*data())


@functools.cache
def residual():
    """V_goal less its best linear fit by the consumer's patches, by lstsq; (n, 5, 5, 3)."""
    x, h, v = (np.asarray(a) for a in data())
    padded = np.pad(h, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows = [padded[:, i : i + 5, j : j + 5].reshape(-1, 2) for i in range(3) for j in range(3)]
    rows = np.concatenate([*rows, np.ones((len(rows[0]), 1))], axis=1)
    goal = v.reshape(len(rows), -1)
    return (goal - rows @ np.linalg.lstsq(rows, goal, rcond=None)[0]).reshape(v.shape)


def true_gain(neurons):
    """psi before less psi after, from the moves themselves."""
    x, left = data()[0], residual()
    move = np.asarray(linear_move(x, neurons.alpha, neurons.omega, SAME, SAME, bias_prev=True))
    return (np.sum(left**2) - np.sum((left - move) ** 2)) / len(x)


def test_the_gain_is_that_of_the_moves_themselves():
    rng = np.random.default_rng(1)
    neurons = Neurons(jnp.asarray(rng.normal(size=(19, 2))), jnp.asarray(rng.normal(size=(2, 27))), jnp.ones(2))
    np.testing.assert_allclose(problem().energy, np.sum(residual() ** 2) / 30, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(conv_gain)(problem(), neurons), true_gain(neurons), rtol=1e-9)
    best = float(best_conv_gain(problem(), neurons))
    scaled = [
        float(conv_gain(problem(), neurons._replace(omega=g * neurons.omega))) for g in np.linspace(-0.1, 0.1, 41)
    ]
    assert 0 < max(scaled) <= best * (1 + 1e-12)


def test_als_gains_more_than_the_approximation_and_less_than_the_bound():
    """Here: sum of lambda^2 91, the approximation at its best amplitude 3755, ALS 5976, the bound 6542."""
    gains = gains_of(problem(), num_neurons=2)
    assert 0 < gains.predicted < gains.approximation < gains.als < gains.bound < problem().energy
    assert gains.als > 1.5 * gains.approximation
    np.testing.assert_allclose(gains.als, true_gain(als(problem(), num_neurons=2)), rtol=1e-8)


def test_the_approximation_gains_at_least_what_it_predicts():
    neurons = approximation(problem(), 2)
    assert true_gain(neurons) >= np.sum(neurons.singular_values**2) > 0  # eq. 71
    np.testing.assert_allclose(
        best_conv_gain(problem(), neurons._replace(omega=7 * neurons.omega)), best_conv_gain(problem(), neurons)
    )


def test_no_step_loses_and_the_end_is_stationary():
    found = [float(conv_gain(problem(), als(problem(), num_neurons=2, num_steps=steps))) for steps in (0, 1, 3, 200)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in zip(found, found[1:]))
    neurons = als(problem(), num_neurons=2, num_steps=200)
    slope = jax.grad(lambda alpha, omega: conv_gain(problem(), neurons._replace(alpha=alpha, omega=omega)), (0, 1))
    for direction, side in zip(slope(neurons.alpha, neurons.omega), (neurons.alpha, neurons.omega)):
        assert jnp.linalg.norm(direction) * jnp.linalg.norm(side) < 1e-3 * found[-1]


def test_neurons_are_balanced_and_ordered():
    neurons = als(problem(), num_neurons=3)
    gram = jnp.einsum("odoe->de", problem().gram)
    norms = jnp.diagonal(neurons.alpha.T @ gram @ neurons.alpha)
    np.testing.assert_allclose(norms, neurons.singular_values, rtol=1e-9)
    np.testing.assert_allclose(neurons.omega @ neurons.omega.T, jnp.diag(neurons.singular_values), atol=1e-9)
    assert jnp.all(jnp.diff(neurons.singular_values) <= 0)


def test_with_one_offset_als_changes_nothing():
    gains = gains_of(problem(POINT), num_neurons=2)
    np.testing.assert_allclose(gains.als, gains.predicted, rtol=1e-9)
    np.testing.assert_allclose(gains.approximation, gains.predicted, rtol=1e-9)
    full = gains_of(problem(POINT), num_neurons=3, num_steps=1)  # as many channels as outputs: nothing left to gain
    np.testing.assert_allclose(full.als, conv_bound(problem(POINT)), rtol=1e-9)


def test_channels_that_do_not_move_the_output_gain_nothing():
    neurons = Neurons(jnp.ones((19, 2)), jnp.zeros((2, 27)), jnp.zeros(2))
    assert best_conv_gain(problem(), neurons) == 0


@pytest.mark.parametrize("num_neurons", [0, 1.5])
def test_the_number_of_neurons_is_positive(num_neurons):
    with pytest.raises(ValueError, match="num_neurons"):
        tiny_conv_als(problem(), num_neurons=num_neurons)
