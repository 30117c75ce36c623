"""The paper's propositions at the level of arrays, against raw samples (float64, 1e-10)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tests.support import oracles
from tests.support.compiled import compiled
from tests.support.oracles import make_samples, record
from tinyjax.methods import best_update, bottleneck, predicted_gain, residual_cross, tiny
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics

CASES = {
    "usual": make_samples(0),
    "free slots": make_samples(1, slots=8, live=3),
    "no slot used": make_samples(2, slots=4, live=0),
    "fewer samples than inputs": make_samples(3, n=6, inputs=9, slots=2, live=2),
    "fewer samples than neurons": make_samples(4, n=6, inputs=9, slots=12, live=12, outputs=3),
    "many outputs": make_samples(5, outputs=12),
}
exact_tiny = jax.jit(lambda s: tiny(s, num_neurons=3, ridge=0.0))
best_update, bottleneck, predicted_gain = jax.jit(best_update), jax.jit(bottleneck), jax.jit(predicted_gain)


@pytest.fixture(params=CASES)
def samples(request):
    return CASES[request.param]


def test_proposition_3_1(samples):
    """dW* is the least squares solution of smallest norm."""
    np.testing.assert_allclose(best_update(record(samples)), oracles.least_squares(samples.b, samples.v), atol=1e-10)


def test_definition_3_1(samples):
    got = bottleneck(record(samples))
    np.testing.assert_allclose(got.before, oracles.psi(samples.v), rtol=1e-12)
    np.testing.assert_allclose(got.after, np.sum(oracles.residual(samples) ** 2) / len(samples.v), atol=1e-10)


def test_proposition_3_2(samples):
    """The neurons' move is the best of rank K in the span of the producer's input (Eckart-Young)."""
    neurons = exact_tiny(record(samples))
    want, singular = oracles.eckart_young(samples.b_prev, oracles.residual(samples), 3)
    np.testing.assert_allclose(samples.b_prev @ neurons.alpha @ neurons.omega, want, atol=1e-9)
    np.testing.assert_allclose(neurons.singular_values, singular[:3], atol=1e-10)
    # lambda is shared evenly between the two sides: |alpha' b| = |omega| = sqrt(lambda)
    moves = np.linalg.norm(samples.b_prev @ neurons.alpha, axis=0) / np.sqrt(len(samples.v))
    np.testing.assert_allclose(moves, np.linalg.norm(neurons.omega, axis=1), atol=1e-10)


def test_the_fan_in_has_the_smallest_norm():
    """alpha lies in the range of S, as S^(-1/2) with the convention of the pseudo-inverse makes it."""
    samples = CASES["fewer samples than inputs"]
    alpha = np.asarray(exact_tiny(record(samples)).alpha)
    projected = np.linalg.lstsq(samples.b_prev, samples.b_prev @ alpha, rcond=1e-12)[0]
    np.testing.assert_allclose(alpha, projected, atol=1e-10)


def test_equation_9(samples):
    """Psi after the first k neurons is psi minus the sum of the first k lambda^2, for every k."""
    got = bottleneck(record(samples))
    left = oracles.residual(samples)
    neurons = exact_tiny(record(samples))
    for k in range(4):
        move = samples.b_prev @ neurons.alpha[:, :k] @ neurons.omega[:k]
        np.testing.assert_allclose(oracles.psi(left, move), got.after - np.sum(got.gains[:k]), atol=1e-10)


def test_no_other_neurons_do_better():
    """Random neurons, each with the best fan-out, never gain more than the first lambda^2."""
    samples = CASES["usual"]
    rng = np.random.default_rng(0)
    left = oracles.residual(samples)
    best = float(bottleneck(record(samples)).gains[0])
    for _ in range(300):
        feature = samples.b_prev @ rng.normal(size=(samples.b_prev.shape[1], 1))
        gain = oracles.psi(left) - oracles.psi(left, feature @ oracles.least_squares(feature, left))
        assert gain <= best + 1e-12


def test_moves_of_the_new_neurons_are_orthogonal(samples):
    """To each other, for the trace scalar product (the remark after corollary 1)."""
    neurons = exact_tiny(record(samples))
    moves = [np.outer(samples.b_prev @ neurons.alpha[:, k], neurons.omega[k]).ravel() for k in range(3)]
    products = np.array([[a @ b for a in moves] for b in moves])
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-8)


def test_proposition_3_4():
    """N N' alpha = lambda S alpha with omega = N' alpha, by a generalised eigensolver; lambda there is ours squared."""
    samples = CASES["usual"]
    s = samples.b_prev.T @ samples.b_prev / len(samples.v)
    n = samples.b_prev.T @ oracles.residual(samples) / len(samples.v)
    values, vectors = scipy.linalg.eigh(n @ n.T, s)
    neurons = exact_tiny(record(samples))
    np.testing.assert_allclose(neurons.singular_values**2, values[::-1][:3], atol=1e-10)
    for k in range(3):
        alpha, expected = np.asarray(neurons.alpha[:, k]), vectors[:, -1 - k]
        cosine = alpha @ expected / np.linalg.norm(alpha) / np.linalg.norm(expected)
        np.testing.assert_allclose(abs(cosine), 1, atol=1e-10)
        np.testing.assert_allclose(neurons.omega[k], n.T @ alpha / neurons.singular_values[k], atol=1e-10)


def test_corollary_1():
    """At order one in V, adding 3 neurons is adding 1, then 2: the goal shrinks by the move of the first."""
    samples = CASES["usual"]
    together = exact_tiny(record(samples))
    left = oracles.residual(samples)
    first = record(samples._replace(v=left))
    move = samples.b_prev @ together.alpha[:, :1] @ together.omega[:1]
    # the old neurons do not move again: b is emptied, so that the residual is the goal itself
    rest = samples._replace(v=left - move, b=np.zeros_like(samples.b))
    then = compiled(tiny, num_neurons=2, ridge=0.0)(record(rest))
    one = compiled(tiny, num_neurons=1, ridge=0.0)(first)
    np.testing.assert_allclose(one.alpha, together.alpha[:, :1], atol=1e-9)
    np.testing.assert_allclose(then.alpha @ then.omega, together.alpha[:, 1:] @ together.omega[1:], atol=1e-9)


def test_predicted_gain_is_the_decrease_of_psi(samples):
    statistics = record(samples)
    neurons, delta = exact_tiny(statistics), best_update(statistics)
    want = oracles.psi(samples.v, samples.b @ delta) - oracles.psi(
        samples.v, samples.b @ delta, samples.b_prev @ neurons.alpha @ neurons.omega
    )
    np.testing.assert_allclose(predicted_gain(moments(statistics), neurons, delta), want, atol=1e-10)


def test_first_order_decrease_has_a_cross_term():
    """<V_goal, V(theta)> / n = sum lambda^2 + <V(dW*), V(theta)> / n: what equations 10 and 11 leave out."""
    samples = CASES["usual"]
    neurons, update = exact_tiny(record(samples)), samples.b @ oracles.least_squares(samples.b, samples.v)
    move = samples.b_prev @ neurons.alpha @ neurons.omega
    n = len(samples.v)
    want = np.sum(neurons.singular_values**2) + np.sum(update * move) / n
    np.testing.assert_allclose(np.sum(samples.v * move) / n, want, atol=1e-10)
    assert abs(np.sum(update * move)) / n > 1e-3  # the term is not small here


def test_convolution_residual_and_update():
    """N by the residual of every output pixel equals N~ - P dW, offset by offset."""
    site = oracles.make_conv_site()
    statistics = oracles.conv_record(site)
    delta = np.asarray(best_update(statistics))
    kernel = delta[:-1].reshape(3, site.hidden.shape[2], -1)
    left = site.v - oracles.conv_move(site.hidden, kernel) - delta[-1]
    np.testing.assert_allclose(bottleneck(statistics).after, np.sum(left**2) / len(left), atol=1e-10)
    np.testing.assert_allclose(
        residual_cross(moments(statistics), jnp.asarray(delta)),
        moments(oracles.conv_record(site._replace(v=left))).cross_prev,
        atol=1e-10,
    )


@pytest.mark.parametrize("seed", range(5))
def test_equation_9_is_an_inequality_for_convolutions(seed):
    site = oracles.make_conv_site(seed)
    statistics = oracles.conv_record(site)
    delta = np.asarray(best_update(statistics))
    left = site.v - oracles.conv_move(site.hidden, delta[:-1].reshape(3, site.hidden.shape[2], -1)) - delta[-1]
    neurons = exact_tiny(statistics)
    kernel = np.asarray(neurons.omega).reshape(3, -1, 3).transpose(2, 0, 1)  # (offset, neuron, output)
    move = oracles.conv_move(site.patches @ np.asarray(neurons.alpha), kernel)
    decrease = (np.sum(left**2) - np.sum((left - move) ** 2)) / len(left)
    assert decrease >= np.sum(neurons.singular_values**2) - 1e-12
    assert np.sum(neurons.singular_values**2) > 0


def test_scaling_the_loss_scales_the_goal_and_nothing_else():
    """Law 4: V_goal times c gives lambda times c, and the same neurons up to the shared factor sqrt(c)."""
    samples = CASES["usual"]
    for dtype, tolerance in [(jnp.float64, 1e-10), (jnp.float32, 2e-4)]:
        want = exact_tiny(record(samples, dtype))
        for c in (1e-3, 1e3):
            got = exact_tiny(record(samples._replace(v=samples.v * c), dtype))
            np.testing.assert_allclose(got.singular_values / c, want.singular_values, rtol=tolerance)
            np.testing.assert_allclose(got.alpha / c**0.5, want.alpha, atol=tolerance)
            np.testing.assert_allclose(got.omega / c**0.5, want.omega, atol=tolerance)


def test_scaling_the_inputs_leaves_the_function():
    """Law 4: the constant keeps its unit while the inputs change theirs."""
    samples = CASES["usual"]
    for ridge in (0.0, 0.1):
        for dtype, tolerance in [(jnp.float64, 1e-9), (jnp.float32, 1e-3)]:
            solve = jax.jit(lambda s, ridge=ridge: tiny(s, num_neurons=3, ridge=ridge))
            want = samples.b_prev @ solve(record(samples, dtype)).alpha
            for c in (1e-3, 1e2):
                unit = np.append(np.full(samples.b_prev.shape[1] - 1, c), 1.0)
                scaled = samples._replace(b_prev=samples.b_prev * unit)
                got = scaled.b_prev @ solve(record(scaled, dtype)).alpha
                np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_mixing_the_inputs_leaves_the_move_at_ridge_0():
    samples = CASES["usual"]
    mix = np.random.default_rng(0).normal(size=(8, 8))
    mixed = samples._replace(b_prev=samples.b_prev @ mix, b=samples.b @ np.random.default_rng(1).normal(size=(6, 6)))
    moves = [s.b_prev @ t.alpha @ t.omega for s in (samples, mixed) for t in [exact_tiny(record(s))]]
    np.testing.assert_allclose(*moves, atol=1e-9)


def test_splitting_the_batch_changes_nothing():
    samples = CASES["usual"]
    statistics = record(samples)
    swapped = jax.tree.map(lambda x: x[::-1] if x.ndim and x.shape[0] == 2 else x, statistics)
    assert isinstance(swapped, Statistics)
    np.testing.assert_allclose(exact_tiny(statistics).alpha, exact_tiny(swapped).alpha, atol=1e-10)
