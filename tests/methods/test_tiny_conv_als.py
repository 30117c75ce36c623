"""Alternating least squares for convolutions: the objective by loops over raw patches, and what the bound costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.compiled import compiled
from tinyjax.core.linalg import solve
from tinyjax.core.neurons import Neurons
from tinyjax.core.windows import Window
from tinyjax.methods.tiny_conv_als import (
    alternate_kernels,
    approximation,
    best_conv_gain,
    conv_bound,
    conv_gain,
    conv_problem,
    gains_of,
)
from tinyjax.statistics.averages import Moments
from tinyjax.statistics.convolution.image_sums import conv_sums
from tinyjax.statistics.convolution.linear_map import linear_move
from tinyjax.statistics.sums import Extras, second_moments

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
POINT = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
gains_of = jax.jit(gains_of, static_argnames=("num_neurons", "num_steps"))
als = jax.jit(alternate_kernels, static_argnames=("num_neurons", "num_steps"))
move_of = jax.jit(functools.partial(linear_move, producer=SAME, consumer=SAME, bias_prev=True))
conv_gain, best_conv_gain = jax.jit(conv_gain), jax.jit(best_conv_gain)


def data(seed=0, n=30, size=5, channels=2, slots=2, outputs=3):
    """A goal that is the move of two channels that are missing, and noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size, size, channels))
    alpha, omega = rng.normal(size=(9 * channels + 1, 2)), rng.normal(size=(2, outputs * 9))
    x, h = jnp.asarray(x), jnp.tanh(jnp.asarray(rng.normal(size=(n, size, size, slots)))) + x[..., :slots]
    v = move_of(x, jnp.asarray(alpha), jnp.asarray(omega))
    return x, h, v + jnp.asarray(rng.normal(size=v.shape)) * 3


@functools.cache
def problem(consumer=SAME):
    @jax.jit
    def build(x, h, v):
        sums = conv_sums(x, h, v, SAME, consumer, bias_prev=True, bias=True, extras=Extras(offset_gram=True), chunk=4)
        mean = Moments(**jax.tree.map(lambda s: s.sum(0) / len(x), second_moments(sums)))
        return conv_problem(mean, solve(mean.gram, mean.cross))

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
    move = np.asarray(move_of(x, neurons.alpha, neurons.omega))
    return (np.sum(left**2) - np.sum((left - move) ** 2)) / len(x)


def test_the_gain_is_that_of_the_moves_themselves():
    rng = np.random.default_rng(1)
    neurons = Neurons(jnp.asarray(rng.normal(size=(19, 2))), jnp.asarray(rng.normal(size=(2, 27))), jnp.ones(2))
    np.testing.assert_allclose(problem().energy, np.sum(residual() ** 2) / 30, rtol=1e-9)
    np.testing.assert_allclose(conv_gain(problem(), neurons), true_gain(neurons), rtol=1e-9)
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
    neurons = jax.jit(approximation, static_argnums=1)(problem(), 2)
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
        alternate_kernels(problem(), num_neurons=num_neurons)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss_fn(p, batch):
    """A linear activation, so that neurons move the output as the linear model says."""
    z = conv(conv(batch["x"], p["k"]) + p["b"], p["u"])
    return jnp.sum((z - batch["t"]) ** 2) / len(z)


@functools.cache
def model():
    rng = np.random.default_rng(5)
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in dict(k=(3, 3, 2, 6), b=(6,), u=(3, 3, 6, 2)).items()}
    x = jnp.asarray(rng.normal(size=(48, 5, 5, 2)))
    t = conv(conv(x, params["k"][::-1]), params["u"][:, ::-1])
    batch = {"x": x, "t": t + 3 * rng.normal(size=t.shape)}
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    return tinyjax.thin(params, site, 2), batch, site


def test_as_a_method_from_a_model_to_its_gain():
    """Growing with it takes away from psi what it says, measured on the outputs of the model itself."""
    params, batch, site = model()
    statistics = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, offset_gram=True))(params, batch)
    found = jax.jit(functools.partial(tinyjax.methods.conv_gains, num_neurons=2))(statistics)
    assert (
        0
        < found.predicted
        < found.approximation
        < found.als
        < found.bound
        < compiled(tinyjax.methods.bottleneck)(statistics).after
    )
    neurons = compiled(tinyjax.methods.tiny_conv_als, num_neurons=2)(statistics)
    output = lambda p: np.asarray(conv(conv(batch["x"], p["k"]) + p["b"], p["u"]))  # noqa: E731
    start = output(params)
    update = (
        output(
            tinyjax.surgery.add_update(params, site, compiled(tinyjax.methods.best_update)(statistics), amplitude=1.0)
        )
        - start
    )
    move = output(tinyjax.surgery.write(params, site, neurons, amplitude=1.0)[0]) - start
    left = 2 * (np.asarray(batch["t"]) - start) - update
    np.testing.assert_allclose((np.sum(left**2) - np.sum((left - move) ** 2)) / 48, found.als, rtol=1e-8)


def test_growing_with_it():
    params, batch, site = model()
    step = tinyjax.make_grow_step(loss_fn, site, num_neurons=2, method=tinyjax.methods.tiny_conv_als)
    new, info = step(params, batch)
    assert info.loss_after[site.name] < info.loss_before[site.name] and int(info.written[site.name]) == 2
    assert info.gain_predicted[site.name] > 0 and int(tinyjax.width(new, site)) == 4


def test_without_the_sums_it_says_what_to_pass():
    params, batch, site = model()
    with pytest.raises(ValueError, match="pass `offset_gram=True` to `estimate`"):
        jax.eval_shape(
            lambda p: tinyjax.methods.tiny_conv_als(tinyjax.estimate(loss_fn, p, batch, site), num_neurons=2), params
        )


def test_a_site_too_wide_for_the_sums_says_so():
    x, h, v = (jnp.zeros((1, 3, 3, c)) for c in (300, 1, 1))
    sums = functools.partial(
        conv_sums, producer=SAME, consumer=SAME, bias_prev=False, bias=False, extras=Extras(offset_gram=True)
    )
    with pytest.raises(ValueError, match="too wide for `offset_gram`: 24300 x 24300"):
        jax.eval_shape(sums, x, h, v)


def test_a_dense_layer_has_one_offset():
    """There `tiny_conv_als` is `tiny`."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "u": jnp.asarray(rng.normal(size=(4, 2)))}
    batch = {"x": jnp.asarray(rng.normal(size=(40, 3))), "t": jnp.asarray(rng.normal(size=(40, 2)))}

    def dense_loss(p, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ p["w"]) @ p["u"] - batch["t"]) ** 2)

    (site,) = tinyjax.find_sites(dense_loss, params, batch)
    params = tinyjax.thin(params, site, 1)
    statistics = jax.jit(lambda p, b: tinyjax.estimate(dense_loss, p, b, site, offset_gram=True))(params, batch)
    products = [
        neurons.alpha @ neurons.omega
        for neurons in (
            compiled(tinyjax.methods.tiny_conv_als, num_neurons=1)(statistics),
            compiled(tinyjax.methods.tiny, num_neurons=1, ridge=0.0)(statistics),
        )
    ]
    np.testing.assert_allclose(*products, rtol=1e-6, atol=1e-9)
