"""Second-order neurons: third moments against loops, rank-one parts against ascent, the rate at which the loss falls.

The stuck network reads inputs that come in pairs (x, -x) and is asked for an even function of them: N = 0, and TINY
finds nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.optimize import minimize

import tinyjax
from tests.support.compiled import compiled
from tests.support.oracles import make_samples, record
from tinyjax import methods
from tinyjax.methods.second_order import held_out_third, rank_one_part, rank_one_parts
from tinyjax.statistics.slices import keep_half

CAPACITY = 4


def apply(params, x, activation):
    return activation(x @ params["w"] + params["b"]) @ params["u"] + params["c"]


def make_loss(activation):
    @jax.jit
    def loss_fn(params, batch):
        return jnp.mean(jnp.sum((apply(params, batch[0], activation) - batch[1]) ** 2, axis=-1))

    return loss_fn


def stuck(seed=0, n=160, inputs=3):
    """Params without neurons and a batch: pairs (x, -x) side by side, a quadratic target of mean zero."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(n // 2, inputs))
    x = np.stack([half, -half], axis=1).reshape(n, inputs)
    target = np.stack([x[:, 0] * x[:, 1], x[:, 2] ** 2 - x[:, 0] ** 2], axis=1)
    batch = jnp.asarray(x), jnp.asarray(target - target[: 3 * n // 4].mean(axis=0))
    shapes = {"w": (inputs, CAPACITY), "b": (CAPACITY,), "u": (CAPACITY, 2), "c": (2,)}
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}, batch


@functools.cache
def statistics_of(activation):
    params, (x, target) = stuck()
    batch = x[:120], target[:120]
    loss_fn = make_loss(activation)
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    return (
        loss_fn,
        params,
        batch,
        site,
        jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, third_moments=2))(params, batch),
    )


