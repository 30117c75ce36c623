"""Random architectures: every site that discovery offers is grown with the function kept, every other has a reason.

At a site that grows, all others are widened too; neurons with fan-out zero, fan-in zero and amplitude zero must change
nothing, and the loss must change as fast as the statistics say by a neuron of small fan-in.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.brute_force import in_heads
from tests.support.numpy_jaxpr import evaluate, traced
from tests.support.random_architectures import Generated, generate
from tinyjax.core.kernels import cols, num_inputs, rows
from tinyjax.core.site import Kernel, Site, Sites, resized
from tinyjax.core.slots import COUNTED
from tinyjax.discovery.sites import find_sites
from tinyjax.estimation.estimator import estimate
from tinyjax.methods import Neurons
from tinyjax.statistics.record import Statistics
from tinyjax.surgery import resize, thin, write
from tinyjax.surgery.fans import lead

FAST, LONG = 200, 2000
SMALL = 1e-6  # of a fan-in; differences of the loss are then good to 1e-10


def widened(model: Generated, sites: Sites, rng: np.random.Generator) -> tuple[Any, Sites]:
    """The parameters and sites with one to three more slots everywhere."""
    sites = Sites(dataclasses.replace(site, fixed="") for site in sites)  # by the penalty, which is left out
    capacities = {site.name: site.capacity + int(rng.integers(1, 4)) for site in sites.growable}
    params = evaluate(lambda p: resize(p, sites, capacities)[0], model.params)
    return params, resized(sites, capacities)


def inputs(kernel: Kernel) -> int:
    return rows(kernel) + (kernel.bias is not None)


def draw(site: Site, rng: np.random.Generator) -> tuple[Any, Any]:
    """Fan-in and fan-out of a random neuron."""
    outputs = sum(rows(c) // site.capacity * cols(c) for c in site.consumers)
    alpha = rng.normal(size=(*lead(site.producers[0]), num_inputs(site), 1))
    return alpha, rng.normal(size=(*site.stack, 1, outputs))


def draw_gate(site: Site, statistics: Any, rng: np.random.Generator) -> Any:
    """The gate that the statistics are for, or a random one; None where there is none."""
    if site.gate is None or statistics is not None:
        return statistics and statistics.gates
    return rng.normal(size=(*site.stack, inputs(site.gate), 1))


def problems(model: Generated, seed: int, *, slopes: bool) -> Iterator[str]:
    """What is wrong with the sites of a model."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model.loss_fn, model.params, model.batch)
    yield from (
        f"`{site.name}`: refused without a reason" for site in sites if not site.growable | (len(site.reason) > 9)
    )
    if not sites.growable:
        return
    if np.all(evaluate(model.penalty, model.params) == 0):  # only a mean over a leaf follows a width in these models
        yield from (f"`{site.name}`: {site.fixed}{site.unchecked}" for site in sites if site.fixed + site.unchecked)
    wide, wide_sites = widened(model, sites, rng)

    def network(params: Any, batch: Any) -> Any:
        return model.loss_fn(params, batch) - model.penalty(params)

    before = evaluate(network, model.params, model.batch)
    if not np.isfinite(before):
        return
    network = traced(network, wide, model.batch)
    base = network(wide, model.batch)
    if not abs(base - before) <= 1e-12 * (1 + abs(before)):
        yield f"widening moves the loss from {before} to {base}"
    statistics = {}
    if slopes:
        statistics = evaluate(lambda p, b: estimate(model.loss_fn, p, b, wide_sites.growable), wide, model.batch)
        own, gradient = (evaluate(jax.grad(model.loss_fn), p, model.batch) for p in (model.params, wide))
        slopes = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))  # else none is to be had
    for site in wide_sites.growable:
        gate = draw_gate(site, statistics.get(site.name), rng)

        def put(params: Any, alpha: Any, omega: Any, amplitude: Any, site: Site = site, gate: Any = gate) -> Any:
            new = write(params, site, Neurons(alpha, omega, alpha[0], gate=gate), amplitude=amplitude)[0]
            return new, thin(new, site, sites[site.name].capacity)

        alpha, omega = draw(site, rng)
        put = traced(put, wide, alpha, omega, 1.0)

        def loss(alpha: Any, omega: Any, put: Any = put) -> Any:
            return network(put(wide, alpha, omega, 1.0)[0], model.batch)

        births = {"in": (0 * alpha, omega), "out": (alpha, 0 * omega)}
        if site.stream is not None and site.stream.normed:
            del births["out"]  # a norm divides by what is written, read or not
        for what, neuron in births.items():
            change = loss(*neuron) - base
            if not abs(change) <= 1e-12 * (1 + abs(base)):
                yield f"`{site.name}`: a neuron of fan-{what} zero moves the loss by {change:.1e}"
        same = jax.tree.map(
            np.array_equal, (*put(wide, alpha, omega, 0.0), put(wide, alpha, omega, 1.0)[1]), (wide,) * 3
        )
        if not all(jax.tree.leaves(same)):
            yield f"`{site.name}`: writing at amplitude 0, or writing and thinning, is not the identity"
        if slopes:
            yield from dust(site, sites[site.name].capacity, gradient)
            if site.norm is None and model.slope != 0:
                yield from slope(site, statistics[site.name], loss, [draw(site, rng) for _ in range(3)], model.slope)


