"""How often a loss is traced and looked through: once for all arguments of the same shapes, anew for any others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tinyjax.discovery.traced_loss import TracedLoss

RNG = np.random.default_rng(0)
N = 16  # statistics on 12 samples, searches on 4


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) / 2)


def chain(params, batch):
    x, y = batch
    for kernel in params["hidden"]:
        x = jnp.tanh(x @ kernel)
    return jnp.mean((x @ params["out"] - y) ** 2)


PARAMS = {"hidden": [normal(3, 5), normal(5, 4)], "out": normal(4, 2)}
BATCH = normal(N, 3), normal(N, 2)


def test_equal_shapes_are_one_trace_and_one_discovery():
    loss = TracedLoss(chain)
    other = jax.tree.map(lambda x: 2 * np.asarray(x), (PARAMS, BATCH))
    abstract = jax.eval_shape(lambda: (PARAMS, BATCH))
    inside = []
    jax.jit(lambda p, b: inside.append((loss.trace(p, b), loss.discover(p, b))))(PARAMS, BATCH)
    for arguments in ((PARAMS, BATCH), other, abstract):
        assert loss.trace(*arguments) is inside[0][0]
        assert loss.discover(*arguments) is inside[0][1]


def half(x):
    return x[: N // 2]


OTHERS = {
    "shape": (PARAMS, jax.tree.map(half, BATCH)),
    "dtype": (PARAMS, (BATCH[0].astype(jnp.float32), BATCH[1])),
    "structure": (PARAMS, list(BATCH)),
    "weak type": (PARAMS | {"gain": 1.0}, BATCH),
    "strong type": (PARAMS | {"gain": jnp.ones(())}, BATCH),
    "key": (PARAMS | {"gain": jax.random.key(0)}, BATCH),
}


def test_other_shapes_are_other_traces():
    loss = TracedLoss(chain)
    traces = {"plain": loss.trace(PARAMS, BATCH)} | {name: loss.trace(*given) for name, given in OTHERS.items()}
    assert len({id(traced) for traced in traces.values()}) == len(traces)
    for name, given in OTHERS.items():
        assert [v.aval for v in traces[name].jaxpr.jaxpr.invars] == [jax.typeof(x) for x in jax.tree.leaves(given)]


def test_a_value_that_is_no_array_is_named():
    with pytest.raises(ValueError, match=r"`params`\['name'\] is a str, not an array"):
        TracedLoss(chain).trace(PARAMS | {"name": "mlp"}, BATCH)


def normalised(params, batch):
    x = batch[0] @ params["hidden"][0]
    x = jax.nn.relu((x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5))
    return jnp.mean((x[:, :4] @ params["out"] - batch[1]) ** 2), {"mean": x.mean(0)}


def test_the_loss_is_what_the_function_says():
    for loss_fn, has_aux in ((chain, False), (normalised, True)):
        loss = TracedLoss(loss_fn, has_aux)

        def plain(params, batch, loss_fn=loss_fn, has_aux=has_aux) -> Any:
            return loss_fn(params, batch)[0] if has_aux else loss_fn(params, batch)

        for transform in (lambda f: f, jax.jit, jax.value_and_grad):
            expected, found = (transform(f)(PARAMS, BATCH) for f in (plain, loss))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), expected, found)
        many = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
        expected, found = (jax.vmap(f, (0, None))(many, BATCH) for f in (plain, loss))
        np.testing.assert_allclose(expected, found, rtol=1e-12)


def test_what_a_loss_closes_over_may_be_traced():
    """Nothing of one transformation stays behind for the next."""

    def report(target):
        def loss(params, batch):
            return jnp.mean((jnp.tanh(batch @ params["hidden"][0]) @ params["hidden"][1] - target) ** 2)

        site = tinyjax.find_sites(loss, PARAMS, BATCH[0]).growable[0]
        return tinyjax.estimate(loss, PARAMS, BATCH[0], site).energy

    expected = [report(target) for target in (0.5, 2.0)]
    jitted = jax.jit(report)
    np.testing.assert_allclose([jitted(0.5), jitted(2.0)], expected, rtol=1e-12)
    np.testing.assert_allclose(jax.lax.map(report, jnp.array([0.5, 2.0])), expected, rtol=1e-12)