@pytest.mark.parametrize(("n", "chunk"), [(41, None), (41, 16), (33, 16)])
def test_third_moments_are_those_of_the_residual(n, chunk):
    rng = np.random.default_rng(1)
    loss_fn = make_loss(jax.nn.gelu)
    shapes = {"w": (3, 5), "b": (5,), "u": (5, 4), "c": (4,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x, target = rng.normal(size=(n, 3)), rng.normal(size=(n, 4))
    batch = jnp.asarray(x), jnp.asarray(target)
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    got = jax.jit(lambda p, b: tinyjax.estimate(loss_fn, p, b, site, third_moments=2, chunk=chunk))(params, batch)

    hidden = np.asarray(jax.nn.gelu(x @ params["w"] + params["b"]))
    b = np.concatenate([hidden, np.ones((n, 1))], axis=1)
    b_prev = np.concatenate([x, np.ones((n, 1))], axis=1)
    v = 2 * (target - np.asarray(apply(params, x, jax.nn.gelu)))
    ridge = float(compiled(tinyjax.methods.held_out_update)(got))
    gram = b.T @ b / n
    residual = v - b @ np.linalg.solve(gram + ridge * np.diag(np.diag(gram)), b.T @ v / n)
    outputs = np.asarray(got.third_outputs)
    directions = np.linalg.svd(residual)[2][:2]
    np.testing.assert_allclose(np.abs(outputs @ directions.T), np.eye(2), atol=1e-9)
    assert got.curvature == pytest.approx(2 / np.sqrt(2 * np.pi), rel=1e-3)
    want = np.zeros((2, 2, 4, 4))
    for i in range(n):
        for r in range(2):
            want[i % 2, r] += (outputs[r] @ residual[i]) * np.outer(b_prev[i], b_prev[i])
    np.testing.assert_allclose(got.third_moments, want, atol=1e-10)


def symmetric(rng, outputs, inputs):
    tensor = rng.normal(size=(outputs, inputs, inputs))
    return tensor + np.swapaxes(tensor, 1, 2)


def ascent(tensor, starts=40):
    """The largest value that quasi-Newton finds: for a given a the best output is along a'Ta."""

    def negative(a):
        a = a / np.linalg.norm(a)
        return -np.linalg.norm(np.einsum("i,rij,j->r", a, tensor, a))

    rng = np.random.default_rng(0)
    return max(-minimize(negative, rng.normal(size=tensor.shape[1])).fun for _ in range(starts))


def test_for_one_output_it_is_the_eigenvector_of_the_largest_absolute_value():
    for seed in range(4):
        matrix = symmetric(np.random.default_rng(seed), 1, 6)
        got = jax.jit(rank_one_part)(jnp.asarray(matrix))
        values, vectors = np.linalg.eigh(matrix[0])
        top = np.argmax(np.abs(values))
        np.testing.assert_allclose(got.value, np.abs(values[top]), rtol=1e-12)
        np.testing.assert_allclose(np.abs(got.vector @ vectors[:, top]), 1, rtol=1e-10)
        assert np.sign(got.output[0]) == np.sign(values[top])


def test_for_several_outputs_it_is_as_good_as_many_quasi_newton_ascents():
    ratios = []
    for seed in range(12):
        tensor = symmetric(np.random.default_rng(seed), 3, 5)
        got = jax.jit(rank_one_part)(jnp.asarray(tensor))
        again = np.einsum("r,i,rij,j->", got.output, got.vector, tensor, got.vector)
        np.testing.assert_allclose(again, got.value, rtol=1e-12)
        ratios.append(float(got.value) / ascent(tensor))
    assert max(ratios) < 1 + 1e-6
    assert min(ratios) > 0.9 and np.median(ratios) > 1 - 1e-6  # a local maximum, nearly always the largest


def test_parts_of_a_sum_of_orthogonal_ones_are_found_in_order_also_when_compressed():
    rng = np.random.default_rng(2)
    vectors = np.linalg.qr(rng.normal(size=(80, 80)))[0][:3]
    outputs = np.linalg.qr(rng.normal(size=(4, 4)))[0][:3]
    tensor = np.einsum("k,kr,ki,kj->rij", [1.0, 3.0, 2.0], outputs, vectors, vectors)
    got = jax.jit(functools.partial(rank_one_parts, num_parts=4))(jnp.asarray(tensor))
    np.testing.assert_allclose(got.value, [3, 2, 1, 0], atol=1e-9)
    np.testing.assert_allclose(np.abs(got.vector[:3] @ vectors[[1, 2, 0]].T), np.eye(3), atol=1e-7)


def test_the_neuron_is_the_best_of_unit_activity_and_fan_out():
    """By ascent on raw samples, which forms neither S nor third moments."""
    samples = make_samples(inputs=3, outputs=2, n=80)
    fit = jax.jit(functools.partial(methods.second_order, num_neurons=1, ridge=0.0))
    got = fit(record(samples, third_outputs=np.eye(2)))

    def negative(alpha):
        pre = samples.b_prev @ alpha
        return -np.linalg.norm(samples.v.T @ pre**2) / np.sum(pre**2)

    rng = np.random.default_rng(0)
    best = max(-minimize(negative, rng.normal(size=4)).fun for _ in range(20))
    mu = float(got.singular_values[0])
    np.testing.assert_allclose(mu, best, rtol=1e-7)
    alpha, omega = np.asarray(got.alpha)[:, 0], np.asarray(got.omega)[0]
    np.testing.assert_allclose(np.mean((samples.b_prev @ alpha) ** 2), mu, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(omega), np.sqrt(mu), rtol=1e-10)
    np.testing.assert_allclose(np.mean(samples.v @ omega * (samples.b_prev @ alpha) ** 2), mu**2.5, rtol=1e-7)
    np.testing.assert_allclose(got.second_order, [mu**2.5 / 2], rtol=1e-7)
    concave = fit(record(samples, third_outputs=np.eye(2), curvature=-2.0))
    np.testing.assert_allclose(concave.omega, -got.omega, rtol=1e-10)
    np.testing.assert_allclose(concave.second_order, [mu**2.5], rtol=1e-7)


def test_the_held_out_ridge_finds_more_on_unseen_samples():
    """Of a product of two factors behind 12 correlated inputs, as a share of what unlimited samples find."""
    fit = jax.jit(lambda s: [methods.second_order(s, num_neurons=1, ridge=r) for r in (held_out_third, 0.0)])
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        factors = rng.normal(size=(2040, 4))
        x = factors @ rng.normal(size=(4, 12)) + 0.3 * rng.normal(size=(2040, 12))
        v = factors[:, :1] * factors[:, 1:2] + rng.normal(size=(2040, 1))
        samples = make_samples(inputs=12, outputs=1, n=40)._replace(
            b_prev=np.concatenate([x[:40], np.ones((40, 1))], axis=1), v=v[:40]
        )
        shares = []
        for neurons in fit(record(samples, third_outputs=np.eye(1))):
            pre = x[40:] @ np.asarray(neurons.alpha)[:-1, 0] + np.asarray(neurons.alpha)[-1, 0]
            shares.append(np.mean(v[40:, 0] * np.sign(neurons.omega[0, 0]) * pre**2) / np.mean(pre**2))
        found.append(shares)
    held_out, exact = np.mean(found, axis=0)
    assert held_out > exact + 0.05
    half = keep_half(record(samples, third_outputs=np.eye(1)), 0)
    assert float(compiled(held_out_third)(half)) == 1.0


def test_neurons_come_in_pairs_that_cancel_to_first_order():
    samples = make_samples(inputs=3, outputs=2, n=80)
    fit = jax.jit(functools.partial(methods.second_order, num_neurons=3, ridge=0.0))
    alpha, omega, values, *_, rates = fit(record(samples, third_outputs=np.eye(2)))
    np.testing.assert_array_equal(alpha[:, 0], -alpha[:, 1])
    for same in (omega, values, rates):
        np.testing.assert_array_equal(same[0], same[1])
    assert 0 < values[2] < values[0]
    completed = methods.completed(
        lambda s, **kw: methods.tiny(s, ridge=0.0, **kw),
        functools.partial(methods.second_order, ridge=0.0),
        useful=lambda statistics, neurons: jnp.arange(3) < 1,
    )
    both = jax.jit(functools.partial(completed, num_neurons=3))(record(samples, third_outputs=np.eye(2)))
    np.testing.assert_allclose(both.alpha[:, 1:], alpha[:, :2], atol=1e-12)  # the best pair, behind one neuron of tiny
    np.testing.assert_allclose(both.second_order, np.append(0, rates[:2]), rtol=1e-10)


def test_tiny_finds_nothing_in_the_stuck_network():
    completed_tiny = methods.completed(functools.partial(methods.tiny, ridge=0.0), methods.second_order)

    @jax.jit
    def look(statistics):
        psi = tinyjax.methods.bottleneck(statistics).after
        return psi, methods.tiny(statistics, num_neurons=2, ridge=0.0), completed_tiny(statistics, num_neurons=2)

    psi, alone, completed = look(statistics_of(jax.nn.gelu)[-1])
    assert float(psi) > 1 and np.all(alone.singular_values == 0)
    assert completed.second_order is not None and np.all(completed.second_order > 0)
    assert np.all(completed.singular_values == 0)


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.silu, lambda z: jnp.sin(z) - z**2])
def test_the_loss_falls_at_the_predicted_rate(activation):
    loss_fn, params, batch, site, statistics = statistics_of(activation)
    neurons = compiled(methods.second_order, num_neurons=2, ridge=0.0)(statistics)

    @jax.jit
    def loss_at(root):
        return loss_fn(tinyjax.surgery.write(params, site, neurons, amplitude=root**2)[0], batch)

    roots = np.array([1, 2, 3, 4, 5, 6]) * 4e-3 / float(jnp.sqrt(neurons.singular_values[0]))
    fallen = [(float(loss_at(0.0)) - float(loss_at(root))) for root in roots]
    powers = np.stack([roots**k for k in range(2, 7)], axis=1)  # of the root of the amplitude
    (first, second), *_ = np.split(np.linalg.lstsq(powers / powers.max(0), fallen, rcond=None)[0] / powers.max(0), [2])
    assert neurons.second_order is not None
    np.testing.assert_allclose(second, jnp.sum(neurons.second_order), rtol=1e-3)
    assert abs(first) * roots[-1] ** 2 < 1e-6 * fallen[-1]  # nothing to first order


