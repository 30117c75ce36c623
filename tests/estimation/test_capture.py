"""Capture: the loss is unchanged, inputs and V_goal are those of the operations (law 1), in every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.zoo import layers
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.sites import discover
from tinyjax.estimation.recording import capture

NAMES = ["plain", "transposed", "remat", "scan_over_layers", "scan_over_time", "siamese", "two_heads", "stop_gradient"]


def captured_gradients(loss_fn, params, batch):
    """Loss, and for every consumer leaf the gradient put together from inputs and V_goal, summed over its uses."""
    traced = trace(loss_fn, params, batch)
    paths = [path for found in discover(traced).paths.values() for path in found]
    uses = [consumer for path in paths for consumer in path.consumers]
    captured = capture(traced, jax.tree.leaves((params, batch)), uses, uses)
    grads = {}
    for use in uses:
        b = use.inputs.to_matrix(captured.inputs[use.op.path])
        g = use.outputs.to_matrix(captured.gradients[use.op.path])
        grads[use.leaf] = grads.get(use.leaf, 0) + use.kernel.from_matrix(jnp.swapaxes(b, -1, -2) @ g)
    return captured.loss, grads


def wanted(loss_fn, params, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return loss, {"/".join(k.key for k in path): g for path, g in jax.tree_util.tree_leaves_with_path(grads)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_identity(name, dtype, tolerance):
    """B' dL/da is the gradient of the leaf; in float32 to 5e-6 of its largest entry."""
    model = layers.MODELS[name]()
    params, batch = jax.tree.map(lambda x: x.astype(dtype), (model.params, model.batch))
    loss, grads = jax.jit(lambda p, b: captured_gradients(model.loss_fn, p, b))(params, batch)
    exact_loss, exact = jax.jit(lambda p, b: wanted(model.loss_fn, p, b))(params, batch)
    np.testing.assert_allclose(float(loss), float(exact_loss), rtol=max(tolerance, 1e-13))
    assert grads
    for leaf, grad in grads.items():
        error = jnp.abs(grad.astype("float64") - exact[leaf].astype("float64")).max()
        assert error <= tolerance * jnp.abs(exact[leaf].astype("float64")).max(), leaf


def test_half_precision_compute_with_single_precision_parameters():
    """A cast between the leaf and the product is a view of the leaf."""
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), (layers.two_layers(), layers.data(6, 5)))

    def loss_fn(p, b):
        p, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, b["x"]))
        return jnp.mean((layers.dense2(p, x).astype(jnp.float32) - b["t"]) ** 2)

    loss, grads = captured_gradients(loss_fn, params, batch)
    exact_loss, exact = wanted(loss_fn, params, batch)
    assert loss == exact_loss
    np.testing.assert_allclose(grads["u"], exact["u"], atol=0.02 * jnp.abs(exact["u"]).max())


def test_no_weight_gradient_is_computed():
    """The backward pass stops at the probes: no product has the shape of the first kernel."""
    model = layers.MODELS["plain"]()
    traced = trace(model.loss_fn, model.params, model.batch)
    (paths,) = discover(traced).paths.values()
    uses = list(paths[0].consumers)
    jaxpr = jax.make_jaxpr(lambda *xs: capture(traced, xs, uses, uses))(*jax.tree.leaves((model.params, model.batch)))
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
