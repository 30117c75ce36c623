"""Losses that sum over their samples are told from means; the answer is compared with losses of repeated batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.discovery.test_sample_coupling import BATCH, COUPLED, SEPARABLE, N, over_time, sq, z
from tests.support.zoo import layers
from tinyjax.core.batch import take_samples
from tinyjax.discovery.dimensions.loss_form import require_mean
from tinyjax.discovery.traced_loss import TracedLoss

PARAMS = layers.two_layers()
ONES = np.ones(3) / 3


def sample_by_sample(p, b, term):
    """Terms of the samples, added up in a scan over them."""
    return jax.lax.scan(lambda c, loss: (c + term(loss), None), 0.0, sq(p, b).mean((1, 2)))[0]


def in_parts(p, b):
    """Means of parts of a batch, added up in a scan."""
    return jax.lax.scan(lambda c, loss: (c + loss.mean(), None), 0.0, sq(p, b).reshape(-1, 2, *sq(p, b).shape[1:]))[0]


SUMS = {
    "sample_by_sample": lambda p, b: sample_by_sample(p, b, lambda loss: loss),
    "means_of_parts": in_parts,
    "sum": lambda p, b: sq(p, b).sum(),
    "sum_of_means": lambda p, b: sq(p, b).mean((1, 2)).sum(),
    "mean_over_time_only": lambda p, b: sq(p, b).sum() / 9,
    "over_a_fixed_batch_size": lambda p, b: sq(p, b).mean((1, 2)).sum() / N,
    "one_of_two_terms": lambda p, b: sq(p, b).mean() + 0.1 * jnp.sum(z(p, b) ** 2),
    "labels": lambda p, b: optax.softmax_cross_entropy_with_integer_labels(z(p, b)[:, 0], b["y"]).sum(),
    "matmul": lambda p, b: jnp.ones(len(b["x"])) @ sq(p, b).mean((1, 2)),
    "einsum": lambda p, b: jnp.einsum("nij,j->", sq(p, b), ONES),
    "scan": lambda p, b: over_time(p, b, lambda c, loss: c + loss * len(b["x"]), 0.0),
    "with_penalty": lambda p, b: sq(p, b).sum() + 1e-2 * jnp.sum(p["w"] ** 2),
    "vmapped": lambda p, b: jax.vmap(lambda x, t: jnp.mean((layers.dense2(p, x) - t) ** 2))(b["x"], b["t"]).sum(),
    "batch_norm": lambda p, b: jnp.sum((z(p, b) - z(p, b).mean(0)) ** 2),
    "size_in_a_constant": lambda p, b: jnp.sum(sq(p, b) * np.float64(0.25)),
    "scaled_first": lambda p, b: (sq(p, b) / 3).sum(0).mean(),
}
MEANS = SEPARABLE | {
    "sample_by_sample": lambda p, b: sample_by_sample(p, b, lambda loss: loss) / len(b["x"]),
    "weighted_in_the_scan": lambda p, b: sample_by_sample(p, b, lambda loss: loss / len(b["x"])),
    "mean_of_parts": lambda p, b: in_parts(p, b) / (len(b["x"]) // 2),
    "l2_sum": lambda p, b: optax.l2_loss(z(p, b), b["t"]).sum(-1).mean() + jnp.sum(p["w"] ** 2),
    "scaled_first": lambda p, b: (sq(p, b) / sq(p, b).size).sum(),
    "times_one_over": lambda p, b: sq(p, b).sum() * (1 / sq(p, b).size),
    "average": lambda p, b: jnp.average(sq(p, b)),
    "batch_norm": lambda p, b: jnp.mean((z(p, b) - z(p, b).mean(0)) ** 2 / (z(p, b).var(0) + 1e-5)),
    "masked_mean": lambda p, b: (sq(p, b).mean(-1) * b["m"]).sum() / b["m"].sum(),
}


def check(loss_fn, batch=BATCH):
    loss = TracedLoss(loss_fn)
    require_mean(loss.trace(PARAMS, batch), loss.trace(PARAMS, take_samples(batch, 0, N // 2)))


def growth(loss_fn):
    """How much of the loss's data term repeating every sample adds, in shares of it."""
    twice = {k: jnp.repeat(v, 2, 0) if v.ndim else v for k, v in BATCH.items()}
    difference = jax.jit(loss_fn)(PARAMS, twice) - jax.jit(loss_fn)(PARAMS, BATCH)
    return abs(difference / jax.jit(loss_fn)(PARAMS, BATCH))


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_refused(name):
    assert growth(SUMS[name]) > 0.1
    with pytest.raises(ValueError, match="the loss sums over the samples of its batch.*Take the mean"):
        check(SUMS[name])


