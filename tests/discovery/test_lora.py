"""Low-rank adapters: found as sites in unmodified models, thinned to rank 0, grown; closed forms against searches."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import nnx

import tinyjax
from tests.support.compiled import compiled
from tests.support.oracles import conv_record, make_conv_site, make_samples, record
from tinyjax.core.params import named_leaves
from tinyjax.methods import tiny_linear

INPUTS, HIDDEN, OUTPUTS, RANK = 7, 9, 6, 4


def data(seed=0, num_samples=48, tokens=3):
    x, y = (jax.random.normal(k, (num_samples, tokens, INPUTS)) for k in jax.random.split(jax.random.key(seed)))
    return x, jnp.sin(2 * y[..., :OUTPUTS] + x[..., :OUTPUTS])


def squared(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=(1, 2)))


# --- models that know nothing of growth: (loss, adapter parameters)


def linen():
    class Adapted(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            a = self.param("lora_a", nn.initializers.he_uniform(), (x.shape[-1], RANK), jnp.float64)
            b = self.param("lora_b", nn.initializers.normal(), (RANK, self.features), jnp.float64)
            return nn.Dense(self.features, param_dtype=jnp.float64, name="base")(x) + 8.0 / RANK * (x @ a) @ b

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Adapted(OUTPUTS, name="second")(nn.relu(Adapted(HIDDEN, name="first")(x)))

    params = jax.jit(Net().init)(jax.random.key(2), data()[0])
    return lambda p, batch: squared(Net().apply(p, batch[0]), batch), params, ["first/lora_a", "second/lora_a"]


def nnx_modules():
    class Net(nnx.Module):
        def __init__(self, rngs):
            double = {"param_dtype": jnp.float64, "dtype": jnp.float64, "rngs": rngs}
            self.first = nnx.LoRALinear(INPUTS, HIDDEN, lora_rank=RANK, lora_param_dtype=jnp.float64, **double)
            base = nnx.Linear(HIDDEN, OUTPUTS, **double)
            self.second = nnx.LoRA(HIDDEN, RANK, OUTPUTS, base_module=base, **double)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, adapters, rest = nnx.split(Net(nnx.Rngs(0)), nnx.LoRAParam, ...)
    adapters, rest = nnx.as_pure(adapters), nnx.as_pure(rest)

    def loss_fn(params, batch):
        return squared(nnx.merge(graph, params, rest)(batch[0]), batch)

    return loss_fn, adapters, ["first/lora/lora_a", "second/lora_a"]


def equinox():
    class Adapted(eqx.Module):
        base: eqx.nn.Linear
        down: eqx.nn.Linear
        up: eqx.nn.Linear

        def __init__(self, inputs, outputs, key):
            keys = jax.random.split(key, 3)
            self.base = eqx.nn.Linear(inputs, outputs, key=keys[0])
            self.down = eqx.nn.Linear(inputs, RANK, use_bias=False, key=keys[1])
            self.up = eqx.nn.Linear(RANK, outputs, use_bias=False, key=keys[2])

        def __call__(self, x, *, key=None):
            return self.base(x) + 2 * self.up(self.down(x))

    keys = jax.random.split(jax.random.key(3))
    net = eqx.nn.Sequential(
        [Adapted(INPUTS, HIDDEN, keys[0]), eqx.nn.Lambda(jax.nn.relu), Adapted(HIDDEN, OUTPUTS, keys[1])]
    )
    arrays, static = eqx.partition(net, eqx.is_inexact_array)

    def loss_fn(params, batch):
        return squared(jax.vmap(jax.vmap(eqx.combine(params, static)))(batch[0]), batch)

    return loss_fn, arrays, ["layers/0/down", "layers/2/down"]


def plain():
    """The frozen kernels are closed over, or given in `params` (see `frozen`)."""
    keys = iter(jax.random.split(jax.random.key(4), 6))
    shapes = {"first": (INPUTS, HIDDEN), "second": (HIDDEN, OUTPUTS)}
    base = {name: jax.random.normal(next(keys), shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    params = {
        name: {"a": jax.random.normal(next(keys), (i, RANK)) / 3, "b": jax.random.normal(next(keys), (RANK, o)) / 3}
        for name, (i, o) in shapes.items()
    }

    def forward(base, params, x):
        def layer(name, x):
            return x @ base[name] + 2.0 * (x @ params[name]["a"]) @ params[name]["b"]

        return layer("second", jax.nn.relu(layer("first", x)))

    return forward, base, params


def plain_loss():
    forward, base, params = plain()
    return lambda p, batch: squared(forward(base, p, batch[0]), batch), params, ["first/a", "second/a"]


MODELS = {"linen": linen, "nnx": nnx_modules, "equinox": equinox, "plain": plain_loss}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_found_thinned_to_rank_zero_and_born_without_changing_the_function(name):
    loss_fn, params, names = MODELS[name]()
    loss_fn, batch = jax.jit(loss_fn), data()
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # adapters start with one side at zero
    sites = tinyjax.find_sites(loss_fn, params, batch)
    for adapter in names:
        site = sites[adapter]
        assert site.growable, site.reason
        assert site.capacity == RANK and [m.role for m in site.members].count("fan_in") == 1
    adapters = [sites[adapter] for adapter in names]
    empty = tinyjax.thin(params, adapters, 0)
    assert [int(tinyjax.width(empty, site)) for site in adapters] == [0, 0]
    without, gradient_of = loss_fn(empty, batch), jax.jit(jax.grad(loss_fn))
    assert abs(without - loss_fn(params, batch)) > 1e-6
    # Empty on both sides no slot learns; born with a fan-in alone, as every adapter starts, its fan-out does.
    for member in adapters[0].members:
        assert np.all(_leaf(gradient_of(empty, batch), member.leaf) == 0)
    born, _ = tinyjax.surgery.write(empty, adapters[0], _birth(adapters[0]), amplitude=1.0)
    np.testing.assert_array_equal(loss_fn(born, batch), without)
    gradient = gradient_of(born, batch)
    fan_in, fan_out = (next(m for m in adapters[0].members if m.role == role) for role in ("fan_in", "fan_out"))
    assert np.all(_leaf(gradient, fan_in.leaf) == 0)
    moved = fan_out.layout.to_slots(_leaf(gradient, fan_out.leaf))
    assert np.all(moved[2:] == 0) and np.all(np.any(moved[:2] != 0, axis=1))


def _birth(site):
    return tinyjax.methods.Neurons(jnp.ones((INPUTS, 2)), jnp.zeros((2, HIDDEN)), jnp.ones(2))


def _leaf(tree, path):
    return named_leaves(tree)[path]


def problem(used, seed=0):
    """One adapter on a frozen kernel with `used` of its ranks, the goal at its output, and its statistics."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (60, INPUTS)) @ jax.random.normal(keys[1], (INPUTS, INPUTS))
    batch = x, jnp.tanh(x @ jax.random.normal(keys[2], (INPUTS, OUTPUTS)))
    kernel = jax.random.normal(keys[3], (INPUTS, OUTPUTS)) / 4
    params = {"a": jax.random.normal(keys[4], (INPUTS, RANK)), "b": jax.random.normal(keys[0], (RANK, OUTPUTS)) / 4}

    @jax.jit
    def loss_fn(params, batch):
        outputs = batch[0] @ kernel + (batch[0] @ params["a"]) @ params["b"]
        return jnp.mean(jnp.sum(jnp.abs(outputs - batch[1]) ** 3, axis=1))  # no quadratic: V_goal is no residual

    site = tinyjax.find_sites(loss_fn, params, batch)["a"]
    params = tinyjax.thin(params, site, used)
    outputs = x @ kernel + (x @ params["a"]) @ params["b"] - batch[1]
    goal = np.asarray(-3 * outputs * jnp.abs(outputs))  # -n dloss/da by hand
    return loss_fn, params, batch, site, goal


