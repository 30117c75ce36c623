"""Typed PRNG keys in a batch: one for each sample is divided with the samples, others are passed whole."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.support.site_laws import assert_laws
from tests.support.zoo.layers import data, draw
from tinyjax.core.batch import batch_size, take_samples
from tinyjax.discovery.dimensions.loss_form import coupling
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.sites import discover
from tinyjax.training.steps import train_epoch

N = 12
PARAMS = draw(1, w=(5, 6), u=(6, 3))
BATCH = data(N, 5) | {"key": jax.random.split(jax.random.key(0), N)}


def denoising(p, b):
    def one(x, t, key):
        noise, masking = jax.random.split(key)
        x = x + 0.1 * jax.random.normal(noise, x.shape)
        x = x * jax.random.bernoulli(masking, 0.8, x.shape)
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["u"] - t) ** 2)

    return jnp.mean(jax.vmap(one)(b["x"], b["t"], b["key"]))


def corrupted_labels(p, b):
    noise = jax.vmap(lambda key, t: t + jax.random.gumbel(jax.random.fold_in(key, 7), t.shape))(b["key"], b["t"])
    return jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["u"] - noise) ** 2)


def dropped_rows(p, b):
    keep = jax.vmap(jax.random.uniform)(b["key"]) > 0.3
    return jnp.mean(keep[:, None] * (jnp.tanh(b["x"] @ p["w"]) @ p["u"] - b["t"]) ** 2)


LOSSES = [denoising, corrupted_labels, dropped_rows]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_parts_of_a_batch_take_the_keys_of_their_samples(loss_fn):
    """Chunks, micro-batches and batches one by one give the sums of the whole: a sample keeps its draw."""
    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    traced = trace(loss_fn, PARAMS, BATCH)
    found = discover(traced)
    assert site.growable and coupling(found.graph, found.axes) == ""
    estimate = partial(tinyjax.estimate, loss_fn, PARAMS, sites=site)
    whole = jax.jit(estimate)(BATCH)
    for option in ({"chunk": 4}, {"micro_batch": 6}):
        chex.assert_trees_all_close(jax.jit(partial(estimate, **option))(BATCH), whole, rtol=1e-12, atol=1e-13)
    parts = [jax.jit(estimate)(take_samples(BATCH, i, i + 6)) for i in (0, 6)]
    chex.assert_trees_all_close(tinyjax.statistics.merge(*parts).cross, whole.cross, rtol=1e-12, atol=1e-13)


def test_the_laws_hold_with_a_key_for_every_sample():
    assert_laws(denoising, PARAMS, BATCH)


def test_one_key_for_all_still_couples_the_samples():
    def loss_fn(p, b):
        noise = jax.random.normal(b["key"], b["x"].shape)
        return jnp.mean((jnp.tanh((b["x"] + noise) @ p["w"]) @ p["u"]) ** 2)

    found = discover(trace(loss_fn, PARAMS, BATCH | {"key": jax.random.key(0)}))
    assert "draws random numbers for the whole batch" in coupling(found.graph, found.axes)


def test_a_mask_drawn_along_the_hidden_axis_is_reported():
    def loss_fn(p, b):
        one = lambda x, key: jnp.mean((jnp.tanh(x @ p["w"]) * jax.random.bernoulli(key, 0.5, (6,)) @ p["u"]) ** 2)  # noqa: E731
        return jnp.mean(jax.vmap(one)(b["x"], b["key"]))

    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    assert not site.growable and "drawn along it" in site.reason


def test_growing_and_training_with_keys():
    batch = data(16, 5) | {"key": jax.random.split(jax.random.key(1), 16)}
    sites = tinyjax.find_sites(denoising, PARAMS, batch)
    params = tinyjax.thin(PARAMS, sites, 3)
    grow = jax.jit(tinyjax.make_grow_step(denoising, sites, num_neurons=1, method=tinyjax.methods.random0, update=None))
    grown, info = grow(params, batch, jax.random.key(2))
    assert int(info.width["w"]) == 4 and info.loss_after["w"] <= info.loss_before["w"]
    epoch = jax.jit(train_epoch(denoising, optax.sgd(0.1)))
    order = jnp.arange(16).reshape(2, 8)[::-1]
    _, _, losses = epoch(grown, optax.sgd(0.1).init(grown), batch, order)
    np.testing.assert_allclose(losses[0], denoising(grown, take_samples(batch, 8, 16)), rtol=1e-12)


def test_keys_of_another_number_are_passed_whole():
    batch = data(N, 5) | {"keys": jax.random.split(jax.random.key(0), 3)}
    assert batch_size(batch) == N
    assert take_samples(batch, 2, 7)["keys"].shape == (3,)
    assert trace(lambda p, b: jnp.mean(b["x"] @ p["w"]), PARAMS, batch).batched == (False, True, True)
    with pytest.raises(ValueError, match=r"`batch`\['keys'\] holds 3 PRNG keys for 12 samples.*one key a sample"):
        take_samples(batch, 3, 6)


def test_a_batch_of_nothing_but_keys():
    """What a generator is trained on."""
    keys = jax.random.split(jax.random.key(0), N)

    def loss_fn(p, b):
        seeds = jax.vmap(lambda key: jax.random.normal(key, (5,)))(b)
        return jnp.mean((jnp.tanh(seeds @ p["w"]) @ p["u"]) ** 2)

    assert batch_size(keys) == N
    assert tinyjax.find_sites(loss_fn, PARAMS, keys)["w"].growable
