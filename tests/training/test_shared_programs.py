"""A second call that is the same as the first finds its programs compiled; one that differs in anything does not."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tinyjax.core import shared_programs
from tinyjax.core.shared_programs import MOST, shared
from tinyjax.surgery import all_params
from tinyjax.training.programs import _training_programs

CHEAP = dict(method=tinyjax.methods.random0, update=None, fill=None)
OPTIMIZER = tinyjax.with_birth(optax.sgd(1e-2))


class Traced:
    """A loss that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, params, batch):
        self.count += 1
        hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
        return jnp.mean((hidden @ params["u"] - batch["t"]) ** 2)


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in dict(w=(4, 6), b=(6,), u=(6, 2)).items()}
    batch = {"x": jnp.asarray(rng.normal(size=(16, 4))), "t": jnp.asarray(rng.normal(size=(16, 2)))}
    sites = tinyjax.find_sites(Traced(), params, batch)
    return tinyjax.thin(params, sites, 2), batch, sites


def grow(loss, given, transform=lambda grow_step: grow_step, **options):
    params, batch, sites = given
    grow_step = tinyjax.make_grow_step(loss, sites, **(dict(num_neurons=2) | CHEAP | options))
    return transform(grow_step)(params, batch, jax.random.key(0))


trace = functools.partial(grow, transform=jax.make_jaxpr)


def run(loss, given, **options):
    params, batch, sites = given
    options = dict(sites=sites, num_neurons=2, growth_samples=16) | CHEAP | options
    schedule = tinyjax.every(2, 2, final=6)
    records = tinyjax.fit(
        loss, params, [batch] * 6, options.pop("optimizer", OPTIMIZER), schedule, jax.random.key(0), **options
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(list(records)[-1].params)]


def traces(loss, call):
    before = loss.count
    call()
    return loss.count - before


def programs_made(call):
    """How many programs are kept that were not; the loss need not be traced again for another program."""
    before = set(shared_programs._kept)
    call()
    return len(set(shared_programs._kept) - before)


def test_a_second_identical_growth_is_not_compiled(given):
    loss = Traced()
    first = grow(loss, given)
    assert loss.count > 0
    assert traces(loss, lambda: grow(loss, given)) == 0
    np.testing.assert_array_equal(first[0]["w"], grow(loss, given)[0]["w"])


def test_a_second_identical_run_is_not_compiled(given):
    loss = Traced()
    first = run(loss, given)
    assert traces(loss, lambda: run(loss, given)) == 0
    jax.tree.map(np.testing.assert_array_equal, first, run(loss, given))


def test_nothing_at_all_is_compiled_a_second_time(given, caplog):
    loss, (params, batch, sites) = Traced(), given
    calls = [lambda: run(loss, given), lambda: tinyjax.diagnose(loss, params, batch, sites=sites, num_neurons=1)]
    compiled = []
    for call in calls:
        for _ in range(2):
            caplog.clear()
            with jax.log_compiles():
                call()
            compiled.append(sum("Finished XLA compilation" in record.message for record in caplog.records))
    assert compiled[0] > 0 < compiled[2]
    assert compiled[1] == 0 == compiled[3]


def test_a_run_that_makes_room_finds_the_losses_of_its_first_time(given):
    made = []

    def make_loss(capacities):
        made.append(Traced())
        return made[-1]

    options = dict(make_loss=make_loss, policy=tinyjax.multiple_of(2), final={given[2][0].name: 6})
    params, batch, sites = given
    small, sites = tinyjax.resize(params, sites, {sites[0].name: 2})
    loss = Traced()
    first = run(loss, (small, batch, sites), **options)
    assert len(made) == 2
    assert (
        traces(
            loss,
            lambda: jax.tree.map(np.testing.assert_array_equal, first, run(loss, (small, batch, sites), **options)),
        )
        == 0
    )
    assert len(made) == 2


