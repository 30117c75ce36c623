"""Tracing: names, batch rules, scans and calls inlined, on every supported JAX."""

import jax
import jax.numpy as jnp
import pytest

from tests.support.zoo import layers
from tinyjax.core.batch import batch_size, has_samples
from tinyjax.discovery.graph.flattening import flatten, scan_counts
from tinyjax.discovery.graph.liveness import behind_loss
from tinyjax.discovery.graph.tracing import trace


def graph_of(name):
    model = layers.MODELS[name]()
    return flatten(trace(model.loss_fn, model.params, model.batch, has_aux=model.has_aux))


def test_names_and_samples():
    model = layers.MODELS["aux_and_key"]()
    traced = trace(model.loss_fn, model.params, model.batch, has_aux=True)
    assert traced.leaf_names == ("b", "c", "u", "w")
    assert dict(zip(sorted(model.batch), traced.batched)) == {"key": False, "level": False, "t": True, "x": True}
    assert traced.num_samples == batch_size(model.batch) == 6
    assert not has_samples(jax.random.key(0), 6) and not has_samples(1.0, 6) and has_samples(jnp.ones(6), 6)


@pytest.mark.parametrize("name", ["nested_jit", "remat", "vmapped", "scan_over_layers", "nested_scans", "linen_scan"])
def test_calls_are_inlined(name):
    """Every product of the model is an operation of its own, with an address of its own."""
    graph = graph_of(name)
    products = [op for op in graph.ops if op.name == "dot_general"]
    assert len({op.path for op in graph.ops if op.eqn is not None}) == sum(op.eqn is not None for op in graph.ops)
    assert len(products) >= 2
    assert not {"jit", "pjit", "scan", "checkpoint", "remat", "custom_jvp_call"} & {op.name for op in graph.ops}


@pytest.mark.parametrize(("name", "lengths"), [("scan_over_layers", (3,)), ("nested_scans", (2, 3)), ("plain", ())])
def test_scans_around_a_product(name, lengths):
    products = [op for op in graph_of(name).ops if op.name == "dot_general"]
    assert products[0].stack == lengths
    assert products[0].scans == products[1].scans


@pytest.mark.parametrize("num_consts", [0, 2])
def test_scan_counts(num_consts):
    """Constants, carries and slices of a scan, however this JAX writes them down."""
    a, b = jnp.ones(3), jnp.ones(3)

    def run(xs):
        step = lambda c, x: ((c[0] + x[0].sum() * (a.sum() + b.sum() if num_consts else 1), 2 * c[1]), x[1])  # noqa: E731
        return jax.lax.scan(step, (0.0, jnp.ones(2)), xs)

    jaxpr = jax.make_jaxpr(lambda a_, b_, xs: run(xs))(a, b, (jnp.ones((5, 3)), jnp.ones((5, 4))))
    (scan,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scan_counts(scan).carry == 2
    assert scan_counts(scan).consts == len(scan.invars) - 4


def test_auxiliary_outputs_are_left_out():
    graph = graph_of("aux_and_key")
    assert {v for op in graph.ops for v in op.outs} <= behind_loss(graph)
    names = {op.name for op in graph.ops}
    assert "sqrt" not in names  # the norm in the auxiliary output
    assert "dot_general" in names


def test_stack_of_jax_is_not_the_slice_of_a_scan():
    """JAX has primitives called `stack` and `unstack`."""

    def loss_fn(p, b):
        first, second = jnp.unstack(jnp.stack([b["x"] @ p["w"], b["t"]], axis=1), axis=1)
        return jnp.mean(first * second)

    batch = layers.data(6, 5)
    ops = flatten(trace(loss_fn, layers.draw(w=(5, 3)), batch)).ops
    assert not {"scan_in", "scan_out"} & {op.name for op in ops}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": jnp.ones((0, 3))}, "empty"),
        ({"x": jnp.ones((2, 3)), "y": jnp.ones(3)}, "leading axis"),
        ({"n": 3.0}, "no array with a leading sample axis"),
        ({"x": jnp.ones((2, 3)), "k": jnp.zeros(2, jnp.uint32)}, "jax.random.key"),
    ],
)
def test_bad_batches(batch, message):
    with pytest.raises(ValueError, match=message):
        batch_size(batch)
