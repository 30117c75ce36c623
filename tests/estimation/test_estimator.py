"""Statistics against loops over samples and positions, chunks, iterators, and misuse."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.zoo import layers
from tinyjax.discovery.sites import find_sites
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.estimator import estimate, estimate_batch
from tinyjax.estimation.options import EstimateOptions, SumOptions
from tinyjax.statistics.merging import merge

LOSS = layers.mse(layers.dense2)
FIELDS = ("count", "gram_prev", "cross_prev", "gram", "cross", "link", "energy", "energy_matrix")


def loops(params, x, t):
    """The sums of a two-layer network on `(n, positions, d)`, one sample and one position at a time."""
    p = {k: np.asarray(v) for k, v in params.items()}
    n, positions, m = t.shape
    d, h = p["w"].shape
    sums = {
        "count": np.zeros(2), "gram_prev": np.zeros((2, d + 1, d + 1)), "cross_prev": np.zeros((2, d + 1, m)),
        "gram": np.zeros((2, h + 1, h + 1)), "cross": np.zeros((2, h + 1, m)), "link": np.zeros((2, 1, d + 1, h + 1)),
        "energy": np.zeros(2), "energy_matrix": np.zeros((2, m, m)),
    }  # fmt: skip
    ask = jax.jit(jax.grad(lambda a, target: jnp.sum((a - target) ** 2) / (positions * m)))
    for i in range(n):
        sums["count"][i % 2] += 1
        for s in range(positions):
            b_prev = np.append(x[i, s], 1.0)
            b = np.append(np.tanh(x[i, s] @ p["w"] + p["b"]), 1.0)
            v = -np.asarray(ask(jnp.asarray(b @ np.vstack([p["u"], p["c"]])), t[i, s]))
            rows = {
                "gram_prev": np.outer(b_prev, b_prev), "cross_prev": np.outer(b_prev, v), "gram": np.outer(b, b),
                "cross": np.outer(b, v), "link": np.outer(b_prev, b)[None], "energy": v @ v,
                "energy_matrix": np.outer(v, v),
            }  # fmt: skip
            for name, value in rows.items():
                sums[name][i % 2] += value
    return sums


def site_of(loss_fn, params, batch, name="w"):
    return find_sites(loss_fn, params, batch)[name]


def assert_same(a, b, names=FIELDS, rtol=1e-12):
    for name in names:
        if getattr(a, name) is not None:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize("chunk", [None, 2, 4])
def test_loops(n, chunk):
    """Odd and even numbers of samples, chunks with remainders 0, 1 and 2 (n = 5, 8 by 2 and 4)."""
    params, batch = layers.two_layers(), layers.data(n, 3, 5)
    site = site_of(LOSS, params, batch)
    found = jax.jit(lambda p, b: estimate(LOSS, p, b, site, energy_matrix=True, chunk=chunk))(params, batch)
    for name, value in loops(params, np.asarray(batch["x"]), np.asarray(batch["t"])).items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12, atol=1e-13, err_msg=name)
    np.testing.assert_array_equal(found.weight_prev, np.vstack([params["w"], params["b"]]))
    np.testing.assert_array_equal(found.weight, np.vstack([params["u"], params["c"]]))
    assert found.width == 4 and found.bias and found.bias_prev


@pytest.mark.parametrize("n", [8, 9, 10, 11])
def test_chunks_with_every_remainder(n):
    params, batch = layers.two_layers(), layers.data(n, 5)
    site = site_of(LOSS, params, batch)
    whole = jax.jit(lambda p, b: estimate(LOSS, p, b, site))(params, batch)
    assert_same(jax.jit(lambda p, b: estimate(LOSS, p, b, site, chunk=4))(params, batch), whole)


def test_what_is_small_passes_at_once(monkeypatch):
    """A pass over all samples where the loss computes few numbers, chunks where it computes many: the same sums."""
    params, batch = layers.two_layers(), layers.data(2050, 5)
    site = site_of(LOSS, params, batch)
    estimator = importlib.import_module("tinyjax.estimation.estimator")

    def lowered():
        step = jax.jit(lambda p, b: estimate(LOSS, p, b, site))
        return step(params, batch), "while" in step.lower(params, batch).as_text()

    at_once, loops_at_once = lowered()
    monkeypatch.setattr(estimator, "AT_ONCE", 1000)
    in_chunks, loops_in_chunks = lowered()
    assert loops_in_chunks and not loops_at_once
    assert_same(at_once, in_chunks)


def test_sums_that_are_not_asked_for_are_not_formed():
    params, batch = layers.two_layers(), layers.data(8, 5)
    site = site_of(LOSS, params, batch)
    step = jax.jit(lambda p, b, asked: estimate_batch(TracedLoss(LOSS), p, b, site, asked={"w": asked}).statistics["w"])
    assert_same(step(params, batch, True), estimate(LOSS, params, batch, site))
    left_out = step(params, batch, False)
    np.testing.assert_allclose(left_out.energy, step(params, batch, True).energy, rtol=1e-12)
    assert not left_out.gram_prev.any() and not left_out.cross_prev.any()
    np.testing.assert_array_equal(left_out.count, [4, 4])


def test_batches_add():
    """Two batches of even size are one batch; an iterator merges them."""
    params, batch = layers.two_layers(), layers.data(10, 5)
    parts = [jax.tree.map(lambda x: x[:6], batch), jax.tree.map(lambda x: x[6:], batch)]
    site = site_of(LOSS, params, batch)
    whole = estimate(LOSS, params, batch, site)
    assert_same(merge(*(estimate(LOSS, params, part, site) for part in parts)), whole)
    assert_same(estimate(LOSS, params, iter(parts), site), whole)


def test_two_consumers_side_by_side():
    """V of both heads in the order of the site's consumers; the bias of one alone is no row."""
    model = layers.MODELS["two_heads"]()
    site = site_of(model.loss_fn, model.params, model.batch)
    found = estimate(model.loss_fn, model.params, model.batch, site)
    p = model.params
    h = np.tanh(np.asarray(model.batch["x"] @ p["w"] + p["b"]))

    def ask(value, policy, t):
        loss = -jnp.sum(jax.nn.softmax(t) * jax.nn.log_softmax(policy))
        return loss + (value[0] - t[0]) ** 2

    grads = jax.vmap(jax.grad(ask, (0, 1)))(h @ p["u"], h @ p["v"] + p["c"], model.batch["t"])
    v = {"u": -np.asarray(grads[0]), "v": -np.asarray(grads[1])}
    expected = h.T @ np.concatenate([v[k.leaf] for k in site.consumers], axis=1)
    assert not found.bias
    np.testing.assert_allclose(found.cross.sum(0), expected, rtol=1e-11, atol=1e-13)


