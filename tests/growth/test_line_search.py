"""Norms and line searches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.oracles import make_samples, record
from tinyjax.growth.line_searches import fixed, line_search, searches, trusted_search, twin_search
from tinyjax.growth.neuron_norms import normalize, normalized
from tinyjax.methods import is_function_preserving, is_stochastic, random0, tiny

double = functools.partial(line_search, dtype=jnp.float64)


@pytest.mark.parametrize("target", [3e-8, 2e-5, 1e-3, 0.04, 1.0, 9.99, 700.0, 3e6])
def test_search_finds_a_minimum_inside_and_outside_its_bracket(target):
    result = jax.jit(lambda t: double(lambda g: (g / t - 1) ** 2))(target)
    np.testing.assert_allclose(result.amplitude, target, rtol=0.1)
    np.testing.assert_allclose(result.loss, (result.amplitude / target - 1) ** 2, atol=1e-12)
    assert result.loss_at_zero == 1


@pytest.mark.parametrize(
    "loss", [lambda g: g, lambda g: 0.0 * g + 3, lambda g: jnp.where(g > 0, jnp.nan, 1.0), lambda g: g * jnp.nan]
)
def test_nothing_is_added_when_nothing_helps(loss):
    result = jax.jit(lambda: double(loss))()
    assert result.amplitude == 0
    np.testing.assert_array_equal(result.loss, loss(jnp.zeros(())))
    np.testing.assert_array_equal(result.loss_at_zero, loss(jnp.zeros(())))


def test_losses_that_are_not_finite_are_avoided():
    result = double(lambda g: jnp.where(g > 0.5, jnp.inf, -g))
    assert 0.3 < result.amplitude <= 0.5
    assert double(lambda g: jnp.where(g > 1e-5, jnp.nan, -g)).amplitude > 1e-6


def count_rounds(function):
    rounds = []
    jax.block_until_ready(function(lambda losses: rounds.append(losses)))
    jax.effects_barrier()
    return rounds


def test_cost_is_two_rounds_of_one_compiled_loss():
    traces = []

    def loss(target, log, g):
        traces.append(1)
        jax.debug.callback(log, g)
        return (g - target) ** 2

    # eval_shape and the loop each trace the loss once
    calls = count_rounds(lambda log: double(functools.partial(loss, 0.3, log)))
    assert len(calls) == 24 and len(traces) <= 3
    assert len(count_rounds(lambda log: double(functools.partial(loss, 1e-30, log)))) <= 6 * 12


def test_search_in_float32_of_a_float64_loss():
    result = line_search(lambda g: (g.astype(jnp.float64) - 2) ** 2, dtype=jnp.float32)
    assert result.amplitude.dtype == jnp.float32 and result.loss.dtype == jnp.float64


def test_search_under_vmap():
    targets = jnp.asarray([1e-5, 0.2, 50.0])
    got = jax.vmap(lambda t: double(lambda g: (g / t - 1) ** 2))(targets).amplitude
    np.testing.assert_allclose(got, targets, rtol=0.1)


@pytest.mark.parametrize("target", [0.3, -0.3, -400.0])
def test_twin_search_finds_either_sign(target):
    result = twin_search(lambda g: (g / target - 1) ** 2, dtype=jnp.float64)
    np.testing.assert_allclose(result.amplitude, target, rtol=0.1)
    assert twin_search(lambda g: jnp.abs(g), dtype=jnp.float64).amplitude == 0


def test_fixed_evaluates_nothing():
    def fail(gamma):
        raise AssertionError

    result = fixed(0.5)(fail, dtype=jnp.float32)
    assert result.amplitude == 0.5 and np.isnan(result.loss) and np.isnan(result.loss_at_zero)
    assert result.amplitude.dtype == jnp.float32


def test_rules_say_whether_they_search():
    assert searches(line_search) and searches(twin_search) and searches(functools.partial(line_search, points=8))
    assert not searches(fixed(1.0))
    assert searches(lambda loss_at, *, dtype: None)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="`gamma` must be >= 0"):
        fixed(-1.0)
    with pytest.raises(ValueError, match="`bracket` must satisfy"):
        double(lambda g: g, bracket=(0.0, 1.0))
    with pytest.raises(ValueError, match="`points` must be at least 4"):
        double(lambda g: g, points=3)
    with pytest.raises(ValueError, match="`loss_at` must return a scalar"):
        double(lambda g: jnp.stack([g, g]))


def test_normalize_sets_the_root_mean_square_norm_of_neurons_that_are_not_empty():
    neurons = tiny(record(make_samples(outputs=3)), num_neurons=5, ridge=0.0)  # two are beyond the rank
    got = normalize(neurons, alpha=2.0, omega=0.5)
    np.testing.assert_allclose(np.sum(np.linalg.norm(got.alpha, axis=0) ** 2) / 3, 4.0, rtol=1e-12)
    np.testing.assert_allclose(np.sum(np.linalg.norm(got.omega, axis=1) ** 2) / 3, 0.25, rtol=1e-12)
    ratio = got.alpha[:, :3] / neurons.alpha[:, :3]
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-10)
    np.testing.assert_array_equal(normalize(neurons, alpha=1.0).omega, neurons.omega)
    np.testing.assert_array_equal(normalize(neurons._replace(omega=0 * neurons.omega), omega=1.0).omega, 0)


def test_normalized_is_a_method_with_the_traits_of_the_method():
    method = normalized(functools.partial(random0, key=jax.random.key(0)), alpha=1.0)
    assert is_function_preserving(method) and is_stochastic(method)
    assert not is_function_preserving(normalized(tiny, alpha=1.0))
    neurons = method(record(make_samples()), num_neurons=4)
    np.testing.assert_allclose(np.mean(np.linalg.norm(neurons.alpha, axis=0) ** 2), 1, rtol=1e-12)


def test_no_amplitude_beyond_the_maximum():
    found = jax.jit(lambda: line_search(lambda g: -g, dtype=jnp.float64, bracket=(1e-3, 1.0), maximum=1.0))()
    assert found.amplitude == 1.0
    assert abs(trusted_search(lambda g: (g - 0.01) ** 2, dtype=jnp.float64).amplitude - 0.01) < 1e-3
    assert trusted_search(lambda g: (g - 300.0) ** 2, dtype=jnp.float64, unit=100.0).amplitude == pytest.approx(3.0)
