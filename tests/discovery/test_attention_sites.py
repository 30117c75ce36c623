"""Attention in unmodified models: sites found, the tangents of their slots, and growth."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import tinyjax
from tests.support.brute_force import inspect
from tests.support.zoo.attention import CASES, Case, data, grouped, jitter, library, squared
from tinyjax.methods import predicted_gain
from tinyjax.statistics.offsets import product

SLOW = pytest.mark.slow
EVERY = [name if name in ("linen", "grouped") else pytest.param(name, marks=SLOW) for name in CASES]


@pytest.mark.parametrize("name", EVERY)
def test_the_slope_of_the_loss_is_that_of_the_sums_at_every_growable_site(name):
    """A neuron in an empty slot, random fan-in and fan-out in every head: first order, to rounding."""
    case = CASES[name]()
    for report in inspect(case).values():
        assert max(report.silent_out, report.silent_in) < 1e-13, report
        assert report.untouched == report.dust == 0, report
        # NNX takes the softmax in float32, whatever the type of queries and keys: differences are no better than that.
        assert report.slope < (1e-3 if name == "nnx" else 1e-6) and report.identity < 1e-12, report


@pytest.mark.parametrize("name", [*CASES, "library"])
def test_value_and_key_dimensions_are_found_and_thinned(name):
    case = CASES[name]() if name in CASES else grouped(attend=library)
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    site = sites[case.values]
    assert site.growable, site.reason
    assert site.capacity == case.capacity
    assert site.name == case.values and sites[case.keys].growable, sites
    loss = jax.jit(case.loss_fn)
    thinned = tinyjax.thin(case.params, site, 2)
    assert int(tinyjax.width(thinned, site)) == 2
    assert abs(loss(thinned, case.batch) - loss(case.params, case.batch)) > 1e-6


@pytest.mark.parametrize("name", ["linen", *(pytest.param(name, marks=SLOW) for name in CASES if name != "linen")])
@pytest.mark.parametrize("which", ["values", "keys"])
def test_growth_keeps_the_function_at_birth_and_lowers_the_loss(name, which):
    case = CASES[name]()
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    site = sites[getattr(case, which)]
    params, batch = tinyjax.thin(case.params, site, 1), data(3, 120)

    def grow(method: Any) -> Any:
        step = tinyjax.make_grow_step(case.loss_fn, site, method=method, update=None, fill=None, num_neurons=2)
        return step(params, batch)

    before = case.loss_fn(params, batch)
    born, _ = grow(tinyjax.methods.tiny0)
    assert int(tinyjax.width(born, site)) == 3
    np.testing.assert_allclose(case.loss_fn(born, batch), before, rtol=1e-13)
    grown, info = grow(tinyjax.methods.tiny_unprojected)
    assert int(tinyjax.width(grown, site)) == 3
    assert np.sum(info.gain_predicted[site.name]) > 0
    assert case.loss_fn(grown, batch) < 0.999 * before


@pytest.mark.parametrize("name", CASES)
def test_another_capacity_of_queries_and_keys_keeps_the_function(name):
    """The model's own 1 / sqrt(d) follows the capacity; a model without it, or with a number, is left alone."""
    case = CASES[name]()
    sites = tinyjax.find_sites(case.loss_fn, case.params, case.batch)
    scaled = ("linen", "nnx", "equinox", "grouped")
    assert {p for _, p in sites[case.keys].powers} == ({0.5} if name in scaled else set())
    if name not in ("equinox", "grouped", "layers", "shared"):
        return  # Linen and NNX check shapes; `shared` has a number that only looks like the root of its capacity
    wider = {case.keys: sites[case.keys].capacity + 5}
    params, _ = tinyjax.resize(case.params, sites, wider)
    np.testing.assert_allclose(case.loss_fn(params, case.batch), case.loss_fn(case.params, case.batch), rtol=1e-12)


