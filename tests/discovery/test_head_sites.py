"""Whole attention heads in unmodified models: found, thinned, resized, and grown. Float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from tests.support.compiled import compiled
from tests.support.zoo.attention import CASES, FEATURES, OUTPUTS, Case, by_hand, data, grouped, jitter, squared
from tinyjax.core.neurons import Pattern
from tinyjax.core.params import named_leaves
from tinyjax.methods import Neurons, predicted_gain, refit

SLOW = pytest.mark.slow
GROWING = ("linen", "nnx", "equinox", "layers")


def heads_of(case: Case) -> tinyjax.Site:
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    (site,) = [site for site in sites if site.name.endswith("heads")]
    return site


@functools.cache
def plain() -> tuple[Case, tinyjax.Site]:
    """Causal attention of three heads in plain JAX, two of them in use."""
    case = grouped(3, 3)._replace(batch=data(0, 60))
    site = heads_of(case)
    return case._replace(params=tinyjax.thin(case.params, site, 2), loss_fn=jax.jit(case.loss_fn)), site


@functools.cache
def record() -> Any:
    case, site = plain()
    return jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site))(case.params, case.batch)


def seen_by(params: Any, x: Any, query: Any, key: Any) -> Any:
    """What a causal head collects, by loops."""
    seen = np.zeros_like(x)
    for n in range(len(x)):
        for t in range(x.shape[1]):
            scores = [x[n, t] @ query @ (x[n, s] @ key) / 3**0.5 for s in range(t + 1)]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            seen[n, t] = sum(w * x[n, s] for s, w in enumerate(weights))
    return seen


def rows_by_loops() -> tuple[Any, Any, Any]:
    """What the new head collects, what the output reads, and V_goal."""
    case, _ = plain()
    params = {name: np.asarray(leaf) for name, leaf in case.params.items()}
    x, y = np.asarray(case.batch["x"]), np.asarray(case.batch["y"])
    hidden = [seen_by(params, x, params["q"][:, h], params["k"][:, h]) @ params["v"][:, h] for h in range(3)]
    goal = -2 * (sum(hidden[h] @ params["o"][h] for h in range(3)) - y)
    new = seen_by(params, x, np.asarray(record().gates.query[..., 0]).T, np.asarray(record().gates.key[..., 0]).T)
    return new.reshape(-1, FEATURES), np.stack(hidden, -1).reshape(-1, 9), goal.reshape(-1, OUTPUTS)


def test_the_record_is_that_of_a_neuron_reading_what_the_pattern_collects():
    found, (seen, hidden, goal) = record(), rows_by_loops()
    for field, want in {
        "gram_prev": seen.T @ seen, "cross_prev": seen.T @ goal, "gram": hidden.T @ hidden,
        "cross": hidden.T @ goal, "link": (seen.T @ hidden)[None], "energy": np.sum(goal**2),
    }.items():  # fmt: skip
        np.testing.assert_allclose(getattr(found, field).sum(0), want, rtol=1e-9, atol=1e-9, err_msg=field)
    assert int(found.width) == 2 and found.heads is None


def test_a_new_head_lowers_the_bottleneck_by_what_it_says_and_the_loss_falls_at_that_slope():
    case, site = plain()
    seen, hidden, goal = rows_by_loops()
    neurons = compiled(tinyjax.methods.tiny, num_neurons=1, ridge=0.0)(record())
    left = goal - hidden @ np.linalg.lstsq(hidden, goal, rcond=1e-12)[0]
    move = seen @ np.asarray(neurons.alpha @ neurons.omega)
    gain = (np.sum(left**2) - np.sum((left - move) ** 2)) / 60
    np.testing.assert_allclose(np.sum(neurons.singular_values**2), gain, rtol=1e-8)
    best = np.linalg.svd(np.linalg.qr(seen)[0].T @ left, compute_uv=False)[:3]
    np.testing.assert_allclose(gain, np.sum(best**2) / 60, rtol=1e-8)
    claimed = compiled(predicted_gain)(
        tinyjax.statistics.moments(record()), neurons, compiled(tinyjax.methods.best_update)(record())
    )
    np.testing.assert_allclose(claimed, gain, rtol=1e-8)

    loss, step = case.loss_fn, 1e-6
    at = [
        loss(tinyjax.surgery.write(case.params, site, neurons, amplitude=g)[0], case.batch)
        for g in (0.0, step, 2 * step)
    ]
    slope = (-3 * at[0] + 4 * at[1] - at[2]) / (2 * step)
    expected = -np.sum(
        np.asarray(tinyjax.statistics.moments(record()).cross_prev) * np.asarray(neurons.alpha @ neurons.omega)
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
    assert at[0] == loss(case.params, case.batch), "the function is kept at amplitude 0"


def test_the_slope_is_exact_for_a_uniform_head_too():
    case, site = plain()
    step, zero = 1e-6, jnp.zeros((3, FEATURES, 1))
    rng = np.random.default_rng(0)
    alpha, omega = jnp.asarray(rng.normal(size=(FEATURES, 3))), jnp.asarray(rng.normal(size=(3, OUTPUTS)))
    neurons = Neurons(alpha, omega, jnp.ones(3), gate=Pattern(zero, zero, jnp.ones((3, 1), bool)))
    at = [
        case.loss_fn(tinyjax.surgery.write(case.params, site, neurons, amplitude=g)[0], case.batch)
        for g in (0.0, step, 2 * step)
    ]
    x = np.asarray(case.batch["x"])
    uniform = np.cumsum(x, axis=1) / np.arange(1, x.shape[1] + 1)[:, None]
    _, _, goal = rows_by_loops()
    expected = -np.sum(goal * (uniform.reshape(-1, FEATURES) @ np.asarray(alpha @ omega))) / len(x)
    np.testing.assert_allclose((-3 * at[0] + 4 * at[1] - at[2]) / (2 * step), expected, rtol=1e-5)


@SLOW
@pytest.mark.parametrize("name", GROWING)
def test_growth_keeps_the_function_at_birth_lowers_the_loss_and_every_leaf_learns(name):
    case = CASES[name]()
    site, batch = heads_of(case), data(3, 60)
    assert site.growable and site.capacity == 2, site.reason
    params = tinyjax.thin(case.params, site, 1)
    before = case.loss_fn(params, batch)

    def grow(method: Any, update: Any = None) -> Any:
        step = tinyjax.make_grow_step(case.loss_fn, site, method=method, update=update, fill=None, num_neurons=1)
        return step(params, batch)

    born, _ = grow(tinyjax.methods.tiny0)
    assert int(tinyjax.width(born, site)) == 2
    np.testing.assert_allclose(case.loss_fn(born, batch), before, rtol=1e-12)
    grown, info = grow(tinyjax.methods.tiny_unprojected)
    assert int(tinyjax.width(grown, site)) == 2 and int(info.written[site.name]) == 1
    assert case.loss_fn(grown, batch) < 0.999 * before
    gradient = named_leaves(jax.grad(case.loss_fn)(grown, batch))
    for member in site.members:
        slots = member.layout.to_slots(gradient[member.leaf])
        assert np.any(slots[..., 1, :] != 0) or member.role == "shift", member.leaf


def test_an_empty_head_stays_empty_under_training():
    case, site = plain()
    step = jax.jit(jax.grad(case.loss_fn))
    params = case.params
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, step(params, case.batch))
    for member in site.members:
        assert np.all(member.layout.to_slots(params[member.leaf])[2] == 0), member.leaf


def test_new_heads_use_the_dimensions_that_the_others_use():
    """A slot that is free in the query-key or value dimension stays free, so those sites keep their widths."""
    case, site = plain()
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    params = tinyjax.thin(case.params, sites, {"q": 2, "v": 1})
    params = params | {"v": params["v"][..., ::-1], "o": params["o"][:, ::-1]}  # the last slot is the one in use
    step = tinyjax.make_grow_step(case.loss_fn, site, method=tinyjax.methods.tiny_unprojected, num_neurons=1, fill=None)
    grown, _ = step(params, case.batch)
    assert int(tinyjax.width(grown, site)) == 3
    assert [int(tinyjax.width(grown, sites[name])) for name in "qv"] == [2, 1]
    assert np.all(grown["q"][:, 2, :2] != 0) and np.all(grown["v"][:, 2, 2] != 0) and np.all(grown["o"][2, 2] != 0)
    assert case.loss_fn(grown, case.batch) < case.loss_fn(params, case.batch)


def test_several_heads_at_once_each_with_a_pattern_of_its_own():
    case, site = plain()
    params = tinyjax.thin(case.params, site, 1)
    found = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site, num_gates=2))(params, case.batch)
    neurons = compiled(tinyjax.methods.tiny, num_neurons=2)(found)
    assert neurons.alpha.shape == (2 * FEATURES, 6) and neurons.omega.shape == (6, OUTPUTS)
    assert np.all(neurons.alpha[:FEATURES, 3:] == 0) and np.all(neurons.alpha[FEATURES:, :3] == 0)
    grown, born = tinyjax.surgery.write(params, site, neurons, amplitude=1.0)
    np.testing.assert_array_equal(born, [False, True, True])
    for head in (1, 2):
        mine = slice((head - 1) * FEATURES, head * FEATURES), slice((head - 1) * 3, head * 3)
        np.testing.assert_array_equal(grown["v"][:, head], neurons.alpha[mine])
        np.testing.assert_array_equal(grown["o"][head], neurons.omega[mine[1]])
        np.testing.assert_array_equal(grown["q"][:, head], found.gates.query[..., head - 1].T)
    gain_of = lambda s: predicted_gain(tinyjax.statistics.moments(s), refit(s, tinyjax.methods.tiny0(s, num_neurons=2)))  # noqa: E731
    assert jax.jit(gain_of)(found) > 0


def cut_by_reshape(heads: int) -> Any:
    """Attention whose kernels hold heads times size in one axis, as in many published models."""

    def loss_fn(p: Any, b: Any) -> Any:
        q, k, v = ((b["x"] @ p[name]).reshape(*b["x"].shape[:2], heads, -1) for name in "qkv")
        return squared(by_hand(q, k, v).reshape(*b["x"].shape[:2], -1) @ p["o"], b)

    return loss_fn


def test_another_number_of_heads_keeps_the_function_of_a_rebuilt_model():
    batch = data()
    shapes = {"q": (FEATURES, 6), "k": (FEATURES, 6), "v": (FEATURES, 6), "o": (6, OUTPUTS)}
    params = jitter({name: jnp.zeros(shape) for name, shape in shapes.items()})
    before, rebuilt = jax.jit(cut_by_reshape(2)), jax.jit(cut_by_reshape(4))
    rebuild = lambda sizes: cut_by_reshape(sizes["heads"])  # noqa: E731
    sites = tinyjax.find_sites(before, params, batch, make_loss=rebuild)
    wider, larger = tinyjax.resize(params, sites, {"heads": 4})
    np.testing.assert_allclose(rebuilt(wider, batch), before(params, batch), rtol=1e-12)
    assert larger == tinyjax.find_sites(rebuilt, wider, batch, make_loss=rebuild), (
        "the query-key site has four layers now"
    )
    compact, widths = tinyjax.compact(tinyjax.thin(wider, larger, {"heads": 1}), larger)
    assert widths == {"heads": 1, "q": 3, "v": 3} and compact["q"].shape == (FEATURES, 3)
    with pytest.raises(ValueError, match="found with 4 slots in leaves of other shapes"):
        tinyjax.estimate(before, wider, batch, larger["heads"])


def test_misuse():
    case, site = plain()
    with pytest.raises(ValueError, match="which has 3 slots"):
        tinyjax.estimate(case.loss_fn, case.params, case.batch, site, num_gates=4)
    with pytest.raises(ValueError, match="too few for 2 neurons"):
        tinyjax.methods.tiny(record(), num_neurons=2)
    bare = compiled(tinyjax.methods.tiny, num_neurons=1, ridge=0.0)(record())._replace(gate=None)
    with pytest.raises(ValueError, match="needs whole heads"):
        tinyjax.surgery.write(case.params, site, bare, amplitude=1.0)
    with pytest.raises(ValueError, match="must not bring an update"):
        tinyjax.methods.tiny_joint(record(), num_neurons=1)
    with pytest.raises(ValueError, match="gates and patterns"):
        tinyjax.estimate(case.loss_fn, case.params, iter([case.batch] * 2), site)
    with pytest.raises(ValueError, match="no null for gated units and heads"):
        tinyjax.methods.significant(record())


@pytest.mark.parametrize("name", ["q", "v"])
def test_births_in_the_dimensions_of_heads_leave_empty_heads_empty(name):
    case, site = plain()
    inner = tinyjax.find_sites(case.loss_fn, case.params, case.batch)[name]
    params = tinyjax.thin(case.params, inner, 2)
    found = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, inner))(params, case.batch)
    for method in (tinyjax.methods.tiny_unprojected, functools.partial(tinyjax.methods.random0, key=jax.random.key(0))):
        per_layer = lambda s, method=method: method(s, num_neurons=1)  # noqa: E731
        neurons = jax.jit(jax.vmap(per_layer) if inner.stack else per_layer)(found)
        grown, born = tinyjax.surgery.write(params, inner, neurons, amplitude=1.0)
        assert int(born.sum()) == 1 and int(tinyjax.width(grown, site)) == 2


def variant(between: Any, read: Any = None) -> Case:
    """Attention with something between its scores and its weights; keys and values of other tokens if `read` says."""
    shapes = {
        "q": (FEATURES, 3, 4),
        "k": (FEATURES, 3, 4),
        "v": (FEATURES, 3, 3),
        "o": (3, 3, OUTPUTS),
        "r": (4, 6),
        "h": (3, 4, 4),
    }
    params = jitter({name: jnp.zeros(shape) for name, shape in shapes.items()})

    def loss_fn(p: Any, b: Any) -> Any:
        others = b["x"] if read is None else b[read]
        q, k, v = (jnp.einsum("ntd,dhk->nthk", y, p[name]) for name, y in zip("qkv", (b["x"], others, others)))
        weights = between(jnp.einsum("nthk,nshk->nhts", q, k) / q.shape[-1] ** 0.5, p, b)
        return squared(jnp.einsum("nhts,nshk,hkd->ntd", weights, v, p["o"]), b)

    batch = data(1, 40)
    batch |= {"z": jax.random.normal(jax.random.key(2), (40, 6, FEATURES)), "key": jax.random.key(3)}
    batch |= {"length": 1 + jnp.arange(40) % 4}
    return Case(loss_fn, params, batch, "v", 3, "q")


def padded(s: Any, p: Any, b: Any) -> Any:
    """Keys beyond the length of a sample are masked."""
    return jax.nn.softmax(jnp.where(jnp.arange(s.shape[-1]) < b["length"][:, None, None, None], s, -jnp.inf))


def dropped(s: Any, p: Any, b: Any) -> Any:
    """Scores under a soft cap; dropout on the weights, the same for all heads."""
    weights = jax.nn.softmax(5 * jnp.tanh(s / 5))
    return jnp.where(jax.random.bernoulli(b["key"], 0.8, (1, 1, *s.shape[2:])), weights / 0.8, 0)


VARIANTS = {
    "padding": lambda: variant(padded),
    "capped_dropout": lambda: variant(dropped),
    "cross_bias": lambda: variant(lambda s, p, b: jax.nn.softmax(s + p["r"]), "z"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_masks_dropout_biases_caps_and_other_tokens_are_as_the_model_has_them(name):
    """The slope of the loss by a new head, by differences; and what the model's own scale is found to be."""
    case = VARIANTS[name]()
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    site = sites["heads"]
    assert site.growable and sites["q"].growable and {power for _, power in sites["q"].powers} == {0.5}, sites
    params = tinyjax.thin(case.params, site, 2)
    found = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site))(params, case.batch)
    neurons = compiled(tinyjax.methods.tiny_unprojected, num_neurons=1, ridge=0.01)(found)
    expected = -np.sum(
        np.asarray(tinyjax.statistics.moments(found).cross_prev) * np.asarray(neurons.alpha @ neurons.omega)
    )
    step, loss = 1e-6, jax.jit(case.loss_fn)
    at = [loss(tinyjax.surgery.write(params, site, neurons, amplitude=g)[0], case.batch) for g in (0.0, step, 2 * step)]
    np.testing.assert_allclose((-3 * at[0] + 4 * at[1] - at[2]) / (2 * step), expected, rtol=1e-4)
    assert expected < 0 and np.any(np.asarray(found.gates.key) != 0)