def estimated(loss_fn, params, batch, site):
    return jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site))(params, batch)


def minimum(value, shapes, starts=4):
    """The lowest value of a function of arrays, by BFGS from several starts."""
    best = np.inf
    for seed in range(starts):
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        start = [0.1 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes)]
        flat, restore = jax.flatten_util.ravel_pytree(start)
        both = jax.jit(jax.value_and_grad(lambda z, restore=restore: value(*restore(z))))
        found = scipy.optimize.minimize(both, flat, jac=True, method="BFGS", options={"maxiter": 5000, "gtol": 1e-9})
        best = min(best, found.fun)
    return best


@pytest.mark.parametrize("used", [0, 2])
def test_the_slope_of_the_loss_is_the_prediction(used):
    loss_fn, params, batch, site, _ = problem(used)
    statistics = estimated(loss_fn, params, batch, site)
    neurons = compiled(tiny_linear, num_neurons=2, ridge=0.0)(statistics)
    at = [loss_fn(tinyjax.surgery.write(params, site, neurons, amplitude=g)[0], batch) for g in (0.0, 1e-6, 2e-6)]
    slope = (-3 * at[0] + 4 * at[1] - at[2]) / 2e-6
    np.testing.assert_allclose(slope, -np.sum(neurons.singular_values**2), rtol=1e-5)