def plain(heads: int = 2, seed: int = 0) -> tuple[Case, dict[str, np.ndarray]]:
    """Causal attention, one slot of two used, and what a slot sees, by loops."""
    case = grouped(heads, heads)
    batch = data(seed)

    params = {k: np.asarray(v) for k, v in case.params.items()}
    params["v"], params["o"] = params["v"].copy(), params["o"].copy()
    params["v"][:, :, 1:] = params["o"][:, 1:] = 0
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    samples, tokens, _ = x.shape
    seen = np.zeros((samples, tokens, heads, x.shape[-1]))
    for i in range(samples):
        for h in range(heads):
            for t in range(tokens):
                scores = [x[i, t] @ params["q"][:, h] @ (x[i, s] @ params["k"][:, h]) / 3**0.5 for s in range(t + 1)]
                weights = np.exp(scores) / np.sum(np.exp(scores))
                seen[i, t, h] = sum(w * x[i, s] for s, w in enumerate(weights))
    hidden = np.stack([seen[:, :, h] @ params["v"][:, h] for h in range(heads)], axis=2)
    goal = -2 * (np.einsum("nthc,hcm->ntm", hidden, params["o"]) - y)
    rows = {"seen": seen, "hidden": hidden.reshape(samples, tokens, -1), "goal": goal}
    return case._replace(params=jax.tree.map(jnp.asarray, params), batch=batch), rows


def statistics_of(case: Case) -> tuple[Any, Any]:
    site = tinyjax.find_sites(case.loss_fn, case.params, case.batch)[case.values]
    estimate = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site, energy_matrix=True))
    return site, estimate(case.params, case.batch)


def test_sums_against_loops():
    case, rows = plain()
    _, record = statistics_of(case)
    seen, hidden, goal = (rows[k].reshape(len(rows[k]), 4, -1) for k in ("seen", "hidden", "goal"))
    for half in (0, 1):
        b, h, v = (np.concatenate(list(x[half::2])) for x in (seen, hidden, goal))
        np.testing.assert_allclose(record.gram_prev[half], b.T @ b, atol=1e-10)
        np.testing.assert_allclose(record.cross_prev[half], b.T @ v, atol=1e-10)
        np.testing.assert_allclose(record.gram[half], h.T @ h, atol=1e-10)
        np.testing.assert_allclose(record.cross[half], h.T @ v, atol=1e-10)
        np.testing.assert_allclose(record.link[half, 0], b.T @ h, atol=1e-10)
        np.testing.assert_allclose(record.energy_matrix[half], v.T @ v, atol=1e-10)


def test_sums_of_queries_and_keys_against_loops():
    """S, N~, R, G, M and P of every head, from scores and their gradient taken by differences of the loss."""
    case, rows = plain(seed=1)
    site = tinyjax.find_sites(case.loss_fn, case.params, case.batch)[case.keys]
    record = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site))(case.params, case.batch)
    x = np.asarray(case.batch["x"])
    p = {k: np.asarray(v) for k, v in case.params.items()}
    for h in range(2):
        gram, gram_out, cross, old, asked, link = (
            np.zeros(s) for s in ((5, 5), (5, 5), (5, 5), (3, 3), (3, 5), (5, 3))
        )
        for i in range(len(x)):
            q, k, value = x[i] @ p["q"][:, h], x[i] @ p["k"][:, h], x[i] @ p["v"][:, h]
            for t in range(4):
                weights = np.exp((q[t] @ k[: t + 1].T) / 3**0.5)
                weights /= weights.sum()
                wanted = value[: t + 1] @ p["o"][h] @ rows["goal"][i, t]
                v = weights * (wanted - weights @ wanted) / 3**0.5  # the softmax, then the scale
                mean = weights @ x[i, : t + 1]
                gram += np.outer(x[i, t], x[i, t])
                old += np.outer(q[t], q[t])
                link += np.outer(x[i, t], q[t])
                for s in range(t + 1):
                    cross += v[s] * np.outer(x[i, t], x[i, s])
                    asked += v[s] * np.outer(q[t], x[i, s])
                    gram_out += weights[s] * np.outer(x[i, s] - mean, x[i, s] - mean) / 4
        wanted = {"gram_prev": gram, "gram_out": gram_out, "cross_prev": cross, "gram": old, "cross": asked}
        for field, value in (wanted | {"link": link[None]}).items():
            np.testing.assert_allclose(getattr(record, field)[h].sum(0), value, atol=1e-9, err_msg=field)


