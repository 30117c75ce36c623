"""Depth: residual blocks allocated empty are the identity, stay empty until they are grown, and grow like any layer.

What the block's input and V_goal say about a new unit is checked against loops over samples with the real activation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tinyjax

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
NUMPY = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}
WIDTH, BLOCK = 6, 4


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    block = lambda: {"w1": draw(rng, WIDTH, BLOCK), "b1": draw(rng, BLOCK), "w2": draw(rng, BLOCK, WIDTH)}  # noqa: E731
    return {"in": draw(rng, 5, WIDTH), "blocks": [block(), block()], "out": draw(rng, WIDTH, 3)}


def make_batch(n=160, seed=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    t = np.abs(x @ rng.normal(size=(5, 3))) + 0.1 * rng.normal(size=(n, 3))
    return {"x": jnp.asarray(x), "t": jnp.asarray(t)}


BATCH = make_batch()


def make_loss(kind):
    def loss_fn(p, batch):
        s = batch["x"] @ p["in"]
        for block in p["blocks"]:
            s = s + ACTIVATIONS[kind](s @ block["w1"] + block["b1"]) @ block["w2"]
        return jnp.mean(jnp.sum((s @ p["out"] - batch["t"]) ** 2, axis=-1))

    return loss_fn


def shallow(p, batch):
    """The same network without its blocks."""
    return jnp.mean(jnp.sum((batch["x"] @ p["in"] @ p["out"] - batch["t"]) ** 2, axis=-1))


def blocks_of(sites):
    """The hidden layers of the blocks, without the stream between them."""
    return tinyjax.Sites(site for site in sites.growable if site.stream is None)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def case(request):
    """Two empty blocks."""
    loss_fn, full = make_loss(request.param), make_params()
    sites = tinyjax.find_sites(loss_fn, full, BATCH)
    return request.param, loss_fn, tinyjax.thin(full, blocks_of(sites), 0), sites


def test_empty_blocks_are_found_silent_and_stay_empty(case):
    _, loss_fn, params, sites = case
    assert blocks_of(sites).names == ("blocks/0/w1", "blocks/1/w1")
    assert loss_fn(params, BATCH) == shallow(params, BATCH)
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, BATCH), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params, optimizer.init(params)
    for _ in range(5):
        trained, state = step(trained, state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(trained["blocks"]))
    assert np.any(trained["in"] != params["in"])


def test_the_slope_of_a_new_block_is_that_of_its_real_activation(case):
    """For ReLU not half of what the linear model says: each twin by the sum over the samples it answers to."""
    kind, loss_fn, params, sites = case
    site = sites["blocks/0/w1"]
    statistics = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site))(params, BATCH)
    neurons = tinyjax.methods.tiny(statistics, num_neurons=2, ridge=0.0)
    if kind == "tanh":  # the order at zero needs a small fan-in, ReLU none
        neurons = neurons._replace(alpha=1e-4 * neurons.alpha)
    found = np.asarray(jax.jit(lambda p, b: tinyjax.growth.twin_slopes(loss_fn, p, b, site, neurons))(params, BATCH))

    x, t, w_in, w_out = (np.asarray(a) for a in (BATCH["x"], BATCH["t"], params["in"], params["out"]))
    alpha, omega = np.asarray(neurons.alpha), np.asarray(neurons.omega)
    expected = np.zeros((2, 2))
    for sample, target in zip(x, t):
        stream = sample @ w_in
        goal = -2 * (stream @ w_out - target) @ w_out.T  # what the block's output is asked for
        for k in range(2):
            answer = np.append(stream, 1.0) @ alpha[:, k]
            for twin, sign in enumerate((1, -1)):
                expected[twin, k] += NUMPY[kind](sign * answer) * (goal @ (sign * omega[k])) / len(x)
    np.testing.assert_allclose(found, expected, rtol=1e-7)

    linear = np.sum(np.asarray(tinyjax.statistics.moments(statistics).cross_prev) * (alpha @ omega))
    if kind == "tanh":
        np.testing.assert_allclose(found.sum(axis=1), linear, rtol=1e-6)
        return
    np.testing.assert_allclose(found.sum(), linear, rtol=1e-9)  # the twins share it, and not in halves
    assert np.abs(found[0].sum() / linear - 0.5) > 0.02
    loss = jax.jit(lambda g, sign: loss_fn(tinyjax.surgery.write(params, site, neurons._replace(
        alpha=sign * neurons.alpha, omega=sign * neurons.omega), amplitude=g)[0], BATCH))  # fmt: skip
    for twin, sign in enumerate((1.0, -1.0)):
        rate = [(loss(h, sign) - loss(0.0, sign)) / h for h in (1e-5, 5e-6)]
        np.testing.assert_allclose(2 * rate[1] - rate[0], -found[twin].sum(), rtol=1e-5)


def test_the_better_twin_is_taken_neuron_by_neuron(case):
    kind, loss_fn, params, sites = case
    site = sites["blocks/1/w1"]
    rng = np.random.default_rng(1)
    neurons = tinyjax.methods.Neurons(draw(rng, WIDTH + 1, 4), draw(rng, 4, WIDTH), jnp.ones(4))

    @jax.jit
    def slopes(params, batch):
        taken = tinyjax.growth.better_twins(loss_fn, params, batch, site, neurons)
        silent = tinyjax.growth.better_twins(loss_fn, params, batch, site, neurons._replace(omega=0 * neurons.omega))
        return tinyjax.growth.twin_slopes(loss_fn, params, batch, site, neurons), taken, silent

    both, taken, silent = slopes(params, BATCH)
    sign = np.where(both[1] > both[0], -1, 1)
    np.testing.assert_array_equal(taken.alpha, sign * neurons.alpha)
    np.testing.assert_array_equal(taken.omega, sign[:, None] * neurons.omega)
    assert np.all(silent.omega == 0) and set(np.unique(np.asarray(silent.alpha / neurons.alpha).round(9))) <= {
        -1.0,
        1.0,
    }
    if kind == "relu":
        assert set(sign) == {-1, 1}


def test_growing_puts_a_layer_where_there_was_none():
    loss_fn, full = make_loss("relu"), make_params()
    sites = blocks_of(tinyjax.find_sites(loss_fn, full, BATCH))
    params = tinyjax.thin(full, sites, 0)
    grow_step = tinyjax.make_grow_step(
        loss_fn, sites[:1], num_neurons=3, method=tinyjax.methods.tiny_unprojected, update=None, fill=None,
        orient=tinyjax.growth.better_twins,
    )  # fmt: skip
    grown, info = grow_step(params, BATCH)
    assert int(info.width["blocks/0/w1"]) == 3
    assert float(loss_fn(grown, BATCH)) < 0.9 * float(loss_fn(params, BATCH))
    assert not np.any(grown["blocks"][1]["w1"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, s):
        return s + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(BLOCK, name="up")(nn.LayerNorm()(s))))


class PreNorm(nn.Module):
    """A pre-norm residual network as it is written everywhere."""

    @nn.compact
    def __call__(self, x):
        s = nn.Dense(WIDTH)(x)
        for _ in range(2):
            s = Block()(s)
        return nn.Dense(3, name="head")(nn.LayerNorm()(s))


def test_empty_blocks_behind_a_norm_in_linen():
    """The norm inside of a block sees the stream alone: the new units' inputs are its output."""
    params = PreNorm().init(jax.random.key(0), BATCH["x"])
    params = jax.tree.map(lambda a: (a + 0.05).astype(jnp.float64), params)
    loss_fn = lambda p, b: jnp.mean(jnp.sum((PreNorm().apply(p, b["x"]) - b["t"]) ** 2, axis=-1))  # noqa: E731
    sites = tinyjax.find_sites(loss_fn, params, BATCH)
    assert sites.growable.names == ("Block_0/up", "Block_1/up")
    params = tinyjax.thin(params, sites.growable, {"Block_1/up": 0})
    site = sites["Block_1/up"]

    @jax.jit
    def grow(params, batch):
        neurons = tinyjax.methods.tiny(tinyjax.estimate(loss_fn, params, batch, site), num_neurons=1, ridge=0.0)
        neurons = neurons._replace(alpha=1e-5 * neurons.alpha)
        slopes = tinyjax.growth.twin_slopes(loss_fn, params, batch, site, neurons)
        statistics = tinyjax.statistics.moments(tinyjax.estimate(loss_fn, params, batch, site))
        return slopes.sum(axis=1), jnp.sum(statistics.cross_prev * (neurons.alpha @ neurons.omega))

    slopes, linear = grow(params, BATCH)
    np.testing.assert_allclose(slopes, linear / 2, rtol=1e-4)  # the slope of GELU at 0
