"""The public functions under jit, vmap over seeds, checkpoint, donation, and with x64 on and off."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax

CAPACITY, START = 8, 4


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["u"] - batch["t"]) ** 2)


def init(key, dtype=float):
    w, b, u = jax.random.split(key, 3)
    return {
        "w": jax.random.normal(w, (5, CAPACITY), dtype),
        "b": jax.random.normal(b, (CAPACITY,), dtype),
        "u": jax.random.normal(u, (CAPACITY, 3), dtype),
    }


def make(dtype=float):
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(24, 5)), dtype), "t": jnp.asarray(rng.normal(size=(24, 3)), dtype)}
    params = init(jax.random.key(0), dtype)
    sites = tinyjax.find_sites(loss_fn, params, batch)
    return tinyjax.thin(params, sites, START), batch, sites


def public(sites):
    """Functions of `(params, batch)`, by name."""
    site = sites["w"]

    def method(name):
        function = getattr(tinyjax.methods, name)

        def run(params, batch):
            statistics = tinyjax.estimate(loss_fn, params, batch, site, energy_matrix=name == "fisher_tiny")
            return function(statistics, num_neurons=2, key=jax.random.key(1))[:2]

        return run

    def statistics(params, batch):
        return tinyjax.estimate(loss_fn, params, batch, site)

    def write(params, batch):
        neurons = tinyjax.methods.Neurons(jnp.ones((6, 2)), jnp.ones((2, 3)), jnp.ones(2))
        return tinyjax.surgery.write(params, site, neurons, amplitude=0.1)

    found = {
        "width": lambda p, b: tinyjax.width(p, site),
        "thin": lambda p, b: tinyjax.thin(p, sites, 2),
        "resize": lambda p, b: tinyjax.resize(p, sites, {"w": 11})[0],
        "write": write,
        "estimate": lambda p, b: statistics(p, b).cross,
        "merge": lambda p, b: tinyjax.statistics.merge(statistics(p, b), statistics(p, b)).gram,
        "bottleneck": lambda p, b: tinyjax.methods.bottleneck(statistics(p, b)),
        "best_update": lambda p, b: tinyjax.methods.best_update(statistics(p, b)),
        "add_update": lambda p, b: tinyjax.surgery.add_update(
            p, site, tinyjax.methods.best_update(statistics(p, b)), amplitude=0.1
        ),
        "prune": lambda p, b: tinyjax.prune(p, site, statistics(p, b), num_neurons=2),
        "train_step": lambda p, b: tinyjax.train_step(loss_fn, optax.sgd(0.1))(p, optax.sgd(0.1).init(p), b)[:3],
    }
    return found | {name: method(name) for name in ("tiny", "tiny0", "gradmax", "fisher_tiny", "random0", "net2net")}


PUBLIC = list(public(make()[2]))


@pytest.mark.parametrize("name", PUBLIC)
def test_jit_vmap_and_checkpoint_agree(name):
    """One function for an ensemble of three seeds, rematerialised, and each member on its own."""
    _, batch, sites = make()
    function = public(sites)[name]
    members = jax.vmap(lambda key: tinyjax.thin(init(key), sites, START))(jax.random.split(jax.random.key(5), 3))
    ensemble = jax.jit(jax.vmap(jax.checkpoint(function), in_axes=(0, None)))(members, batch)
    alone = jax.jit(function)
    for i in range(3):
        one = alone(jax.tree.map(lambda x, i=i: x[i], members), batch)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], ensemble), one, rtol=1e-6, atol=1e-8)


def test_an_ensemble_grows_in_one_call_and_buffers_may_be_donated():
    _, batch, sites = make()
    optimizer = tinyjax.with_birth(optax.adam(1e-2))
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2, method=tinyjax.methods.random0, update=None,
    fill=None,
                                       optimizer=optimizer)  # fmt: skip

    def grow(params, state, key):
        return jax.checkpoint(grow_step)(params, batch, state, key)

    keys = jax.random.split(jax.random.key(5), 3)
    members = jax.vmap(lambda key: tinyjax.thin(init(key), sites, START))(keys)
    states = jax.vmap(optimizer.init)(members)
    first = jax.tree.map(lambda x: x[0].copy(), (members, states, keys))
    grown, _, info = jax.jit(jax.vmap(grow), donate_argnums=(0, 1))(members, states, keys)
    assert members["w"].is_deleted() and info.width["w"].tolist() == [START + 2] * 3
    alone, _, _ = jax.jit(grow, donate_argnums=(0, 1))(*first)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], grown), alone, rtol=1e-8)


@pytest.mark.parametrize("x64", [True, False])
def test_x64_on_and_off(x64):
    """Dtypes of the parameters are kept, and both agree."""
    with jax.enable_x64(x64):
        params, batch, sites = make(jnp.float32)
        for name in ("tiny", "bottleneck", "best_update", "prune", "resize"):
            got = jax.jit(public(sites)[name])(params, batch)
            assert {x.dtype for x in jax.tree.leaves(got)} <= {jnp.dtype("float32"), jnp.dtype(bool)}, name
        options = dict(num_neurons=2, method=tinyjax.methods.random0, update=None, fill=None)
        grown, info = jax.jit(tinyjax.make_grow_step(loss_fn, sites, **options))(params, batch, jax.random.key(0))
        assert int(info.width["w"]) == START + 2
        assert {x.dtype for x in jax.tree.leaves(grown)} == {jnp.dtype("float32")}
