"""Numerical safety: whatever the data, methods give finite neurons in float32, and growths keep their promises.

Records of one site with every pathology go through every method; a few through a whole growth.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.methods.test_every_method import METHODS
from tests.support.oracles import Samples, make_samples, record

X = slice(None, -1)  # the constant stays 1


def scaled(samples, inputs=1.0, goal=1.0):
    """Inputs and goal in other units; what the layer computes from its input stays the same."""
    prev = samples.b_prev.copy()
    prev[:, X] *= inputs
    return samples._replace(b_prev=prev, v=samples.v * goal)


def with_inputs(change):
    samples = make_samples(n=40, inputs=6, slots=5, live=4, outputs=4)
    prev = samples.b_prev.copy()
    change(prev)
    return samples._replace(b_prev=prev)


def constant(prev):
    prev[:, X] = 2.0


def duplicated(prev):
    prev[:, 1:6] = prev[:, :1]


def rank_two(prev):
    prev[:, X] = prev[:, :2] @ np.random.default_rng(0).normal(size=(2, 6))


def all_zero(prev):
    prev[:, X] = 0


def mixed_units(prev):
    prev[:, X] *= 10.0 ** np.array([-15, -8, 0, 3, 8, 15])


def dead(samples: Samples) -> Samples:
    """Every unit of the layer is off on every sample."""
    b = samples.b.copy()
    b[:, X] = 0
    return samples._replace(b=b)


GOOD = make_samples(n=40, inputs=6, slots=5, live=4, outputs=4)
PATHOLOGIES = {
    "constant inputs": with_inputs(constant),
    "duplicated inputs": with_inputs(duplicated),
    "inputs of rank two": with_inputs(rank_two),
    "inputs all zero": with_inputs(all_zero),
    "inputs in units from 1e-15 to 1e15": with_inputs(mixed_units),
    "inputs of 1e-15": scaled(GOOD, inputs=1e-15),
    "inputs of 1e15": scaled(GOOD, inputs=1e15),
    "inputs of 1e-30": scaled(GOOD, inputs=1e-30),
    "a goal of 1e-15": scaled(GOOD, goal=1e-15),
    "a goal of 1e15": scaled(GOOD, goal=1e15),
    "a goal of 1e-30": scaled(GOOD, goal=1e-30),
    "a goal of zero": scaled(GOOD, goal=0.0),
    "a dead layer": dead(GOOD),
    "fewer samples than inputs": Samples(*(x[:4] if i < 3 else x for i, x in enumerate(GOOD))),
    "a layer without live neurons": GOOD._replace(
        weight_prev=0 * GOOD.weight_prev, weight=GOOD.weight * 0, b=dead(GOOD).b
    ),
}


@functools.cache
def compiled(name, shapes):
    del shapes
    method = METHODS[name]

    def run(statistics, key):
        neurons = method(statistics, num_neurons=3, key=key)
        return neurons, tinyjax.methods.best_update(statistics), tinyjax.methods.bottleneck(statistics)

    return jax.jit(run)


@pytest.mark.parametrize("pathology", PATHOLOGIES)
@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_finite(name, pathology):
    statistics = record(PATHOLOGIES[pathology], jnp.float32, energy_matrix=True, third_outputs=np.eye(4)[[0, 2, 3]])
    neurons, update, psi = compiled(name, 0)(statistics, jax.random.key(0))
    for what in (neurons.alpha, neurons.omega, neurons.delta, update, psi.before, psi.after):
        if what is not None:
            assert np.all(np.isfinite(what)), (name, pathology)
    assert float(psi.after) <= float(psi.before) * (1 + 1e-3)


def relu_net(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["u"]


def loss_fn(params, batch):
    return jnp.mean((relu_net(params, batch["x"]) - batch["t"]) ** 2)


def case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 8), "b": (8,), "u": (8, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    batch = {"x": jnp.asarray(rng.normal(size=(32, 5)), dtype), "t": jnp.asarray(rng.normal(size=(32, 3)), dtype)}
    sites = tinyjax.find_sites(loss_fn, params, batch)
    return tinyjax.thin(params, sites, 4), batch, sites


OPTIMIZER = tinyjax.with_birth(optax.adam(1e-2))


@functools.cache
def grower():
    sites = case()[2]
    step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2, optimizer=OPTIMIZER)
    return jax.jit(step)


def spoil(params, batch, what):
    """Params and batch with one thing wrong."""
    if what in batch:
        return params, batch | {what: batch[what].at[0, 0].set(jnp.nan)}
    if what in params:
        return params | {what: params[what].at[(0,) * params[what].ndim].set(jnp.inf)}, batch
    return params, batch | {"x": batch["x"] * 1e30, "t": batch["t"] * 1e30}  # the loss leaves float32


@pytest.mark.parametrize("what", ["x", "t", "w", "b", "u", "overflow"])
def test_nothing_is_changed_where_anything_is_not_finite(what):
    """Parameters and optimizer state come back bitwise, with the status."""
    params, batch, sites = case()
    params, batch = spoil(params, batch, what)
    state = OPTIMIZER.init(params)
    new, new_state, info = grower()(params, batch, state)
    chex.assert_trees_all_equal((new, new_state), (params, state))
    assert info.status["w"] == tinyjax.Status.NON_FINITE and not info.born["w"].any()
    assert not info.finite_loss["w"]
    with pytest.raises(ValueError, match="not finite, nothing was changed"):
        tinyjax.check(info)


@pytest.mark.parametrize("weights", [1.0, None], ids=["as they are", "in the unit of the inputs"])
@pytest.mark.parametrize("inputs", [0.0, 1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_growths_in_any_unit_grow_or_say_why(inputs, weights):
    """The loss does not rise, everything stays finite, and what overflows or vanishes is named."""
    params, batch, _ = case()
    batch = batch | {"x": batch["x"] * inputs}
    params = params | {"w": params["w"] * (1 if weights or not inputs else 1 / inputs)}
    before = loss_fn(params, batch)
    new, state, info = grower()(params, batch, OPTIMIZER.init(params))
    chex.assert_tree_all_finite((new, state))
    status, square = info.status["w"], inputs**2
    if status == tinyjax.Status.NON_FINITE:
        assert not np.isfinite(before) or square > 3e38 / len(batch["x"])
        assert bool(info.finite_loss["w"]) == bool(np.isfinite(before))
        chex.assert_trees_all_equal(new, params)
    else:
        assert loss_fn(new, batch) <= before
        if square > 1e-38:  # smaller ones are flushed to zero
            assert status == tinyjax.Status.GROWN and int(info.width["w"]) == 6
        else:  # a neuron that reads the constant of the bias is left
            assert status == tinyjax.Status.DEAD_INPUTS and int(info.width["w"]) == 5


def test_a_layer_that_nothing_enters_says_so():
    """The ReLUs before it are all off: the status names it, nothing is written, and a living layer before cures it."""

    def deep(params, batch):
        hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["w"] + params["b"]) @ params["v"])
        return jnp.mean((hidden @ params["u"] - batch["t"]) ** 2)

    rng = np.random.default_rng(0)
    shapes = {"w": (5, 8), "b": (8,), "v": (8, 8), "u": (8, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    _, batch, _ = case()
    sites = tinyjax.find_sites(deep, params, batch)
    alive = tinyjax.thin(params, sites, 4)
    dead = alive | {"b": jnp.where(jnp.arange(8) < 4, -1e3, 0.0).astype(jnp.float32)}
    grow = jax.jit(tinyjax.make_grow_step(deep, sites, num_neurons=2))
    new, info = grow(dead, batch)
    tinyjax.check(info)
    assert {name: int(s) for name, s in info.status.items()} == {
        "w": tinyjax.Status.GROWN, "v": tinyjax.Status.DEAD_INPUTS
    }  # fmt: skip
    np.testing.assert_array_equal(new["u"], dead["u"])
    new, info = grow(new, batch)  # what was born in the layer before lives
    assert info.status["v"] == tinyjax.Status.GROWN and int(info.width["v"]) == 6


def test_a_dead_relu_layer_grows():
    """All units off: the update can only use what is left, psi is finite, and not all newborn neurons are dead."""
    params, batch, sites = case()
    params = params | {"b": jnp.where(jnp.arange(8) < 4, -1e3, 0.0).astype(jnp.float32)}
    new, _, info = grower()(params, batch, OPTIMIZER.init(params))
    chex.assert_tree_all_finite((new, info.psi_before, info.psi_after, info.gain_held_out))
    assert info.status["w"] == tinyjax.Status.GROWN and int(info.width["w"]) == 6
    hidden = jax.nn.relu(batch["x"] @ new["w"] + new["b"])
    assert not hidden[:, :4].any() and hidden[:, 4:6].any()
    np.testing.assert_allclose(info.psi_before["w"], info.psi_after["w"] + info.gain_predicted["w"], rtol=1e-5)
