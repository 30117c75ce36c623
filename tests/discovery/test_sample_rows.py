"""Rows that are the samples in another guise: views side by side, maps and scans over samples, micro-batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tinyjax
from tests.support.site_laws import assert_laws
from tests.support.zoo.layers import data, draw
from tinyjax.discovery.dimensions.loss_form import coupling
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.sites import discover
from tinyjax.statistics.averages import moments

N = 12
PARAMS = draw(1, w=(5, 6), u=(6, 3))
BATCH = data(N, 5) | {"y": data(N, 5, seed=3)["x"], "z": data(N, 5, seed=4)["x"]}
TOKENS = data(N, 4, 5) | {"y": data(N, 4, 5, seed=3)["x"]}


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["u"]


def two_views(p, b):
    first, second = jnp.split(net(p, jnp.concatenate([b["x"], b["y"]])), 2)
    return jnp.mean((first - b["t"]) ** 2) + jnp.mean((first - second) ** 2)


def three_views(p, b):
    """Side by side two times over, and cut by hand."""
    n = len(b["x"])
    out = net(p, jnp.concatenate([jnp.concatenate([b["x"], b["y"]]), b["z"]]))
    triplet = jnp.tanh(jnp.sum((out[:n] - out[n : 2 * n]) ** 2 - (out[:n] - out[2 * n :]) ** 2, -1))
    return jnp.mean(triplet) + jnp.mean((out[:n] - b["t"]) ** 2)


def views_of_tokens(p, b):
    out = net(p, jnp.concatenate([b["x"], b["y"]])).mean(1)
    return jnp.mean((out[: len(b["x"])] - b["t"].mean(1)) ** 2) + jnp.mean(out[len(b["x"]) :] ** 4)


def mapped(p, b):
    one = lambda sample: jnp.mean((net(p, sample["x"]) - sample["t"]) ** 2)  # noqa: E731
    return jnp.mean(jax.lax.map(one, b))


def mapped_in_groups(p, b):
    out = jax.lax.map(lambda x: net(p, x), b["x"], batch_size=4)
    return jnp.mean((out - b["t"]) ** 2)


def micro_batches(p, b):
    parts = jax.tree.map(lambda x: x.reshape(-1, 4, *x.shape[1:]), b)
    add = lambda total, part: (total + jnp.mean((net(p, part["x"]) - part["t"]) ** 2), None)  # noqa: E731
    total, _ = jax.lax.scan(add, 0.0, parts)
    return total / len(parts["x"])


def micro_batches_of_tokens(p, b):
    x, t = (b[name].reshape(-1, 2, *b[name].shape[1:]) for name in ("x", "t"))
    _, losses = jax.lax.scan(lambda c, part: (c, jnp.mean((net(p, part[0]) - part[1]) ** 2)), (), (x, t), reverse=True)
    return losses.mean()


def head_outside(p, b):
    """The network in a map, what judges it outside."""
    out = jax.lax.map(lambda x: net(p, x), b["x"])
    return jnp.mean(jnp.log1p(jnp.exp(out @ jnp.ones((3, 2)))) ** 2)


def stacked_views(p, b):
    out = net(p, jnp.stack([b["x"], b["y"]]).reshape(-1, 5)).reshape(2, -1, 3)
    return jnp.mean((out[0] - b["t"]) ** 2) + jnp.mean(out[1] ** 4)


def masked_views(p, b):
    """Every view with a mask of its rows of its own."""
    mask = (b["t"][:, :1] > 0) * 1.0
    h = jnp.tanh(jnp.concatenate([b["x"], b["y"]]) @ p["w"]) * jnp.concatenate([mask, 1 - mask])
    return jnp.mean((h @ p["u"] - 1) ** 2)


def rolled(p, b):
    """Neighbours in the batch are compared, behind the network."""
    out = net(p, b["x"])
    return jnp.mean((out - jnp.roll(out, 1, axis=0)) ** 2) + jnp.mean(out[: len(out) // 2] ** 4)


LOSSES = [
    two_views, three_views, stacked_views, masked_views, rolled, mapped, mapped_in_groups, micro_batches, head_outside,
]  # fmt: skip


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: f.__name__)
def test_the_laws_hold_whatever_the_samples_pass_through(loss_fn):
    assert_laws(loss_fn, PARAMS, BATCH)


@pytest.mark.parametrize("loss_fn", [views_of_tokens, micro_batches_of_tokens], ids=lambda f: f.__name__)
def test_the_laws_hold_for_tokens(loss_fn):
    assert_laws(loss_fn, PARAMS, TOKENS)


def direct(p, b):
    return jnp.mean((net(p, b["x"]) - b["t"]) ** 2)


@pytest.mark.parametrize("loss_fn", [mapped, mapped_in_groups, micro_batches], ids=lambda f: f.__name__)
def test_a_scan_over_samples_gives_the_sums_of_the_batch(loss_fn):
    """Also sample by sample: the even and the odd ones are the same in both."""

    def sums_of(loss_fn):
        site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
        return jax.jit(lambda p: tinyjax.estimate(loss_fn, p, BATCH, site))(PARAMS)

    sums = map(sums_of, (loss_fn, direct))
    chex.assert_trees_all_close(*sums, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_fn", [two_views, mapped], ids=lambda f: f.__name__)
def test_chunks_of_views_and_maps(loss_fn):
    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    whole, parts = (
        jax.jit(lambda p, chunk=chunk: tinyjax.estimate(loss_fn, p, BATCH, site, chunk=chunk))(PARAMS)
        for chunk in (None, 4)
    )
    chex.assert_trees_all_close(parts, whole, rtol=1e-12, atol=1e-13)


def carried(p, b):
    total, _ = jax.lax.scan(lambda c, s: (jnp.tanh(c + jnp.mean(net(p, s["x"]) ** 2)), None), 0.0, b)
    return total


def compared(p, b):
    """Every sample with all of them, one at a time."""
    every = net(p, b["x"])
    return jnp.mean(jax.lax.map(lambda s: jnp.mean(jnp.exp(-jnp.abs(net(p, s) - every))), b["y"]))


@pytest.mark.parametrize(
    ("loss_fn", "why"),
    [(carried, "from sample to sample"), (compared, "pairs the samples"), (micro_batches, "into parts of its own")],
)
def test_scans_that_couple_the_samples(loss_fn, why):
    found = discover(trace(loss_fn, PARAMS, BATCH))
    assert found.sites["w"].growable
    assert why in coupling(found.graph, found.axes)


def half(p, b):
    n = len(b["x"]) // 2
    return jnp.mean((net(p, b["x"][:n]) - b["t"][:n]) ** 2)


def uneven(p, b):
    return jnp.mean(net(p, jnp.concatenate([b["x"], b["y"][: len(b["y"]) // 2]])) ** 2)


def every_other(p, b):
    return jnp.mean(net(p, b["x"][::2]) ** 2)


def prototypes(p, b):
    return jnp.mean((net(p, jnp.eye(5)).mean(0) - b["t"]) ** 2)


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (half, "`u` reads rows that are not all the samples: of them, it passes through `slice`"),
        (uneven, "`u` reads rows that are not all the samples: of them, it is a concatenation"),
        (every_other, "`u` reads rows that are not all the samples"),
        (prototypes, "the input of `u` does not depend on the samples"),
    ],
)
def test_rows_that_are_not_the_samples_are_refused_by_what_they_are(loss_fn, reason):
    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    assert not site.growable and reason in site.reason, site.reason


def attention(p, x):
    scores = (x @ p["q"]) @ jnp.swapaxes(x @ p["k"], -1, -2)
    return jax.nn.softmax(scores) @ (x @ p["v"]) @ p["o"]


def attention_of_views(p, b):
    first, second = jnp.split(attention(p, jnp.concatenate([b["x"], b["y"]])), 2)
    return jnp.mean((first - b["t"]) ** 2) + jnp.mean((first - second) ** 2)


def attention_mapped(p, b):
    return jnp.mean(jax.lax.map(lambda s: jnp.mean((attention(p, s["x"]) - s["t"]) ** 2), b))


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [(attention_of_views, "several batches side by side"), (attention_mapped, "in a scan that is not over layers")],
    ids=["views", "mapped"],
)
def test_values_of_attention_grow_and_scores_say_why_not(loss_fn, reason):
    params = draw(2, q=(5, 4), k=(5, 4), v=(5, 6), o=(6, 3))
    sites = tinyjax.find_sites(loss_fn, params, TOKENS)
    assert not sites["q"].growable and reason in sites["q"].reason
    assert_laws(loss_fn, params, TOKENS, "v", readers=("o",))


def test_a_residual_stream_of_two_views():
    """Law 1 for what every group of readers is asked."""
    params = draw(1, e=(5, 6), a=(6, 7), b=(7, 6), h=(6, 3))

    def loss_fn(p, b):
        s = jnp.concatenate([b["x"], b["y"]]) @ p["e"]
        first, second = jnp.split((s + jnp.tanh(s @ p["a"]) @ p["b"]) @ p["h"], 2)
        return jnp.mean((first - b["t"]) ** 2) + jnp.mean((first - second) ** 4)

    site = tinyjax.find_sites(loss_fn, params, BATCH)["e"]
    assert [kernel.leaf for kernel in site.consumers] == ["a", "h"]
    cross = jax.jit(lambda p: moments(tinyjax.estimate(loss_fn, p, BATCH, site)).cross)(params)
    gradient = jax.grad(loss_fn)(params, BATCH)
    for leaf, block in (("a", cross[:6, :7]), ("h", cross[6:, 7:])):
        np.testing.assert_allclose(block, -gradient[leaf], atol=1e-12 * np.abs(gradient[leaf]).max())


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False, momentum=0.0, name="norm")(nn.Dense(6, name="hidden")(x))
        return nn.Dense(3, name="head")(jnp.tanh(h))


def normed_views(variables, b):
    out, updates = Normed().apply(variables, jnp.concatenate([b["x"], b["y"]]), mutable=["batch_stats"])
    first, second = jnp.split(out, 2)
    return jnp.mean((first - b["t"]) ** 2) + jnp.mean((first - second) ** 2), updates


def test_a_batch_normalisation_over_two_views_is_the_identity_on_a_newborn():
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), Normed().init(jax.random.key(0), BATCH["x"]))
    sites = tinyjax.find_sites(normed_views, variables, BATCH, has_aux=True)
    grow = jax.jit(
        tinyjax.make_grow_step(normed_views, sites, num_neurons=1, has_aux=True, method=tinyjax.methods.random0)
    )
    new, info = grow(tinyjax.thin(variables, sites, 3), BATCH, jax.random.key(1))
    (born,) = np.flatnonzero(info.born["hidden"])
    dense, norm = (jax.tree.map(lambda x: x[..., born], new["params"][name]) for name in ("hidden", "norm"))
    z = np.concatenate([BATCH["x"], BATCH["y"]]) @ dense["kernel"] + dense["bias"]
    normalised = (z - z.mean()) / np.sqrt(z.var() + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(normalised, z, rtol=1e-12, atol=1e-13)


def encoded(p, b, name):
    return jnp.tanh(b[name] @ p["w"])


@pytest.mark.parametrize(
    ("join", "name"),
    [
        (lambda x, y: jnp.abs(x - y), "sub"),
        (lambda x, y: x * y, "mul"),
        (lambda x, y: jnp.maximum(x, y), "max"),
        (lambda x, y: jnp.concatenate([x, y]), "concatenate"),
        (lambda x, y: (x + y) / 2, "add"),
    ],
)
def test_two_uses_of_an_encoder_that_one_kernel_reads(join, name):
    def loss_fn(p, b):
        out = join(encoded(p, b, "x"), encoded(p, b, "y")) @ p["u"]
        return jnp.mean(out**2)

    site = tinyjax.find_sites(loss_fn, PARAMS, BATCH)["w"]
    assert not site.growable
    assert site.reason == f"`u` reads two products of `w` at once, which meet in `{name}`"


def test_two_uses_of_an_encoder_apart():
    """Each read by itself, by one kernel twice: rows of both, as ever."""

    def loss_fn(p, b):
        return jnp.mean(jnp.abs(encoded(p, b, "x") @ p["u"] - encoded(p, b, "y") @ p["u"]) ** 3)

    assert_laws(loss_fn, PARAMS, BATCH)
