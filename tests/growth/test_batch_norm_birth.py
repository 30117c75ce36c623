"""A channel born behind a batch normalisation: the normalisation is the identity on it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tinyjax
from tests.support.zoo import images
from tests.support.zoo.layers import data
from tinyjax.core.kernels import cols, rows
from tinyjax.core.params import named_leaves
from tinyjax.core.windows import Window
from tinyjax.discovery.graph.tracing import trace
from tinyjax.discovery.sites import discover
from tinyjax.growth.batch_norm_birth import identity_at_birth, response_moments
from tinyjax.methods import Neurons, traits

GAMMAS = jnp.array([0.7, 1e-4, -0.7, -2.5])


class Seen(nn.Module):
    """Two normalised convolutions and a dense layer; also returns what every activation receives."""

    train: bool
    momentum: float = 0.0  # one forward pass leaves exactly the statistics of its batch

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train, momentum=self.momentum)
        first = norm(name="norm1", epsilon=1e-3)(nn.Conv(5, (3, 2), strides=(2, 1), name="first")(x))
        second = norm(name="norm2")(nn.Conv(6, (2, 2), padding="VALID", use_bias=False, name="second")(nn.tanh(first)))
        third = norm(name="norm3")(nn.Dense(5, name="dense")(nn.tanh(second).mean((1, 2))))
        return nn.Dense(2, name="head")(nn.tanh(third)), {"first": first, "second": second, "dense": third}


SITES = ("first", "second", "dense")
CAPACITY = {"first": 5, "second": 6, "dense": 5}
BATCH = data(12, 5, 4, 2)


@partial(jax.jit, static_argnames="train")
def loss_fn(variables, batch, train=True):
    (outputs, seen), updates = Seen(train).apply(variables, batch["x"], mutable=["batch_stats"])
    return jnp.mean(outputs**2 + outputs), (seen, updates)


def start(batch=BATCH):
    """Parameters with three channels a layer in use, whose running statistics are those of the batch."""
    variables = images.variables_of(Seen(True), batch)
    sites = tinyjax.find_sites(loss_fn, variables, batch, has_aux=True)
    variables = tinyjax.thin(variables, sites, 3)
    return variables | loss_fn(variables, batch)[1][1], sites


def draw(site, num_neurons, seed=0):
    rng = np.random.default_rng(seed)
    (producer,) = site.producers
    inputs = rows(producer) + (producer.bias is not None)
    outputs = sum(rows(c) // site.capacity * cols(c) for c in site.consumers)
    return Neurons(
        jnp.asarray(rng.normal(size=(inputs, num_neurons))), jnp.asarray(rng.normal(size=(num_neurons, outputs))), None
    )


def moments_of(loss_fn, variables, batch, site, alpha, has_aux=True):
    traced = trace(loss_fn, variables, batch, has_aux=has_aux)
    (path,) = discover(traced).paths[site.name]
    bias = site.producers[0].bias is not None
    return response_moments(traced, path, variables, batch, alpha, bias=bias)


def born(variables, site, neurons, gamma, moments):
    """The parameters after a birth; a negative amplitude is that of the twin."""
    sign = jnp.sign(gamma)
    signed = neurons._replace(alpha=sign * neurons.alpha, omega=sign * neurons.omega)
    birth = identity_at_birth(site.norm, moments, gamma)
    return tinyjax.surgery.write(variables, site, signed, amplitude=jnp.abs(gamma), birth=birth)[0]


def answers(inputs, alpha, window, bias):
    """alpha' b of every patch, pixel by pixel: (n, *out, k)."""
    inputs, alpha = np.asarray(inputs), np.asarray(alpha)
    (kh, kw), (sh, sw), ((top, bottom), (left, right)), _ = window
    padded = np.pad(inputs, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    found = np.zeros((len(inputs), height, width, alpha.shape[1]))
    for i in range(height):
        for j in range(width):
            patch = padded[:, i * sh : i * sh + kh, j * sw : j * sw + kw].reshape(len(inputs), -1)
            patch = np.concatenate([patch, np.ones((len(inputs), 1))], axis=1) if bias else patch
            found[:, i, j] = patch @ alpha
    return found


def expected_answers(variables, alphas):
    """What new neurons of every layer answer in training, by hand from the activities of the layer below."""
    seen = {name: np.asarray(value) for name, value in loss_fn(variables, BATCH)[1][0].items()}
    below = np.tanh(seen["second"]).mean((1, 2))
    same = Window((3, 2), (2, 1), ((1, 1), (0, 1)), (1, 1))
    valid = Window((2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1))
    return {
        "first": answers(BATCH["x"], alphas["first"], same, True),
        "second": answers(np.tanh(seen["first"]), alphas["second"], valid, False),
        "dense": np.concatenate([below, np.ones((len(below), 1))], axis=1) @ np.asarray(alphas["dense"]),
    }


def test_moments_of_a_response():
    variables, sites = start()
    alphas = {site.name: draw(site, 2).alpha for site in sites}
    found = jax.jit(lambda v: {s.name: moments_of(loss_fn, v, BATCH, s, alphas[s.name]) for s in sites})(variables)
    for name, answer in expected_answers(variables, alphas).items():
        flat = answer.reshape(-1, 2)
        np.testing.assert_allclose(found[name][0], flat.mean(0), atol=1e-12)
        np.testing.assert_allclose(found[name][1], flat.var(0), atol=1e-12)


@pytest.mark.parametrize("name", SITES)
def test_normalisation_is_the_identity_on_a_newborn_in_training_and_in_evaluation(name):
    variables, sites = start()
    site = sites[name]
    neurons = draw(site, 2)
    by_hand = expected_answers(variables, {s.name: draw(s, 2).alpha for s in sites})[name]

    @jax.jit
    def after(gamma):
        new = born(variables, site, neurons, gamma, moments_of(loss_fn, variables, BATCH, site, neurons.alpha))
        return [loss_fn(new, BATCH, train)[1][0][name] for train in (True, False)]

    before = loss_fn(variables, BATCH)[1][0][name]
    for gamma in GAMMAS:
        for seen in after(gamma):
            wanted = np.sign(gamma) * np.sqrt(np.abs(gamma)) * by_hand
            np.testing.assert_allclose(seen[..., 3:5], wanted, atol=1e-10)
            np.testing.assert_allclose(seen[..., :3], before[..., :3], atol=1e-12)
            np.testing.assert_array_equal(seen[..., 5:], 0)


def test_running_statistics_do_not_move_at_the_next_training_step():
    variables, sites = start()
    site = sites["first"]
    neurons = draw(site, 2)
    new = born(variables, site, neurons, 0.5, moments_of(loss_fn, variables, BATCH, site, neurons.alpha))
    moved = loss_fn(new, BATCH)[1][1]["batch_stats"]["norm1"]
    for key in ("mean", "var"):
        np.testing.assert_allclose(new["batch_stats"]["norm1"][key], moved[key] + (key == "var") * _free(5), atol=1e-12)


def _free(width):
    """An empty slot holds variance 1, but its batch has variance 0."""
    return (np.arange(5) >= width).astype(float)


@pytest.mark.parametrize("name", images.NORMALISED)
def test_first_order_of_a_birth_through_a_normalisation(name):
    """Proposition 3.3 with the birth's own scale and shift, also with the twin's sign."""
    model = images.NORMALISED[name]()
    sites = tinyjax.find_sites(model.loss_fn, model.params, model.batch, has_aux=model.has_aux).growable
    thinned = tinyjax.thin(model.params, sites, {site.name: site.capacity - 1 for site in sites})
    neurons = {site.name: draw(site, 1) for site in sites}
    step = 1e-5

    @jax.jit
    def measure(params):
        moments = {
            s.name: moments_of(model.loss_fn, params, model.batch, s, neurons[s.name].alpha, model.has_aux)
            for s in sites
        }

        def loss(site, gamma):
            new = born(params, site, neurons[site.name], gamma, moments[site.name])
            found = model.loss_fn(new, model.batch)
            return found[0] if model.has_aux else found

        gammas = jnp.array([step, 2 * step, -step])
        losses = {s.name: jax.lax.map(partial(loss, s), gammas) for s in sites}
        found = model.loss_fn(params, model.batch)
        statistics = tinyjax.estimate(model.loss_fn, params, model.batch, sites, has_aux=model.has_aux)
        return found[0] if model.has_aux else found, losses, statistics

    base, losses, statistics = measure(thinned)
    for site in sites:
        moment = tinyjax.statistics.moments(statistics[site.name]).cross_prev
        alpha, omega = neurons[site.name].alpha, neurons[site.name].omega
        one, two, twin = np.asarray(losses[site.name]) - base
        slope = (2 * one - two / 2) / step
        scale = jnp.linalg.norm(alpha) * jnp.linalg.norm(omega) * jnp.linalg.norm(moment)
        assert abs(slope + jnp.sum((alpha.T @ moment) * omega)) < 1e-6 * scale
        assert abs(twin - one) < 1e-3 * abs(one)  # both factors change sign: the twin has the same slope


def test_relu_behind_a_normalisation_has_the_mean_slope():
    """Proposition 3.3 through conv + BatchNorm + ReLU: a twin has the slope of its own side, both together 1/2.

    A new channel is positively homogeneous, so finite amplitudes give the slopes but for the second order.
    """

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(nn.Conv(5, (3, 3), name="first")(x)))
            return nn.Conv(2, (2, 2), name="head")(x)

    batch = data(12, 5, 4, 2)
    variables, step = images.variables_of(Net(), batch), 1e-6

    def loss_fn(variables, batch):
        outputs, updates = Net().apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean(jnp.tanh(outputs) ** 2 + outputs), updates

    site = tinyjax.find_sites(loss_fn, variables, batch, has_aux=True)["first"]
    thinned, neurons = tinyjax.thin(variables, site, 3), draw(site, 1)

    @jax.jit
    def measure(params):
        moments = moments_of(loss_fn, params, batch, site, neurons.alpha)
        losses = jax.lax.map(
            lambda gamma: loss_fn(born(params, site, neurons, gamma, moments), batch)[0], jnp.array([step, -step])
        )
        cross = tinyjax.statistics.moments(tinyjax.estimate(loss_fn, params, batch, site, has_aux=True)).cross_prev
        return (loss_fn(params, batch)[0] - losses) / step, cross

    achieved, cross = measure(thinned)
    predicted = jnp.sum((neurons.alpha.T @ cross) * neurons.omega) / 2
    np.testing.assert_allclose(achieved.mean(), predicted, rtol=1e-4)
    assert abs(achieved[0] - achieved[1]) > 0.1 * abs(predicted)  # the twins differ: no single slope holds