def dust(site: Site, used: int, gradient: Any) -> Iterator[str]:
    """An empty slot gets no gradient; scales and statistics may (from a penalty), a birth sets them anew."""
    for member in (m for m in site.members if m.role in COUNTED):
        largest = np.abs(member.layout.to_slots(gradient[member.leaf])[..., used:, :]).max()
        if largest != 0:
            yield f"`{site.name}`: a gradient of {largest:.1e} in an empty slot of `{member.leaf}`"


def slope(site: Site, record: Statistics, loss: Any, neurons: list[Any], factor: float | None) -> Iterator[str]:
    """The loss falls by <N, alpha omega>, times the slope of the activations: one factor for all neurons."""
    moment = record.cross_prev.sum(axis=-3) / record.count.reshape(-1, 2)[0].sum()
    if record.heads is None:
        said = np.array([-np.sum((np.swapaxes(alpha, -1, -2) @ moment) * omega) for alpha, omega in neurons])
    else:
        said = np.array([-in_heads(alpha, moment, omega) for alpha, omega in neurons])
    found, coarse = (
        [(loss(step * alpha, omega) - loss(-step * alpha, omega)) / (2 * step) for alpha, omega in neurons]
        for step in (SMALL, 4 * SMALL)
    )
    size = np.array([np.linalg.norm(alpha) * np.linalg.norm(omega) for alpha, omega in neurons]) * np.linalg.norm(
        moment
    )
    if not size.max() > 1e-7 or np.abs(np.subtract(found, coarse)).max() > 1e-6 * size.max():
        return  # nothing to tell apart from rounding, or too curved for differences
    factor = float(found @ said / (said @ said)) if factor is None else factor
    worst = np.abs(found - factor * said).max() / size.max()
    if not worst < 1e-5:
        yield f"`{site.name}`: the loss falls by {np.array(found)}, the statistics say {factor:.3f} times {said}"


def told(seed: int, *, slopes: bool) -> list[str]:
    """The problems of a seed, with its story."""
    model = generate(seed)
    return [f"seed {seed}: {text}\n    {' > '.join(model.story)}" for text in problems(model, seed, slopes=slopes)]


@pytest.mark.parametrize("part", range(8))
def test_generated_architectures(part):
    each = FAST // 8
    found = [text for seed in range(part * each, (part + 1) * each) for text in told(seed, slopes=seed % 5 == 0)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_generated_architectures(part):
    each = LONG // 20
    found = [text for seed in range(FAST + part * each, FAST + (part + 1) * each) for text in told(seed, slopes=True)]
    assert not found, "\n".join(found)


def test_enough_of_them_can_grow():
    """The others prove little: most models have a site, and some have several."""
    growable = []
    for seed in range(60):
        model = generate(seed)
        growable.append(len(find_sites(model.loss_fn, model.params, model.batch).growable))
    assert np.mean(np.array(growable) > 0) > 0.6 and sum(growable) > 100


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize(
    "take",
    [
        lambda x, i, mode: x.at[i].get(mode=mode),
        lambda x, i, mode: x.at[:, i % 3, 1:3].get(mode=mode),
        lambda x, i, mode: x.at[i, :, i % 4].get(mode=mode),
        lambda x, i, mode: jax.vmap(lambda row, j: row.at[j % 3].get(mode=mode))(x, i),
        lambda x, i, mode: jnp.take_along_axis(x, i[:, None, None] % 4, 2, mode=mode),
        lambda x, i, mode: jax.lax.dynamic_slice(x, (i[1], 1, i[0]), (2, 2, 3)),
    ],
)
def test_the_evaluator_gathers_as_xla_does(take, mode):
    x, indices = np.arange(60.0).reshape(5, 3, 4), np.array([3, -1, 0, 7, 2]) * (mode != "promise_in_bounds")
    function = lambda x, indices: take(x, indices, mode)  # noqa: E731
    np.testing.assert_array_equal(evaluate(function, x, indices), function(jnp.asarray(x), jnp.asarray(indices)))


@pytest.mark.parametrize("seed", [0, 11, 29])
def test_the_evaluator_agrees_with_xla(seed):
    model = generate(seed)
    for function in (model.loss_fn, jax.grad(model.loss_fn)):
        mine = evaluate(function, model.params, model.batch)
        chex.assert_trees_all_close(mine, jax.jit(function)(model.params, model.batch), rtol=1e-9, atol=1e-12)
