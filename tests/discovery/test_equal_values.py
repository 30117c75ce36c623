"""Equal values are one value: a hidden layer that is computed twice, or copied, on its way to several readers."""

import chex
import jax
import jax.numpy as jnp
import pytest

import tinyjax
from tests.support.site_laws import assert_laws
from tests.support.zoo.layers import data, draw

PARAMS = draw(1, w=(5, 6), b=(6,), u=(6, 3), v=(6, 2))
BATCH = data(8, 5)


def two_heads(first, second):
    """Two heads that read a layer, each through a function of its pre-activation of its own."""

    def loss_fn(p, b):
        z = b["x"] @ p["w"] + p["b"]
        out, other = first(z) @ p["u"], second(z) @ p["v"]
        return jnp.mean((out - b["t"]) ** 2) + jnp.mean((other - b["t"][:, :2]) ** 3)

    return loss_fn


COPIES = {
    "computed_twice": jnp.tanh,
    "where_twice": lambda z: jnp.where(z > 0, jnp.tanh(z), jnp.tanh(z)),
    "turned_twice": lambda z: jnp.tanh(z).T.T,
    "whole_slice": lambda z: jax.lax.slice(jnp.tanh(z), (0, 0), z.shape),
    "through_another_shape": lambda z: jnp.tanh(z).reshape(4, -1).reshape(z.shape),
    "nothing_added": lambda z: jnp.tanh(z) + 0.0,
    "times_one": lambda z: 1.0 * jnp.tanh(z) / 1.0,
    "fenced": lambda z: jax.lax.optimization_barrier((jnp.tanh(z), z))[0],
    "alone": lambda z: jnp.concatenate([jnp.tanh(z)]),
    "detached": lambda z: jax.lax.stop_gradient(jnp.tanh(z)),
    "detached_before": lambda z: jnp.tanh(jax.lax.stop_gradient(z)),
}


@pytest.mark.parametrize("name", COPIES)
def test_two_readers_of_equal_values(name):
    first = COPIES["where_twice"] if name == "where_twice" else jnp.tanh
    site = tinyjax.find_sites(two_heads(first, COPIES[name]), PARAMS, BATCH)["w"]
    assert site.growable, site.reason
    assert [kernel.leaf for kernel in site.consumers] == ["u", "v"]


@pytest.mark.parametrize("name", ["computed_twice", "detached", "detached_before"])
def test_the_laws_hold_for_two_readers_of_equal_values(name):
    assert_laws(two_heads(jnp.tanh, COPIES[name]), PARAMS, BATCH, readers=("u", "v"))


def test_a_detached_reader_of_what_attention_mixes():
    """The tangents of new values pass through the copy, which jax would differentiate to zero."""
    params = draw(2, q=(5, 4), k=(5, 4), v=(5, 6), o=(6, 3), probe=(6, 2))

    def loss_fn(p, b):
        weights = jax.nn.softmax((b["x"] @ p["q"]) @ jnp.swapaxes(b["x"] @ p["k"], -1, -2))
        h = weights @ (b["x"] @ p["v"])
        probe = jax.lax.stop_gradient(h) @ p["probe"]
        return jnp.mean((probe - 1) ** 2) + jnp.mean((h @ p["o"] - b["t"]) ** 2)

    assert_laws(loss_fn, params, data(8, 4, 5), "v", readers=("probe", "o"))


def encode(p, b):
    return jax.nn.silu(2 * (b["x"] @ p["w"] + p["b"]))


def encoder_called_twice(p, b):
    out, other = encode(p, b) @ p["u"], encode(p, b) @ p["v"]
    return jnp.mean((out - b["t"]) ** 2) + jnp.mean((other - b["t"][:, :2]) ** 4)


def rematerialised_once(p, b):
    out = jax.checkpoint(lambda p: encode(p, b) @ p["u"])(p)
    return jnp.mean((out - b["t"]) ** 2) + jnp.mean((encode(p, b) @ p["v"]) ** 4)


@pytest.mark.parametrize("loss_fn", [encoder_called_twice, rematerialised_once])
def test_the_laws_hold_for_an_encoder_that_is_called_for_each_of_its_readers(loss_fn):
    assert_laws(loss_fn, PARAMS, BATCH, readers=("u", "v"))


def test_a_network_that_is_called_twice_is_asked_for_both():
    """One product in the graph, V_goal of its two places added; its rows are counted once."""
    net = lambda p, b: encode(p, b) @ p["u"]  # noqa: E731
    twice = lambda p, b: jnp.mean((net(p, b) - b["t"]) ** 2) + jnp.mean(jax.checkpoint(net)(p, b) ** 4)  # noqa: E731

    def once(p, b):
        out = net(p, b)
        return jnp.mean((out - b["t"]) ** 2) + jnp.mean(out**4)

    assert_laws(twice, PARAMS, BATCH)
    sites = [tinyjax.find_sites(loss_fn, PARAMS, BATCH) for loss_fn in (twice, once)]
    assert sites[0] == sites[1]
    sums = [jax.jit(lambda p, f=f: tinyjax.estimate(f, p, BATCH, sites[0]["w"]))(PARAMS) for f in (twice, once)]
    chex.assert_trees_all_close(*sums, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "other", [jnp.sin, lambda z: 2 * jnp.tanh(z), lambda z: jnp.tanh(z) + 1e-3 * jnp.tanh(z)[::-1]]
)
def test_values_that_differ_stay_apart(other):
    site = tinyjax.find_sites(two_heads(jnp.tanh, other), PARAMS, BATCH)["w"]
    assert not site.growable


def test_equal_arrays_of_two_layers_tie_nothing():
    """Zeros, a level of the batch and a mask from one key, in the shapes of two layers of one width."""

    def loss_fn(p, b):
        def layer(x, kernel):
            z = x @ kernel
            z = jnp.where(z > 0, z, jnp.zeros((8, 6))) + 0 * jnp.full((8, 6), b["level"])
            return z * jax.random.bernoulli(b["key"], 0.5, (8, 6))

        return jnp.mean((layer(layer(b["x"], p["w"]), p["m"]) @ p["u"] - b["t"]) ** 2)

    batch = BATCH | {"level": 0.5, "key": jax.random.key(0)}
    sites = tinyjax.find_sites(loss_fn, draw(1, w=(5, 6), m=(6, 6), u=(6, 3)), batch)
    assert [[member.leaf for member in site.members] for site in sites] == [["m", "w"], ["m", "u"]]