def test_neurons_are_the_optimum_with_the_old_adapter_free_to_move():
    loss_fn, params, batch, site, goal = problem(2)
    x, a, b = batch[0], params["a"][:, :2], params["b"][:2]

    def psi(*free):
        move = free[0] @ b + a @ free[1] + (free[2] @ free[3] if len(free) > 2 else 0)
        return jnp.sum((goal - x @ move) ** 2) / len(x)

    old = minimum(psi, [(INPUTS, 2), (2, OUTPUTS)], starts=1)
    together = minimum(psi, [(INPUTS, 2), (2, OUTPUTS), (INPUTS, 1), (1, OUTPUTS)])
    neurons = compiled(tiny_linear, num_neurons=1, ridge=0.0)(estimated(loss_fn, params, batch, site))
    np.testing.assert_allclose(old - np.sum(neurons.singular_values**2), together, rtol=1e-6)
    # Exactly nothing that the old adapter can do, on either side.
    assert np.allclose(neurons.omega @ b.T, 0, atol=1e-9)
    assert np.allclose(neurons.alpha.T @ (x.T @ x) @ a, 0, atol=1e-6 * np.linalg.norm(x) ** 2)


def test_the_first_rank_of_an_empty_adapter_is_that_of_tiny_and_the_best_of_all():
    loss_fn, params, batch, site, goal = problem(0)
    statistics = estimated(loss_fn, params, batch, site)
    first, plain = (
        compiled(method, num_neurons=1, ridge=0.0)(statistics) for method in (tiny_linear, tinyjax.methods.tiny)
    )
    np.testing.assert_allclose(first.alpha, plain.alpha, atol=1e-12)
    lowest = minimum(lambda a, b: jnp.sum((goal - batch[0] @ a @ b) ** 2) / 60, [(INPUTS, 1), (1, OUTPUTS)])
    np.testing.assert_allclose(np.sum(goal**2) / 60 - np.sum(first.singular_values**2), lowest, rtol=1e-7)


def test_at_full_rank_nothing_is_new():
    samples = make_samples(3)
    samples.weight[:4] = np.eye(4)  # four existing neurons write to every output
    assert np.all(compiled(tiny_linear, num_neurons=2, ridge=0.0)(record(samples)).alpha == 0)


def test_only_dense_consumers():
    with pytest.raises(ValueError, match="dense consumer"):
        tiny_linear(conv_record(make_conv_site()), num_neurons=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_growth_from_rank_zero_lowers_the_loss(name):
    loss_fn, params, names = MODELS[name]()
    loss_fn, batch = jax.jit(loss_fn), data()
    sites = tinyjax.find_sites(loss_fn, params, batch)
    adapters = [sites[adapter] for adapter in names]
    empty = tinyjax.thin(params, adapters, 0)
    step = tinyjax.make_grow_step(loss_fn, adapters, method=tiny_linear, update=None, fill=None, num_neurons=2)
    grown, info = step(empty, batch)
    assert [int(tinyjax.width(grown, site)) for site in adapters] == [2, 2]
    assert all(info.gain_held_out[site.name] > 0 for site in adapters)
    assert loss_fn(grown, batch) < 0.9 * loss_fn(empty, batch)
    touched = {member.leaf for site in adapters for member in site.members}
    for path, leaf in named_leaves(empty).items():
        if path not in touched:
            np.testing.assert_array_equal(named_leaves(grown)[path], leaf)


def test_merged_adapters_are_refused_by_name():
    def loss_fn(params, batch):
        return squared(batch[0] @ (params["w"] + 2 * params["a"] @ params["b"]), batch)

    params = {"w": jnp.ones((INPUTS, OUTPUTS)), "a": jnp.ones((INPUTS, 3)), "b": jnp.ones((3, OUTPUTS))}
    site = next(s for s in tinyjax.find_sites(loss_fn, params, data()) if s.capacity == 3)
    assert not site.growable
    assert "`a` reaches the matrix product through `mul`" in site.reason


def test_rank_grows_from_zero_while_the_frozen_kernel_stays():
    """From rank 0 to 2 by `tiny0`, trained in between: the base is bit for bit the same, empty ranks stay empty."""
    forward, base, adapters = plain()
    batch = data(1)

    def loss_fn(params, batch):
        return squared(forward(params["base"], params["adapters"], batch[0]), batch)

    params = {"base": base, "adapters": adapters}
    sites = tinyjax.find_sites(loss_fn, params, batch)
    chosen = sites["adapters/second/a"]
    params = tinyjax.thin(params, [chosen, sites["adapters/first/a"]], 0)
    optimizer = tinyjax.with_birth(optax.adam(1e-2))
    losses = []
    for record_ in tinyjax.fit(
        loss_fn, params, [batch] * 12, optimizer, tinyjax.every(5, 1, final=2), jax.random.key(0),
        num_neurons=1, sites=chosen, trainable=lambda p: p["adapters"],
    ):  # fmt: skip
        losses.append(float(record_.loss))
        last = record_
    assert last.width == {chosen.name: 2} and losses[-1] < losses[0]
    for name, kernel in base.items():
        np.testing.assert_array_equal(last.params["base"][name], kernel)
    for side, axis in (("a", 1), ("b", 0)):
        assert np.all(np.take(last.params["adapters"]["second"][side], [2, 3], axis=axis) == 0)
        assert np.all(last.params["adapters"]["first"][side] == 0)
