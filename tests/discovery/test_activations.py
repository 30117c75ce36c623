"""The even part of activations at 0, and the activations read off the jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.paths.activations import curvature
from tinyjax.discovery.sites import discover, paths_of

KINK = np.sqrt(2 / np.pi)
CURVATURES = {
    "gelu": (jax.nn.gelu, 2 / np.sqrt(2 * np.pi)),
    "exact gelu": (lambda z: jax.nn.gelu(z, approximate=False), 2 / np.sqrt(2 * np.pi)),
    "silu": (jax.nn.silu, 0.5),
    "softplus": (lambda z: jax.nn.softplus(z) - jnp.log(2.0), 0.25),
    "square": (jnp.square, 2.0),
    "squared relu": (lambda z: jax.nn.relu(z) ** 2, 1.0),
    "elu": (jax.nn.elu, 0.5),  # the mean of both sides, 0 and 1
    "concave": (lambda z: jnp.sin(z) - z**2, -2.0),
    "relu": (jax.nn.relu, 0.5 * KINK),
    "leaky relu": (lambda z: jax.nn.leaky_relu(z, 0.2), 0.4 * KINK),
    "abs": (jnp.abs, KINK),
    "tanh": (jnp.tanh, 0.0),
    "sine": (jnp.sin, 0.0),
    "softsign": (jax.nn.soft_sign, 0.0),
    "hard tanh": (jax.nn.hard_tanh, 0.0),
    "identity": (lambda z: 2 * z, 0.0),
    "fourth power": (lambda z: z + z**4, 0.0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", CURVATURES)
def test_curvature_at_zero(name, dtype):
    activation, want = CURVATURES[name]
    got = curvature(lambda z: activation(z.astype(dtype)))
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=0 if want else 1e-12)


def test_the_parabola_of_a_kink_is_the_nearest_over_normal_inputs():
    z = np.random.default_rng(0).normal(size=400_000)
    columns = np.stack([np.ones_like(z), z**2 / 2], axis=1)
    nearest = np.linalg.lstsq(columns, np.maximum(z, 0) - z / 2, rcond=None)[0][1]
    np.testing.assert_allclose(curvature(jax.nn.relu), nearest, rtol=1e-2)


@pytest.mark.parametrize("name", ["gelu", "elu", "leaky relu", "tanh"])
def test_the_activation_is_read_off_the_model(name):
    activation, _ = CURVATURES[name]

    def loss_fn(params, x):
        return jnp.mean((activation(x @ params["w"] + params["b"]) @ params["u"]) ** 2)

    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4), "u": jnp.ones((4, 2))}
    x = jnp.ones((8, 3))
    (site,) = tinyjax.find_sites(loss_fn, params, x)
    (path,) = paths_of(discover(trace(loss_fn, params, x)), site)
    z = jnp.linspace(-3, 3, 11)
    np.testing.assert_allclose(path.activation(z), activation(z), rtol=1e-12, atol=1e-15)


def test_no_activation_is_read_where_rows_are_masked():
    def loss_fn(params, batch):
        return jnp.mean((jax.nn.gelu(batch["x"] @ params["w"]) * batch["mask"][:, None] @ params["u"]) ** 2)

    params = {"w": jnp.ones((3, 4)), "u": jnp.ones((4, 2))}
    batch = {"x": jnp.ones((8, 3)), "mask": jnp.ones(8)}
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    (path,) = paths_of(discover(trace(loss_fn, params, batch)), site)
    assert path.weights and path.activation is None