def test_sums_in_float32():
    case, _ = plain()
    site, record = statistics_of(case)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (case.params, case.batch))
    got = jax.jit(lambda p, b: tinyjax.estimate(case.loss_fn, p, b, site))(*single)
    for field in ("gram_prev", "cross_prev", "link"):
        want, scale = getattr(record, field), np.abs(getattr(record, field)).max()
        assert getattr(got, field).dtype == jnp.float32
        np.testing.assert_allclose(getattr(got, field) / scale, want / scale, atol=5e-6)


def lowest(value: Callable[..., Any], shapes: list[tuple[int, ...]], starts: int = 4) -> float:
    """The lowest value of a function of arrays, by BFGS from several starts."""
    found = []
    for seed in range(starts):
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        start = [0.3 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes)]
        flat, restore = jax.flatten_util.ravel_pytree(start)
        both = jax.jit(jax.value_and_grad(lambda z, restore=restore: value(*restore(z))))
        found.append(scipy.optimize.minimize(both, flat, jac=True, method="BFGS", options={"maxiter": 5000}).fun)
    return min(found)


def test_all_heads_together_come_close_to_the_optimum_and_claim_what_they_gain():
    """Gauss-Seidel over heads against BFGS over all arrays; the claim against the rows themselves."""
    case, rows = plain()
    _, record = statistics_of(case)
    seen, hidden, goal = rows["seen"], rows["hidden"], rows["goal"]
    flat = hidden.reshape(-1, hidden.shape[-1])
    v = goal.reshape(-1, goal.shape[-1])
    left = jnp.asarray((v - flat @ np.linalg.lstsq(flat, v, rcond=1e-12)[0]).reshape(goal.shape))

    def psi(alpha: Any, omega: Any) -> Any:
        move = jnp.einsum("nthd,hdk,hkm->ntm", seen, alpha, omega)
        return jnp.sum((left - move) ** 2) / len(seen)

    neurons = jax.jit(functools.partial(tinyjax.methods.tiny, num_neurons=1, ridge=0.0))(record)
    omega = neurons.omega.reshape(1, 3, 2).transpose(2, 0, 1)
    total = float(jnp.sum(left**2)) / len(seen)
    real = total - psi(neurons.alpha, omega)
    claimed = predicted_gain(tinyjax.statistics.moments(record), neurons, tinyjax.methods.best_update(record))
    np.testing.assert_allclose(claimed, real, rtol=1e-9)
    optimum = total - lowest(psi, [(2, 5, 1), (2, 1, 3)])
    assert 0.9 * optimum < real < (1 + 1e-9) * optimum

    def alone(alpha: Any, omega: Any) -> Any:
        return jnp.sum((left - seen[:, :, 0] @ alpha @ omega) ** 2) / len(seen)

    assert real > total - lowest(alone, [(5, 1), (1, 3)], starts=2)


def test_a_single_head_is_the_best_neuron_there_is():
    """Multi-query attention with one query is a dense site behind a mixing of rows: eq. 9 holds exactly."""
    case, rows = plain(heads=1)
    _, record = statistics_of(case)
    hidden, v = (rows[k].reshape(-1, rows[k].shape[-1]) for k in ("hidden", "goal"))
    left = v - hidden @ np.linalg.lstsq(hidden, v, rcond=1e-12)[0]
    seen = rows["seen"].reshape(len(v), -1)
    neurons = jax.jit(functools.partial(tinyjax.methods.tiny, num_neurons=1, ridge=0.0))(record)
    samples = len(rows["seen"])
    optimum = lowest(lambda a, w: jnp.sum((left - seen @ a @ w) ** 2) / samples, [(5, 1), (1, 3)], starts=2)
    np.testing.assert_allclose(np.sum(left**2) / samples - np.sum(neurons.singular_values**2), optimum, rtol=1e-7)


