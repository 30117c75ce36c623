"""What training never moves stays: frozen leaves are found from the optimizer's program, and no growth writes to them.

The oracle of what is frozen trains: forty steps with random gradients, and every entry that is bit for bit the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tinyjax
from tests.support.zoo.layers import draw
from tinyjax.core.params import named_leaves
from tinyjax.surgery import frozen_leaves

# --- what the optimizer never moves

PARAMS = draw(0, w=(5, 6), u=(6, 3), c=(3,))
IS_U = {"w": False, "u": True, "c": False}
LABELS = {"w": "train", "u": "freeze", "c": "train"}
SOME_ROWS = np.ones((6, 3))
SOME_ROWS[2:4] = 0


def split(frozen, trained=None):
    return optax.multi_transform({"train": trained or optax.adam(1e-2), "freeze": frozen}, LABELS)


def times(mask):
    return optax.stateless(lambda g, p: jax.tree.map(lambda x, m: x * m, g, mask))


def chosen_by(mask):
    return optax.stateless(lambda g, p: jax.tree.map(lambda x, m: jnp.where(m > 0.5, x, 0.0), g, mask))


def by_path(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "freeze" if "u" in str(path) else "train", params)


LATE = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(1e-2)], [12])
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "labels": split(optax.set_to_zero()),
    "labels by a function": optax.partition({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, by_path),
    "a rate of 0": split(optax.adamw(0.0)),
    "a schedule of 0": split(optax.sgd(lambda count: 0.0, momentum=0.9)),
    "a chain that ends in 0": split(optax.chain(optax.adam(1e-2), optax.scale(0.0))),
    "a mask after": optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), IS_U)),
    "a mask before": optax.chain(optax.masked(optax.set_to_zero(), IS_U), optax.adam(1e-2)),
    "a mask before decay": optax.chain(optax.masked(optax.set_to_zero(), IS_U), optax.adamw(1e-2)),
    "a mask that trains raw gradients": optax.masked(optax.adam(1e-2), IS_U),
    "freeze": optax.chain(optax.sgd(0.1), optax.transforms.freeze(IS_U)),
    "selective": optax.transforms.selective_transform(optax.adam(1e-2), freeze_mask=IS_U),
    "rows times 0": optax.chain(times(dict(w=1.0, u=SOME_ROWS, c=1.0)), optax.adam(1e-2)),
    "rows selected": optax.chain(optax.sgd(0.1, 0.9), chosen_by(dict(w=1.0, u=SOME_ROWS, c=0.0))),
    "flat": optax.chain(optax.flatten(optax.adam(1e-2)), optax.masked(optax.set_to_zero(), IS_U)),
    "if finite": optax.apply_if_finite(split(optax.set_to_zero()), 3),
    "on a plateau": optax.chain(split(optax.set_to_zero()), optax.contrib.reduce_on_plateau()),
    "with births": tinyjax.with_birth(split(optax.set_to_zero())),
    "with births, accumulated": optax.MultiSteps(tinyjax.with_birth(split(optax.set_to_zero())), 3),
    # what only waits is not frozen
    "warmup": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 30)),
    "late": optax.sgd(LATE),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 8),
    "every ninth": optax.chain(optax.adam(1e-2), optax.apply_every(9)),
    "unfrozen later": optax.conditionally_mask(split(optax.sgd(0.1)), lambda step: step > 8),
    "adafactor": optax.adafactor(1e-2),
    "muon": optax.contrib.muon(1e-2),
}


def never_moved(optimizer):
    """By leaf, the share of entries that forty steps leave bit for bit the same."""
    optimizer, rng = optax.with_extra_args_support(optimizer), np.random.default_rng(0)
    noise = jax.tree.map(lambda x: rng.normal(size=(40, *x.shape)), PARAMS)

    @jax.jit
    def run(noise):
        def step(carry, gradient):
            params, state, moved = carry
            updates, state = optimizer.update(gradient, state, params, value=jnp.ones(()))
            new = optax.apply_updates(params, updates)
            return (new, state, jax.tree.map(lambda m, a, b: m | (a != b), moved, new, params)), None

        start = PARAMS, optimizer.init(PARAMS), jax.tree.map(lambda x: jnp.zeros(x.shape, bool), PARAMS)
        return jax.lax.scan(step, start, noise)[0][2]

    return {name: 1 - float(np.mean(moved)) for name, moved in run(noise).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_are_those_that_training_never_moves(name):
    abstract = jax.eval_shape(lambda: PARAMS)
    found = frozen_leaves(abstract, OPTIMIZERS[name])
    share = never_moved(OPTIMIZERS[name])
    assert set(found) == {leaf for leaf, still in share.items() if still > 0}
    for leaf, why in found.items():
        assert why == "the optimizer never moves " + ("it" if share[leaf] == 1 else "some of its entries")


def test_a_line_search_trains_everything_and_hyperparameters_are_the_users():
    assert not frozen_leaves(PARAMS, optax.lbfgs())
    assert not frozen_leaves(PARAMS, optax.inject_hyperparams(optax.adam)(learning_rate=0.0))


def test_an_optimizer_that_moves_nothing_freezes_nothing():
    for still in (optax.sgd(0.0), optax.set_to_zero(), tinyjax.with_birth(optax.adam(0.0))):
        assert not frozen_leaves(PARAMS, still)
        assert set(frozen_leaves(PARAMS, still, lambda p: {"w": p["w"]})) == {"u", "c"}


def test_what_trainable_leaves_out_is_frozen():
    found = frozen_leaves({"a": PARAMS, "b": PARAMS}, optax.masked(optax.set_to_zero(), IS_U), lambda p: p["a"])
    assert set(found) == {"a/u", "b/w", "b/u", "b/c"}
    assert found["b/w"] == "`trainable` leaves it out" and found["a/u"] == "the optimizer never moves it"


CHEAP = dict(method=partial(tinyjax.methods.tiny, ridge=1e-2), update=partial(tinyjax.methods.best_update, ridge=1e-2))

# --- models: (loss, parameters, batch, sites whose readers can be frozen with those readers)


def batch_of(shape, targets, seed=5):
    found = draw(seed, x=shape, t=targets)
    return {"x": 3 * found["x"], "t": jnp.tanh(3 * found["t"])}


def squared(outputs, batch):
    return jnp.mean((outputs - batch["t"]) ** 2)


def network():
    """Two hidden layers with biases."""
    params = draw(1, first=(5, 6), d=(6,), middle=(6, 6), e=(6,), last=(6, 3), f=(3,))

    def loss(p, b):
        x = jnp.tanh(b["x"] @ p["first"] + p["d"])
        return squared(jnp.tanh(x @ p["middle"] + p["e"]) @ p["last"] + p["f"], b)

    return loss, params, batch_of((64, 5), (64, 3))


def convolutions():
    params = draw(2, stem=(3, 3, 2, 4), scale=(4,), shift=(4,), deep=(3, 3, 4, 3))
    conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def loss(p, b):
        return squared(conv(jax.nn.relu(conv(b["x"], p["stem"]) * p["scale"] + p["shift"]), p["deep"]).mean((1, 2)), b)

    return loss, params, batch_of((32, 5, 5, 2), (32, 3))


def attention():
    """One head; scores are divided by the root of the dimension of queries and keys."""
    params = draw(3, q=(4, 6), k=(4, 6), v=(4, 5), o=(5, 4))

    def loss(p, b):
        scores = jnp.einsum("ntd,nsd->nts", b["x"] @ p["q"], b["x"] @ p["k"]) / np.sqrt(p["q"].shape[1])
        return squared(jax.nn.softmax(scores) @ (b["x"] @ p["v"]) @ p["o"], b)

    return loss, params, batch_of((32, 6, 4), (32, 6, 4))


def stack():
    """Layers in a scan, of which an optimizer may freeze some."""
    params = draw(4, up=(3, 5, 4), down=(3, 4, 5), head=(5, 2))

    def loss(p, b):
        layer = lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None)  # noqa: E731
        return squared(jax.lax.scan(layer, b["x"], (p["up"], p["down"]))[0] @ p["head"], b)

    return loss, params, batch_of((64, 5), (64, 2))


FIRST_LAYERS = np.arange(3).reshape(3, 1, 1) > 0
REFUSED = {
    "network, labels": (network, "first", "middle"),
    "network, by name": (network, "middle", "last"),
    "convolutions": (convolutions, "stem", "deep"),
    "values": (attention, "v", "o"),
    "stack": (stack, "up", "down"),
}


def freezing(params, *leaves):
    """An optimizer that never moves these leaves."""
    labels = {name: "freeze" if name in leaves else "train" for name in params}
    return tinyjax.with_birth(optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels))


@pytest.mark.parametrize("name", REFUSED)
def test_a_site_read_by_a_frozen_kernel_is_refused_when_named_and_left_out_when_not(name):
    make, producer, reader = REFUSED[name]
    loss, params, batch = make()
    site = tinyjax.find_sites(loss, params, batch)[producer]
    optimizer = freezing(params, reader)
    message = (
        f"site `{producer}` cannot grow: .*`{reader}`, which is frozen .the optimizer never moves it.*Train the leaf"
    )
    thinned = tinyjax.thin(params, site, 2)
    for freeze in (
        {"optimizer": optimizer},
        {"trainable": lambda p: {k: v for k, v in p.items() if k != reader}},
    ):
        say = message if "optimizer" in freeze else f"`{reader}`, which is frozen .`trainable` leaves it out"
        step = tinyjax.make_grow_step(loss, site, num_neurons=1, **freeze)
        with pytest.raises(ValueError, match=say):
            step(thinned, batch, optimizer.init(params)) if "optimizer" in freeze else step(thinned, batch)
        with pytest.raises(ValueError, match=say):
            tinyjax.diagnose(loss, thinned, batch, sites=site, **freeze)
    schedule = lambda step, widths, history: {producer: 1}  # noqa: E731
    with pytest.raises(ValueError, match=message):
        next(tinyjax.fit(loss, thinned, [batch], optimizer, schedule, jax.random.key(0), sites=site, num_neurons=1))
    with pytest.raises(ValueError, match=f"at site `{producer}`, which cannot grow: .*`{reader}`, which is frozen"):
        next(tinyjax.fit(loss, thinned, [batch], optimizer, schedule, jax.random.key(0), num_neurons=1))
    idle = tinyjax.fit(loss, thinned, [batch], optimizer, lambda *_: {}, jax.random.key(0), num_neurons=1)
    record = next(idle)
    assert producer not in record.sites.names and f"`{reader}`, which is frozen" in record.refused[producer].reason
    found = tinyjax.diagnose(loss, thinned, batch, optimizer=optimizer)
    assert producer not in found.findings and f"`{reader}`, which is frozen" in str(found)


def test_layers_of_a_stack_that_are_frozen_in_part():
    loss, params, batch = stack()
    site = tinyjax.find_sites(loss, params, batch)["up"]
    mask = dict.fromkeys(params, 1.0) | {"down": FIRST_LAYERS}
    optimizer = tinyjax.with_birth(optax.chain(times(mask), optax.sgd(1e-2, momentum=0.9)))
    step = tinyjax.make_grow_step(loss, site, num_neurons=1, optimizer=optimizer)
    with pytest.raises(ValueError, match="`down`, which is frozen .the optimizer never moves some of its entries"):
        step(tinyjax.thin(params, site, 2), batch, optimizer.init(params))


GROWN = {
    "fan-in": (network, "middle", ["first", "d", "middle", "e"]),
    "bias of the reader": (network, "first", ["e"]),
    "bias of the last reader": (network, "middle", ["f"]),
    "scale and shift": (convolutions, "stem", ["scale", "shift"]),
    "queries and keys": (attention, "v", ["q", "k"]),
}


@pytest.mark.parametrize("name", GROWN)
def test_what_is_frozen_next_to_a_growth_stays_bit_for_bit(name):
    make, producer, leaves = GROWN[name]
    loss, params, batch = make()
    site = tinyjax.find_sites(loss, params, batch)[producer]
    start = tinyjax.thin(params, site, 2)
    optimizer = freezing(params, *leaves)
    step = tinyjax.make_grow_step(loss, site, num_neurons=1, optimizer=optimizer, **CHEAP)
    grown, _, info = step(start, batch, optimizer.init(start), jax.random.key(1))
    assert int(info.width[producer]) == 3 and float(info.amplitude_update[producer]) > 0
    through = {member.leaf: member.layout for member in site.members}
    for leaf in leaves:
        old, new = start[leaf], grown[leaf]
        if leaf in through:
            old, new = (through[leaf].to_slots(x)[..., :2, :] for x in (old, new))
        np.testing.assert_array_equal(new, old)
    reader = site.consumers[0].leaf
    assert not np.array_equal(
        through[reader].to_slots(grown[reader])[..., :2, :], through[reader].to_slots(start[reader])[..., :2, :]
    )


def test_the_update_beside_a_frozen_bias_is_that_of_the_kernel_alone():
    """Against least squares without a column for the constant, on the samples that a growth estimates from."""
    loss, params, batch = network()
    site = tinyjax.find_sites(loss, params, batch)["middle"]
    start = tinyjax.thin(params, site, 4)
    step = tinyjax.make_grow_step(
        loss, site, num_neurons=1, update=tinyjax.methods.best_update, fill=None, optimizer=optax.sgd(0.1),
        trainable=lambda p: {k: v for k, v in p.items() if k != "f"},
    )  # fmt: skip
    grown, _, info = step(start, batch, optax.sgd(0.1).init({k: v for k, v in start.items() if k != "f"}))
    b = np.tanh(np.tanh(batch["x"] @ start["first"] + start["d"]) @ start["middle"] + start["e"])[:48, :4]
    y = b @ start["last"][:4] + start["f"]
    best = np.linalg.lstsq(b, 2 / 3 * (np.asarray(batch["t"])[:48] - y), rcond=None)[0]
    moved = np.asarray(grown["last"] - start["last"])[:4]
    np.testing.assert_allclose(moved, float(info.amplitude_update["middle"]) * best, rtol=1e-6)
    np.testing.assert_array_equal(grown["f"], start["f"])


def test_neurons_that_read_nothing_are_not_born_into_a_frozen_fan_in():
    loss, params, batch = network()
    site = tinyjax.find_sites(loss, params, batch)["middle"]
    start = tinyjax.thin(params, site, 2)
    for leaves, born in ((("d",), 2), (("middle",), 0)):
        optimizer = freezing(params, *leaves)
        options = dict(num_neurons=2, method=tinyjax.methods.gradmax, update=None, optimizer=optimizer)
        step = tinyjax.make_grow_step(loss, site, **options)
        grown, _, info = step(start, batch, optimizer.init(start), jax.random.key(0))
        assert int(info.written["middle"]) == born and int(info.width["middle"]) == 4
        if not born:  # the filler's neurons read, and their fan-out learns
            gradient = jax.grad(loss)(grown, batch)["last"]
            assert np.all(np.any(gradient[2:4] != 0, axis=1))


def test_a_compensation_does_not_multiply_a_frozen_leaf():
    loss, params, batch = attention()
    sites = tinyjax.find_sites(loss, params, batch).growable
    (site,) = (site for site in sites if site.powers)
    ((leaf, _),) = site.powers
    other = {"q": "k", "k": "q"}[leaf]
    start = tinyjax.thin(params, site, 3)
    optimizer = freezing(params, leaf)
    message = f"another capacity of site `{site.name}` asks to multiply `{leaf}`.*that leaf is frozen .the optimizer"
    for capacity in (4, 9):
        with pytest.raises(ValueError, match=message):
            tinyjax.resize(start, sites, {site.name: capacity}, optimizer=optimizer, opt_state=optimizer.init(start))
    with pytest.raises(ValueError, match="`trainable` leaves it out"):
        tinyjax.resize(start, sites, {site.name: 9}, trainable=lambda p: {k: v for k, v in p.items() if k != leaf})
    # the same capacity, another site, another frozen leaf
    tinyjax.resize(
        start, sites, {site.name: site.capacity, "v": 8}, optimizer=optimizer, opt_state=optimizer.init(start)
    )
    optimizer = freezing(params, other)
    wider, _, _ = tinyjax.resize(start, sites, {site.name: 9}, optimizer=optimizer, opt_state=optimizer.init(start))
    np.testing.assert_array_equal(wider[other][:, :3], start[other][:, :3])


def test_running_statistics_are_no_weights():
    """They are outside of `trainable`, and their new slots are written at birth all the same."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(5, name="hidden")(x))
            return nn.Dense(3, name="out")(nn.tanh(x))

    def loss(variables, batch):
        outputs, updates = Net().apply(variables, batch["x"], mutable=["batch_stats"])
        return squared(outputs, batch), updates

    batch = batch_of((64, 5), (64, 3))
    variables = Net().init(jax.random.key(0), batch["x"])
    site = tinyjax.find_sites(loss, variables, batch, has_aux=True)["hidden"]
    start = tinyjax.thin(variables, site, 3)
    step = tinyjax.make_grow_step(loss, site, num_neurons=1, has_aux=True, trainable=lambda v: v["params"], **CHEAP)
    grown, info = step(start, batch)
    assert int(info.width["hidden"]) == 4
    mean, var = (np.asarray(grown["batch_stats"]["norm"][name]) for name in ("mean", "var"))
    assert mean[3] != 0 and var[3] != 1 and mean[4] == 0 and var[4] == 1
    np.testing.assert_array_equal(mean[:3], start["batch_stats"]["norm"]["mean"][:3])


def test_adapters_grow_on_a_frozen_base():
    base, adapters = draw(6, first=(5, 6), last=(6, 3)), draw(7, a=(5, 4), b=(4, 6))

    def loss(p, b):
        hidden = b["x"] @ p["base"]["first"] + (b["x"] @ p["adapters"]["a"]) @ p["adapters"]["b"]
        return squared(jnp.tanh(hidden) @ p["base"]["last"], b)

    params, batch = {"base": base, "adapters": adapters}, batch_of((64, 5), (64, 3))
    found = tinyjax.diagnose(loss, params, batch, trainable=lambda p: p["adapters"])
    assert list(found.findings) == ["adapters/a"]
    params = tinyjax.thin(params, tinyjax.find_sites(loss, params, batch)["adapters/a"], 1)
    records = tinyjax.fit(
        loss, params, [batch] * 3, tinyjax.with_birth(optax.adam(1e-2)), tinyjax.every(1, 1, final=3),
        jax.random.key(0), num_neurons=1, trainable=lambda p: p["adapters"],
    )  # fmt: skip
    *_, last = records
    assert last.width == {"adapters/a": 3}
    for name, leaf in named_leaves(base).items():
        np.testing.assert_array_equal(last.params["base"][name], leaf)
