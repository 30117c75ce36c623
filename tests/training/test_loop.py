"""`fit` and `train_step`: training and growing in one call, and the same loop in Flax's own containers."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import tinyjax

# A growth without eigenvalues or line searches: it compiles in a second, and it needs the key.
CHEAP = dict(method=tinyjax.methods.random0, update=None, fill=None)
BATCH_SIZE = 16


def make_batches(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, BATCH_SIZE, 5))
    t = np.sin(2 * x[..., :3])
    return [{"x": jnp.asarray(x[i]), "t": jnp.asarray(t[i])} for i in range(n)]


def apply(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["u"] + params["c"]


def loss_fn(params, batch):
    return jnp.mean((apply(params, batch["x"]) - batch["t"]) ** 2)


def init(width=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, width), "b": (width,), "u": (width, 3), "c": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape)) / 2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def thin():
    params = init()
    return tinyjax.thin(params, tinyjax.find_sites(loss_fn, params, make_batches(1)[0]), 2)


OPTIMIZER = tinyjax.with_birth(optax.adam(1e-2))
PROGRAMS = {}  # runs of the same loss at the same sites compile once


def fit(params, batches, schedule, *, num_neurons=3, key=0, growth_samples=32, loss=loss_fn, **options):
    options = dict(num_neurons=num_neurons, growth_samples=growth_samples, programs=PROGRAMS) | options
    return list(tinyjax.fit(loss, params, iter(batches), OPTIMIZER, schedule, jax.random.key(key), **options))


class Compiles:
    """A loss that remembers the shapes it was traced with."""

    def __init__(self):
        self.capacities = []

    def __call__(self, params, batch):
        self.capacities.append(params["w"].shape[1])
        return loss_fn(params, batch)


def test_fit_grows_to_the_final_width_and_makes_room_on_the_way():
    """The default recipe: 4 -> 12 neurons with capacities 8 and 12, each compiled once."""
    params = init(4)
    loss = Compiles()
    schedule = tinyjax.every(2, 2, final=12)
    records, traced = [], []
    optimizer = tinyjax.with_birth(optax.adam(1e-2))
    for record in tinyjax.fit(
        loss,
        params,
        make_batches(12),
        optimizer,
        schedule,
        jax.random.key(0),
        num_neurons=2,
        growth_samples=32,
        policy=tinyjax.multiple_of(8),
        final={"w": 12},
    ):
        records.append(record)
        traced.append(len(loss.capacities))
    assert [r.step for r in records] == list(range(1, 13))
    assert [r.width["w"] for r in records] == [6, 6, 8, 8, 10, 10, 12, 12, 12, 12, 12, 12]
    assert [r.sites["w"].capacity for r in records] == 4 * [8] + 8 * [12]
    assert [r.growth is not None for r in records] == [True, False] * 4 + 4 * [False]
    for record in records:
        assert record.width["w"] == int(tinyjax.width(record.params, record.sites["w"]))
        assert record.params["w"].shape == (5, record.sites["w"].capacity)
        assert jax.tree.map(jnp.shape, record.opt_state) == jax.tree.map(jnp.shape, optimizer.init(record.params))
    growths = [r.growth for r in records if r.growth is not None]
    assert all(g.loss_after["w"] <= g.loss_before["w"] for g in growths)
    # Traces happen in the first steps at a capacity only: discovery, growth and training.
    new_traces = np.flatnonzero(np.diff(traced, prepend=0))
    np.testing.assert_array_equal(new_traces, [0, 4])
    assert records[-1].loss < 0.8 * records[0].loss


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.tanh(nn.Dense(self.width, name="hidden")(x)))


def test_fit_rebuilds_a_model_that_checks_shapes():
    built = []

    def make_loss(widths):
        built.append(dict(widths))
        net = Net(widths["hidden"])
        return lambda params, batch: jnp.mean((net.apply(params, batch["x"]) - batch["t"]) ** 2)

    batches = make_batches(6)
    params = Net(2).init(jax.random.key(0), batches[0]["x"])
    loss = make_loss({"hidden": 2})
    records = fit(
        params, batches, tinyjax.every(2, 3, final=9), loss=loss, make_loss=make_loss, final={"hidden": 9}, **CHEAP
    )
    assert [r.width["hidden"] for r in records] == [5, 5, 8, 8, 9, 9]
    assert built[0] == {"hidden": 2} and built[-2:] == [{"hidden": 8}, {"hidden": 9}]
    assert len(built) == 4  # once more to see what follows the width
    last = records[-1]
    small, widths = tinyjax.compact(last.params, last.sites)
    np.testing.assert_allclose(make_loss(widths)(small, batches[0]), last.loss_fn(last.params, batches[0]), rtol=1e-12)


def test_a_full_site_without_policy_takes_what_fits(thin):
    with pytest.warns(UserWarning, match="`w` .all 8 slots are used., where nothing can grow") as told:
        records = fit(thin, make_batches(4), tinyjax.every(1, 3, final=20), **CHEAP)
    assert sum("nothing can grow" in str(w.message) for w in told) == 1
    assert [r.width["w"] for r in records] == [5, 8, 8, 8]
    assert records[-1].growth is None


@pytest.mark.parametrize("final", [8, 20], ids=["at its final width", "beyond the slots"])
def test_a_full_network_says_once_that_nothing_can_grow(final):
    """Whoever forgets `thin` learns it; a control whose schedule never asks does not."""
    with pytest.warns(UserWarning, match="`w` .all 8 slots are used., where nothing can grow: .*`thin`") as told:
        records = fit(init(), make_batches(3), tinyjax.every(1, 1, final=final))
    assert sum("nothing can grow" in str(w.message) for w in told) == 1 and all(
        record.growth is None for record in records
    )
    fit(init(), make_batches(1), lambda step, widths, history: {})


def test_the_trained_part_alone_is_trained_and_aux_is_put_back(thin):
    """Decay would shrink the running statistics; the sums in `seen` say that every batch was trained on once."""

    def loss(variables, batch):
        value = loss_fn(variables["params"], batch) + 0 * variables["stats"]["seen"]
        return value, variables["stats"]["seen"] + batch["x"].sum()

    variables = {"params": thin, "stats": {"seen": jnp.zeros(()), "untouched": jnp.ones(3)}}
    batches = make_batches(6)
    optimizer = tinyjax.with_birth(optax.adamw(1e-2, weight_decay=0.1))
    records = list(
        tinyjax.fit(
            loss,
            variables,
            iter(batches),
            optimizer,
            tinyjax.every(3, 2, final=6),
            jax.random.key(0),
            num_neurons=2,
            growth_samples=48,
            trainable=lambda v: v["params"],
            has_aux=True,
            with_aux=lambda v, seen: v | {"stats": v["stats"] | {"seen": seen}},
            **CHEAP,
        )
    )
    assert len(records) == len(batches) and records[-1].width["w"] == 6
    seen = np.cumsum([float(b["x"].sum()) for b in batches])
    np.testing.assert_allclose([r.params["stats"]["seen"] for r in records], seen, rtol=1e-12)
    np.testing.assert_array_equal(records[-1].params["stats"]["untouched"], 1)
    assert jax.tree.map(jnp.shape, records[-1].opt_state) == jax.tree.map(jnp.shape, optimizer.init(thin))


def test_a_growth_looks_at_the_next_batches_and_loses_none(thin):
    batches = make_batches(5)
    taken = []

    def stream():
        for i, batch in enumerate(batches):
            taken.append(i)
            yield batch

    schedule = lambda step, widths, history: {"w": 2} if step == 1 else {}  # noqa: E731
    records = []
    for record in tinyjax.fit(
        loss_fn, thin, stream(), optax.sgd(0.0), schedule, jax.random.key(0), num_neurons=2, growth_samples=40, **CHEAP
    ):
        records.append((record, len(taken)))
    # 40 samples are three batches of 16: at step 1 the stream is read up to batch 3, then not before batch 4.
    assert [count for _, count in records] == [1, 4, 4, 4, 5]
    # The learning rate is 0 and the birth keeps the function: the losses say which batch each step was given.
    want = [float(loss_fn(thin, batch)) for batch in batches]
    np.testing.assert_allclose([r.loss for r, _ in records], want, rtol=1e-12)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x)[:40], *batches[1:4])
    np.testing.assert_allclose(records[1][0].growth.loss_before["w"], loss_fn(thin, whole), rtol=1e-12)


def test_a_fixed_key_reproduces_a_run(thin):
    run = partial(fit, thin, make_batches(3), tinyjax.every(2, 2, final=6), **CHEAP)
    first, again, other = run(key=0)[-1], run(key=0)[-1], run(key=1)[-1]
    chex.assert_trees_all_equal(first.params, again.params)
    assert np.abs(first.params["w"] - other.params["w"]).max() > 1e-3


def test_runs_that_share_programs_compile_once(thin):
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    optimizer, programs, schedule = tinyjax.with_birth(optax.adam(1e-2)), {}, tinyjax.every(1, 1, final=8)
    sites = tinyjax.find_sites(counted, thin, make_batches(1)[0]).growable

    def run(seed, **options):
        records = tinyjax.fit(
            counted, thin, make_batches(3), optimizer, schedule, jax.random.key(seed), num_neurons=1, sites=sites,
            growth_samples=32, programs=programs, **(CHEAP | options),
        )  # fmt: skip
        return list(records)[-1]

    first, seen = run(0), len(traces)
    other = run(1)
    assert len(traces) == seen and np.abs(first.params["w"] - other.params["w"]).max() > 1e-3
    chex.assert_trees_all_equal(run(0).params, first.params)
    run(0, method=tinyjax.methods.net2net)  # another program, of a loss that has been traced already
    assert len(traces) == seen and len(programs) == 2


def test_a_run_goes_on_from_any_record_as_if_it_had_not_been_stopped(thin):
    batches, schedule = make_batches(6), tinyjax.every(2, 2, final=8)
    whole = fit(thin, batches, schedule, **CHEAP)
    for stop in (1, 2, 3, 4):
        record = whole[stop - 1]
        resumed = fit(
            record.params,
            batches[stop:],
            schedule,
            sites=record.sites,
            opt_state=record.opt_state,
            step=record.step,
            history=record.history,
            **CHEAP,
        )
        assert [r.step for r in resumed] == list(range(stop + 1, 7))
        chex.assert_trees_all_equal(resumed[-1].params, whole[-1].params)
        chex.assert_trees_all_equal(resumed[-1].opt_state, whole[-1].opt_state)
        assert len(resumed[-1].history) == len(whole[-1].history) == 3


def test_an_epoch_in_a_scan_is_its_steps_one_by_one(thin):
    batches, optimizer = make_batches(3), tinyjax.with_birth(optax.adam(1e-2))
    data = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    order = np.arange(3 * BATCH_SIZE).reshape(3, BATCH_SIZE)
    epoch = jax.jit(tinyjax.train_epoch(loss_fn, optimizer))
    params, opt_state, losses = epoch(thin, optimizer.init(thin), data, order)
    records = fit(thin, batches, tinyjax.every(1, 1, final=8, start=99))
    chex.assert_trees_all_close((params, opt_state), (records[-1].params, records[-1].opt_state), rtol=1e-12)
    np.testing.assert_allclose(losses, [r.loss for r in records], rtol=1e-12)


def test_micro_batches_give_the_step_of_the_whole_batch(thin):
    batches = make_batches(3)
    never = tinyjax.every(1, 1, final=8, start=99)
    at_once = fit(thin, batches, never)
    in_parts = fit(thin, batches, never, micro_batch=4)
    chex.assert_trees_all_close(in_parts[-1].params, at_once[-1].params, rtol=1e-12)
    np.testing.assert_allclose([r.loss for r in in_parts], [r.loss for r in at_once], rtol=1e-12)


def test_micro_batches_serve_batches_of_several_sizes_with_one_program(thin):
    sizes = [jax.tree.map(lambda x, n=n: x[:n], batch) for n, batch in zip((4, 8, 16), make_batches(3))]
    loss = Compiles()
    records = []
    for record in tinyjax.fit(
        loss,
        thin,
        sizes,
        optax.sgd(0.1),
        lambda step, widths, history: {},
        jax.random.key(0),
        num_neurons=1,
        micro_batch=4,
    ):
        records.append(record)
        if record.step == 1:
            traces = len(loss.capacities)
    assert len(records) == 3 and len(loss.capacities) == traces
    with pytest.raises(ValueError, match="batch of 16 samples is not a multiple of `micro_batch`, 3"):
        fit(thin, make_batches(1), tinyjax.every(1, 1, final=8, start=99), micro_batch=3)
    with pytest.raises(ValueError, match="`micro_batch` must be at least 1"):
        fit(thin, make_batches(1), tinyjax.every(1, 1, final=8), micro_batch=0)


def test_sites_that_take_turns_are_estimated_one_at_a_time():
    """Each site has a program of its own, with a batch of its own size; nothing is compiled twice."""

    def loss(params, batch):
        hidden = jnp.tanh(jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"])
        return jnp.mean((hidden @ params["w3"] - batch["t"]) ** 2)

    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape)) for name, shape in dict(w1=(5, 8), w2=(8, 7), w3=(7, 3)).items()
    }
    sites = tinyjax.find_sites(loss, params, make_batches(1)[0])
    schedule = tinyjax.schedules.round_robin(1, 1, final=7)
    samples = dict(zip(sites.names, (16, 32)))
    start = tinyjax.thin(params, sites, 2)
    records = fit(start, make_batches(4), schedule, loss=loss, num_neurons=1, growth_samples=samples, **CHEAP)
    first, second = sites.names
    assert [tuple(r.growth.width) for r in records] == [(first,), (second,), (first,), (second,)]
    assert [tuple(r.width.values()) for r in records] == [(3, 2), (3, 3), (4, 3), (4, 4)]


def test_a_schedule_sees_the_growths_so_far(thin):
    lengths = []

    def schedule(step, widths, history):
        lengths.append((len(history), widths["w"]))
        return {"w": 1} if step % 2 == 0 else {}

    fit(thin, make_batches(4), schedule, **CHEAP)
    assert lengths == [(0, 2), (1, 3), (1, 3), (2, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batches=[]), r"`batches` is empty"),
        (dict(batches=[], sites="given"), r"`batches` is empty"),
        (dict(schedule=lambda step, widths, history: {"hidden": 1}), r"no site `hidden`; the sites are `w`"),
        (dict(schedule=tinyjax.every(1, {"hidden": 1}, final=4)), r"no site `hidden`; the sites are `w`"),
        (dict(schedule=tinyjax.every(1, 4, final=8)), r"asks for 4 neurons at site `w` at once, more than .*, 3"),
        (dict(num_neurons={"hidden": 1}), r"no site `hidden`"),
        (dict(num_neurons=0), r"`num_neurons` of site `w` must be an int of at least 1, got 0"),
        (dict(make_loss=lambda widths: loss_fn, final={"hidden": 3}, start=8), r"`final` gives site `w` no width"),
    ],
)
def test_misuse(thin, change, message):
    arguments = dict(batches=make_batches(2), schedule=tinyjax.every(1, 1, final=12)) | change
    params = init(arguments.pop("start")) if "start" in arguments else thin
    if arguments.pop("sites", None):
        arguments["sites"] = tinyjax.find_sites(loss_fn, params, make_batches(1)[0])
    with pytest.raises(ValueError, match=message):
        fit(params, arguments.pop("batches"), arguments.pop("schedule"), **arguments, **CHEAP)


def test_where_fewer_than_eight_samples_are_left_nothing_grows(thin):
    """The data may end in the midst of a batch, whatever the schedule asks for there."""
    *first, last = make_batches(3)
    rest = jax.tree.map(lambda x: x[:7], last)
    records = fit(thin, [*first, rest], tinyjax.every(2, 2, final=8), **CHEAP)
    assert [r.width["w"] for r in records] == [4, 4, 4] and records[-1].growth is None


def test_a_run_that_was_stopped_at_its_end_goes_on_with_nothing(thin):
    record = fit(thin, make_batches(1), tinyjax.every(9, 2, final=8, start=1), **CHEAP)[-1]
    assert fit(record.params, [], tinyjax.every(9, 2, final=8), step=1, opt_state=record.opt_state, **CHEAP) == []


def test_a_loop_that_is_left_can_be_taken_up_again(thin):
    """`fit` is a generator: what was peeked at for a growth is not lost."""
    schedule = tinyjax.every(2, 2, final=8)
    records = tinyjax.fit(
        loss_fn, thin, iter(make_batches(4)), OPTIMIZER, schedule, jax.random.key(0), num_neurons=3,
        growth_samples=32, **CHEAP,
    )  # fmt: skip
    first = [next(records), next(records)]
    rest = list(records)
    whole = fit(thin, make_batches(4), schedule, **CHEAP)
    assert [r.step for r in (*first, *rest)] == [1, 2, 3, 4]
    chex.assert_trees_all_equal(rest[-1].params, whole[-1].params)


def test_a_policy_without_its_final_widths_is_refused_at_once(thin):
    with pytest.raises(ValueError, match="the policy `full` allocates the final widths: pass `final`"):
        fit(thin, make_batches(1), lambda step, widths, history: {}, policy=tinyjax.surgery.full)


def test_nan_in_a_growth_stops_the_run(thin):
    batches = make_batches(2)
    batches[1]["x"] = batches[1]["x"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"site `w`: the loss is not finite"):
        fit(thin, batches, tinyjax.every(1, 1, final=8), **CHEAP)


def test_train_step_is_the_textbook_step():
    params, optimizer = init(), optax.adamw(1e-2)
    batch = make_batches(1)[0]
    got, state, loss, aux = jax.jit(tinyjax.train_step(loss_fn, optimizer))(params, optimizer.init(params), batch)
    updates, want_state = optimizer.update(jax.grad(loss_fn)(params, batch), optimizer.init(params), params)
    chex.assert_trees_all_close((got, state), (optax.apply_updates(params, updates), want_state), rtol=1e-12)
    np.testing.assert_allclose(loss, loss_fn(params, batch), rtol=1e-12)
    assert aux is None


# Recipes: the same in Flax's containers.


def test_train_state(thin):
    batches = make_batches(4)
    model = Net(8)
    tx = tinyjax.with_birth(optax.adam(1e-2))

    def loss(params, batch):
        return jnp.mean((model.apply({"params": params}, batch["x"]) - batch["t"]) ** 2)

    params = model.init(jax.random.key(0), batches[0]["x"])["params"]
    sites = tinyjax.find_sites(loss, params, batches[0])
    state = TrainState.create(apply_fn=model.apply, params=tinyjax.thin(params, sites, 2), tx=tx)
    grow_step = tinyjax.make_grow_step(loss, sites, num_neurons=3, optimizer=tx, **CHEAP)

    @jax.jit
    def grow(state, batch, key):
        params, opt_state, info = grow_step(state.params, batch, state.opt_state, key)
        return state.replace(params=params, opt_state=opt_state), info

    @jax.jit
    def train(state, batch):
        return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))

    state = train(train(state, batches[0]), batches[1])
    before = loss(state.params, batches[2])
    state, info = grow(state, batches[2], jax.random.key(1))
    tinyjax.check(info)
    assert int(info.width["hidden"]) == 5 == int(tinyjax.width(state.params, sites["hidden"]))
    np.testing.assert_allclose(loss(state.params, batches[2]), before, rtol=1e-12)
    state = train(state, batches[3])
    # The first step of a newborn fan-out weight is that of a fresh Adam: the learning rate.
    born = np.flatnonzero(info.born["hidden"])
    np.testing.assert_allclose(np.abs(state.params["out"]["kernel"][born]), 1e-2, rtol=1e-3)
    assert int(state.step) == 3


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    batches = make_batches(4)
    model = Model(nnx.Rngs(0))
    graph = nnx.graphdef(model)
    tx = tinyjax.with_birth(optax.adam(1e-2))

    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["t"]) ** 2)

    def pure_loss(params, batch):
        return loss(nnx.merge(graph, params), batch)

    params = nnx.as_pure(nnx.state(model, nnx.Param))
    sites = tinyjax.find_sites(pure_loss, params, batches[0])
    nnx.update(model, tinyjax.thin(params, sites, 2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grow_step = tinyjax.make_grow_step(pure_loss, sites, num_neurons=3, optimizer=tx, **CHEAP)

    @nnx.jit
    def grow(model, optimizer, batch, key):
        params, opt_state = nnx.as_pure((nnx.state(model, nnx.Param), optimizer.opt_state))
        params, opt_state, info = grow_step(params, batch, opt_state, key)
        nnx.update(model, params)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        return info

    @nnx.jit
    def train(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss)(model, batch))

    for batch in batches[:2]:
        train(model, optimizer, batch)
    before = loss(model, batches[2])
    info = grow(model, optimizer, batches[2], jax.random.key(1))
    tinyjax.check(info)
    assert int(info.width["hidden"]) == 5
    np.testing.assert_allclose(loss(model, batches[2]), before, rtol=1e-6)
    train(model, optimizer, batches[3])
    born = np.flatnonzero(info.born["hidden"])
    np.testing.assert_allclose(np.abs(model.out.kernel[...][born]), 1e-2, rtol=1e-3)


def test_every_site_and_every_growth_draws_with_a_key_of_its_own():
    """Two layers of one shape and two growths of one: no two newborn fan-ins are the same."""
    rng = np.random.default_rng(3)
    shapes = {"a": (6, 6), "b": (6, 6), "c": (6, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) / 3 for name, shape in shapes.items()}
    batches = [{"x": jnp.asarray(rng.normal(size=(BATCH_SIZE, 6))), "t": jnp.zeros((BATCH_SIZE, 3))} for _ in range(2)]

    def loss(p, b):
        return jnp.mean((jnp.tanh(jnp.tanh(b["x"] @ p["a"]) @ p["b"]) @ p["c"] - b["t"]) ** 2)

    sites = tinyjax.find_sites(loss, params, batches[0])
    params = tinyjax.thin(params, sites, 4)
    options = dict(method=tinyjax.methods.random0, update=None, fill=None, num_neurons=1)
    one = tinyjax.make_grow_step(loss, sites, **options)
    grown, _ = one(params, batches[0], jax.random.key(0))
    ratio = np.asarray(grown["a"][:4, 4] / grown["b"][:4, 4])
    assert np.ptp(ratio) > 1e-3 * np.abs(ratio).max()

    def run(seed):
        records = tinyjax.fit(
            loss, params, batches, tinyjax.with_birth(optax.sgd(0.0)), tinyjax.every(1, 1, final=6),
            jax.random.key(seed), growth_samples=16, **options,
        )  # fmt: skip
        return [np.asarray(record.params["a"]) for record in records]

    first, second = run(0)
    assert np.abs(first[:, 4] - second[:, 5]).max() > 1e-3 * np.abs(first[:, 4]).max()