def test_training_and_evaluation_agree_after_a_growth():
    """With running statistics of this batch, they do exactly where nothing behind the site is normalised."""
    batch = data(64, 5, 4, 2)
    variables, sites = start(batch)
    method = partial(tinyjax.methods.tiny, ridge=1e-2)
    grow_step = tinyjax.make_grow_step(loss_fn, sites["dense"], num_neurons=2, method=method, update=None, has_aux=True)
    new, info = grow_step(variables, batch)
    assert int(info.width["dense"]) == 5
    assert info.amplitude["dense"] != 0
    training, evaluation = (float(loss_fn(new, batch, train)[0]) for train in (True, False))
    np.testing.assert_allclose(training, info.loss_after["dense"], rtol=1e-12)
    np.testing.assert_allclose(evaluation, training, rtol=1e-10)
    assert training < loss_fn(variables, batch)[0]


def test_fillers_are_born_with_the_identity_too():
    @traits(function_preserving=True, stochastic=True)
    def outward(statistics, *, num_neurons, key=None):
        inputs, outputs = statistics.cross_prev.shape[1:]
        return Neurons(jax.random.normal(key, (inputs, num_neurons)), jnp.zeros((num_neurons, outputs)), None)

    @traits(function_preserving=True, stochastic=False)
    def nothing(statistics, *, num_neurons, key=None):
        inputs, outputs = statistics.cross_prev.shape[1:]
        return Neurons(jnp.zeros((inputs, num_neurons)), jnp.zeros((num_neurons, outputs)), jnp.zeros(num_neurons))

    variables, sites = start()
    grow_step = tinyjax.make_grow_step(
        loss_fn, sites["second"], num_neurons=2, method=nothing, fill=outward, update=None, has_aux=True
    )
    new, info = grow_step(variables, BATCH)
    assert int(info.filled["second"]) == 2
    kernel = new["params"]["second"]["kernel"][..., 3:5].reshape(-1, 2)
    answer = expected_answers(variables, {s.name: draw(s, 2).alpha for s in sites} | {"second": kernel})["second"]
    for train in (True, False):
        seen = loss_fn(new, BATCH, train)[1][0]["second"]
        np.testing.assert_allclose(seen[..., 3:5], answer, atol=1e-10)