def test_a_relu_neuron_falls_at_the_rate_of_its_kink_nearly_the_largest():
    loss_fn, params, (x, target), site, statistics = statistics_of(jax.nn.relu)
    neurons = compiled(methods.second_order, num_neurons=1, ridge=0.0)(statistics)
    gamma = 1e-6
    grown, _ = tinyjax.surgery.write(params, site, neurons, amplitude=gamma)
    rate = (float(loss_fn(params, (x, target))) - float(loss_fn(grown, (x, target)))) / gamma
    b_prev = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    v = 2 * np.asarray(target)
    alpha, omega = np.asarray(neurons.alpha)[:, 0], np.asarray(neurons.omega)[0]
    np.testing.assert_allclose(rate, np.mean(v @ omega * np.maximum(b_prev @ alpha, 0)), rtol=1e-4)

    def negative(alpha):  # of unit activity, with its best fan-out
        pre = b_prev @ alpha
        return -np.linalg.norm(v.T @ np.maximum(pre, 0)) / len(v) / np.sqrt(np.mean(pre**2))

    rng = np.random.default_rng(0)
    best = max(-minimize(negative, rng.normal(size=4), method="Nelder-Mead").fun for _ in range(20))
    assert rate / float(neurons.singular_values[0]) > 0.9 * best


