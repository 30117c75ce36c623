"""S of the data, decomposed once: the same ridges, neurons and growths as when it is summed and factored anew."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.growth.test_grow_step import init, loss_fn, make
from tests.support import oracles
from tests.support.oracles import make_samples, record
from tinyjax.methods.solvers.live import input_root
from tinyjax.statistics.averages import moments
from tinyjax.statistics.slices import keep_half
from tinyjax.statistics.spectra import decompose

noisy = make_samples(0, n=40, inputs=8, slots=6, live=4, signal=2.0)


def with_spectra(statistics):
    return dataclasses.replace(statistics, spectra=decompose(statistics.gram_prev, statistics.count))


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_a_spectrum_solves_as_the_normal_equations(ridge):
    known = with_spectra(record(noisy))
    rows = {2: slice(None), 0: slice(0, None, 2), 1: slice(1, None, 2)}
    for part, statistics in ((2, known), (0, keep_half(known, 0)), (1, keep_half(known, 1))):
        root = input_root(moments(statistics), ridge)
        got = root.unwhiten(root.whiten(moments(statistics).cross_prev))
        want = oracles.ridge_solution(noisy.b_prev[rows[part]], noisy.v[rows[part]], ridge)
        np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize(
    "method", [tinyjax.methods.tiny, tinyjax.methods.fisher_tiny, tinyjax.methods.tiny_unprojected]
)
def test_methods_find_the_same_neurons(method):
    statistics = record(noisy, energy_matrix=True)
    plain, known = (jax.jit(partial(method, num_neurons=3))(s) for s in (statistics, with_spectra(statistics)))
    chex.assert_trees_all_close(known, plain, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        tinyjax.methods.held_out_ridge(with_spectra(statistics)), tinyjax.methods.held_out_ridge(statistics), rtol=1e-12
    )


def test_growths_are_the_same_and_only_the_layer_that_reads_the_data_is_known():
    params, batch, sites = make()
    inputs = tinyjax.growth.decompose_inputs(loss_fn, params, batch, sites)
    assert set(inputs) == {"0"}
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2)
    want, plain = grow_step(params, batch)
    got, info = grow_step(params, batch, inputs=inputs)
    assert np.all(info.written["0"] > 0)
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-9)
    chex.assert_trees_all_close(info, plain, rtol=1e-6, atol=1e-9)


def test_inputs_of_another_batch_are_refused():
    params, batch, sites = make()
    wide = {"x": jnp.pad(batch["x"], ((0, 0), (0, 1))), "y": batch["y"]}
    other = init(jax.random.key(0), (7, 12, 12, 2))
    inputs = tinyjax.growth.decompose_inputs(loss_fn, other, wide, tinyjax.find_sites(loss_fn, other, wide))
    with pytest.raises(ValueError, match="site `0` has S of shape"):
        tinyjax.make_grow_step(loss_fn, sites, num_neurons=2)(params, batch, inputs=inputs)


def test_tangents_along_parameters_are_no_data():
    """What values do depends on the weights of attention, although they are made from the data itself."""
    rng = np.random.default_rng(5)
    shapes = {"q": (3, 2), "k": (3, 2), "v": (3, 4), "o": (4, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(8, 5, 3)))

    def loss_fn(p, x):
        weights = jax.nn.softmax(x @ p["q"] @ jnp.swapaxes(x @ p["k"], 1, 2), axis=-1)
        return jnp.mean((weights @ (x @ p["v"]) @ p["o"]) ** 2)

    site = tinyjax.find_sites(loss_fn, params, x)["v"]
    assert site.growable and site.kind == "attention values"
    assert not tinyjax.growth.decompose_inputs(loss_fn, params, x, site)
