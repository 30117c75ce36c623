"""The loss along a path, prepared: the same numbers as the loss itself, at a fraction of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.zoo import images, layers
from tinyjax.discovery.graph.tracing import trace
from tinyjax.growth.line_loss import loss_along

AMPLITUDES = jnp.array([-0.7, 0.0, 1.3])
FLAT = ("plain", "nested_jit", "remat", "scan_over_layers", "aux_and_key", "transformer_block", "l2_penalty")
ZOO = {name: layers.MODELS[name] for name in FLAT} | {
    name: builder for table in (images.NORMALISED, images.KINKED) for name, builder in list(table.items())[:2]
}


def directions(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), params)


@pytest.mark.parametrize("name", ZOO)
def test_the_loss_at_every_amplitude(name):
    """Half of the leaves move straight, a quarter on a curve, a quarter not at all; and each half in turn."""
    model = ZOO[name]()
    traced = trace(model.loss_fn, model.params, model.batch, has_aux=model.has_aux)
    leaves, structure = jax.tree.flatten(model.params)
    ways = jax.tree.leaves(directions(model.params))

    def both(offset):
        straight = {i for i in range(len(leaves)) if (i + offset) % 4 in (0, 1)}
        curved = {i for i in range(len(leaves)) if (i + offset) % 4 == 2}

        def path(c):
            new = [x + (c if i in straight else c**2) * d for i, (x, d) in enumerate(zip(leaves, ways))]
            moved = straight | curved
            return jax.tree.unflatten(structure, [n if i in moved else x for i, (n, x) in enumerate(zip(new, leaves))])

        def direct(c):
            out = model.loss_fn(path(c), model.batch)
            return out[0] if model.has_aux else out

        prepared = loss_along(traced, model.params, model.batch, path, straight)
        return jax.vmap(prepared)(AMPLITUDES), jax.vmap(direct)(AMPLITUDES)

    for got, want in jax.jit(lambda: [both(0), both(2)])():
        assert len(np.unique(np.asarray(want))) > 1
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_what_does_not_move_is_computed_once():
    """Before the moving layer nothing is left to do at an amplitude, and its own product is made twice in all."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(5, 5))) for _ in range(4)]
    x = jnp.asarray(rng.normal(size=(7, 5)))

    def loss_fn(params, batch):
        for w in params:
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    def search(params, x):
        def path(c):
            return [params[0], params[1], params[2] + c * params[0], params[3]]

        loss_at = loss_along(trace(loss_fn, params, x), params, x, path, {2})
        return jax.lax.map(loss_at, AMPLITUDES)

    jaxpr = jax.make_jaxpr(search)(params, x)
    outside = [eqn.primitive.name for eqn in jaxpr.eqns]
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    inside = [eqn.primitive.name for eqn in loop.params["jaxpr"].eqns]
    assert (outside.count("dot_general"), inside.count("dot_general")) == (4, 1)
