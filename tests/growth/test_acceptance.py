"""What a growth accepts and what it reports of unseen samples, each against NumPy and nothing of the product."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import tinyjax
from tests.support.zoo.layers import draw
from tinyjax import methods

X = draw(0, x=(40, 4))["x"]
BATCH = {"x": X, "t": jnp.sin(2 * X @ draw(1, w=(4, 2))["w"])}
PARAMS = draw(2, w=(4, 5), u=(5, 2))


def loss_fn(p, b):
    return jnp.mean(jnp.sum((jnp.tanh(b["x"] @ p["w"]) @ p["u"] - b["t"]) ** 2, axis=-1))


def thinned():
    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    return site, tinyjax.thin(PARAMS, site, 3)


def test_a_best_update_that_would_raise_the_loss_is_rejected():
    """Alone: the neurons that follow keep the function, and would hide nothing."""
    site, params = thinned()
    for gamma, accepted in ((1e3, False), (1e-2, True)):
        update = dict(update_amplitude=tinyjax.growth.fixed(gamma), method=tinyjax.methods.random0, fill=None)
        grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=1, **update)
        grown, info = grow_step(params, BATCH, jax.random.key(0))
        assert (float(info.amplitude_update["w"]) == gamma) is accepted
        assert (float(info.gain_achieved["w"]) > 0) is accepted
        assert np.array_equal(grown["u"], params["u"]) is not accepted
        np.testing.assert_allclose(info.loss_after["w"], loss_fn(grown, BATCH), rtol=1e-12)
        assert loss_fn(grown, BATCH) <= loss_fn(params, BATCH)


def one_direction(halves, fit):
    """By how much the fit to each half lowers the mean squared residual of the other, from rows."""
    gains = []
    for i in (0, 1):
        alpha, omega = fit(*halves[i])
        x, v = halves[1 - i]
        move = x @ alpha @ omega
        gains.append(np.sum(v**2 - (v - move) ** 2) / len(v))
    return np.mean(gains)


@methods.traits(function_preserving=False, stochastic=False)
def averaging(statistics, *, num_neurons, key=None):
    """Reads the first output's direction of descent: no solution of anything, so halves differ a lot."""
    mean = tinyjax.statistics.moments(statistics)
    alpha = mean.cross_prev[:, :1] * 3.0
    return tinyjax.methods.Neurons(alpha, jnp.eye(1, mean.cross_prev.shape[1]), jnp.ones(1))


def test_the_held_out_gain_of_a_growth_is_that_of_the_other_half():
    site, params = thinned()
    grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=1, method=averaging, update=None, fill=None)
    _, info = grow_step(params, BATCH)
    x = np.asarray(BATCH["x"])[:30]  # three quarters of the batch are the statistics'
    hidden = np.tanh(x @ np.asarray(params["w"]))
    v = -2 * (hidden @ np.asarray(params["u"]) - np.asarray(BATCH["t"])[:30])
    halves = [(x[i::2], v[i::2]) for i in (0, 1)]

    def fit(x, v):
        return 3 * x.T @ v[:, :1] / len(x), np.eye(1, 2)

    expected = one_direction(halves, fit)
    seen = np.mean([np.sum(v**2 - (v - x @ np.matmul(*fit(x, v))) ** 2) / len(v) for x, v in halves])
    assert abs(seen - expected) > 0.01 * abs(expected)  # so the two can be told apart
    np.testing.assert_allclose(info.gain_held_out["w"], expected, rtol=1e-9)


def test_the_held_out_gain_of_neurons_is_that_of_the_other_half():
    site, params = thinned()
    statistics = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site))(params, BATCH)
    x = np.asarray(BATCH["x"])
    v = -2 * (np.tanh(x @ np.asarray(params["w"])) @ np.asarray(params["u"]) - np.asarray(BATCH["t"]))
    expected = one_direction(
        [(x[i::2], v[i::2]) for i in (0, 1)], lambda x, v: (3 * x.T @ v[:, :1] / len(x), np.eye(1, 2))
    )
    found = tinyjax.methods.held_out_gain(statistics, lambda half: (averaging(half, num_neurons=1), None))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