@functools.cache
def grown(method, activation, seed=0, **options):
    loss_fn = make_loss(activation)
    params, batch = stuck()
    sites = tinyjax.find_sites(loss_fn, params, batch)
    step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=CAPACITY, method=method, fill=None, **options)
    after, info = step(params, batch, key=jax.random.key(seed))
    return params, after, info, [float(loss_fn(p, batch)) for p in (params, after)]


def test_a_growth_gets_unstuck():
    completed = methods.completed(methods.tiny, methods.second_order)
    _, after, info, (before, fallen) = grown(completed, jax.nn.gelu)
    assert int(info.written["w"]) == CAPACITY and fallen < 0.5 * before
    np.testing.assert_allclose(info.gain_predicted["w"], 0, atol=1e-12)  # psi is of first order
    params, same, info, _ = grown(methods.tiny, jax.nn.gelu)
    assert int(info.written["w"]) == 0 and int(info.status["w"]) != int(tinyjax.Status.GROWN)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, same)))


@pytest.mark.slow
def test_random_directions_with_a_line_search_find_less():
    completed = methods.completed(methods.tiny, methods.second_order)
    *_, (before, fallen) = grown(completed, jax.nn.gelu)
    drawn = [grown(methods.random, jax.nn.gelu, amplitude=tinyjax.growth.twin_search, seed=s)[-1][1] for s in range(3)]
    assert before >= max(drawn) and before - fallen > 2 * (before - np.mean(drawn))


@pytest.mark.slow
def test_a_growth_that_raises_the_loss_leaves_the_function_alone():
    params, same, info, _ = grown(methods.second_order, jax.nn.gelu, amplitude=tinyjax.growth.fixed(1e3))
    assert int(info.status["w"]) == int(tinyjax.Status.REJECTED) and float(info.amplitude["w"]) == 0
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, same)))


@pytest.mark.slow
@pytest.mark.parametrize("c", [1e-3, 1e3])
def test_the_unit_of_the_loss_changes_no_choice(c):
    params, batch = stuck()
    plain = make_loss(jax.nn.gelu)
    method = methods.completed(methods.tiny, methods.second_order)
    _, want, _, _ = grown(method, jax.nn.gelu)
    scaled = lambda p, b: c * plain(p, b)  # noqa: E731
    step = tinyjax.make_grow_step(
        scaled, tinyjax.find_sites(scaled, params, batch), num_neurons=CAPACITY, method=method, fill=None
    )
    got, _ = step(params, batch)
    np.testing.assert_allclose(apply(got, batch[0], jax.nn.gelu), apply(want, batch[0], jax.nn.gelu), atol=1e-6)


