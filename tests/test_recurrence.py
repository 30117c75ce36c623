"""Recurrent units and blocks used several times: statistics against loops over time, growth, surgery, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brute import QUICK, inspect
from zoo_recurrent import RECURRENT

import tinyjax

FAST = ("unrolled_stacked", "scan_some_states", "linen_rnn")


@pytest.mark.parametrize("name", RECURRENT)
def test_discovery(name):
    model = RECURRENT[name]()
    sites = tinyjax.find_sites(model.loss_fn, model.params, model.batch)
    assert {site.name: site.capacity for site in sites.growable} == dict(model.growable)
    for site, word in model.refused.items():
        assert not sites[site].growable and word in sites[site].reason, sites[site].reason


GROWABLE = [name for name, build in RECURRENT.items() if build().growable]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in GROWABLE]
)
def test_slope_silence_and_gradient_identity(name):
    for report in inspect(RECURRENT[name]()).values():
        assert report.silent_out == report.silent_in == report.untouched == report.dust == 0, report
        assert report.slope < 1e-6 and report.identity < 1e-12, report


# The sums, lag by lag


def through_time(params, batch, every_step):
    """Rows b_t, h_t and v_t = [v_{t+1}, v^o_t], (samples, steps, ...): backpropagation through time, step by step."""
    p = jax.tree.map(np.asarray, params)
    x, t = np.asarray(batch["x"]), np.asarray(batch["t"])
    n, steps, _ = x.shape
    h, before = np.zeros((n, steps + 1, len(p["u"]))), []
    for k in range(steps):
        before.append(np.concatenate([x[:, k], h[:, k], np.ones((n, 1))], -1))
        h[:, k + 1] = np.tanh(x[:, k] @ p["w"] + h[:, k] @ p["u"] + p["b"])
    error = h[:, 1:] @ p["v"] + p["c"] - t
    v_out = -2 * error / (error[0].size if every_step else error[0, 0].size)
    if not every_step:
        v_out[:, :-1] = 0
    v_next = np.zeros((n, steps + 1, len(p["u"])))
    for k in reversed(range(steps)):
        v_next[:, k] = (v_out[:, k] @ p["v"].T + v_next[:, k + 1] @ p["u"].T) * (1 - h[:, k + 1] ** 2)
    return np.stack(before, 1), h[:, 1:], np.concatenate([v_next[:, 1:], v_out], -1)


@pytest.mark.parametrize("name", ["scan_readout_outside", "scan_last_carry", "scan_backwards"])
def test_statistics_against_a_loop_over_time(name):
    model = RECURRENT[name]()
    (site,) = tinyjax.find_sites(model.loss_fn, model.params, model.batch)
    found = jax.jit(partial(tinyjax.estimate, model.loss_fn, sites=site), compiler_options=QUICK)(
        model.params, model.batch
    )
    batch = model.batch | ({"x": model.batch["x"][:, ::-1]} if "backwards" in name else {})
    rows = through_time(model.params, batch, name != "scan_last_carry")
    for half in (0, 1):
        b, h, v = (x[half::2].reshape(-1, x.shape[-1]) for x in rows)
        expected = dict(gram_prev=b.T @ b, cross_prev=b.T @ v, gram=h.T @ h, cross=h.T @ v, energy=np.sum(v**2))
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(found, field)[half], value, rtol=1e-11, atol=1e-13, err_msg=field)
        np.testing.assert_allclose(found.link[half, 0], b.T @ h, rtol=1e-11, atol=1e-13)
    p = model.params
    np.testing.assert_array_equal(found.weight_prev, np.concatenate([p["w"], p["u"], p["b"][None]]))
    np.testing.assert_array_equal(found.weight, np.concatenate([p["u"], p["v"]], 1))


# Surgery


@pytest.fixture(scope="module")
def case():
    """Every state is read; four slots, three of them used."""
    model = RECURRENT["scan_readout_outside"]()
    sites = tinyjax.find_sites(model.loss_fn, model.params, model.batch)
    return jax.jit(model.loss_fn), tinyjax.thin(model.params, sites, 3), model.batch, sites


def test_capacity_and_compact_keep_the_function(case):
    loss_fn, params, batch, sites = case
    before = loss_fn(params, batch)
    wide, wide_sites = tinyjax.resize(params, sites, {"w": 7})
    assert (
        wide["u"].shape == (7, 7) and wide_sites["w"].capacity == 7 and int(tinyjax.width(wide, wide_sites["w"])) == 3
    )
    assert loss_fn(wide, batch) == pytest.approx(float(before), abs=1e-14)
    tight, widths = tinyjax.compact(wide, wide_sites)
    assert widths == {"w": 3} and {name: leaf.shape for name, leaf in tight.items()} == dict(
        w=(3, 3), u=(3, 3), b=(3,), v=(3, 2), c=(2,)
    )
    assert loss_fn(tight, batch) == pytest.approx(float(before), abs=1e-14)
    assert tinyjax.find_sites(loss_fn, wide, batch) == wide_sites


def test_a_unit_is_born_without_weights_to_free_slots_and_other_newborns(case):
    _, params, _, sites = case
    wide, (site,) = tinyjax.resize(params, sites, {"w": 6})
    ones = tinyjax.Neurons(jnp.ones((3 + 6 + 1, 2)), jnp.ones((2, 6 + 2)), jnp.ones(2))
    grown, born = tinyjax.write(wide, site, ones, amplitude=1.0)
    assert np.flatnonzero(born).tolist() == [3, 4]
    kernel = np.zeros((6, 6))
    kernel[:3, :3], kernel[:3, 3:5], kernel[3:5, :3] = params["u"][:3, :3], 1, 1
    np.testing.assert_array_equal(grown["u"], kernel)
    np.testing.assert_array_equal(grown["w"][:, 3:5], 1), np.testing.assert_array_equal(grown["v"][3:5], 1)
    np.testing.assert_array_equal(grown["b"][3:5], 1)
    for old, back in zip(jax.tree.leaves(wide), jax.tree.leaves(tinyjax.thin(grown, site, 3))):
        np.testing.assert_array_equal(old, back)


def test_training_with_free_slots_is_training_without(case):
    loss_fn, params, batch, sites = case
    optimizer = optax.adamw(1e-2)

    @partial(jax.jit, compiler_options=QUICK)
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=20)[0][0]

    wide, wide_sites = tinyjax.resize(params, sites, {"w": 6})
    padded, exact = train(wide), train(tinyjax.compact(params, sites)[0])
    for a, b in zip(*(jax.tree.leaves(tree) for tree in (tinyjax.compact(padded, wide_sites)[0], exact))):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_split_and_duplicate_units(case):
    """A unit split in two keeps the function; one of the two is then the cheapest to prune, and costs nothing."""
    loss_fn, params, batch, sites = case
    (site,) = sites
    estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site), compiler_options=QUICK)
    split = tinyjax.net2net(estimate(params, batch), num_neurons=1, key=jax.random.key(0))
    wider, born = tinyjax.write(params, site, split, amplitude=1.0)
    before = float(loss_fn(params, batch))
    assert int(born.sum()) == 1 and loss_fn(wider, batch) == pytest.approx(before, abs=1e-14)
    pruned, removed = tinyjax.prune(wider, site, estimate(wider, batch), num_neurons=1)
    assert int(removed.sum()) == 1 and int(tinyjax.width(pruned, site)) == 3
    assert loss_fn(pruned, batch) == pytest.approx(before, abs=1e-8)