def test_values_at_birth_by_neuron():
    variables, sites = start()
    site = sites["first"]
    birth = {site.norm.scale: jnp.array([2.0, 3.0]), site.norm.var: 5.0}
    new, written = tinyjax.surgery.write(variables, site, draw(site, 2), amplitude=1.0, birth=birth)
    np.testing.assert_array_equal(written, [False] * 3 + [True] * 2)
    old, new = named_leaves(variables), named_leaves(new)
    np.testing.assert_array_equal(new[site.norm.scale][3:], [2, 3])
    np.testing.assert_array_equal(new[site.norm.var][3:], [5, 5])
    np.testing.assert_array_equal(new[site.norm.mean][3:], 0)
    np.testing.assert_array_equal(new[site.norm.shift][3:], 0)
    for leaf in (site.norm.scale, site.norm.shift, site.norm.mean, site.norm.var):
        np.testing.assert_array_equal(new[leaf][:3], old[leaf][:3])
    with pytest.raises(ValueError, match=r"`birth` names `nowhere`; the vectors of site `first` that it can set"):
        tinyjax.surgery.write(variables, site, draw(site, 2), amplitude=1.0, birth={"nowhere": 1.0})


def test_norms_are_read_off():
    _, sites = start()
    assert sites.names == SITES and {s.name: s.capacity for s in sites} == CAPACITY
    for site, epsilon in zip(sites, (1e-3, 1e-5, 1e-5)):
        number = SITES.index(site.name) + 1
        assert site.norm == tinyjax.core.site.Norm(
            f"params/norm{number}/scale",
            f"params/norm{number}/bias",
            f"batch_stats/norm{number}/mean",
            f"batch_stats/norm{number}/var",
            epsilon,
        )
    roles = {m.leaf.rpartition("/")[2]: m.role for m in sites["second"].members if "norm2" in m.leaf}
    assert roles == {"scale": "scale", "bias": "shift", "mean": "mean", "var": "var"}