def test_offsets_of_grouped_queries_bound_what_a_neuron_costs():
    """With S the sum over the queries of a group, sum lambda^2 is a lower bound of the gain, the slope is exact."""
    case = CASES["shared"]()
    step, site = 1e-6, tinyjax.find_sites(case.loss_fn, case.params, case.batch)["v"]
    start = tinyjax.thin(case.params, site, 1)
    _, record = statistics_of(case._replace(params=start))
    neurons = tinyjax.methods.tiny_unprojected(record, num_neurons=2, ridge=0.0)
    claimed = predicted_gain(tinyjax.statistics.moments(record), neurons)
    np.testing.assert_allclose(claimed, np.sum(neurons.singular_values**2), rtol=1e-9)
    at = [
        case.loss_fn(tinyjax.surgery.write(start, site, neurons, amplitude=g)[0], case.batch)
        for g in (0, step, 2 * step)
    ]
    slope = (-3 * at[0] + 4 * at[1] - at[2]) / (2 * step)
    np.testing.assert_allclose(slope, -np.sum(neurons.singular_values**2), rtol=1e-4)
    assert product(neurons.alpha, neurons.omega, 3).shape == record.cross_prev.shape[1:]


def refusal(attended: Callable[..., Any]) -> str:
    """Why the value dimension cannot grow where `attended(weights, values)` lies in front of the output."""
    params = jitter({"q": jnp.zeros((5, 2, 3)), "v": jnp.zeros((5, 2, 3)), "o": jnp.zeros((2, 3, 3))})

    def loss_fn(p: Any, b: Any) -> Any:
        q, v = (jnp.einsum("ntd,dhk->nthk", b["x"], p[name]) for name in "qv")
        weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, q))
        return squared(jnp.einsum("nthk,hkd->ntd", attended(weights, v), p["o"]), b)

    return tinyjax.find_sites(loss_fn, params, data())["v"].reason


TALK = np.array([[1.0, 0.5], [0.0, 1.0]])


def attend(weights: Any, values: Any) -> Any:
    return jnp.einsum("nhts,nshk->nthk", weights, values)


@pytest.mark.parametrize(
    ("attended", "reason"),
    [
        (lambda w, v: jax.nn.standardize(attend(w, v)), "mixed by `reduce_sum`"),
        (lambda w, v: attend(w, v + v[:, :, ::-1]), "heads are mixed by `rev`"),
        (lambda w, v: attend(w, v[:, :, ::-1]), "with another axis"),
        (
            lambda w, v: attend(w, v) + jnp.einsum("nthk,gh->ntgk", attend(w, v), TALK),
            "heads are mixed by `dot_general`",
        ),
        (lambda w, v: jax.nn.sigmoid(attend(w, v)), "mixed by `dot_general`"),
        (lambda w, v: attend(w, v).max(1, keepdims=True) + attend(w, v), "`reduce_max`"),
        (lambda w, v: attend(w, v) * np.array([1.0, 2.0, 3.0]), "shape of a constant"),
    ],
    ids=["norm", "both_orders", "order", "talking", "loud", "max", "by_slot"],
)
def test_what_leaks_between_slots_or_heads_is_refused_by_name(attended, reason):
    assert reason in refusal(attended)


def test_activations_after_mixing_are_part_of_the_tangent():
    """GELU behind the mixing of tokens has slope 1/2 at an empty slot; ReLU the mean of both sides."""
    for activation, slope in ((jax.nn.gelu, 0.5), (jax.nn.relu, 0.5)):
        params = jitter({"v": jnp.zeros((5, 4)), "o": jnp.zeros((4, 3)), "m": jnp.zeros((4, 4))})

        def loss_fn(p: Any, b: Any, activation: Any = activation) -> Any:
            mixing = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", b["x"], b["x"]))
            return squared(activation(mixing @ (b["x"] @ p["v"])) @ p["o"], b)

        batch = data()
        site = tinyjax.find_sites(loss_fn, params, batch)["v"]
        record = jax.jit(lambda p, b, f=loss_fn, site=site: tinyjax.estimate(f, p, b, site))(params, batch)
        mixing = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", batch["x"], batch["x"]))
        seen = slope * (mixing @ batch["x"]).reshape(-1, 5)
        np.testing.assert_allclose(record.gram_prev.sum(0), seen.T @ seen, rtol=1e-10)


def test_methods_with_an_update_of_their_own_are_refused_where_heads_share_the_consumer():
    case, _ = plain()
    _, record = statistics_of(case)
    with pytest.raises(ValueError, match="a site with heads shares among them"):
        tinyjax.methods.tiny_joint(record, num_neurons=1)
