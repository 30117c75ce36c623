"""`make_grow_step`: one program, pure, never worse on its batch, and clear about what it cannot do."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tinyjax.methods import is_function_preserving, traits

CAPACITY, START = 12, 3


def forward(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch["x"]), batch["y"]).mean()


def init(key, sizes, dtype=jnp.float64):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (i, o), dtype) / np.sqrt(i), "b": 0.1 * jnp.ones(o, dtype)}
        for k, i, o in zip(keys, sizes[:-1], sizes[1:])
    ]


def make(capacity=CAPACITY, start=START, dtype=jnp.float64, n=96):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6))
    batch = {"x": jnp.asarray(x, dtype), "y": jnp.asarray((np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] > 0).astype(int))}
    full = init(jax.random.key(0), (6, CAPACITY, CAPACITY, 2), dtype)
    sites = tinyjax.find_sites(loss_fn, full, batch)
    params = tinyjax.thin(full, sites, start)
    if capacity != CAPACITY:
        params, sites = tinyjax.resize(params, sites, dict.fromkeys(sites.names, capacity))
    return params, batch, sites


@cache
def default():
    """The growth with nothing chosen, and the same without `check`: each compiles once for all who use it."""
    _, _, sites = make()
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=4)
    return grow_step, jax.jit(grow_step)


def test_a_growth_widens_lowers_the_loss_and_reports():
    params, batch, sites = make()
    new, info = default()[0](params, batch)
    for site in sites:
        name = site.name
        assert int(tinyjax.width(new, site)) == START + 4 == int(info.width[name])
        assert int(info.written[name]) + int(info.filled[name]) == 4
        assert int(info.born[name].sum()) == 4 and not info.born[name][:START].any()
        assert info.status[name] == tinyjax.Status.GROWN
        assert info.loss_after[name] <= info.loss_before[name]
        assert info.psi_after[name] < info.psi_before[name]
    np.testing.assert_allclose(info.loss_before["0"], loss_fn(params, batch), rtol=1e-12)
    np.testing.assert_allclose(info.loss_after["1"], loss_fn(new, batch), rtol=1e-12)


@pytest.mark.parametrize("method", [tinyjax.methods.tiny0, partial(tinyjax.methods.tiny0, ridge=0.0)])
def test_a_birth_without_update_keeps_every_output_bitwise(method):
    params, batch, sites = make()
    new, _ = tinyjax.make_grow_step(loss_fn, sites, num_neurons=4, method=method, update=None)(params, batch)
    np.testing.assert_array_equal(forward(new, batch["x"]), forward(params, batch["x"]))


def test_neurons_with_an_amplitude_lower_the_loss():
    params, batch, sites = make()
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=3, method=tinyjax.methods.tiny, fill=None)
    new, info = jax.jit(grow_step)(params, batch)
    assert loss_fn(new, batch) < loss_fn(params, batch)
    assert sum(float(info.amplitude[n]) > 0 for n in sites.names) >= 1


def test_one_trace_serves_a_whole_schedule():
    params, batch, sites = make()
    calls = []

    def counted(params, batch):
        calls.append(None)
        return loss_fn(params, batch)

    grow_step = tinyjax.make_grow_step(counted, sites, num_neurons=3)
    schedule = [{"0": 3}, {"1": 2}, {"0": 1, "1": 1}, 0, {"0": 2}, {"1": 3}]
    params, _ = grow_step(params, batch, neurons=schedule[0])
    traced = len(calls)
    for neurons in schedule[1:]:
        params, _ = grow_step(params, batch, neurons=neurons)
    assert len(calls) == traced
    assert [int(tinyjax.width(params, s)) for s in sites] == [START + 6, START + 6]


def test_a_site_that_is_not_asked_reports_its_goal_and_changes_nothing_for_the_other():
    params, batch, sites = make()
    both = tinyjax.make_grow_step(loss_fn, sites, num_neurons=3)
    alone = tinyjax.make_grow_step(loss_fn, sites["1"], num_neurons=3)
    one, info = both(params, batch, jax.random.key(0), {"1": 3})
    other, only = alone(params, batch, jax.random.key(0))
    assert info.status["0"] == tinyjax.Status.SKIPPED
    asked = tinyjax.estimate(loss_fn, params, jax.tree.map(lambda x: x[:72], batch), sites["0"])
    np.testing.assert_allclose(info.psi_before["0"], tinyjax.statistics.moments(asked).energy, rtol=1e-10)
    for field in ("psi_before", "psi_after", "gain_held_out", "loss_after"):
        np.testing.assert_allclose(getattr(info, field)["1"], getattr(only, field)["1"], rtol=1e-9)


def test_inside_jit_and_scan_with_training_steps():
    params, batch, sites = make()
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2)
    optimizer = optax.sgd(0.1)

    def train(params, _):
        updates, _ = optimizer.update(jax.grad(loss_fn)(params, batch), optimizer.init(params))
        return optax.apply_updates(params, updates), None

    def round_(params, _):
        params, info = grow_step(params, batch)
        params, _ = jax.lax.scan(train, params, length=3)
        return params, info

    scanned, infos = jax.jit(lambda p: jax.lax.scan(round_, p, length=3))(params)
    looped = params
    for _ in range(3):
        looped, _ = jax.jit(round_)(looped, None)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(infos.width["0"], START + 2 * np.arange(1, 4))
    assert np.all(np.diff(infos.loss_before["0"]) < 0)


def test_vmap_grows_an_ensemble():
    _, batch, sites = make()
    members = jax.vmap(lambda k: tinyjax.thin(init(k, (6, CAPACITY, CAPACITY, 2)), sites, START))(
        jax.random.split(jax.random.key(5), 3)
    )
    grow_step, _ = default()
    grown, info = jax.jit(jax.vmap(lambda p: grow_step(p, batch)))(members)
    one, _ = grow_step(jax.tree.map(lambda x: x[1], members), batch)
    assert info.width["0"].shape == (3,)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], grown), one, rtol=1e-8, atol=1e-10)


def test_refresh_estimates_before_every_site():
    params, batch, sites = make()
    moving = dict(num_neurons=2, update=tinyjax.methods.best_update, update_amplitude=tinyjax.growth.fixed(0.1))
    once = tinyjax.make_grow_step(loss_fn, sites, **moving)(params, batch)[1]
    again = tinyjax.make_grow_step(loss_fn, sites, refresh=True, **moving)(params, batch)[1]
    np.testing.assert_allclose(once.psi_before["0"], again.psi_before["0"], rtol=1e-12)
    assert once.psi_before["1"] != again.psi_before["1"]


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05, momentum=0.9), optax.adam(1e-2), optax.adamw(1e-2)])
def test_padded_is_exact_and_free_slots_stay_zero(optimizer):
    """Law 5: a network with spare slots trains and grows like the one without."""
    final = START + 2
    optimizer = tinyjax.with_birth(optimizer)

    @partial(jax.jit, static_argnums=0)
    def run(sites, params, batch):
        grow_step = tinyjax.make_grow_step(
            loss_fn, sites, num_neurons=2, method=partial(tinyjax.methods.tiny0, ridge=1e-2), optimizer=optimizer
        )

        def train(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(train, (params, optimizer.init(params)), length=25)
        params, state, info = grow_step(carry[0], batch, carry[1], key=jax.random.key(0))
        carry, _ = jax.lax.scan(train, (params, state), length=25)
        return carry[0], info

    outputs = []
    for capacity in (final, CAPACITY):
        params, batch, sites = make(capacity)
        trained, info = run(sites, params, batch)
        outputs.append(forward(trained, batch["x"]))
        for site in sites:
            assert int(tinyjax.width(trained, site)) == final
            for member in site.members:
                slots = member.layout.to_slots(tinyjax.core.params.named_leaves(trained)[member.leaf])
                np.testing.assert_array_equal(slots[final:], 0)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-12)


def test_optimizer_state_travels_and_newborn_slots_start_afresh():
    params, batch, sites = make()
    optimizer = tinyjax.with_birth(optax.adam(1e-2))
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2, optimizer=optimizer)
    new, new_state, info = grow_step(params, batch, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    born = np.asarray(info.born["0"])
    before, after = (optax.tree_utils.tree_get(s, "mu")[0]["w"] for s in (state, new_state))
    np.testing.assert_array_equal(after[:, born], 0)
    np.testing.assert_array_equal(after[:, :START], before[:, :START])
    # The first step of a newborn weight with a gradient is that of a fresh Adam: the learning rate.
    gradient = jax.grad(loss_fn)(new, batch)
    updates, _ = optimizer.update(gradient, new_state, new)
    fan_out = np.abs(np.asarray(updates[1]["w"][born, :START]))
    np.testing.assert_allclose(fan_out, 1e-2, rtol=1e-3)


def test_running_statistics_are_not_trained():
    params, batch, sites = make()
    variables = {"params": params, "ema": jnp.zeros(3)}

    def loss(variables, batch):
        return loss_fn(variables["params"], batch)

    found = tinyjax.find_sites(loss, variables, batch)
    assert found.names == ("0", "1")
    optimizer = tinyjax.with_birth(optax.adam(1e-2))
    state = optimizer.init(variables["params"])
    grow_step = tinyjax.make_grow_step(loss, found, num_neurons=2, optimizer=optimizer, trainable=lambda v: v["params"])
    new, new_state, _ = grow_step(variables, batch, state)
    chex.assert_trees_all_equal_shapes(state, new_state)
    assert int(tinyjax.width(new, found[0])) == START + 2


def test_nan_in_the_batch_changes_nothing_and_says_so():
    params, batch, sites = make()
    bad = {**batch, "x": batch["x"].at[3, 2].set(jnp.nan)}
    grow_step, unchecked = default()
    with pytest.raises(ValueError, match=r"site `0`: the loss is not finite"):
        grow_step(params, bad)
    same, info = unchecked(params, bad)
    chex.assert_trees_all_equal(same, params)
    assert all(info.status[n] == tinyjax.Status.NON_FINITE for n in sites.names)
    assert not any(info.born[n].any() for n in sites.names)


def test_more_neurons_than_free_slots():
    params, batch, sites = make(start=CAPACITY - 1)
    grow_step, unchecked = default()
    with pytest.raises(ValueError, match=r"site `0` has fewer free slots than neurons asked for.*`resize`"):
        grow_step(params, batch)
    new, info = unchecked(params, batch)
    assert int(info.width["0"]) == CAPACITY and int(info.born["0"].sum()) == 1
    chex.assert_trees_all_equal_shapes(new, params)


def test_beyond_the_rank_without_filler():
    params, batch, sites = make()
    grow_step = tinyjax.make_grow_step(loss_fn, sites["1"], num_neurons=6, fill=None)  # two classes: rank at most 2
    with pytest.raises(ValueError, match=r"site `1`: the method found \d neurons, fewer than asked for.*`fill`"):
        grow_step(params, batch)


def test_a_growth_that_would_raise_the_loss_is_rejected():
    @traits(function_preserving=False, stochastic=False)
    def harmful(statistics, *, num_neurons, key=None):
        neurons = tinyjax.methods.tiny(statistics, num_neurons=num_neurons)
        return neurons._replace(omega=-1e3 * neurons.omega)

    params, batch, sites = make()
    grow_step = tinyjax.make_grow_step(
        loss_fn, sites, num_neurons=2, method=harmful, update=None, amplitude=tinyjax.growth.fixed(1.0), fill=None
    )
    new, info = grow_step(params, batch)
    chex.assert_trees_all_equal(new, params)
    assert all(info.status[n] == tinyjax.Status.REJECTED for n in sites.names)


def test_a_method_of_the_users_own():
    @traits(function_preserving=True, stochastic=True)
    def ones(statistics, *, num_neurons, key=None):
        inputs, outputs = statistics.cross_prev.shape[1:]
        return tinyjax.methods.Neurons(
            jnp.ones((inputs, num_neurons)), jnp.zeros((num_neurons, outputs)), jnp.ones(num_neurons)
        )

    params, batch, sites = make()
    new, _ = tinyjax.make_grow_step(loss_fn, sites["0"], num_neurons=2, method=ones)(params, batch, jax.random.key(0))
    np.testing.assert_array_equal(new[0]["w"][:, START : START + 2], 1)
    assert is_function_preserving(ones)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_neurons=0), r"`num_neurons` of site `0` must be an int of at least 1, got 0"),
        (dict(num_neurons=CAPACITY + 1), r"more than its 12 slots; `resize` it first"),
        (dict(num_neurons={"2": 1}), r"`num_neurons` names the unknown site `2`"),
        (dict(num_neurons={"0": 1}), r"`num_neurons` has no entry for site `1`"),
        (dict(num_neurons=2, amplitude=tinyjax.growth.line_search), r"`tiny0` keeps the function"),
        (dict(num_neurons=2, fill=tinyjax.methods.tiny), r"`fill` must keep the function"),
        (dict(num_neurons=2, sites=[]), r"`sites` is empty"),
    ],
)
def test_misuse_at_construction(change, message):
    _, _, sites = make()
    arguments = dict(sites=sites) | change
    with pytest.raises(ValueError, match=message):
        tinyjax.make_grow_step(loss_fn, arguments.pop("sites"), **arguments)


def test_misuse_at_call():
    params, batch, sites = make()
    grow_step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=2)
    with pytest.raises(ValueError, match=r"`neurons` asks for 3 at site `0`; this grow_step was made for 0 .. 2"):
        grow_step(params, batch, neurons=3)
    with pytest.raises(ValueError, match=r"`neurons` names the unknown site `hidden`"):
        grow_step(params, batch, neurons={"hidden": 1})
    with pytest.raises(ValueError, match=r"at least 8 samples"):
        grow_step(params, jax.tree.map(lambda x: x[:4], batch))
    with pytest.raises(ValueError, match=r"every leaf of `batch` must have the samples as its leading axis"):
        grow_step(params, {**batch, "y": batch["y"][:-1]})
    with pytest.raises(ValueError, match=r"pass `key=`"):
        tinyjax.make_grow_step(loss_fn, sites, num_neurons=2, method=tinyjax.methods.random0)(params, batch)


def test_an_activation_that_is_not_silent_at_zero_is_refused_when_the_loss_is_first_seen():
    params, batch, sites = make()

    def sigmoid_loss(params, batch):
        hidden = jax.nn.sigmoid(batch["x"] @ params[0]["w"] + params[0]["b"])
        return loss_fn(params[1:], {**batch, "x": hidden})

    found = tinyjax.find_sites(sigmoid_loss, params, batch)
    assert not found["0"].growable and "0.5" in found["0"].reason
    with pytest.raises(ValueError, match=r"site `0` cannot grow: an empty neuron is not silent: `logistic` maps"):
        tinyjax.make_grow_step(sigmoid_loss, sites, num_neurons=2)(params, batch)
    with pytest.raises(ValueError, match=r"site `0` cannot grow"):
        tinyjax.make_grow_step(sigmoid_loss, found, num_neurons=2)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_the_loss_changes_nothing(scale):
    """Law 4: with the amplitudes searched in their own unit, the grown function is the same."""
    params, batch, sites = make()
    batch = {**batch, "y": (batch["x"][:, 0] > 0).astype(int)}  # simple enough for 72 samples to say what 24 want
    grown = []
    for c in (1.0, scale):
        grow_step = tinyjax.make_grow_step(lambda p, b, c=c: c * loss_fn(p, b), sites["1"], num_neurons=2)
        new, info = jax.jit(grow_step)(params, batch, jax.random.key(0))
        grown.append((forward(new, batch["x"]), info.written["1"], info.amplitude_update["1"] * c))
    assert grown[0][1] > 0 and grown[0][2] > 0
    chex.assert_trees_all_close(grown[0], grown[1], rtol=1e-6)


def test_a_method_of_ones_own_is_one_function():
    """Anything from statistics to neurons: here a neuron an output, which reads what its output is asked for."""

    def one_each(statistics, *, num_neurons, key=None):
        mean = tinyjax.statistics.moments(statistics)
        asked = mean.cross_prev[:, :num_neurons]
        return tinyjax.methods.Neurons(asked, jnp.eye(num_neurons, mean.cross_prev.shape[1]), jnp.ones(num_neurons))

    params, batch, sites = make(n=400)
    grow_step = tinyjax.make_grow_step(loss_fn, sites[1], num_neurons=2, method=one_each, update=None, fill=None)
    new, info = grow_step(params, batch)
    assert int(info.written["1"]) == 2 and info.amplitude["1"] > 0
    assert info.gain_achieved["1"] > 0 and loss_fn(new, batch) < loss_fn(params, batch)
    statistics = tinyjax.estimate(loss_fn, params, batch, sites[1])
    want = tinyjax.methods.predicted_gain(tinyjax.statistics.moments(statistics), one_each(statistics, num_neurons=2))
    assert np.isfinite(want) and np.isfinite(info.gain_predicted["1"]) and np.isfinite(info.gain_held_out["1"])
    both = tinyjax.methods.completed(one_each, tinyjax.methods.random0)(
        statistics, num_neurons=2, key=jax.random.key(0)
    )
    np.testing.assert_allclose(both.alpha, one_each(statistics, num_neurons=2).alpha)