def test_stack_is_one_record_a_layer():
    """Each layer of a scan against the same network unrolled."""
    model = layers.MODELS["scan_over_layers"]()
    blocks = model.params["blocks"]

    def unrolled(p, batch):
        x = batch["x"]
        for i in range(3):
            x = x + layers.dense2(p[f"l{i}"], x)
        return jnp.mean((x @ p["o"] - batch["t"]) ** 2)

    params = {f"l{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(3)} | {"o": model.params["o"]}
    found = estimate(
        model.loss_fn, model.params, model.batch, site_of(model.loss_fn, model.params, model.batch, "blocks/w")
    )
    plain = estimate(unrolled, params, model.batch, find_sites(unrolled, params, model.batch).growable)
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], found), plain[f"l{i}/w"])


def test_leaf_used_twice_adds_rows():
    """Siamese: statistics of the vector and of the sequence add, with V of the joint loss."""
    model = layers.MODELS["siamese"]()
    found = estimate(model.loss_fn, model.params, model.batch, site_of(model.loss_fn, model.params, model.batch))
    x = np.asarray(model.batch["x"])
    rows = np.concatenate([x.reshape(-1, 5), x[:, 0]])
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    np.testing.assert_allclose(found.gram_prev.sum(0), rows.T @ rows, rtol=1e-12)
    assert found.count.tolist() == [3, 3]


def test_float32_stays_float32_under_x64():
    model = layers.MODELS["plain"]()
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float32), (model.params, model.batch))
    found = estimate(LOSS, params, batch, site_of(LOSS, params, batch))
    assert {getattr(found, name).dtype for name in FIELDS if getattr(found, name) is not None} == {jnp.dtype("float32")}
    exact = estimate(LOSS, model.params, model.batch, site_of(LOSS, model.params, model.batch))
    np.testing.assert_allclose(found.cross, exact.cross, atol=2e-5)


def coupled(p, b):
    return jnp.sqrt(LOSS(p, b))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: (LOSS, p, jax.tree.map(lambda x: x[:0], b), {}), "empty"),
        (lambda p, b: (LOSS, p, {**b, "t": b["t"][:4]}, {}), r"\['t'\] has 4"),
        (lambda p, b: (LOSS, p, {**b, "k": jnp.zeros(2, jnp.uint32)}, {}), "raw uint32 PRNG key"),
        (lambda p, b: (LOSS, p, jax.tree.map(lambda x: x[:1], b), {}), "single sample"),
        (lambda p, b: (lambda p, b: b["t"].mean(0), p, b, {}), "real scalar"),
        (lambda p, b: (lambda p, b: (LOSS(p, b), 1), p, b, {}), "has_aux=True"),
        (lambda p, b: (LOSS, p, b, {"has_aux": True}), "pair"),
        (lambda p, b: (LOSS, p, b, {"chunk": 3}), "even number of samples, got 3"),
        (lambda p, b: (LOSS, p, b, {"chunk": 0}), "even"),
        (lambda p, b: (coupled, p, b, {"chunk": 2}), "couples the samples"),
        (lambda p, b: (LOSS, layers.two_layers(h=6), b, {}), "6 slots"),
        (lambda p, b: (layers.mse(lambda p, x: x @ p["r"]), {"r": p["w"][:, :3]}, b, {}), "no site `w`"),
        (lambda p, b: (LOSS, p, iter(()), {}), "iterator of batches is empty"),
    ],
)
def test_misuse(change, message):
    params, batch = layers.two_layers(), layers.data(6, 5)
    site = site_of(LOSS, params, batch)
    loss_fn, params, batch, options = change(params, batch)
    with pytest.raises(ValueError, match=message):
        estimate(loss_fn, params, batch, site, **options)


def test_the_keywords_are_the_options():
    assert set(EstimateOptions.__annotations__) == {field.name for field in dataclasses.fields(SumOptions)}
    with pytest.raises(TypeError, match="estimate.. got an unexpected keyword argument `chunks`"):
        tinyjax.estimate(lambda p, b: 0.0, {}, {}, (), chunks=4)


def test_refused_site_says_why():
    loss_fn = layers.mse(lambda p, x: jax.nn.sigmoid(x @ p["w"]) @ p["u"])
    params, batch = layers.draw(w=(5, 4), u=(4, 3)), layers.data(6, 5)
    with pytest.raises(ValueError, match="site `w` cannot grow: an empty neuron is not silent"):
        estimate(loss_fn, params, batch, site_of(loss_fn, params, batch))
