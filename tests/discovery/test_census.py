# ruff: noqa: E501
"""No hidden dimension is missed in silence: every model and its spelled-out twin tell the same dimensions.

A twin writes each matrix product as a broadcast, a multiplication and a sum. Sizes of hidden dimensions are 6, 7 and 9;
inputs, outputs, samples, tokens and vocabularies have other ones and must never be listed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tests.support.zoo.layers import draw
from tinyjax.discovery.sites import find_sites

HIDDEN = {6, 7, 9}
BATCH = draw(0, x=(8, 5), z=(8, 5), s=(8,), t=(8, 3), r=(8,)) | {
    "i": jnp.arange(8) % 4, "j": jnp.arange(8) % 2, "y": jnp.arange(8) % 3, "k": jax.random.key(0),
}  # fmt: skip


def plain(x, w):
    return x @ w


def spelled(x, w):
    return (x[..., :, None] * w).sum(-2)


def squared(y, t):
    return jnp.mean((y - t) ** 2)


# Each takes the product, the parameters and the batch, and gives the loss; what is hidden is said beside it.
MODELS = {
    "two layers": (lambda dot, p, b: squared(dot(jnp.tanh(dot(b["x"], p["w"])), p["u"]), b["t"]), [6]),
    "three layers": (lambda dot, p, b: squared(
        dot(jnp.sin(dot(jnp.tanh(dot(b["x"], p["w"]) + p["b"]), p["m"])), p["v"]), b["t"]), [6, 7]),
    "labels": (lambda dot, p, b: -jnp.mean(jnp.take_along_axis(
        jax.nn.log_softmax(dot(jnp.tanh(dot(b["x"], p["w"])), p["u"])), b["y"][:, None], 1)), [6]),
    "one-hot labels": (lambda dot, p, b: -jnp.mean(jnp.sum(
        jax.nn.one_hot(b["y"], 3) * jax.nn.log_softmax(dot(jnp.tanh(dot(b["x"], p["w"])), p["u"])), -1)), [6]),
    "no target": (lambda dot, p, b: jnp.mean(dot(jnp.tanh(dot(b["x"], p["w"])), p["u"]) ** 2), [6]),
    "autoencoder": (lambda dot, p, b: squared(dot(jnp.tanh(dot(b["x"], p["w"])), p["d"]), b["x"]), [6]),
    "variational": (lambda dot, p, b: (lambda m, s: squared(dot(m + jnp.exp(s) * jax.random.normal(b["k"], m.shape),
        p["d"]), b["x"]) + jnp.mean(jnp.sum(m**2 + jnp.exp(s) - s, -1)))(dot(b["x"], p["w"]), dot(b["x"], p["w2"])),
        [6]),
    "committee": (lambda dot, p, b: squared(jnp.tanh(dot(b["x"], p["w"])).sum(-1), b["r"]), [6]),
    "mean of units": (lambda dot, p, b: squared(jnp.tanh(dot(b["x"], p["w"])).mean(-1), b["r"]), [6]),
    "fixed votes": (lambda dot, p, b: squared(jnp.tanh(dot(b["x"], p["w"])) @ np.array([1.0, -1, 1, -1, 1, -1]), b["r"]),
        [6]),
    "maximum": (lambda dot, p, b: squared(dot(b["x"], p["w"]).max(-1), b["r"]), [6]),
    "logsumexp": (lambda dot, p, b: squared(jax.nn.logsumexp(dot(b["x"], p["w"]), -1), b["r"]), [6]),
    "median": (lambda dot, p, b: squared(jnp.sort(dot(b["x"], p["w"]), -1)[:, 3], b["r"]), [6]),
    "norm of units": (lambda dot, p, b: squared(jnp.linalg.norm(dot(b["x"], p["w"]), axis=-1), b["r"]), [6]),
    "two towers": (lambda dot, p, b: squared(jnp.sum(
        jnp.tanh(dot(b["x"], p["w"])) * jnp.tanh(dot(b["z"], p["w2"])), -1), b["r"]), [6]),
    "two towers, linear loss": (lambda dot, p, b: -jnp.mean(b["r"] * jnp.sum(
        jnp.tanh(dot(b["x"], p["w"])) * jnp.tanh(dot(b["z"], p["w2"])), -1)), [6]),
    "all pairs": (lambda dot, p, b: -jnp.mean(jnp.diagonal(jax.nn.log_softmax(
        dot(jnp.tanh(dot(b["x"], p["w"])), jnp.tanh(dot(b["z"], p["w2"])).T)))), [6]),
    "embeddings": (lambda dot, p, b: squared(jnp.sum(p["e"][b["i"]] * p["f"][b["j"]], -1), b["r"]), [6]),
    "embedding and layer": (lambda dot, p, b: squared(dot(jnp.tanh(p["e"][b["i"]]), p["u"]), b["t"]), [6]),
    "outer product": (lambda dot, p, b: squared(dot((jnp.tanh(dot(b["x"], p["w"]))[:, :, None] * jnp.tanh(
        dot(b["z"], p["q"]))[:, None]).reshape(8, 42), p["o"]), b["t"]), [6, 7]),
    "broadcast units": (lambda dot, p, b: squared(dot(jnp.tanh(b["s"][:, None] * p["b"] + p["b2"]), p["u"]), b["t"]), [6]),
    "broadcast units, summed": (lambda dot, p, b: squared((jnp.tanh(b["s"][:, None] * p["b"]) * p["b2"]).sum(-1), b["r"]),
        [6]),
    "radial units": (lambda dot, p, b: squared(dot(jnp.exp(-jnp.sum((b["x"][:, None] - p["w"].T) ** 2, -1)), p["u"]),
        b["t"]), [6]),
    "low rank": (lambda dot, p, b: squared(dot(dot(b["x"], p["w"]), p["u"]) + dot(b["x"], dot(p["w2"], p["u2"])), b["t"]),
        [6, 6]),
    "low rank of parameters": (lambda dot, p, b: squared(dot(b["x"], dot(p["w"], p["u"])), b["t"]), [6]),
    "permuted units": (lambda dot, p, b: squared(dot(jnp.tanh(dot(b["x"], p["w"][:, np.array([2, 1, 0, 3, 5, 4])])), p["u"]),
        b["t"]), [6]),
    "chosen kernel": (lambda dot, p, b: squared(dot(jnp.tanh(dot(b["x"], p["ws"][1])), p["u"]), b["t"]), [6]),
    "kernel by sample": (lambda dot, p, b: squared(dot(jnp.tanh(jax.vmap(dot)(b["x"], p["ws"][b["j"]])), p["u"]), b["t"]),
        [6]),
    "inputs beside units": (lambda dot, p, b: squared(dot(jnp.concatenate(
        [jnp.tanh(dot(b["x"], p["w"])), b["z"]], -1), p["c"]), b["t"]), [6]),
    "two inputs side by side": (lambda dot, p, b: squared(dot(jnp.concatenate([b["x"], b["z"]], -1), p["i"]), b["t"]), []),
    "a linear model": (lambda dot, p, b: squared(dot(b["x"], p["l"]) + p["c3"], b["t"]), []),
    "features of the data": (lambda dot, p, b: squared(dot(jnp.sin(b["x"] @ np.ones((5, 11))), p["g"]), b["t"]), []),
    "repeated units": (lambda dot, p, b: squared(dot(jnp.repeat(jnp.tanh(dot(b["x"], p["w"])), 2, -1), p["k"]), b["t"]), [6]),
    "weights on a grid": (lambda dot, p, b: squared(b["x"] * dot(np.ones((8, 5)), p["h"]), b["x"]), []),
}  # fmt: skip
PARAMS = draw(
    1, w=(5, 6), u=(6, 3), b=(6,), m=(6, 7), v=(7, 3), d=(6, 5), w2=(5, 6), u2=(6, 3), e=(4, 6), f=(2, 6), q=(5, 7),
    o=(42, 3), b2=(6,), ws=(2, 5, 6), c=(11, 3), i=(10, 3), l=(5, 3), c3=(3,), g=(11, 3), k=(12, 3), h=(5, 5),
)  # fmt: skip


class Used(dict):
    """Parameters that remember which of them are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def used(loss):
    params = Used(PARAMS)
    loss(params, BATCH)
    return {name: PARAMS[name] for name in params.read}