@pytest.mark.parametrize("name", MEANS)
def test_means_pass(name):
    if "noise" not in name and name != "labels_arange":
        assert growth(MEANS[name]) < 1e-12
    check(MEANS[name])


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_samples_passes(name):
    check(COUPLED[name][0])


@pytest.mark.parametrize(
    "name", [name for name in layers.MODELS if name != "flat_rows"]
)  # one batch size is all it takes
def test_zoo(name):
    model = layers.MODELS[name]()
    few = take_samples(model.batch, 0, 2)
    loss = TracedLoss(model.loss_fn, model.has_aux)
    require_mean(loss.trace(model.params, model.batch), loss.trace(model.params, few))


def test_growths_and_chunks_refuse_a_sum():
    sites = tinyjax.find_sites(SUMS["sum"], PARAMS, BATCH)
    site = next(iter(sites.growable))
    with pytest.raises(ValueError, match="the loss sums over the samples"):
        tinyjax.make_grow_step(SUMS["sum"], site, num_neurons=1)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="the loss sums over the samples"):
        tinyjax.estimate(SUMS["sum"], PARAMS, BATCH, site, chunk=4)


def test_numbers_that_a_loss_closes_over_are_read_under_a_trace_too():
    """JAX arrays and tracers as constants of the loss: state of a module, a temperature that a sweep maps over."""
    flag, half = jnp.asarray(True), jnp.asarray(0.5)

    def of(reduce, weight):
        return lambda p, b: reduce(jnp.where(flag, half, 1.0) * weight * sq(p, b))

    jax.jit(lambda weight: check(of(jnp.mean, weight)))(2.0)
    with pytest.raises(ValueError, match="the loss sums over the samples"):
        jax.jit(lambda weight: check(of(jnp.sum, weight)))(2.0)


# --- the same in parts: micro-batches and iterators, with models of their own


def dense(p, b):
    return jnp.sum((jnp.tanh(b["x"] @ p["w"]) @ p["v"] - b["t"]) ** 2)


def convolved(p, b):
    x = jax.lax.conv_general_dilated(b["x"][..., None], p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.sum(jnp.mean((jax.nn.relu(x).mean(1) @ p["v"] - b["t"]) ** 2, axis=1))


def recurrent(p, b):
    def step(h, x):
        return jnp.tanh(x @ p["w"] + h @ p["u"]), None

    steps = b["x"].reshape(-1, 3, 2).transpose(1, 0, 2)
    h, _ = jax.lax.scan(step, jnp.zeros((len(b["x"]), p["u"].shape[0])), steps)
    return jnp.sum((h @ p["v"] - b["t"]) ** 2) / 16  # the number of samples as it happened to be


def weighted(p, b):
    """Of every sample its own weight, as of tokens that are masked: not divided by the sum of the weights."""
    return jnp.sum(b["m"] * jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["v"] - b["t"]) ** 2, axis=1))


def over_the_root(p, b):
    return dense(p, b) / np.sqrt(len(b["x"]))


