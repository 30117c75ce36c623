"""How many neurons: sign-flipped sums against loops, false positives at their level, and every rule's number."""

import dataclasses
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support import oracles
from tests.support.oracles import make_samples, record
from tests.support.zoo.layers import draw
from tinyjax.methods import energy, fraction, rank_trigger, significant
from tinyjax.statistics.dense import null_signs
from tinyjax.statistics.sums import Null

N, D, C, Q = 120, 6, 4, 5
PARAMS = draw(0, w=(D, C), b=(C,), u=(C, Q), c=(Q,))


def hidden(x):
    return np.tanh(x @ np.asarray(PARAMS["w"]) + np.asarray(PARAMS["b"]))


def loss_fn(params, batch):
    """Linear in the output, so that V_goal is what the batch says."""
    out = jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["u"] + params["c"]
    return -jnp.mean(jnp.sum(batch["v"] * out, axis=-1))


SITE = tinyjax.find_sites(loss_fn, PARAMS, {"x": jnp.ones((8, D)), "v": jnp.ones((8, Q))})[0]


def softmax_errors(rng, sets):
    p = np.exp(1.5 * rng.normal(size=(sets, N, Q)))
    p /= p.sum(axis=-1, keepdims=True)
    labels = (p.cumsum(axis=-1) > rng.random((sets, N, 1))).argmax(axis=-1)
    return np.eye(Q)[labels] - p


def heteroscedastic(rng, x):
    return rng.normal(size=(*x.shape[:2], Q)) * (0.2 + np.abs(x[..., :1])) * np.exp(x[..., 1:2] / 2)


NOISE = {
    "isotropic": lambda rng, x: rng.normal(size=(*x.shape[:2], Q)),
    "heteroscedastic": heteroscedastic,
    "softmax-shaped": lambda rng, x: softmax_errors(rng, len(x)),
    "heavy-tailed": lambda rng, x: rng.standard_t(3, size=(*x.shape[:2], Q)),
}


@pytest.fixture(scope="module")
def count():
    """The number of significant neurons of every data set, in one program."""
    return jax.jit(jax.vmap(lambda batch: significant(tinyjax.estimate(loss_fn, PARAMS, batch, SITE, null_draws=19))))


