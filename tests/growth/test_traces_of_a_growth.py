"""How often a growth calls the loss: once for each number of samples that it looks at, and looks through it once."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tinyjax.discovery import traced_loss

RNG = np.random.default_rng(0)
STATISTICS, SEARCH, ALL = 12, 4, 16


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 2)


def chain(params, x):
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def gated(params, x):
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["value"])) @ params["out"]


def scanned(params, x):
    def layer(x, kernels):
        return x + jax.nn.gelu(x @ kernels[0]) @ kernels[1], None

    return jax.lax.scan(layer, x, params)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        inner = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
        return nn.relu(x + nn.BatchNorm(use_running_average=False)(nn.Conv(2, (3, 3))(inner)))


IMAGES = normal(ALL, 4, 4, 2)
CASES = {  # parameters, model, batch, options, discoveries
    "mlp": ([normal(3, 4), normal(4, 4), normal(4, 2)], chain, normal(ALL, 3), {}, 1),
    "estimated again": ([normal(3, 4), normal(4, 4), normal(4, 2)], chain, normal(ALL, 3), dict(refresh=True), 1),
    "twins": ([normal(3, 4), normal(4, 2)], chain, normal(ALL, 3), dict(orient=tinyjax.growth.better_twins), 1),
    "gated": (dict(gate=normal(3, 4), value=normal(3, 4), out=normal(4, 2)), gated, normal(ALL, 3), {}, 1),
    "scan": ((normal(2, 3, 4), normal(2, 4, 3)), scanned, normal(ALL, 3), {}, 1),
    "batch norm": (Block().init(jax.random.key(0), IMAGES), Block().apply, IMAGES, dict(has_aux=True), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_growth_calls_the_loss_once_for_each_number_of_samples(name, monkeypatch):
    params, model, batch, options, discoveries = CASES[name]
    calls, looked = collections.Counter(), collections.Counter()

    def loss(params, x):
        calls[len(x)] += 1
        if "has_aux" in options:
            z, aux = model(params, x, mutable=["batch_stats"])
            return jnp.mean(z**2), aux
        return jnp.mean(model(params, x) ** 2)

    for function in (traced_loss.trace, traced_loss.discover):

        def counted(*args, function=function, **kwargs):
            looked[function.__name__] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(traced_loss, function.__name__, counted)
    sites = tinyjax.find_sites(loss, params, batch, has_aux="has_aux" in options).growable
    grow_step = tinyjax.make_grow_step(loss, sites, num_neurons=1, **options)
    jax.clear_caches()
    calls.clear()
    jax.jit(grow_step).trace(params, batch, jax.random.key(0))
    assert sites and calls == {STATISTICS: 1, SEARCH: 1, ALL: 1}
    # Accepting a step needs no discovery: without a normalisation, whose births see all samples, two traces suffice.
    assert looked == {"trace": 1 + discoveries, "discover": discoveries}


def test_batches_of_one_shape_are_looked_through_once(monkeypatch):
    found = []
    discover = traced_loss.discover
    monkeypatch.setattr(traced_loss, "discover", lambda traced: found.append(traced) or discover(traced))
    params, x = CASES["mlp"][0], normal(3, 8, 3)

    def loss(params, x):
        return jnp.mean(chain(params, x) ** 2)

    site = tinyjax.find_sites(loss, params, x[0]).growable[0]
    together = tinyjax.estimate(loss, params, iter(x), site)
    assert len(found) == 1
    whole = tinyjax.estimate(loss, params, x.reshape(24, 3), site)
    np.testing.assert_allclose(together.gram.sum(0), whole.gram.sum(0), rtol=1e-12)
