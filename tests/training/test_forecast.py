"""Forecasts of runs, against the runs themselves and against the programs that they trace."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from experiments.demo import calibration
from tinyjax.training import forecast
from tinyjax.training.cost_model import Work, seconds, work

INPUTS, SAMPLES = 3, 32
OPTIMIZER = tinyjax.with_birth(optax.sgd(1e-2))


def loss_fn(params, batch):
    x, y = batch
    x = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])
    return jnp.mean((x @ params["c"] - y) ** 2)


def network(first, second):
    rng = np.random.default_rng(0)
    shapes = {"a": (INPUTS, first), "b": (first, second), "c": (second, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.normal(size=(SAMPLES, INPUTS))), jnp.asarray(rng.normal(size=(SAMPLES, 2)))
    return params, batch, tinyjax.find_sites(loss_fn, params, batch).growable


def step_work(params, batch):
    return work(tinyjax.train_step(loss_fn, OPTIMIZER), params, OPTIMIZER.init(params), batch)


def of_run(sizes):
    params, batch, sites = network(4, 4)
    return forecast.of_fit(
        loss_fn,
        params,
        batch,
        OPTIMIZER,
        tinyjax.schedules.round_robin(2, 2, final=6, start=1),
        sizes,
        sites=sites,
        widths={"a": 4, "b": 4},
        num_neurons=2,
        growth_samples=SAMPLES,
        policy=tinyjax.multiple_of(3),
    )


def test_it_counts_the_steps_and_the_growths_of_the_run_at_the_capacities_of_the_run():
    params, batch, sites = network(4, 4)
    records = tinyjax.fit(
        loss_fn,
        params,
        [batch] * 7,
        OPTIMIZER,
        tinyjax.schedules.round_robin(2, 2, final=6, start=1),
        jax.random.key(0),
        sites=sites,
        num_neurons=2,
        growth_samples=SAMPLES,
        policy=tinyjax.multiple_of(3),
    )
    capacities, growths = [], 0
    for record in records:
        capacities.append(tuple(site.capacity for site in record.sites))
        growths += record.growth is not None
    found = of_run([SAMPLES] * 7)
    assert [times for _, times in found.training] == [1, 6] == [capacities.count(c) for c in ((4, 4), (6, 6))]
    assert sum(times for _, times in found.growth) == growths == 2
    for (done, _), widths in zip(found.training, ((4, 4), (6, 6))):
        assert done == step_work(*network(*widths)[:2])
    params, batch, sites = network(6, 6)
    grow = tinyjax.make_grow_step(loss_fn, [sites["a"]], num_neurons=2, optimizer=OPTIMIZER)
    assert found.growth[0][0] == work(grow, params, batch, OPTIMIZER.init(params), jax.random.key(0))
    expected = [rate * sum(times * done.cost for done, times in parts) for rate, parts in zip((2.0, 3.0), found)]
    np.testing.assert_allclose(found.seconds(forecast.Rates(2.0, 3.0)), sum(expected))


def test_batches_between_the_smallest_and_the_largest_are_interpolated():
    params, (x, y), _ = network(4, 4)
    found = forecast.of_fit(
        loss_fn,
        params,
        (x, y),
        OPTIMIZER,
        lambda step, widths, history: {},
        [8, 24, 32, 24],
        sites=network(4, 4)[2],
        widths={"a": 4, "b": 4},
        num_neurons=1,
    )
    assert [times for _, times in found.training] == [1, 2, 1] and found.growth == ()
    for (done, _), size in zip(found.training, (8, 24, 32)):
        np.testing.assert_allclose(done, step_work(params, (x[:size], y[:size])), rtol=1e-12)


def test_a_schedule_is_held_to_the_seconds_of_a_step():
    params, batch, sites = network(8, 8)
    step = forecast.step_work(loss_fn, params, batch, OPTIMIZER, sites)

    def cost(widths):
        return seconds(1e-9, step(widths))

    for a, b in ((2, 5), (8, 8), (9, 3)):  # cut, as they are, wider
        want = seconds(1e-9, step_work(*network(a, b)[:2]))
        np.testing.assert_allclose(cost({"a": a, "b": b}), want, rtol=1e-12)
    limit = cost({"a": 3, "b": 5})
    held = tinyjax.schedules.budget(tinyjax.every(1, {"b": 9}, final={"b": 20}), cost, limit=limit)
    assert held(1, {"a": 3, "b": 2}) == {"b": 3}


@pytest.fixture
def clock(monkeypatch):
    """What `perf_counter` shows next."""
    ticks = []
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: ticks.pop(0))
    return ticks


def records(*growths):
    return (SimpleNamespace(params=jnp.ones(()), loss=jnp.ones(()), growth=growth) for growth in growths)


def test_the_first_growth_and_the_steps_around_it_are_the_calibration_runs(clock):
    clock += [0, 2, 4, 16, 18, 21, 23, 99]  # the start, then the end of every record
    step, growth = calibration.first_seconds(records(None, None, "grown", None, None, None, None))
    assert (step, growth) == (2, 10) and clock == [99]  # five steps are enough
    clock[:] = [0, 1]
    with pytest.raises(ValueError, match="needs a growth and a gradient step"):
        calibration.first_seconds(records(None))


def test_an_estimate_says_what_takes_how_long():
    done = Work(1.0, 1.0, 0.0)
    found = forecast.Forecast(training=((done, 300), (done, 300)), growth=((done, 4),))
    said = calibration.estimate(found, forecast.Rates(0.5, 10.0))
    assert said == "6 min once compiled: 600 steps 5 min, 4 growths 40.0 s (programs to compile: 2 + 1)"
