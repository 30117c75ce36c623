"""Models in bfloat16: what is captured is rounded as the model rounds it, sums are kept in float32."""

import jax
import jax.numpy as jnp
import numpy as np

import tinyjax


def loss_fn(params, batch):
    x, y = batch
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["first"])
    return jnp.mean((x @ params["last"] - y).astype(jnp.float32) ** 2)


def example():
    rng = np.random.default_rng(0)
    shapes = {"first": (12, 6), "last": (6, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 3, jnp.bfloat16) for name, shape in shapes.items()}
    x, y = rng.normal(size=(500, 3, 4)) + 1, rng.normal(size=(500, 3))
    return params, (jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))


def test_sums_of_a_bfloat16_model_are_those_of_its_arrays_in_float32():
    params, batch = example()
    (site,) = tinyjax.find_sites(loss_fn, params, batch).growable
    found = jax.jit(lambda params, batch: tinyjax.estimate(loss_fn, params, batch, site, chunk=100))(params, batch)
    sums = [found.gram_prev, found.cross_prev, found.gram, found.cross, found.link, found.energy]
    assert {str(x.dtype) for x in sums} == {"float32"}
    x = np.asarray(batch[0], np.float64).reshape(500, -1)
    h = np.asarray(jax.nn.relu(batch[0].reshape(500, -1) @ params["first"]), np.float64)
    # bfloat16 sums of 250 squares would be wrong by 1e-2
    for half in range(2):
        np.testing.assert_allclose(found.gram_prev[half], x[half::2].T @ x[half::2], rtol=2e-6, atol=1e-3)
        np.testing.assert_allclose(found.gram[half], h[half::2].T @ h[half::2], rtol=2e-6, atol=1e-3)


def test_a_bfloat16_model_grows():
    params, batch = example()
    sites = tinyjax.find_sites(loss_fn, params, batch).growable
    params = tinyjax.thin(params, sites, 2)
    grown, info = jax.jit(tinyjax.make_grow_step(loss_fn, sites, num_neurons=2))(params, batch, jax.random.key(0))
    (name,) = sites.names
    assert int(info.width[name]) == 4 and float(info.loss_after[name]) <= float(info.loss_before[name])
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {jnp.dtype("bfloat16")}
