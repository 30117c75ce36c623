"""A thousand growths: grow, prune, compact, resize, grow. Neither memory nor the number of compiled functions grows."""

import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax

CAPACITY, START = 8, 3


def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["u"] - batch["t"]) ** 2)


def cycles(count):
    """Runs `count` rounds of two growths; yields live arrays and compilations after each."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, CAPACITY), "b": (CAPACITY,), "u": (CAPACITY, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    batch = {"x": jnp.asarray(rng.normal(size=(16, 4))), "t": jnp.asarray(rng.normal(size=(16, 2)))}
    sites = tinyjax.find_sites(loss_fn, params, batch)
    params = tinyjax.thin(params, sites, START)
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    # The cheapest program there is: random neurons, no line search.
    options = dict(num_neurons=2, method=tinyjax.methods.random0, update=None, fill=None)
    grow_step = tinyjax.make_grow_step(counted, sites, **options)
    estimate = jax.jit(lambda params, batch: tinyjax.estimate(counted, params, batch, sites["w"]))
    prune = jax.jit(lambda params, statistics: tinyjax.prune(params, sites["w"], statistics, num_neurons=4)[0])
    for i in range(count):
        for key in jax.random.split(jax.random.key(i)):
            params, info = grow_step(params, batch, key)
        assert int(info.width["w"]) == START + 4 and info.status["w"] == tinyjax.Status.GROWN
        params = prune(params, estimate(params, batch))
        small, widths = tinyjax.compact(params, sites)
        assert widths == {"w": START}
        exact = tinyjax.find_sites(loss_fn, small, batch)
        params, again = tinyjax.resize(small, exact, {"w": CAPACITY})
        assert again == sites
        gc.collect()
        yield len(jax.live_arrays()), len(traces)


def unchanged(history):
    """From the second round on nothing is traced, and as many arrays are alive."""
    arrays, traces = zip(*history)
    assert len(set(traces[1:])) == 1, "something was traced again"
    assert max(arrays[2:]) <= arrays[1], "arrays pile up"


def test_twenty_growths_compile_once():
    unchanged(list(cycles(10)))


@pytest.mark.slow
def test_a_thousand_growths_compile_once():
    history, size = [], []
    for state in cycles(500):
        history.append(state)
        size.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    unchanged(history)
    assert size[-1] < 1.1 * size[100], "the process grows"