@pytest.mark.slow
def test_noise_is_completed_where_nothing_is_significant():
    """On finite samples N is never zero: significance tells noise from what the first order asks for."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    target = (x[:, :1] * x[:, 1:2]) + 0.1 * rng.normal(size=(400, 1))
    loss_fn = make_loss(jax.nn.gelu)
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "u": jnp.zeros((4, 1)), "c": jnp.zeros(1)}
    batch = jnp.asarray(x), jnp.asarray(target)
    sites = tinyjax.find_sites(loss_fn, params, batch)
    losses = []
    for useful in (methods.within_rank, methods.within_significance):
        method = methods.completed(methods.tiny, methods.second_order, useful=useful)
        step = tinyjax.make_grow_step(loss_fn, sites, num_neurons=1, method=method, fill=None)
        losses.append(float(loss_fn(step(params, batch)[0], batch)))
    assert losses[1] < losses[0]


class Net(nn.Module):
    """An unmodified Linen model with layers of two kinds."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Dense(5, name="silu")(x))
        return nn.Dense(1)(jnp.tanh(nn.Dense(6, name="tanh")(x)))


def test_an_unmodified_model_grows_and_an_odd_activation_is_refused_by_name():
    model = Net()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)))
    batch = x, x[:, :1] * x[:, 1:2]
    loss_fn = jax.jit(lambda params, batch: jnp.mean((model.apply(params, batch[0]) - batch[1]) ** 2))
    params = jax.jit(model.init)(jax.random.key(0), x)
    sites = tinyjax.find_sites(loss_fn, params, batch)
    silu, tanh = sites["silu"], sites["tanh"]
    params = tinyjax.thin(params, sites, 3)
    method = methods.completed(methods.tiny, methods.second_order)
    before = float(loss_fn(params, batch))
    after, info = tinyjax.make_grow_step(loss_fn, silu, num_neurons=2, method=method)(params, batch)
    assert float(loss_fn(after, batch)) < before and int(info.width[silu.name]) == 5
    refused = tinyjax.make_grow_step(loss_fn, tanh, num_neurons=2, method=method)
    with pytest.raises(ValueError, match=f"`{tanh.name}` say nothing: the even part of its activation vanishes"):
        refused(params, batch)


def test_other_places_are_refused_by_name():
    def conv_loss(params, x):
        h = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.lax.conv_general_dilated(
            jax.nn.relu(h), params["l"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(h**2)

    def masked_loss(params, batch):
        return jnp.mean((jax.nn.gelu(batch["x"] @ params["w"]) * batch["mask"][:, None] @ params["u"]) ** 2)

    cases = [
        (
            conv_loss,
            {"k": jnp.ones((3, 3, 2, 4)), "l": jnp.ones((3, 3, 4, 2))},
            jnp.ones((8, 4, 4, 2)),
            "a convolution",
        ),
        (
            masked_loss,
            {"w": jnp.ones((3, 4)), "u": jnp.ones((4, 2))},
            {"x": jnp.ones((8, 3)), "mask": jnp.ones(8)},
            "more than an elementwise activation",
        ),
    ]
    for loss_fn, params, batch, reason in cases:
        (site,) = tinyjax.find_sites(loss_fn, params, batch)
        with pytest.raises(ValueError, match=f"third moments of site `{site.name}`.*here lies {reason}"):
            tinyjax.estimate(loss_fn, params, batch, site, third_moments=1)


def test_records_of_two_batches_are_not_added():
    loss_fn, params, batch, site, statistics = statistics_of(jax.nn.gelu)
    with pytest.raises(ValueError, match="third moments of two records cannot be added"):
        tinyjax.statistics.merge(statistics, statistics)
    with pytest.raises(ValueError, match="pass one, not an iterator"):
        tinyjax.estimate(loss_fn, params, iter((batch, batch)), site, third_moments=1)
    with pytest.raises(ValueError, match="`third_moments` must be >= 0"):
        tinyjax.estimate(loss_fn, params, batch, site, third_moments=-1)