def no_heads(between: Any) -> str:
    case = variant(between)
    return tinyjax.find_sites(case.loss_fn, case.params, case.batch)["heads"].reason


SLOPES = np.array([1.0, 0.5, 0.25])[:, None, None]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda s, p, b: jax.nn.softmax(s - SLOPES * np.abs(np.arange(4)[:, None] - np.arange(4))), "of a constant"),
        (lambda s, p, b: jax.nn.softmax(s + p["h"]), "differs between heads"),
        (lambda s, p, b: jax.nn.softmax(s) * jax.random.bernoulli(b["key"], 0.8, s.shape), "random numbers"),
        (lambda s, p, b: s, "no softmax"),
        (lambda s, p, b: jax.nn.softmax(s, axis=1), "mixed by `reduce"),
    ],
    ids=["alibi", "bias_by_head", "dropout_by_head", "linear", "over_heads"],
)
def test_what_tells_heads_apart_or_mixes_them_is_refused_by_name(between, reason):
    assert "counts attention heads" in no_heads(between) and reason in no_heads(between), no_heads(between)


ANGLES = np.arange(4.0)[:, None, None] * np.array([1.0, 0.1])


def turned(a: Any, b: Any) -> list[Any]:
    return [a * np.cos(ANGLES) - b * np.sin(ANGLES), a * np.sin(ANGLES) + b * np.cos(ANGLES)]