PARTS = {
    "dense": (dense, layers.draw(1, w=(6, 4), v=(4, 3))),
    "convolved": (convolved, layers.draw(2, w=(3, 1, 4), v=(4, 3))),
    "recurrent": (recurrent, layers.draw(3, w=(2, 4), u=(4, 4), v=(4, 3))),
    "weighted": (weighted, layers.draw(4, w=(6, 4), v=(4, 3))),
    "over_the_root": (over_the_root, layers.draw(5, w=(6, 4), v=(4, 3))),
}
SAMPLES = layers.draw(7, x=(16, 6), t=(16, 3)) | {"m": np.arange(16) % 3 / 2}
HALVES = [jax.tree.map(lambda v, i=i: v[i : i + 8], SAMPLES) for i in (0, 8)]


@pytest.mark.parametrize("name", PARTS)
def test_sums_are_refused_in_micro_batches_iterators_and_by_everyone_who_takes_them(name):
    loss, params = PARTS[name]
    sites = tinyjax.find_sites(loss, params, SAMPLES).growable
    assert sites
    fit = dict(num_neurons=1, optimizer=optax.sgd(0.1), schedule=lambda *_: {}, key=jax.random.key(0))
    for parts in (
        lambda: tinyjax.estimate(loss, params, SAMPLES, sites, micro_batch=8),
        lambda: tinyjax.estimate(loss, params, SAMPLES, sites, micro_batch=6),
        lambda: tinyjax.estimate(loss, params, iter(HALVES), sites),
        lambda: tinyjax.make_grow_step(loss, sites, num_neurons=1, estimate_micro_batch=6)(params, SAMPLES),
        lambda: tinyjax.diagnose(loss, params, SAMPLES),
        lambda: next(tinyjax.fit(loss, params, [SAMPLES], micro_batch=8, **fit)),
    ):
        with pytest.raises(ValueError, match="the loss sums over the samples of its batch.*Take the mean"):
            parts()


def test_means_in_parts_add_up_and_a_loss_for_one_number_of_samples_passes():
    def mean(p, b):
        return dense(p, b) / len(b["x"])

    def eight(p, b):
        assert b["x"].shape == (8, 6)
        return dense(p, b)

    params = PARTS["dense"][1]
    site = tinyjax.find_sites(mean, params, SAMPLES)["w"]
    whole = tinyjax.estimate(mean, params, SAMPLES, site).energy.sum()
    for parts in (
        tinyjax.estimate(mean, params, SAMPLES, site, micro_batch=8),
        tinyjax.estimate(mean, params, iter(HALVES), site),
    ):
        np.testing.assert_allclose(parts.energy.sum(), whole, rtol=1e-12)
    # all parts are alike: they cannot but be comparable
    fixed = tinyjax.estimate(eight, params, SAMPLES, site, micro_batch=8).energy.sum()
    np.testing.assert_allclose(fixed, 64 * whole, rtol=1e-12)


def test_a_mean_over_masked_tokens_in_micro_batches_is_that_of_accumulated_gradients():
    """It is no mean of terms of samples: `chunk` refuses it, `micro_batch` says that it takes the mean of the parts."""

    def masked(p, b):
        each = jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["v"] - b["t"]) ** 2, axis=1)
        return jnp.sum(each * b["m"]) / jnp.sum(b["m"])

    params = PARTS["dense"][1]
    site = tinyjax.find_sites(masked, params, SAMPLES)["w"]
    with pytest.raises(ValueError, match="couples the samples"):
        tinyjax.estimate(masked, params, SAMPLES, site, chunk=8)
    found = tinyjax.estimate(masked, params, SAMPLES, site, micro_batch=8)

    def accumulated(v):
        return sum(masked(params | {"v": v}, half) for half in HALVES) / 2

    gradient = jax.grad(accumulated)(params["v"])
    np.testing.assert_allclose(tinyjax.statistics.moments(found).cross, -gradient, rtol=1e-9, atol=1e-12)
