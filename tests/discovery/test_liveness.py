"""What the loss does not depend on says nothing about the network: the sites are those of the loss alone."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tinyjax
from tests.support.site_laws import assert_laws
from tests.support.zoo.layers import data, draw
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.liveness import behind_loss
from tinyjax.discovery.graph.tracing import trace

PARAMS = draw(1, w=(5, 6), b=(6,), u=(6, 3))
BATCH = data(8, 5)
SHAPE = jax.ShapeDtypeStruct((), jnp.float64)


def loss_with(watch, *, has_aux=False):
    """A two-layer network whose hidden layer is given to `watch`, which returns it, and something besides."""

    def loss_fn(p, b):
        h, more = watch(jnp.tanh(b["x"] @ p["w"] + p["b"]), p, b)
        loss = jnp.mean((h @ p["u"] - b["t"]) ** 2)
        return (loss, more) if has_aux else loss

    return loss_fn


def entropy(h, p, b):
    return h, {"entropy": -(jax.nn.softmax(h) * jax.nn.log_softmax(h)).sum(-1).mean(), "norm": jnp.linalg.norm(p["w"])}


def histogram(h, p, b):
    return h, (jnp.histogram(h, bins=4)[0], jnp.sort(h.ravel())[:3], h[:, :2])


def accuracy(h, p, b):
    return h, jnp.mean(jnp.argmax(h @ p["u"], -1) == jnp.argmax(b["t"], -1))


def correlation(h, p, b):
    return h, jnp.linalg.norm(h.T @ h - jnp.eye(h.shape[1]))


def printed(h, p, b):
    jax.debug.print("{} {}", h.mean(), jnp.quantile(h, 0.5))
    return h, None


def watched(h, p, b):
    jax.debug.callback(lambda x: None, h.reshape(-1, 2).max(0))
    return h, None


def unused_results(h, p, b):
    jax.pure_callback(lambda x: x, SHAPE, h.sum())
    jax.experimental.io_callback(lambda x: x, SHAPE, h.max(), ordered=True)
    return h, None


def dead_branch_and_carry(h, p, b):
    kept, _ = jax.lax.cond(b["x"][0, 0] > 0, lambda h: (h.mean(), h.std()), lambda h: (h.max(), h.min()), h)
    (_, total), _ = jax.lax.scan(lambda c, x: ((c[0] + 1, c[1] + x.sum()), x.max()), (0, kept), h)
    return h, total


def checked(h, p, b):
    return eqx.error_if(h, jnp.any(~jnp.isfinite(h)) | (h.sum() > 1e6), "not finite"), None


def switched_check(h, p, b):
    """A check by hand: one branch returns its operand, the others what a callback that raises would."""

    def fail(h):
        return jax.pure_callback(lambda: np.zeros(h.shape), jax.ShapeDtypeStruct(h.shape, h.dtype))

    return jax.lax.switch((h.max() > 1e6).astype(int), [lambda h: h, fail], h), None


def fenced(h, p, b):
    h, _ = jax.lax.optimization_barrier((h, h.mean()))
    return jax.named_call(lambda h: h, name="same")(h), None


WATCHES = [
    entropy, histogram, accuracy, correlation, printed, watched, unused_results, dead_branch_and_carry, checked,
    switched_check, fenced,
]  # fmt: skip


@pytest.mark.parametrize("watch", WATCHES, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("has_aux", [False, True])
def test_what_the_loss_does_not_depend_on(watch, has_aux):
    plain = tinyjax.find_sites(loss_with(lambda h, p, b: (h, None)), PARAMS, BATCH)
    assert plain.growable.names == ("w",)
    assert tinyjax.find_sites(loss_with(watch, has_aux=has_aux), PARAMS, BATCH, has_aux=has_aux) == plain


@pytest.mark.parametrize("watch", [entropy, checked])
def test_the_laws_hold_beside_metrics_and_checks(watch):
    assert_laws(loss_with(watch, has_aux=True), PARAMS, BATCH, has_aux=True)


def test_what_decides_between_branches_is_not_dead():
    def loss_fn(p, b):
        h = jnp.tanh(b["x"] @ p["w"])
        scale = jax.lax.cond(h.mean() > 0, lambda x: 2 * x, lambda x: x, b["x"][0, 0])
        return jnp.mean((h @ p["u"]) ** 2) * scale

    site = tinyjax.find_sites(loss_fn, draw(1, w=(5, 6), u=(6, 3)), BATCH)["w"]
    assert not site.growable and "reduce_sum" in site.reason


def test_a_carry_that_only_the_next_step_reads_is_not_dead():
    """The last state of the recurrence is thrown away, the outputs of its steps are not."""

    def loss_fn(p, b):
        def step(h, x):
            return jnp.tanh(x @ p["w"] + h @ p["r"]), h @ p["u"]

        _, out = jax.lax.scan(step, jnp.zeros((8, 6)), b["x"].swapaxes(0, 1))
        return jnp.mean(out**2)

    graph = flatten(trace(loss_fn, draw(1, w=(5, 6), r=(6, 6), u=(6, 3)), data(8, 4, 5)))
    assert sum(op.name == "dot_general" for op in graph.ops) == 3
    assert set(graph.params) <= behind_loss(graph)


class Normed(nn.Module):
    """A normalised layer in training, whose activations are sown; metrics of it come with the new statistics."""

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(6, name="hidden")(x))
        self.sow("intermediates", "seen", nn.softmax(h))
        return nn.Dense(3, name="head")(jnp.tanh(h)), {"spread": h.std(), "order": jnp.sort(h, axis=-1)}


@partial(jax.jit, static_argnames="report")
def normed_loss(variables, batch, report=True):
    mutable = ["batch_stats", "intermediates"] if report else ["batch_stats"]
    (out, metrics), updates = Normed().apply(variables, batch["x"], mutable=mutable)
    return jnp.mean((out - batch["t"]) ** 2), {**updates, **(metrics if report else {})}


def test_new_running_statistics_beside_metrics_keep_their_roles():
    variables = Normed().init(jax.random.key(0), BATCH["x"])
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    found, plain = (
        tinyjax.find_sites(partial(normed_loss, report=report), variables, BATCH, has_aux=True)
        for report in (True, False)
    )
    assert found == plain
    norm = found["hidden"].norm
    assert norm is not None and norm.mean == "batch_stats/norm/mean" and norm.var == "batch_stats/norm/var"


def test_a_leaf_that_only_a_metric_reads_stays_a_member():
    """It would have another shape than the layer that it reads after a resize."""
    params = draw(1, w=(5, 6), b=(6,), u=(6, 3), probe=(6, 2))
    loss_fn = loss_with(lambda h, p, b: (h, (jax.lax.stop_gradient(h) @ p["probe"]).argmax(-1)), has_aux=True)
    site = tinyjax.find_sites(loss_fn, params, BATCH, has_aux=True)["w"]
    assert "probe" in {member.leaf for member in site.members}