def half(x: Any) -> Any:
    return x * jnp.cos(ANGLES).repeat(2, -1) + jnp.concatenate([-x[..., 2:], x[..., :2]], -1)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: jnp.concatenate(turned(*jnp.split(x, 2, -1)), -1), "a rotary embedding"),
        (lambda x: jnp.stack(turned(x[..., ::2], x[..., 1::2]), -1).reshape(x.shape), "rotary"),
        (half, "rotary"),
        (lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6), "a norm of them"),
        (lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1), "a norm"),
    ],
    ids=["rotary_halves", "rotary_pairs", "rotary_sum", "rms_norm", "layer_norm"],
)
def test_what_turns_or_normalises_queries_and_keys_is_refused_by_name_and_values_grow(between, reason):
    params = jitter({"q": jnp.zeros((5, 3, 4)), "k": jnp.zeros((5, 3, 4)), "v": jnp.zeros((5, 3, 3)),
                     "o": jnp.zeros((3, 3, 3))})  # fmt: skip

    def loss_fn(p: Any, b: Any) -> Any:
        q, k, v = (jnp.einsum("ntd,dhk->nthk", b["x"], p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", between(q), between(k)))
        return squared(jnp.einsum("nhts,nshk,hkd->ntd", weights, v, p["o"]), b)

    sites = tinyjax.find_sites(loss_fn, params, data())
    assert sites.growable.names == ("v",)
    refused = [site for site in sites if not site.growable]
    assert 3 in {site.capacity for site in refused} and len(refused) > 1, "the heads, and their queries"
    for site in refused:
        assert reason in site.reason and "values can grow" in site.reason, site
