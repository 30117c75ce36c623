"""Which losses are a mean over samples: the answer is compared with gradients of parts of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.zoo import layers
from tinyjax.discovery.dimensions.loss_form import coupling
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.sites import discover

N = 8
rng = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(rng.normal(size=(N, 3, 5))),
    "t": jnp.asarray(rng.normal(size=(N, 3, 3))),
    "y": jnp.arange(N) % 3,
    "m": jnp.asarray(rng.integers(0, 2, (N, 3)).astype(float)),
    "i": jnp.asarray(rng.permutation(N) % 2),
    "k": jax.random.key(3),
}


def z(p, b):
    return layers.dense2(p, b["x"])


def sq(p, b):
    return (z(p, b) - b["t"]) ** 2


def noisy(p, b, noise):
    return sq(p, b | {"x": b["x"] + noise}).mean()


def over_time(p, b, step, start):
    both = b["x"].swapaxes(0, 1), b["t"].swapaxes(0, 1)
    return jax.lax.scan(lambda c, s: (step(c, jnp.mean((layers.dense2(p, s[0]) - s[1]) ** 2)), None), start, both)[0]


SEPARABLE = {
    "mse": lambda p, b: sq(p, b).mean(),
    "sum_over_size": lambda p, b: sq(p, b).sum() / sq(p, b).shape[0],
    "per_sample_mask": lambda p, b: jnp.mean((sq(p, b).mean(-1) * b["m"]).sum(1) / (b["m"].sum(1) + 1)),
    "fixed_denominator": lambda p, b: (sq(p, b).mean(-1) * b["m"]).sum() / b["m"].size,
    "norm_of_sample": lambda p, b: jnp.sqrt(sq(p, b).mean((1, 2))).mean(),
    "shared_feature_noise": lambda p, b: noisy(p, b, jax.random.normal(b["k"], (5,))),
    "max_of_sample": lambda p, b: sq(p, b).max((1, 2)).mean(),
    "matmul_mean": lambda p, b: (jnp.ones(len(b["x"])) / len(b["x"])) @ sq(p, b).mean((1, 2)),
    "l2": lambda p, b: sq(p, b).mean() + jnp.sum(p["w"] ** 2),
    "two_terms": lambda p, b: sq(p, b).mean() - 0.1 * z(p, b).mean(),
    "list_of_terms": lambda p, b: jnp.mean(jnp.array([sq(p, b).mean(), z(p, b).mean()])),
    "scan_over_time": lambda p, b: over_time(p, b, lambda c, loss: c + loss, 0.0) / 3,
    "labels_arange": lambda p, b: -jax.nn.log_softmax(z(p, b)[:, 0])[jnp.arange(len(b["y"])), b["y"]].mean(),
    "labels_take": lambda p, b: -jnp.take_along_axis(jax.nn.log_softmax(z(p, b)[:, 0]), b["y"][:, None], 1).mean(),
    "labels_optax": lambda p, b: optax.softmax_cross_entropy_with_integer_labels(z(p, b)[:, 0], b["y"]).mean(),
    "focal": lambda p, b: optax.sigmoid_focal_loss(z(p, b)[:, 0], jax.nn.one_hot(b["y"], 3)).mean(),
    "cosine": lambda p, b: optax.cosine_distance(z(p, b), b["t"]).mean(),
    "kl": lambda p, b: optax.kl_divergence(jax.nn.log_softmax(z(p, b)), jax.nn.softmax(b["t"])).mean(),
}
COUPLED = {
    "batch_norm": (lambda p, b: jnp.mean((z(p, b) - z(p, b).mean(0)) ** 2), "batch normalisation"),
    "contrastive": (lambda p, b: jnp.mean(jax.nn.logsumexp(z(p, b)[:, 0] @ z(p, b)[:, 0].T, -1)), "pairs the samples"),
    "distances": (lambda p, b: jnp.mean((z(p, b)[:, None] - z(p, b)[None]) ** 2), "pairs the samples"),
    "rmse": (lambda p, b: jnp.sqrt(sq(p, b).mean()), "`sqrt`"),
    "masked_mean": (lambda p, b: (sq(p, b).mean(-1) * b["m"]).sum() / (b["m"].sum() + 1), "`div`"),
    "square_of_mean": (lambda p, b: sq(p, b).mean() ** 2, "through"),
    "product": (lambda p, b: sq(p, b).mean() * z(p, b).mean(), "`mul`"),
    "product_in_scan": (lambda p, b: over_time(p, b, lambda c, loss: c * loss, 1.0), "`mul`"),
    "dropout": (lambda p, b: noisy(p, b, jax.random.normal(b["k"], b["x"].shape)), "random"),
    "fixed_noise": (lambda p, b: noisy(p, b, jax.random.normal(jax.random.key(0), b["x"].shape)), "random"),
    "numbered": (lambda p, b: (sq(p, b).mean((1, 2)) * jnp.arange(len(b["x"]))).mean(), "from sample to sample"),
    "linspace": (
        lambda p, b: (sq(p, b).mean((1, 2)) * jnp.linspace(0, 1, len(b["x"]))).mean(),
        "from sample to sample",
    ),
    "picked": (lambda p, b: (z(p, b)[b["i"]] * b["t"]).mean(), "picks"),
    "reversed": (lambda p, b: (z(p, b)[len(b["x"]) - 1 - jnp.arange(len(b["x"]))] * b["t"]).mean(), "picks"),
    "flipped": (lambda p, b: (z(p, b)[::-1] * b["t"]).mean(), "`rev`"),
    "shuffled": (lambda p, b: (jax.random.permutation(b["k"], z(p, b)) * b["t"]).mean(), "picks"),
    "differences": (lambda p, b: (jnp.diff(z(p, b), axis=0) ** 2).sum() / len(b["x"]), "slice"),
    "maximum": (lambda p, b: sq(p, b).max(0).sum(), "`reduce_max`"),
    "cumulative": (lambda p, b: jnp.cumsum(sq(p, b), 0).mean(), "cumsum"),
    "branch_on_mean": (lambda p, b: jax.lax.cond(b["t"].mean() > 0, lambda x: x, jnp.sin, sq(p, b).mean()), "mean"),
}


def answer(loss_fn):
    discovery = discover(trace(loss_fn, layers.two_layers(), BATCH))
    return coupling(discovery.graph, discovery.axes)


def gap(loss_fn):
    """Largest difference between the gradient of the batch and the mean of those of its quarters."""
    grad = jax.jit(jax.grad(loss_fn))
    parts = [{k: v[i : i + 2] if v.ndim else v for k, v in BATCH.items()} for i in range(0, N, 2)]
    grads = [grad(layers.two_layers(), part) for part in parts]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), mean, grad(layers.two_layers(), BATCH))
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable(name):
    assert answer(SEPARABLE[name]) == ""
    assert gap(SEPARABLE[name]) < 1e-12


@pytest.mark.parametrize("name", COUPLED)
def test_coupled(name):
    loss_fn, word = COUPLED[name]
    assert word in answer(loss_fn)


@pytest.mark.parametrize("name", ["batch_norm", "masked_mean", "numbered", "picked", "product_in_scan"])
def test_coupled_losses_differ_in_parts(name):
    """The oracle is no rubber stamp: it tells these apart."""
    assert gap(COUPLED[name][0]) > 1e-4


@pytest.mark.parametrize("name", layers.MODELS)
def test_zoo(name):
    model = layers.MODELS[name]()
    discovery = discover(trace(model.loss_fn, model.params, model.batch, has_aux=model.has_aux))
    found = coupling(discovery.graph, discovery.axes)
    assert model.coupled in found and bool(found) == bool(model.coupled)
