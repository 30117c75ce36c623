"""The width of a residual stream in unmodified models: sums, slopes, births that keep the function, growth."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tinyjax
from tests.support.brute_force import inspect
from tests.support.compiled import compiled
from tests.support.zoo.residual import CASES, FEATURES, HIDDEN, OUTPUTS, TOKENS, WIDTH, data, rms
from tinyjax.methods import Neurons
from tinyjax.training.checkpoint.model import site_from_json, site_to_json

SLOW = pytest.mark.slow
EVERY = [name if name == "by_hand" else pytest.param(name, marks=SLOW) for name in CASES]


@functools.cache
def found(name):
    """The case, its loss, its parameters, its sites and the stream among them."""
    case = CASES[name]()
    loss_fn, params = case.loss_fn, case.params
    sites = tinyjax.find_sites(loss_fn, params, case.batch)
    return case, loss_fn, params, sites, sites[case.name]


@pytest.mark.parametrize("name", CASES)
def test_the_stream_of_an_unmodified_model_is_found(name):
    case, _, _, _, site = found(name)
    assert site.growable and site.capacity == WIDTH
    assert len(site.producers) == case.writers
    assert site.stream.readers == case.readers and site.stream.normed == case.normed
    assert bool(site.powers) == (case.normed and name != "unscaled")
    assert site_from_json(site_to_json(site)) == site


@pytest.mark.parametrize("name", EVERY)
def test_the_slope_of_the_loss_is_that_of_the_sums(name):
    """Random writers and readers in an empty slot, in every leaf, against differences of the loss."""
    (report,) = inspect(found(name)[0], only=lambda site: site.stream is not None).values()
    assert report.slope < 1e-7 and report.identity < 1e-12, report
    assert report.silent_out == report.silent_in == report.untouched == report.dust == 0, report


def forward(p, batch, probes):
    """The case `by_hand` with something added at every reader, and what writers and readers see."""
    s, seen, written = batch["x"] @ p["in"], [], [batch["x"]]
    for q, probe in zip(p["blocks"], probes):
        y = rms(s, q["g"])
        h = jnp.tanh(y @ q["up"] + q["b"] + probe)
        seen.append((jnp.sqrt(jnp.mean(s**2, axis=-1) + 1e-2), y))
        written.append(h)
        s = s + h @ q["down"] + q["c"]
    seen.append((jnp.ones(s.shape[:-1]), s))
    loss = jnp.mean(jnp.sum((s @ p["out"] + probes[-1] - batch["y"]) ** 2, axis=(1, 2)))
    return loss, (seen, written)


def test_the_sums_are_those_of_loops_over_samples():
    """S_m and N_lm of every reader: writers before it, divided by what its norm divides by."""
    case, loss_fn, params, _, site = found("by_hand")
    n = 20
    probes = [jnp.zeros((n, TOKENS, d)) for d in (HIDDEN, HIDDEN, OUTPUTS)]
    goals, (seen, written) = jax.grad(partial(forward, params, case.batch), has_aux=True)(probes)
    goals, seen, written = jax.tree.map(np.asarray, (goals, seen, written))
    statistics = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site))(params, case.batch)
    sizes = (FEATURES, HIDDEN, 1, HIDDEN, 1)
    grams, cross = np.zeros((2, 3, sum(sizes), sum(sizes))), np.zeros((2, sum(sizes), 2 * HIDDEN + OUTPUTS))
    own, asked = np.zeros((2, WIDTH * 3 + 2, WIDTH * 3 + 2)), np.zeros((2, WIDTH * 3 + 2, 2 * HIDDEN + OUTPUTS))
    link = np.zeros((2, sum(sizes), WIDTH * 3 + 2))
    for i in range(n):
        for t in range(TOKENS):
            row = col = 0
            for m, (goal, (sigma, y)) in enumerate(zip(goals, seen)):
                v = -n * goal[i, t]
                parts = [np.append(h[i, t], [1.0] if k else []) for k, h in enumerate(written)]
                b = np.concatenate([part / sigma[i, t] * (owner <= m) for owner, part in zip((0, 1, 2), parts)])
                h = np.append(y[i, t], [1.0] if m < 2 else [])
                grams[i % 2, m] += np.outer(b, b)
                cross[i % 2, :, col : col + len(v)] += np.outer(b, v)
                own[i % 2, row : row + len(h), row : row + len(h)] += np.outer(h, h)
                asked[i % 2, row : row + len(h), col : col + len(v)] += np.outer(h, v)
                link[i % 2, :, row : row + len(h)] += np.outer(b, h)
                row, col = row + len(h), col + len(v)
    np.testing.assert_allclose(statistics.grams, grams, atol=1e-10)
    np.testing.assert_allclose(statistics.gram_prev, grams.sum(axis=1), atol=1e-10)
    np.testing.assert_allclose(statistics.cross_prev, cross, atol=1e-10)
    np.testing.assert_allclose(statistics.gram, own, atol=1e-10)
    np.testing.assert_allclose(statistics.cross, asked, atol=1e-10)
    np.testing.assert_allclose(statistics.link[:, 0], link, atol=1e-10)
    np.testing.assert_allclose(statistics.energy.sum(), sum(np.sum((n * g) ** 2) for g in goals))
    assert statistics.normed and statistics.weight.shape == own.shape[1:2] + asked.shape[2:]


def test_chunks_add_up():
    case, loss_fn, params, _, site = found("by_hand")
    whole, parts = (
        jax.jit(partial(tinyjax.estimate, loss_fn, sites=site, chunk=chunk, null_draws=1))(params, case.batch)
        for chunk in (None, 8)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), parts, whole)
    assert whole.null.gram.shape == (2, 1, *whole.gram.shape[1:])


def at_width(case, width, params):
    """The loss and the parameters in a model built for another width."""
    loss_fn, like = case.make(width)
    return jax.jit(loss_fn), jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(params))


@pytest.mark.parametrize("name", [n if n == "linen" else pytest.param(n, marks=SLOW) for n in CASES])
def test_another_capacity_and_the_compact_net_keep_the_function(name):
    """Where a norm divides by the width, its epsilon included: what is written follows, and the scale behind."""
    case, loss_fn, params, sites, site = found(name)
    thinned = tinyjax.thin(params, site, 4)
    before = jax.jit(loss_fn)(thinned, case.batch)
    wide, there = tinyjax.resize(thinned, sites, {case.name: WIDTH + 5})
    assert there[case.name].capacity == WIDTH + 5 and int(tinyjax.width(wide, there[case.name])) == 4
    loss, there_params = at_width(case, WIDTH + 5, wide)
    np.testing.assert_allclose(loss(there_params, case.batch), before, rtol=1e-12)
    narrow, widths = tinyjax.compact(thinned, site)
    assert widths == {case.name: 4}
    loss, narrow = at_width(case, 4, narrow)
    np.testing.assert_allclose(loss(narrow, case.batch), before, rtol=1e-12)
    back, _ = tinyjax.resize(wide, there, {case.name: WIDTH})
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), back, thinned)


@SLOW
def test_growing_into_another_capacity_keeps_what_the_sums_say():
    """At a wider capacity the same net has the same statistics up to the factor by which its writers grew."""
    case, loss_fn, params, sites, site = found("by_hand")
    wide, there = tinyjax.resize(params, sites, {case.name: 2 * WIDTH})
    a, b = (
        jax.jit(partial(tinyjax.estimate, fn, sites=s))(p, case.batch)
        for fn, p, s in ((loss_fn, params, site), (case.make(2 * WIDTH)[0], wide, there[case.name]))
    )
    np.testing.assert_allclose(b.grams[:, :2], a.grams[:, :2], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(b.cross_prev[..., : 2 * HIDDEN], a.cross_prev[..., : 2 * HIDDEN], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_a_birth_keeps_the_function_and_learns_and_empty_slots_do_not(name):
    case, loss_fn, params, _, site = found(name)
    batch = data(40, 3)
    params = tinyjax.thin(params, site, 3)
    before = jax.jit(loss_fn)(params, batch)
    step = tinyjax.make_grow_step(loss_fn, site, num_neurons=2, update=None)
    grown, info = step(params, batch)
    assert int(info.width[site.name]) == 5 and int(info.filled[site.name]) == 0
    np.testing.assert_allclose(jax.jit(loss_fn)(grown, batch), before, rtol=1e-13)

    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = grown, optimizer.init(grown)
    for _ in range(3):
        trained, state = train(trained, state)
    leaves = tinyjax.core.params.named_leaves(trained)
    for member in site.members:
        slots = np.asarray(member.layout.to_slots(leaves[member.leaf]))
        assert np.all(slots[5:] == (1 if member.role == "scale" else 0)), member.leaf
        assert member.role == "scale" or np.all(np.any(slots[3:5] != 0, axis=1)), member.leaf


@pytest.mark.parametrize("name", EVERY)
def test_growth_lowers_the_loss(name):
    """Writers and readers by least squares, their amplitude by a line search; the sums predict its slope."""
    case, loss_fn, params, _, site = found(name)
    batch = data(80, 3)
    params = tinyjax.thin(params, site, 3)
    step = tinyjax.make_grow_step(
        loss_fn,
        site,
        num_neurons=2,
        method=tinyjax.methods.tiny_unprojected if name == "plain" else tinyjax.methods.tiny,
        fill=None,
    )
    grown, info = step(params, batch)
    assert int(info.written[site.name]) == 2
    assert float(info.loss_after[site.name]) < 0.98 * float(info.loss_before[site.name])
    np.testing.assert_allclose(jax.jit(loss_fn)(grown, batch), info.loss_after[site.name], rtol=1e-12)


def test_amplitudes_leave_readers_alone_under_a_norm():
    case, _, params, _, site = found("by_hand")
    params = tinyjax.thin(params, site, 3)
    inputs = FEATURES + 2 * (HIDDEN + 1)
    neurons = Neurons(jnp.ones((inputs, 1)), jnp.ones((1, 2 * HIDDEN + OUTPUTS)), jnp.ones(1))
    written, born = tinyjax.surgery.write(params, site, neurons, amplitude=0.25)
    assert int(born.sum()) == 1 and born[3]
    assert np.all(written["in"][:, 3] == 0.25) and np.all(written["blocks"][1]["c"][3] == 0.25)
    assert np.all(written["out"][3] == 1) and np.all(written["blocks"][0]["up"][3] == 1)
    assert written["blocks"][0]["g"][3] == 1
    same, none = tinyjax.surgery.write(params, site, neurons, amplitude=0.0)
    assert not np.any(none)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_the_best_update_moves_every_reader_by_its_own():
    """Side by side: the update of each reader is that of its own inputs alone."""
    case, loss_fn, params, _, site = found("by_hand")
    statistics = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site))(params, case.batch)
    delta = np.asarray(compiled(tinyjax.methods.best_update)(statistics))
    mean = tinyjax.statistics.moments(statistics)
    height = WIDTH + 1
    alone = np.linalg.pinv(mean.gram[:height, :height]) @ mean.cross[:height, :HIDDEN]
    np.testing.assert_allclose(delta[:height, :HIDDEN], alone, atol=1e-6)
    assert not np.any(delta[height:, :HIDDEN]) and not np.any(delta[:height, HIDDEN:])
    moved = tinyjax.surgery.add_update(params, site, jnp.asarray(delta), amplitude=1.0)
    np.testing.assert_allclose(moved["blocks"][0]["up"] - params["blocks"][0]["up"], alone[:WIDTH], atol=1e-6)
    np.testing.assert_allclose(moved["blocks"][0]["b"] - params["blocks"][0]["b"], alone[WIDTH], atol=1e-6)
    np.testing.assert_array_equal(moved["in"], params["in"])


@SLOW
def test_a_stream_is_scored_beside_other_sites():
    case, loss_fn, params, sites, site = found("by_hand")
    params = tinyjax.thin(params, site, 3)

    def model(p, batch):
        s = batch["x"] @ p["in"]
        for q in p["blocks"]:
            s = s + jnp.tanh(rms(s, q["g"]) @ q["up"] + q["b"]) @ q["down"] + q["c"]
        return s @ p["out"]

    def objective(z, batch):
        return jnp.mean(jnp.sum((z - batch["y"]) ** 2, axis=(1, 2)))

    score = jax.jit(partial(tinyjax.score_sites, model, objective, sites=site, num_neurons=2))
    found_score = score(params, data(200, 3))[site.name]
    assert found_score.gain > 0 and found_score.amplitude > 0


def test_a_stream_is_not_pruned():
    case, loss_fn, params, _, site = found("by_hand")
    with pytest.raises(ValueError, match="residual stream"):
        tinyjax.prune(params, site, None, num_neurons=1)


def test_what_readers_see_is_not_known_before_growth():
    """The first writer reads the data alone; readers see the other writers too."""
    case, loss_fn, params, _, site = found("by_hand")
    assert tinyjax.growth.decompose_inputs(loss_fn, params, case.batch, site) == {}
