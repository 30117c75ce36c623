"""The slope at 0: networks that fall there grow exactly as the same networks written with the sign elsewhere.

The oracle is the network itself: a sign moved from the activation to the fan-out changes no output, so it may change
neither what a growth gains nor which neurons it writes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.zoo.layers import draw

BATCH = {"x": draw(0, x=(48, 4))["x"]}
BATCH["t"] = jnp.sin(3 * BATCH["x"] @ draw(1, w=(4, 2))["w"])
PARAMS = draw(2, w=(4, 5), u=(5, 2))
TOKENS = {"x": draw(3, x=(24, 3, 4))["x"]}
TOKENS["t"] = jnp.sin(2 * jnp.cumsum(TOKENS["x"], 1) @ draw(1, w=(4, 2))["w"])


def squared(outputs, batch):
    return jnp.mean((outputs - batch["t"]) ** 2)


def two_layers(act, p, b):
    return squared(act(b["x"] @ p["w"]) @ p["u"], b)


ACTIVATIONS = {  # falling, and the same rising: falling(z) = -rising(z)
    "inside": (lambda z: jnp.arctan(-0.7 * z), lambda z: jnp.arctan(0.7 * z)),
    "shifted_cosine": (lambda z: jnp.cos(z + 1) - np.cos(1.0), lambda z: np.cos(1.0) - jnp.cos(z + 1)),
    "leaky": (  # 1 on one side, -3 on the other
        lambda z: jax.nn.leaky_relu(z, -3.0),
        lambda z: -jax.nn.leaky_relu(z, -3.0),
    ),
    "gelu": (lambda z: -jax.nn.gelu(z), jax.nn.gelu),
}


def grown(loss, params, batch, **options):
    site = tinyjax.find_sites(loss, params, batch)["w"]
    options = dict(num_neurons=2, method=tinyjax.methods.tiny, update=None, fill=None) | options
    thin = tinyjax.thin(params, site, site.capacity - 2)
    params, info = tinyjax.make_grow_step(loss, site, **options)(thin, batch)
    return params, {name: np.asarray(getattr(info, name)["w"]) for name in ("gain_achieved", "written", "amplitude")}


def check_same(falling, rising, params, batch, flipped=("u",), **options):
    moved = {name: -x if name in flipped else x for name, x in params.items()}
    a, info = grown(falling, moved, batch, **options)
    b, expected = grown(rising, params, batch, **options)
    assert expected["written"] == 2 and expected["gain_achieved"] > 0
    for name, x in expected.items():
        np.testing.assert_allclose(info[name], x, rtol=1e-8, err_msg=name)
    for name, x in b.items():
        np.testing.assert_allclose(a[name], -x if name in flipped else x, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_falling_activation_grows_as_the_rising_one(name):
    falling, rising = ACTIVATIONS[name]
    a, b = (partial(two_layers, act) for act in (falling, rising))
    moved = PARAMS | {"u": -PARAMS["u"]}
    np.testing.assert_allclose(a(moved, BATCH), b(PARAMS, BATCH), rtol=1e-12)
    check_same(a, b, PARAMS, BATCH)


def test_its_own_delta_and_neurons_make_the_move_that_was_solved_for():
    """To first order the loss falls by the bottleneck's decrease times the amplitude, whatever the slope."""
    batch = jax.tree.map(lambda x: jnp.tile(x[:14], (4, 1)), BATCH)  # the same samples for statistics and for the loss
    options = dict(
        method=partial(tinyjax.methods.tiny_joint, ridge=0.0),
        amplitude=tinyjax.growth.fixed(1e-5),
        update=None,
        fill=None,
    )
    for act in (lambda z: -0.25 * jnp.tanh(z), lambda z: 3 * jnp.sin(z)):
        loss = partial(two_layers, act)
        site = tinyjax.find_sites(loss, PARAMS, batch)["w"]
        _, info = tinyjax.make_grow_step(loss, site, num_neurons=2, **options)(tinyjax.thin(PARAMS, site, 3), batch)
        decrease = info.psi_before["w"] - info.psi_after["w"]
        np.testing.assert_allclose(info.gain_achieved["w"] / 1e-5, decrease, rtol=1e-3)