def dimensions(loss, params):
    sites = find_sites(loss, params, BATCH)
    assert all(site.growable or len(site.reason) > 10 for site in sites)
    assert len(set(sites.names)) == len(sites)
    return sorted(site.capacity for site in sites)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("product", [plain, spelled])
def test_a_model_and_its_twins_tell_the_same_dimensions(name, product):
    model, hidden = MODELS[name]
    loss = lambda p, b: model(product, p, b)  # noqa: E731
    assert dimensions(loss, used(loss)) == hidden


@pytest.mark.parametrize("name", MODELS)
def test_a_flat_vector_of_parameters_hides_nothing(name):
    model, hidden = MODELS[name]
    loss = lambda p, b: model(plain, p, b)  # noqa: E731
    flat, unravel = ravel_pytree(used(loss))
    assert dimensions(lambda theta, b: loss(unravel(theta), b), flat) == hidden


def test_the_reason_names_what_stands_in_the_way():
    def reason(loss, params):
        (site,) = find_sites(loss, params, BATCH)
        return site.name, site.reason

    w, u, e, b = (PARAMS[name] for name in "wueb")
    committee = lambda p, x: squared(jnp.tanh(x["x"] @ p["w"]).sum(-1), x["r"])  # noqa: E731
    assert reason(committee, {"w": w}) == (
        "w",
        "no matrix product with a parameter reads it: `reduce_sum` is taken over it",
    )
    units = lambda p, x: squared(jnp.tanh(x["s"][:, None] * p["b"]) @ p["u"], x["t"])  # noqa: E731
    assert "`b` meets the activations in `mul`" in reason(units, {"b": b, "u": u})[1]
    flat = lambda p, x: squared(jnp.tanh(x["x"] @ p[:30].reshape(5, 6)) @ p[30:].reshape(6, 3), x["t"])  # noqa: E731
    assert "reaches the matrix product through `slice`" in reason(flat, jnp.concatenate([w.ravel(), u.ravel()]))[1]
    tower = lambda p, x: squared(jnp.sum(p["e"][x["i"]] * (x["x"] @ p["w"]), -1), x["r"])  # noqa: E731
    assert "is taken over it" in reason(tower, {"e": e, "w": w})[1]


def test_einsums_of_three_operands():
    three = lambda p, x: squared(jnp.einsum("nd,dh,ho->no", x["x"], p["w"], p["u"]), x["t"])  # noqa: E731
    assert dimensions(three, {name: PARAMS[name] for name in "wu"}) == [6]
    towers = lambda p, x: squared(jnp.einsum("nd,dh,nh->n", x["x"], p["w"], p["e"][x["i"]]), x["r"])  # noqa: E731
    assert dimensions(towers, {name: PARAMS[name] for name in "we"}) == [6]