@pytest.mark.parametrize(
    "other",
    [
        dict(num_neurons=1),
        dict(fill=tinyjax.methods.random0, method=tinyjax.methods.tiny0),
        dict(method=functools.partial(tinyjax.methods.random0, key=None)),
        dict(estimate_micro_batch=6),
        dict(refresh=True),
    ],
    ids=lambda other: "-".join(other),
)
def test_another_option_is_another_program(given, other):
    loss = Traced()
    trace(loss, given)
    assert programs_made(lambda: trace(loss, given)) == 0
    assert programs_made(lambda: trace(loss, given, **other)) > 0
    assert programs_made(lambda: trace(loss, given, **other)) == 0


def test_another_loss_is_another_program(given):
    trace(Traced(), given)
    loss = Traced()
    assert traces(loss, lambda: trace(loss, given)) > 0


def test_another_optimizer_is_another_program():
    loss, optimizer, other = Traced(), optax.sgd(1e-2), optax.sgd(1e-2)
    programs = [
        _training_programs(loss, dict(optimizer=one, trainable=all_params, has_aux=False))
        for one in (optimizer, optimizer, other)
    ]
    assert programs[0] is programs[1] is not programs[2]


def keys(*values):
    """What is made for each of some values: equal where the program is shared."""
    return [shared(("test", value), object) for value in values]


class Model:
    def loss(self, params, batch):
        return 0.0


def test_what_is_the_same():
    model, function = Model(), len
    for same in [
        (model.loss, model.loss),
        (functools.partial(function, a=1), functools.partial(function, a=1)),
        ({"a": 1, "b": (2.5, None)}, {"b": (2.5, None), "a": 1}),
        ([function, "x"], [function, "x"]),
    ]:
        assert len(set(keys(*same))) == 1, same


def test_what_is_not():
    one, other = Model(), Model()
    values = [
        *(1, True, 1.0, "1", (1,), [1], {1: 1}, None, one, other, one.loss, other.loss, Model.loss),
        *(functools.partial(one.loss, 1), functools.partial(one.loss, 2), lambda: 0, lambda: 0),
    ]
    assert len(set(keys(*values))) == len(values)


@pytest.mark.parametrize("unhashable", [np.ones(2), jnp.ones(2), {1}, functools.partial(len, np.ones(2))], ids=str)
def test_what_cannot_be_compared_is_made_anew(unhashable):
    assert len(set(keys(unhashable, unhashable))) == 2


def test_an_option_that_cannot_be_compared_still_grows(given):
    loss = Traced()
    method = functools.partial(tinyjax.methods.tiny, ridge=jnp.asarray(0.1))
    options, grown = dict(method=method, amplitude=tinyjax.growth.fixed(0.1)), []
    assert programs_made(lambda: grown.append(grow(loss, given, **options))) == 0
    _, info = grown[0]
    assert [int(width) for width in info.width.values()] == [4]


def test_only_the_programs_used_last_are_kept():
    class Thing:
        def __call__(self):
            return 0

    things = [Thing() for _ in range(MOST + 1)]
    known = [weakref.ref(thing) for thing in things]
    often, rest = things[0], things[1:]
    first = shared((often,), object)
    for thing in rest:
        shared((thing,), object)
        assert shared((often,), object) is first
    assert len(shared_programs._kept) == MOST
    del things, rest, thing
    gc.collect()
    assert [ref() is not None for ref in known] == [True, False, *[True] * (MOST - 1)]


def test_nothing_of_a_trace_is_kept(given):
    params, batch, sites = given
    before = len(shared_programs._kept)

    def outer(scale):
        grow_step = tinyjax.make_grow_step(
            lambda params, batch: scale * Traced()(params, batch), sites, num_neurons=1, **CHEAP
        )
        return grow_step(params, batch, jax.random.key(0))[1].loss_after

    with jax.checking_leaks():
        jax.jit(outer)(jnp.asarray(2.0))
    assert len(shared_programs._kept) == before