def test_factors_that_are_parameters_are_searched_with_both_signs():
    def scaled(p, b):
        return squared(p["a"] * jnp.tanh(b["x"] @ p["w"]) @ p["u"], b)

    def leaky(p, b):
        z = b["x"] @ p["w"]
        return squared(jnp.where(z > 0, z, p["a"] * z) @ p["u"], b)

    params = PARAMS | {"a": jnp.asarray(1.3)}
    check_same(scaled, scaled, params, BATCH, flipped=("u", "a"))
    assert grown(leaky, params | {"a": jnp.asarray(-4.0)}, BATCH)[1]["written"] == 2


def test_a_sign_behind_attention_and_in_its_values():
    def attend(out, act, p, b):
        mixing = jax.nn.softmax(b["x"] @ p["q"] @ b["x"].swapaxes(1, 2))
        return squared(out * (mixing @ act(b["x"] @ p["w"])) @ p["u"], b)

    params = PARAMS | draw(4, q=(4, 4))
    bent = lambda z: jnp.where(z > 0, z, -0.1 * z)  # noqa: E731  rises by 0.45 on average, falls on the left
    check_same(partial(attend, -1, bent), partial(attend, 1, bent), params, TOKENS)


def test_a_sign_in_a_recurrence():
    def recur(sign, p, b):
        step = lambda h, x: (sign * jnp.tanh(x @ p["w"] + h @ p["r"]),) * 2  # noqa: E731
        states = jax.lax.scan(step, jnp.zeros((len(b["x"]), 5)), b["x"].swapaxes(0, 1))[1]
        return squared(states.swapaxes(0, 1) @ p["u"], b)

    check_same(partial(recur, -1), partial(recur, 1), PARAMS | draw(5, r=(5, 5)), TOKENS, flipped=("u", "r"))


def test_a_sign_between_convolutions_with_a_normalisation_and_a_pooling():
    images = {"x": draw(6, x=(16, 4, 4, 2))["x"]}
    images["t"] = jnp.sin(images["x"].mean((1, 2)) @ draw(7, w=(2, 2))["w"])
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    convolve = partial(convolve, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(sign, p, b):
        z = convolve(b["x"], p["w"])
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        z = (z - mean) / jnp.sqrt(var + 1e-3) * p["scale"] + p["shift"]
        pooled = jax.lax.reduce_window(sign * jnp.tanh(z), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return squared(convolve(pooled, p["u"]).mean((1, 2)), b)

    params = draw(8, w=(3, 3, 2, 4), u=(3, 3, 4, 2)) | {"scale": jnp.ones(4), "shift": jnp.zeros(4)}
    check_same(partial(loss, -1), partial(loss, 1), params, images)


def test_the_slope_of_a_record():
    for act, slope in ((lambda z: -0.25 * jnp.tanh(z), -0.25), (jax.nn.relu, 0.5), (lambda z: jnp.abs(z), 0.0)):
        loss = partial(two_layers, act)
        statistics = tinyjax.estimate(loss, PARAMS, BATCH, tinyjax.find_sites(loss, PARAMS, BATCH)["w"])
        assert statistics.slope == pytest.approx(slope, abs=1e-5)


def test_net2net_keeps_the_function_of_a_falling_activation():
    loss = partial(two_layers, lambda z: -jnp.tanh(z))
    site = tinyjax.find_sites(loss, PARAMS, BATCH)["w"]
    thin = tinyjax.thin(PARAMS, site, 3)
    step = tinyjax.make_grow_step(loss, site, num_neurons=1, method=tinyjax.methods.net2net, update=None)
    params, info = step(thin, BATCH, key=jax.random.key(0))
    np.testing.assert_allclose(loss(params, BATCH), loss(thin, BATCH), rtol=1e-12)
    assert int(info.written["w"]) == 1
