"""Recurrent units and blocks used several times: statistics against loops over time, growth, surgery, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.support import oracles
from tests.support.brute_force import QUICK, inspect
from tests.support.compiled import compiled
from tests.support.killed_run import digits
from tests.support.zoo.layers import Model, data, draw
from tests.support.zoo.recurrent import RECURRENT

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


def adam(loss_fn, batch, *, rate, steps):
    """From parameters to what Adam makes of them on a batch."""
    optimizer = optax.adam(rate)

    @jax.jit
    def train(params, batch):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[0][0]

    return lambda params: train(params, batch)


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
    mixed = model.batch | {"x": model.batch["x"].astype(jnp.float32)}
    assert jax.eval_shape(partial(tinyjax.estimate, model.loss_fn, sites=site), model.params, mixed).gram.dtype == float
    for half in (0, 1):
        b, h, v = (x[half::2].reshape(-1, x.shape[-1]) for x in rows)
        energy = np.sum(v**2 / np.array(found.shares))
        expected = dict(gram_prev=b.T @ b, cross_prev=b.T @ v, gram=h.T @ h, cross=h.T @ v, energy=energy)
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(found, field)[half], value, rtol=1e-11, atol=1e-13, err_msg=field)
        np.testing.assert_allclose(found.link[half, 0], b.T @ h, rtol=1e-11, atol=1e-13)
    p = model.params
    np.testing.assert_array_equal(found.weight_prev, np.concatenate([p["w"], p["u"], p["b"][None]]))
    np.testing.assert_array_equal(found.weight, np.concatenate([p["u"], p["v"]], 1))
    np.testing.assert_allclose(found.shares, [3 / 4] * 4 + [1 / 4 if name == "scan_last_carry" else 1] * 2)


def test_a_readout_of_the_last_state_is_fitted_as_if_it_were_read_at_its_share_of_all():
    """The update and the units are least squares on goals over the root of their share; the loss falls as they say."""
    model = RECURRENT["scan_last_carry"]()
    (site,) = tinyjax.find_sites(model.loss_fn, model.params, model.batch)
    found = jax.jit(partial(tinyjax.estimate, model.loss_fn, sites=site), compiler_options=QUICK)(
        model.params, model.batch
    )
    b, h, v = (x.reshape(-1, x.shape[-1]) for x in through_time(model.params, model.batch, False))
    root = np.sqrt(found.shares)
    samples = oracles.Samples(b, h, v / root, np.asarray(found.weight_prev), np.asarray(found.weight))
    delta = oracles.least_squares(h, v / root)
    np.testing.assert_allclose(compiled(tinyjax.methods.best_update)(found), delta / root, atol=1e-9)
    move, singular = oracles.eckart_young(b, oracles.residual(samples), 2)
    neurons = compiled(tinyjax.methods.tiny, num_neurons=2, ridge=0.0)(found)
    np.testing.assert_allclose(b @ neurons.alpha @ neurons.omega, move / root, atol=1e-7)
    n = len(model.batch["x"])
    np.testing.assert_allclose(neurons.singular_values, np.sqrt(len(v) / n) * singular[:2], rtol=1e-7)
    psi = compiled(tinyjax.methods.bottleneck)(found)
    np.testing.assert_allclose(psi.after, np.sum(oracles.residual(samples) ** 2) / n, rtol=1e-8)


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


def test_what_units_cost_counts_the_recurrent_kernel_once(case):
    _, _, _, sites = case
    assert tinyjax.costs.parameters(sites, {"w": 3}) == 3 * 3 + 3 * 3 + 3 + 3 * 2
    assert tinyjax.costs.forward_flops(sites, {"w": 3}) == 2 * 4 * (3 * 3 + 3 * 3 + 3 * 2)  # at each of four steps
    assert tinyjax.costs.parameter_cost(sites)("w", {"w": 3}) == 3 + (2 * 3 + 1) + 1 + 2


def test_a_unit_is_born_without_weights_to_free_slots_and_other_newborns(case):
    _, params, _, sites = case
    wide, (site,) = tinyjax.resize(params, sites, {"w": 6})
    ones = tinyjax.methods.Neurons(jnp.ones((3 + 6 + 1, 2)), jnp.ones((2, 6 + 2)), jnp.ones(2))
    grown, born = tinyjax.surgery.write(wide, site, ones, amplitude=1.0)
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
    train = adam(loss_fn, batch, rate=1e-2, steps=20)
    wide, wide_sites = tinyjax.resize(params, sites, {"w": 6})
    padded, exact = train(wide), train(tinyjax.compact(params, sites)[0])
    for a, b in zip(*(jax.tree.leaves(tree) for tree in (tinyjax.compact(padded, wide_sites)[0], exact))):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_split_and_duplicate_units(case):
    """A unit split in two keeps the function; one of the two is then the cheapest to prune, and costs nothing."""
    loss_fn, params, batch, sites = case
    (site,) = sites
    estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site), compiler_options=QUICK)
    split = compiled(tinyjax.methods.net2net, num_neurons=1)(estimate(params, batch), key=jax.random.key(0))
    wider, born = tinyjax.surgery.write(params, site, split, amplitude=1.0)
    before = float(loss_fn(params, batch))
    assert int(born.sum()) == 1 and loss_fn(wider, batch) == pytest.approx(before, abs=1e-14)
    pruned, removed = tinyjax.prune(wider, site, estimate(wider, batch), num_neurons=1)
    assert int(removed.sum()) == 1 and int(tinyjax.width(pruned, site)) == 3
    assert loss_fn(pruned, batch) == pytest.approx(before, abs=1e-8)


def test_what_a_unit_tells_itself_is_not_missed_when_it_is_pruned():
    """The unit to go, and the weights of the others, by least squares on the products of all others."""
    model = RECURRENT["scan_readout_outside"]()
    (site,) = tinyjax.find_sites(model.loss_fn, model.params, model.batch)
    loud = model.params | {"u": model.params["u"].at[0, 0].set(9.0)}
    statistics = jax.jit(partial(tinyjax.estimate, model.loss_fn, sites=site), compiler_options=QUICK)(
        loud, model.batch
    )
    pruned, removed = tinyjax.prune(loud, site, statistics, num_neurons=1)
    h = through_time(loud, model.batch, True)[1].reshape(-1, 4)
    weight = np.concatenate([loud["u"], loud["v"]], 1)

    def refit(j):
        others = [i for i in range(4) if i != j]
        target = h @ np.delete(weight, j, 1)
        fitted = oracles.least_squares(h[:, others], target)
        return np.sum((target - h[:, others] @ fitted) ** 2), others, fitted

    best = min(range(4), key=lambda j: refit(j)[0])
    assert np.flatnonzero(removed).tolist() == [best]
    _, others, fitted = refit(best)
    np.testing.assert_allclose(pruned["u"][np.ix_(others, others)], fitted[:, :3], atol=1e-6)
    np.testing.assert_allclose(pruned["v"][np.array(others)], fitted[:, 3:], atol=1e-6)
    assert not np.any(pruned["u"][best]) and not np.any(pruned["u"][:, best])


# Growth


def test_a_growth_keeps_free_slots_free_and_lowers_the_loss(case):
    """Remember the input of the step before: one unit too few, one is grown, with the update of U and the readout."""
    loss_fn, params, _, sites = case
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 4, 3))
    batch = {"x": jnp.asarray(x), "t": jnp.asarray(np.roll(x, 1, 1)[..., :2] * (np.arange(4) > 0)[:, None])}
    params, sites = tinyjax.resize(tinyjax.thin(params, sites, 1), sites, {"w": 5})
    grow_step = tinyjax.make_grow_step(loss_fn, sites, method=tinyjax.methods.tiny, num_neurons=2)
    grown, info = jax.jit(grow_step, compiler_options=QUICK)(params, batch)
    assert int(info.written["w"]) == 2 and float(info.gain_achieved["w"]) > 0
    assert float(loss_fn(grown, batch)) == pytest.approx(float(info.loss_after["w"]))
    np.testing.assert_array_equal(info.born["w"], [False, True, True, False, False])
    assert not np.any(grown["u"][3:]) and not np.any(grown["u"][:, 3:]) and not np.any(grown["u"][1:3, 1:3])
    assert not np.any(grown["v"][3:]) and not np.any(grown["w"][:, 3:])


@pytest.mark.slow
def test_digits_read_row_by_row():
    """Classified by the last of eight states: units of TINY lower the loss of unseen digits, random ones hardly."""
    samples = digits()
    arrays = {"x": samples.image[..., 0] - 0.5, "y": samples.label}
    fresh, unseen = ({k: jnp.asarray(x[part]) for k, x in arrays.items()} for part in (slice(1024), slice(1024, None)))

    def loss_fn(p, b):
        h = jnp.zeros((len(b["x"]), len(p["u"])))
        rows = b["x"].swapaxes(0, 1)
        h = jax.lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None), h, rows)[0]
        return optax.softmax_cross_entropy_with_integer_labels(h @ p["v"] + p["c"], b["y"]).mean()

    params = draw(w=(8, 12), u=(12, 12), v=(12, 10)) | dict(b=jnp.zeros(12), c=jnp.zeros(10))
    sites = tinyjax.find_sites(loss_fn, params, fresh)
    params = adam(loss_fn, fresh, rate=5e-3, steps=150)(tinyjax.thin(params, sites, 4))
    after = {}
    for method in (tinyjax.methods.tiny, tinyjax.methods.random0):
        grow_step = tinyjax.make_grow_step(loss_fn, sites, method=method, num_neurons=4, fill=None)
        grown, info = jax.jit(grow_step)(params, fresh, key=jax.random.key(1))
        assert int(info.width["w"]) == 8
        after[method.__name__] = float(loss_fn(grown, unseen))
    before = float(loss_fn(params, unseen))
    assert before - after["tiny"] > max(0.1, 3 * (before - after["random0"])), (before, after)


@pytest.mark.slow
def test_units_of_tiny_remember_what_random_ones_do_not():
    """Two units cannot hold an input for three steps; two born by TINY lower the loss at once, random ones do not."""
    lag = 3

    def loss_fn(p, x):
        states = jax.lax.scan(
            lambda h, x: ((h := jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])), h),
            jnp.zeros((len(x), len(p["u"]))), x.swapaxes(0, 1),
        )[1].swapaxes(0, 1)  # fmt: skip
        return jnp.mean((states @ p["v"] + p["c"] - jnp.roll(x, lag, 1))[:, lag:] ** 2)

    x = jax.random.normal(jax.random.key(0), (512, 8, 1))
    train = adam(loss_fn, x, rate=1e-2, steps=100)
    gains = {}
    for name in ("tiny", "random0"):
        for seed in range(3):
            draws = jax.random.normal(jax.random.key(seed), (8, 8))
            params = dict(w=draws[:1], u=draws * 0.25, b=jnp.zeros(8), v=draws[:, :1], c=jnp.zeros(1))
            sites = tinyjax.find_sites(loss_fn, params, x)
            params = train(tinyjax.thin(params, sites, 2))
            if seed == 0:
                grow_step = jax.jit(
                    tinyjax.make_grow_step(loss_fn, sites, method=getattr(tinyjax.methods, name), num_neurons=2)
                )
            _, info = grow_step(params, x, key=jax.random.key(seed))
            gains.setdefault(name, []).append(float(info.gain_achieved["w"]))
    assert np.mean(gains["tiny"]) > 10 * np.mean(gains["random0"]), gains


# Blocks used several times


def depth_loss(loop, params, batch):
    block = lambda h: h + (jnp.tanh(h @ params["w"] + params["b"]) @ params["u"] + params["c"])  # noqa: E731
    return jnp.mean((loop(block, batch["x"]) @ params["o"] - batch["t"]) ** 2)


DEPTH = dict(
    unrolled=lambda block, h: block(block(block(h))),
    scan=lambda block, h: jax.lax.scan(lambda h, _: (block(h), None), h, None, length=3)[0],
    fori_loop=lambda block, h: jax.lax.fori_loop(0, 3, lambda _, h: block(h), h),
)


@pytest.mark.parametrize("loop", DEPTH)
def test_a_block_used_three_times_adds_its_rows(loop):
    """The sums over all uses, each with the whole adjoint there; what they say is least squares on the rows of all."""
    params, batch = draw(w=(5, 4), b=(4,), u=(4, 5), c=(5,), o=(5, 3)), data(40, 5)
    loss_fn = partial(depth_loss, DEPTH[loop])
    site = tinyjax.find_sites(loss_fn, params, batch)["w"]
    found = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site), compiler_options=QUICK)(params, batch)

    p, x, t = jax.tree.map(np.asarray, (params, batch["x"], batch["t"]))
    states, hidden = [x], []
    for _ in range(3):
        hidden.append(np.tanh(states[-1] @ p["w"] + p["b"]))
        states.append(states[-1] + hidden[-1] @ p["u"] + p["c"])
    adjoint, goals = -2 * (states[-1] @ p["o"] - t) / t[0].size @ p["o"].T, []
    for h in reversed(hidden):
        goals.insert(0, adjoint)
        adjoint = adjoint + (adjoint @ p["u"].T * (1 - h**2)) @ p["w"].T
    ones = np.ones((len(x), 1))
    rows = [[np.concatenate([a, ones], 1) for a in arrays] for arrays in (states[:3], hidden)]
    b_prev, b, v = (np.concatenate([a[half::2] for half in (0, 1) for a in use]) for use in (*rows, goals))
    for half in (0, 1):
        mine = np.arange(len(v)) // (len(v) // 2) == half
        for field, left, right in (("gram_prev", b_prev, b_prev), ("cross_prev", b_prev, v), ("gram", b, b)):
            np.testing.assert_allclose(getattr(found, field)[half], left[mine].T @ right[mine], rtol=1e-10, atol=1e-13)
    samples = oracles.Samples(b_prev, b, v, p["w"], p["u"])
    _, singular = oracles.eckart_young(b_prev, oracles.residual(samples), 4)
    neurons = compiled(tinyjax.methods.tiny, num_neurons=4, ridge=0.0)(found)
    np.testing.assert_allclose(neurons.singular_values, np.sqrt(3) * singular[:4], rtol=1e-7)
    psi = compiled(tinyjax.methods.bottleneck)(found)
    np.testing.assert_allclose(psi.after, 3 * oracles.psi(oracles.residual(samples)), rtol=1e-10)


def test_a_block_scanned_three_times_grows():
    params, batch = draw(w=(5, 4), b=(4,), u=(4, 5), c=(5,), o=(5, 3)), data(7, 5)
    model = Model(partial(depth_loss, DEPTH["scan"]), params, batch, {"w": 4})
    (report,) = inspect(model).values()
    assert report.silent_out == report.silent_in == report.untouched == report.dust == 0, report
    assert report.slope < 1e-6 and report.identity < 1e-12, report
