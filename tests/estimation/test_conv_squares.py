"""The predicted gain in front of a convolution: that of the best amplitude, from moves of the model itself.

The activation is linear here, so a neuron written at amplitude gamma moves the output by gamma V(theta) exactly.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tinyjax
from tests.support.zoo.layers import draw
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.conv_squares import bounded_squares
from tinyjax.growth.batch_split import split_batch
from tinyjax.methods import Effect, predicted_gain
from tinyjax.statistics.averages import moments
from tinyjax.statistics.slices import keep_half

N, K = 32, 2
NUMBERS = ("NHWC", "HWIO", "NHWC")
METHOD = partial(tinyjax.methods.tiny, ridge=1e-2)
UPDATE = partial(tinyjax.methods.best_update, ridge=1e-2)
neurons_of = jax.jit(partial(METHOD, num_neurons=K, update_ridge=1e-2))
update_of = jax.jit(UPDATE)


def conv(x, kernel, strides=(1, 1), padding: Any = "SAME"):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NUMBERS)


def strided(p, x):
    return conv(conv(x, p["k"], (2, 1)) + p["b"], p["u"], padding=((1, 0), (2, 1)))


def flattened(p, x):
    h = conv(x, p["k"]) + p["b"]
    return h.reshape(len(h), -1) @ p["u"]


def pooled(p, x):
    """The plain mean over all pixels: one offset, S is exact."""
    return (conv(x, p["k"]) + p["b"]).mean((1, 2)) @ p["u"]


CASES = {
    "strided": (strided, dict(k=(3, 3, 2, 6), b=(6,), u=(2, 3, 6, 2))),
    "flattened": (flattened, dict(k=(2, 2, 2, 6), b=(6,), u=(120, 2))),
    "pooled": (pooled, dict(k=(3, 3, 2, 6), b=(6,), u=(6, 2))),
}


def loss_of(apply):
    return lambda p, batch: jnp.sum((apply(p, batch["x"]) - batch["t"]) ** 2) / len(batch["x"])


def case(name):
    apply, shapes = CASES[name]
    apply = jax.jit(apply)
    params = draw(3, **shapes)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, 5, 4, 2)))
    t = apply(draw(4, **shapes), x) + 0.3 * rng.normal(size=apply(params, x).shape)  # something that can be learnt
    sites = tinyjax.find_sites(loss_of(apply), params, {"x": x, "t": t})
    return apply, tinyjax.thin(params, sites["k"], 3), {"x": x, "t": t}, sites["k"]


def moves(apply, params, batch, site, statistics):
    """Residual and V(theta), both (n, everything), by writing the update and the neurons into the model."""
    neurons, delta = neurons_of(statistics), update_of(statistics)
    z = apply(params, batch["x"])
    updated = tinyjax.surgery.add_update(params, site, delta, amplitude=1.0)
    left = 2 * (batch["t"] - z) - (apply(updated, batch["x"]) - z)
    grown, _ = tinyjax.surgery.write(params, site, neurons, amplitude=1.0)
    return (np.asarray(a).reshape(len(z), -1) for a in (left, apply(grown, batch["x"]) - z))


@pytest.mark.parametrize("name", CASES)
def test_gains_are_those_of_the_moves_at_their_best_amplitude(name):
    apply, params, batch, site = case(name)
    loss_fn = loss_of(apply)
    method = partial(METHOD, update_ridge=1e-2)
    method = tinyjax.methods.traits(function_preserving=False, stochastic=False)(method)
    step = tinyjax.make_grow_step(loss_fn, site, num_neurons=K, method=method, update=UPDATE, fill=None)
    _, info = jax.jit(step)(params, batch)
    part, _ = split_batch(batch)
    statistics = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site))(params, part)

    def psi_falls(left, move, gamma):
        return np.mean(np.sum(left**2, 1) - np.sum((left - gamma * move) ** 2, 1))

    def best(left, move):
        return np.sum(left * move) / np.sum(move**2) if name != "pooled" else 1.0

    left, move = moves(apply, params, part, site, statistics)
    gain = psi_falls(left, move, best(left, move))
    np.testing.assert_allclose(info.gain_predicted["k"], gain, rtol=1e-9)
    np.testing.assert_allclose(info.psi_after["k"], np.mean(np.sum(left**2, 1)) - gain, rtol=1e-9)
    held_out = []
    for fitted in (0, 1):
        left, move = moves(apply, params, part, site, keep_half(statistics, fitted))
        gamma = best(left[fitted::2], move[fitted::2])
        held_out.append(psi_falls(left[1 - fitted :: 2], move[1 - fitted :: 2], gamma))
    np.testing.assert_allclose(info.gain_held_out["k"], np.mean(held_out), rtol=1e-9)

    bound = jax.jit(predicted_gain)(moments(statistics), neurons_of(statistics), update_of(statistics))
    assert gain > (3 if name == "strided" else 1) * bound or name == "pooled"


def test_squares_are_of_the_samples_they_name():
    apply, params, batch, site = case("strided")
    squares = bounded_squares(TracedLoss(loss_of(apply)), params, batch, tinyjax.Sites([site]))["k"]
    statistics = jax.jit(lambda p, b: tinyjax.estimate(loss_of(apply), p, b, site))(params, batch)
    neurons = neurons_of(statistics)
    twice = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), neurons._replace(singular_values=None))
    _, move = moves(apply, params, batch, site, statistics)
    square = np.sum(move**2, axis=1)
    expected = np.array([square.mean(), square[::2].mean(), square[1::2].mean()])
    np.testing.assert_allclose(jax.jit(squares)(twice), [expected, 81 * expected], rtol=1e-9)


def test_only_sites_with_several_offsets_need_them():
    apply, params, batch, site = case("pooled")
    assert bounded_squares(TracedLoss(loss_of(apply)), params, batch, tinyjax.Sites([site])) == {}


def test_diagnosis_scores_convolutions_at_their_best_amplitude():
    apply, params, batch, site = case("strided")
    (finding,) = tinyjax.diagnose(loss_of(apply), params, batch, num_neurons=K).findings.values()
    statistics = jax.jit(lambda p, b: tinyjax.estimate(loss_of(apply), p, b, site))(params, batch)
    ridge, update_ridge = (
        2 * tinyjax.methods.held_out_ridge(statistics),
        2 * tinyjax.methods.held_out_update(statistics),
    )

    def fit(half):
        return (
            tinyjax.methods.tiny(half, num_neurons=K, ridge=ridge, update_ridge=update_ridge),
            tinyjax.methods.best_update(half, ridge=update_ridge),
        )

    at_one = float(tinyjax.methods.held_out_gain(statistics, fit)) / finding.asked
    assert 1.5 * at_one < finding.gain < finding.share


def test_the_best_amplitude_never_turns_neurons_round():
    for slope, square, amplitude in ((2.0, 4.0, 0.5), (-2.0, 4.0, 0.0), (1.0, 0.0, 0.0)):
        effect = Effect(jnp.asarray(slope), jnp.asarray(square))
        assert effect.best_amplitude == amplitude
        assert effect.gain(effect.best_amplitude) == max(0.0, 2 * amplitude * slope - amplitude**2 * square)