@pytest.mark.parametrize("kind", NOISE)
def test_noise_gives_a_neuron_at_the_nominal_level(count, kind):
    """1000 data sets in which the old neurons can do all that is asked for but noise: 50 +- 7 give a neuron."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, N, D))
    v = NOISE[kind](rng, x) + hidden(x) @ rng.normal(size=(C, Q))
    positives = np.mean(np.asarray(count({"x": jnp.asarray(x), "v": jnp.asarray(v)})) > 0)
    assert abs(positives - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_signal_gives_its_rank(count, rank):
    """Along the D - C = 2 input directions that the old neurons do not read."""
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(1000, N, D))
    first = np.linalg.svd(np.asarray(PARAMS["w"]))[0][:, C : C + rank]
    second = np.linalg.qr(rng.normal(size=(Q, rank)))[0]
    v = rng.normal(size=(1000, N, Q)) + 1.5 * x @ first @ second.T
    found = np.asarray(count({"x": jnp.asarray(x), "v": jnp.asarray(v)}))
    assert np.mean(found == rank) > 0.9


def test_null_sums_are_sums_with_signs():
    """Against loops; whatever the chunks, and over an iterator of batches."""
    rng = np.random.default_rng(2)
    batch = {"x": jnp.asarray(rng.normal(size=(11, D))), "v": jnp.asarray(rng.normal(size=(11, Q)))}
    parts = [jax.tree.map(itemgetter(rows), batch) for rows in (slice(6), slice(6, 11))]
    signs = np.asarray(null_signs(3, 0, 11))
    assert set(np.unique(signs)) == {-1.0, 1.0} and np.linalg.matrix_rank(signs) == 3
    x, v = np.asarray(batch["x"]), np.asarray(batch["v"])
    b_prev, b = (np.concatenate([rows, np.ones((11, 1))], axis=1) for rows in (x, hidden(x)))
    pairs = {"cross_prev": (b_prev, v), "gram": (b, b), "cross": (b, v), "link": (b_prev, b)}
    want = {name: np.zeros((2, 3, a.shape[1], c.shape[1])) for name, (a, c) in pairs.items()}
    for i in range(11):
        for r in range(3):
            for name, (left, right) in pairs.items():
                want[name][i % 2, r] += signs[r, i] * np.outer(left[i], right[i])
    want["link"] = want["link"][:, :, None]
    at_once = jax.jit(lambda batch: tinyjax.estimate(loss_fn, PARAMS, batch, SITE, null_draws=3))
    by_chunks = jax.jit(lambda batch: tinyjax.estimate(loss_fn, PARAMS, batch, SITE, null_draws=3, chunk=4))
    merged = jax.jit(lambda parts: tinyjax.estimate(loss_fn, PARAMS, iter(parts), SITE, null_draws=3))
    for found in (at_once(batch), by_chunks(batch), merged(parts)):
        for name, value in want.items():
            np.testing.assert_allclose(getattr(found.null, name), value, rtol=1e-10, atol=1e-12)


def conv(x, kernel):
    return jax.lax.conv(x, kernel, (1,), "SAME")


MAPS = {
    "conv": (lambda p, x: conv(jnp.tanh(conv(x, p["w"])), p["u"]), {"w": (5, 3, 3), "u": (2, 5, 3)}, (3, 6)),
    "sequence": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"], {"w": (3, 5), "u": (5, 2)}, (4, 3)),
}


@pytest.mark.parametrize("name", MAPS)
def test_signs_go_by_samples_not_by_positions(name):
    """The null sums are the sums of single samples with their signs."""
    apply, shapes, shape = MAPS[name]
    params = draw(0, **shapes)

    def loss(params, batch):
        return jnp.mean(jnp.sum(apply(params, batch) ** 2, axis=(1, 2)))

    batch = jnp.asarray(np.random.default_rng(3).normal(size=(8, *shape)))
    site = tinyjax.find_sites(loss, params, batch)[0]
    found = jax.jit(lambda b: tinyjax.estimate(loss, params, b, site, null_draws=2))(batch)
    signs = np.asarray(null_signs(2, 0, 8))
    single = jax.jit(lambda x: tinyjax.estimate(loss, params, jnp.stack([x, x]), site))
    singles = [single(x) for x in batch]
    for field in ("cross_prev", "gram", "cross", "link"):
        for half in (0, 1):
            for r in range(2):
                want = sum(signs[r, i] * getattr(singles[i], field)[0] for i in range(half, 8, 2))
                np.testing.assert_allclose(getattr(found.null, field)[half, r], want, rtol=1e-9, atol=1e-10)


def test_the_unit_of_loss_and_inputs_changes_no_number(count):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1000, N, D))
    v = rng.normal(size=(1000, N, Q)) + 0.3 * x[..., :1]
    want = np.asarray(count({"x": jnp.asarray(x), "v": jnp.asarray(v)}))
    assert 0.1 < np.mean(want > 0) < 1
    for scale in (1e-3, 1e3):
        np.testing.assert_array_equal(count({"x": jnp.asarray(x), "v": jnp.asarray(scale * v)}), want)


def with_null(samples, draws=19):
    statistics = record(samples)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(draws, len(samples.v)))

    def sums(left, right):
        both = [np.einsum("rn,na,nb->rab", signs[:, i::2], left[i::2], right[i::2]) for i in (0, 1)]
        return jnp.asarray(np.stack(both))

    b_prev, b, v = samples[:3]
    null = Null(sums(b_prev, v), sums(b, b), sums(b, v), sums(b_prev, b)[:, :, None])
    return dataclasses.replace(statistics, null=null)


def test_significant_says_what_it_needs():
    samples = make_samples()
    with pytest.raises(ValueError, match="`significant` needs null draws: ask .* for `null_draws=19`"):
        significant(record(samples))
    with pytest.raises(ValueError, match=r"`level` is 0.01 with 19 null draws: ask for at least 99"):
        significant(with_null(samples), level=0.01)
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        significant(with_null(samples), level=1.5)
    with pytest.raises(ValueError, match="`null_draws` must be >= 0"):
        tinyjax.estimate(loss_fn, PARAMS, {"x": jnp.ones((8, D)), "v": jnp.ones((8, Q))}, SITE, null_draws=-1)


def test_nothing_left_is_not_significant():
    samples = make_samples(n=60)
    done = samples._replace(v=samples.b @ np.random.default_rng(0).normal(size=(samples.b.shape[1], 4)))
    test = jax.jit(significant)
    assert test(with_null(done)) == 0
    few = make_samples(n=6, slots=8, live=8)  # more neurons than samples: nothing is left to test
    assert test(with_null(few)) == 0


def test_rank_trigger_counts_dimensions():
    """Two of five neurons repeat others: 3 dimensions."""
    samples = make_samples(n=200, slots=8, live=5)
    assert rank_trigger(record(samples), threshold=0.6) == 2
    samples.b[:, 3:5] = samples.b[:, :2]
    assert rank_trigger(record(samples), threshold=0.6) == 0
    assert rank_trigger(record(samples), threshold=0.2) == 2
    assert rank_trigger(record(make_samples(live=0)), threshold=0.0) == 0


def test_fraction_of_the_width():
    statistics = record(make_samples(slots=8, live=5))
    assert [int(fraction(statistics, share=s)) for s in (0.0, 0.2, 0.25, 1.0)] == [0, 1, 2, 5]
    with pytest.raises(ValueError, match="`share` must be >= 0"):
        fraction(statistics, share=-1.0)


def test_energy_counts_the_neurons_that_hold_a_share():
    samples = make_samples(n=300, outputs=6)
    _, singular = oracles.eckart_young(samples.b_prev, oracles.residual(samples), 1)
    held = np.cumsum(singular**2) / np.sum(singular**2)
    shares = (0.0, 0.5, 0.9, 0.999, 1.0)
    want = [0, *(1 + int(np.searchsorted(held, share * (1 - 1e-9))) for share in shares[1:])]
    counts = jax.jit(lambda s: [energy(s, share=share, ridge=0.0) for share in shares])(record(samples))
    np.testing.assert_array_equal(counts, want)
    assert want[1] < want[2] < want[3]
    with pytest.raises(ValueError, match=r"`share` must be in \[0, 1\]"):
        energy(record(samples), share=1.5)


def test_a_growth_adds_no_more_than_the_rule_says():
    """A rule limits `neurons`; zero skips the site, and leaves the parameters alone."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(320, D))
    params = draw(5, w=(D, 12), b=(12,), u=(12, Q), c=(Q,))
    noise = {"x": jnp.asarray(x), "v": jnp.asarray(rng.normal(size=(320, Q)))}
    signal = noise | {"v": noise["v"].at[:, 0].add(3 * x[:, 2])}
    sites = tinyjax.find_sites(loss_fn, params, noise)
    params = tinyjax.thin(params, sites, 2)
    cheap = dict(num_neurons=4, method=tinyjax.methods.random0, update=None, fill=None)
    grow_step = tinyjax.make_grow_step(loss_fn, sites, how_many=significant, null_draws=19, **cheap)
    grown, info = grow_step(params, signal, key=jax.random.key(0))
    assert int(info.width["w"]) == 3 and int(info.written["w"]) == 1
    same, info = grow_step(params, noise, key=jax.random.key(0))
    assert info.status["w"] == tinyjax.Status.SKIPPED
    jax.tree.map(np.testing.assert_array_equal, same, params)
    half = tinyjax.make_grow_step(loss_fn, sites, how_many=partial(fraction, share=1.5), **cheap)
    assert int(half(params, noise, key=jax.random.key(0))[1].width["w"]) == 5
    assert int(half(params, noise, key=jax.random.key(0), neurons=2)[1].width["w"]) == 4
