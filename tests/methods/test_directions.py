"""The methods beside `tiny`, each against an oracle on raw samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import oracles
from tests.support.oracles import make_samples, record
from tinyjax.methods import (
    best_update,
    completed,
    fisher_tiny,
    gradmax,
    gradmax_dual,
    held_out_joint,
    held_out_unprojected,
    net2net,
    north,
    north_weight,
    predicted_gain,
    random,
    random0,
    redundancy,
    refit_fan_in,
    symmetric_uniform,
    tiny,
    tiny_joint,
    tiny_unprojected,
)
from tinyjax.methods.north import uncorrelated
from tinyjax.statistics.averages import moments

usual = make_samples(0)


def move_of(samples, neurons):
    return samples.b_prev @ np.asarray(neurons.alpha) @ np.asarray(neurons.omega)


# --- tiny_unprojected


def test_unprojected_neurons_are_the_best_for_the_goal_itself():
    neurons = tiny_unprojected(record(usual), num_neurons=3, ridge=0.0)
    want, singular = oracles.eckart_young(usual.b_prev, usual.v, 3)
    np.testing.assert_allclose(move_of(usual, neurons), want, atol=1e-9)
    np.testing.assert_allclose(neurons.singular_values, singular[:3], atol=1e-10)


def test_unprojected_ridge_is_the_best_of_the_grid():
    b, v = usual.b_prev, usual.v
    rows = slice(0, None, 2), slice(1, None, 2)

    def scores(exponent):
        return sum(oracles.held_out_score(b[i], v[i], b[j], v[j], 10**exponent) for i, j in (rows, rows[::-1]))

    best = 10 ** max(np.arange(-8, 4.1, 0.5), key=scores)
    np.testing.assert_allclose(held_out_unprojected(record(usual)), best / 2, rtol=1e-12)


# --- tiny_joint


@pytest.mark.parametrize("rank", [1, 2])
def test_joint_reaches_the_optimum_of_alternating_least_squares(rank):
    neurons = tiny_joint(record(usual), num_neurons=rank, ridge=0.0, update_ridge=0.0)
    got = oracles.psi(usual.v, usual.b @ neurons.delta, move_of(usual, neurons))
    np.testing.assert_allclose(got, oracles.alternating_least_squares(usual, rank), rtol=1e-8)
    alone = np.sum(oracles.residual(usual) ** 2) / len(usual.v)
    np.testing.assert_allclose(alone - got, np.sum(neurons.singular_values**2), rtol=1e-8)


def test_joint_is_never_worse_than_tiny_with_the_update_refitted():
    for seed in range(5):
        samples = make_samples(seed)
        joint = tiny_joint(record(samples), num_neurons=2, ridge=0.0, update_ridge=0.0)
        ours = oracles.psi(samples.v, samples.b @ joint.delta, move_of(samples, joint))
        move = move_of(samples, tiny(record(samples), num_neurons=2, ridge=0.0))
        refitted = samples.b @ oracles.least_squares(samples.b, samples.v - move)
        assert ours <= oracles.psi(samples.v, move, refitted) + 1e-12


def test_joint_is_tiny_when_inputs_and_neurons_are_uncorrelated():
    b = usual.b - usual.b_prev @ oracles.least_squares(usual.b_prev, usual.b)
    b[:, -1] = 0  # the constant is in both: nothing but rounding is left of it
    orthogonal = usual._replace(b=b)
    joint = tiny_joint(record(orthogonal), num_neurons=2, ridge=0.0, update_ridge=0.0)
    apart = tiny(record(orthogonal), num_neurons=2, ridge=0.0)
    np.testing.assert_allclose(joint.alpha, apart.alpha, atol=1e-9)
    np.testing.assert_allclose(joint.delta, best_update(record(orthogonal)), atol=1e-9)


def test_joint_slope_is_the_decrease_of_psi():
    """<V_goal, V(dW) + V(theta)> / n = psi before - psi after: always a descent direction."""
    neurons = tiny_joint(record(usual), num_neurons=2, ridge=0.0, update_ridge=0.0)
    move = usual.b @ np.asarray(neurons.delta) + move_of(usual, neurons)
    np.testing.assert_allclose(
        np.sum(usual.v * move) / len(move), oracles.psi(usual.v) - oracles.psi(usual.v, move), rtol=1e-9
    )


def test_joint_ignores_what_the_old_neurons_compute():
    """A linear old neuron spans an input direction: nothing new can be gained from it, to rounding."""
    linear = usual._replace(b=np.concatenate([usual.b_prev[:, :4], np.ones((len(usual.v), 1))], axis=1))
    neurons = tiny_joint(record(linear), num_neurons=4, ridge=0.0, update_ridge=0.0)
    got = oracles.psi(linear.v, linear.b @ neurons.delta, move_of(linear, neurons))
    everything = oracles.least_squares(usual.b_prev, usual.v)
    np.testing.assert_allclose(got, oracles.psi(usual.v, usual.b_prev @ everything), rtol=1e-9)


def test_joint_ridge_maximises_the_held_out_gain():
    noisy = make_samples(1, n=40, inputs=8, slots=6, live=6, signal=2.0)
    r_update = 0.1
    rows = slice(0, None, 2), slice(1, None, 2)

    def scores(exponent):
        total = 0
        for i, j in (rows, rows[::-1]):
            # both blocks at once: the ridges enter as extra rows of one least squares problem
            both, scale = (np.concatenate([noisy.b[k], noisy.b_prev[k]], axis=1) for k in (i, i))
            penalty = np.repeat([r_update, 10**exponent], [noisy.b.shape[1], noisy.b_prev.shape[1]])
            extra = np.diag(np.sqrt(penalty * np.sum(scale**2, axis=0)))
            goal = np.concatenate([noisy.v[i], np.zeros((len(extra), noisy.v.shape[1]))])
            x = np.linalg.lstsq(np.concatenate([both, extra]), goal, rcond=None)[0]
            total -= oracles.psi(noisy.v[j], np.concatenate([noisy.b[j], noisy.b_prev[j]], axis=1) @ x)
        return total

    best = 10 ** max(np.arange(-8, 4.1, 0.5), key=scores)
    np.testing.assert_allclose(held_out_joint(record(noisy), update_ridge=r_update), best / 2, rtol=1e-12)


# --- fisher_tiny


def test_fisher_maximises_the_senn_score():
    neurons = fisher_tiny(record(usual, energy_matrix=True), num_neurons=2, ridge=0.0, output_ridge=0.0)
    left, n = oracles.residual(usual), len(usual.v)

    def score(a, w):
        inside = np.sum((usual.b_prev @ a) * (left @ w)) / n
        return inside**2 / np.mean((usual.b_prev @ a) ** 2) / np.mean((usual.v @ w) ** 2)

    first = score(np.asarray(neurons.alpha[:, 0]), np.asarray(neurons.omega[0]))
    np.testing.assert_allclose(neurons.singular_values[0] ** 2, first, rtol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(5):  # alternating maximisation from random starts never does better
        w = rng.normal(size=4)
        for _ in range(50):
            a = oracles.least_squares(usual.b_prev, left @ w)
            w = oracles.least_squares(usual.v, np.linalg.pinv(usual.v).T @ (left.T @ (usual.b_prev @ a)))
            w /= np.linalg.norm(w)
        assert score(a, w) <= first + 1e-9


def test_fisher_knows_no_unit_of_the_outputs():
    unit = np.array([1.0, 10.0, 0.1, 3.0])
    scaled = usual._replace(v=usual.v * unit)
    got, want = (fisher_tiny(record(s, energy_matrix=True), num_neurons=2, ridge=0.1) for s in (scaled, usual))
    np.testing.assert_allclose(got.singular_values, want.singular_values, rtol=1e-9)
    np.testing.assert_allclose(np.abs(got.alpha), np.abs(want.alpha), atol=1e-9)


# --- gradmax


def test_gradmax_maximises_the_gradient_of_the_fan_in():
    neurons = gradmax(record(usual), num_neurons=2, scale=0.1)
    assert np.all(neurons.alpha == 0)
    np.testing.assert_allclose(neurons.omega @ neurons.omega.T, 0.01 * np.eye(2), atol=1e-12)

    def squared_gradient(omega):  # of the loss with respect to alpha, sample by sample
        return np.sum(sum(np.outer(b, omega @ v) for b, v in zip(usual.b_prev, usual.v)) ** 2) / len(usual.v) ** 2

    best = squared_gradient(np.asarray(neurons.omega))
    np.testing.assert_allclose(best, 0.01 * np.sum(neurons.singular_values**2), rtol=1e-10)
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert squared_gradient(0.1 * np.linalg.qr(rng.normal(size=(4, 2)))[0].T) <= best + 1e-12


def test_gradmax_dual_maximises_the_gradient_of_the_fan_out():
    neurons = gradmax_dual(record(usual), num_neurons=1)
    assert np.all(neurons.omega == 0)

    def gradient(alpha):
        return np.linalg.norm(usual.v.T @ (usual.b_prev @ alpha)) / len(usual.v)

    best = gradient(np.asarray(neurons.alpha[:, 0]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        alpha = rng.normal(size=8)
        assert gradient(alpha / np.linalg.norm(alpha)) <= best + 1e-12


def test_gradmax_is_redundant_where_tiny_is_not():
    """Appendix B.1: GradMax asks for what the old neurons can do already. Here that is a large part of the goal."""
    rng = np.random.default_rng(0)
    hidden = usual.b_prev[:, :3]  # linear old neurons, so that the projection removes their part of the input exactly
    b = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    v = 50 * np.outer(hidden @ rng.normal(size=3), [1, 0, 0, 0]) + np.outer(usual.b_prev[:, 5], [0, 1, 0, 0])
    samples = usual._replace(b=b, v=v, weight=np.zeros((4, 4)))
    statistics = record(samples)
    delta = best_update(statistics)
    greedy = redundancy(moments(statistics), gradmax(statistics, num_neurons=1).omega, delta)
    ours = redundancy(moments(statistics), tiny(statistics, num_neurons=1, ridge=0.0).omega, delta)
    assert greedy[0] > 0.95 and ours[0] < 0.6
    asked = samples.b_prev.T @ v @ np.asarray(gradmax(statistics, num_neurons=1).omega[0])
    feasible = samples.b_prev.T @ (b @ np.asarray(delta)) @ np.asarray(gradmax(statistics, num_neurons=1).omega[0])
    np.testing.assert_allclose(greedy[0], asked @ feasible / (asked @ asked), rtol=1e-10)

    # The same as a number: what the best fan-ins for its fan-outs would gain, and how much of it needs new neurons.
    mean, born = moments(statistics), gradmax(statistics, num_neurons=1)
    claimed = predicted_gain(mean, refit_fan_in(statistics, born, ridge=0.0)) / mean.energy
    new = predicted_gain(mean, refit_fan_in(statistics, born, delta, ridge=0.0), delta) / mean.energy
    best = np.sum(oracles.eckart_young(samples.b_prev, oracles.residual(samples), 1)[1][0] ** 2) / mean.energy
    assert claimed > 0.95 and new < 1e-3 and best > 3 * new, (claimed, new, best)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_refitted_fan_in_is_the_best_for_its_fan_out(ridge):
    """Against least squares over the entries of alpha, all samples and outputs stacked."""
    statistics, delta = record(usual), best_update(record(usual))
    born = gradmax(statistics, num_neurons=3, scale=0.1)
    omega, left = np.asarray(born.omega), oracles.residual(usual)
    design = np.einsum("nd,kq->nqdk", usual.b_prev, omega).reshape(left.size, -1)
    size = np.sqrt(np.sum(usual.b_prev**2, axis=0))
    rows = np.sqrt(ridge) * np.einsum("de,kq->eqdk", np.diag(size), omega).reshape(len(size) * omega.shape[1], -1)
    goal = np.concatenate([left.ravel(), np.zeros(len(rows))])
    want = np.linalg.lstsq(np.concatenate([design, rows]), goal, rcond=1e-12)[0].reshape(-1, 3)
    got = refit_fan_in(statistics, born, delta, ridge=ridge)
    np.testing.assert_allclose(got.alpha, want, atol=1e-9)
    np.testing.assert_array_equal(got.omega, born.omega)
    gain = oracles.psi(left) - oracles.psi(left, usual.b_prev @ want @ omega)
    np.testing.assert_allclose(predicted_gain(moments(statistics), got, delta), gain, rtol=1e-9)
    assert gain > 0
    both = tiny(statistics, num_neurons=3, ridge=0.0)
    np.testing.assert_array_equal(refit_fan_in(statistics, both, delta).alpha, both.alpha)


# --- north


def test_north_is_the_published_recipe_in_law():
    """Covariance of alpha over many draws: S^-1 B V r, with V from a QR of the pre-activations, sample by sample."""
    statistics = record(usual)
    n, k = len(usual.v), 20_000
    ours = np.asarray(uncorrelated(statistics, 3, 0.0, jax.random.key(0))[0])
    pre = usual.b_prev @ usual.weight_prev
    np.testing.assert_allclose(pre.T @ (usual.b_prev @ ours), np.zeros((5, 3)), atol=1e-9)
    full, _ = np.linalg.qr(pre, mode="complete")
    kernel = full[:, 5:]
    rng = np.random.default_rng(0)
    recipe = np.sqrt(n) * oracles.least_squares(usual.b_prev, kernel @ rng.normal(size=(n - 5, k)))
    draws = jax.vmap(lambda key: uncorrelated(statistics, 3, 0.0, key)[0])(jax.random.split(jax.random.key(1), k))
    draws = np.asarray(draws).transpose(1, 0, 2).reshape(8, -1)
    want, got = np.cov(recipe), np.cov(draws)
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    np.testing.assert_allclose(np.mean(draws, axis=1), np.zeros(8), atol=0.03 * np.sqrt(np.diag(want).max()))


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_north_has_the_length_of_the_old_neurons_and_stays_orthogonal(ridge):
    """Inputs that hardly vary would get weights of 1 / their deviation; and a ridge costs no orthogonality."""
    samples = make_samples(slots=6, live=4)
    samples.b_prev[:, :2] *= 1e-4
    got = np.asarray(north(record(samples), num_neurons=3, ridge=ridge, key=jax.random.key(0)).alpha)
    pre = samples.b_prev @ samples.weight_prev[:, :4]
    # the tolerance is that of S at condition 1e8
    np.testing.assert_allclose(pre.T @ (samples.b_prev @ got) / np.linalg.norm(pre), np.zeros((4, 3)), atol=1e-8)
    norms = np.mean(np.linalg.norm(samples.weight_prev[:, :4], axis=0))
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), np.full(3, norms), rtol=1e-10)


def test_north_stops_at_the_admissible_dimension():
    """8 inputs, 5 neurons: 3 directions are left, whatever the number asked for; none with 8 neurons or more."""
    got = north(record(usual), num_neurons=5, key=jax.random.key(0))
    np.testing.assert_array_equal(got.singular_values, [1, 1, 1, 0, 0])
    assert np.all(got.alpha[:, 3:] == 0) and np.linalg.matrix_rank(got.alpha) == 3
    wide = north(record(make_samples(slots=9, live=9)), num_neurons=2, key=jax.random.key(0))
    assert np.all(wide.alpha == 0) and np.all(wide.singular_values == 0)


def test_north_weight_is_orthogonal_with_the_mean_norm():
    samples = make_samples(slots=6, live=4)
    got = north_weight(record(samples), num_neurons=5, key=jax.random.key(0))
    alpha, kernel = np.asarray(got.alpha), samples.weight_prev[:-1, :4]
    np.testing.assert_array_equal(got.singular_values, [1, 1, 1, 0, 0])
    np.testing.assert_allclose(kernel.T @ alpha[:-1], np.zeros((4, 5)), atol=1e-10)
    norms = np.linalg.norm(alpha[:, :3], axis=0)
    np.testing.assert_allclose(norms, np.full(3, np.mean(np.linalg.norm(kernel, axis=0))), rtol=1e-10)
    assert np.all(alpha[-1] == 0)
    first = north_weight(record(make_samples(live=0)), num_neurons=1, key=jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(first.alpha), np.sqrt(2), rtol=1e-12)


# --- random, net2net, completed


@pytest.mark.parametrize(("draw", "variance", "limit"), [(jax.random.normal, 1, 6), (symmetric_uniform, 1 / 3, 1)])
def test_random_draws(draw, variance, limit):
    got = random(record(usual), num_neurons=3000, draw=draw, key=jax.random.key(0))
    for side in (got.alpha, got.omega):
        np.testing.assert_allclose(np.var(side), variance, rtol=0.04)
        assert np.abs(side).max() < limit
    assert abs(np.corrcoef(got.alpha[0], got.omega[:, 0])[0, 1]) < 0.06


def test_net2net_keeps_the_function_and_copies_only_live_neurons():
    samples = make_samples(slots=8, live=3)
    got = net2net(record(samples), num_neurons=5, key=jax.random.key(0))
    after = np.tanh(samples.b_prev @ got.alpha) @ got.omega + samples.b @ (samples.weight + got.delta)
    np.testing.assert_allclose(after, samples.b @ samples.weight, atol=1e-12)
    for k in range(5):
        source = int(np.argmin(np.abs(samples.weight_prev - np.asarray(got.alpha[:, k : k + 1])).sum(axis=0)))
        assert source < 3
        share = np.asarray(got.omega[k]) / samples.weight[source]
        np.testing.assert_allclose(share, np.full(4, share[0]), rtol=1e-10)
        assert 0.05 < share[0] < 0.75
    assert len(np.unique(np.round(np.abs(got.omega[:, 0]), 12))) == 5  # unequal shares
    nothing = net2net(record(make_samples(live=0)), num_neurons=2, key=jax.random.key(0))
    assert np.all(nothing.alpha == 0) and np.all(nothing.singular_values == 0)


def test_net2net_of_a_convolution():
    """Offset by offset: the copy's kernel and what is left of the original's add up to the old kernel."""
    statistics = oracles.conv_record(oracles.make_conv_site())
    got = net2net(statistics, num_neurons=1, key=jax.random.key(2))
    weight = np.asarray(statistics.weight)[:-1].reshape(3, 2, 3)
    left = (weight + np.asarray(got.delta)[:-1].reshape(3, 2, 3)).sum(axis=1)
    copy = np.asarray(got.omega)[0].reshape(3, 3).T  # (offset, output)
    np.testing.assert_allclose(left + copy, weight.sum(axis=1), rtol=1e-12)
    assert np.all(got.delta[-1] == 0)


def test_completed_fills_what_the_method_leaves():
    statistics = record(make_samples(outputs=3))
    key = jax.random.key(0)
    got = completed(lambda s, **kw: tiny(s, ridge=0.0, **kw), random0)(statistics, num_neurons=5, key=key)
    want = tiny(statistics, num_neurons=5, ridge=0.0)
    np.testing.assert_array_equal(got.alpha[:, :3], want.alpha[:, :3])
    np.testing.assert_array_equal(got.singular_values, want.singular_values)
    assert np.all(np.linalg.norm(got.alpha[:, 3:], axis=0) > 0) and np.all(got.omega[3:] == 0)

    def first_only(statistics, neurons):
        return jnp.arange(len(neurons.singular_values)) < 1

    got = completed(lambda s, **kw: tiny(s, ridge=0.0, **kw), random0, useful=first_only)(
        statistics, num_neurons=2, key=key
    )
    assert np.all(got.omega[1] == 0) and np.any(got.omega[0] != 0)
    with pytest.raises(ValueError, match="`fallback` brings an update"):
        completed(tiny, net2net)(statistics, num_neurons=2, key=key)
