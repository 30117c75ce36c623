"""One solver for all closed forms: best rank-k C of 2 <N, C> - tr(S C R C'), and what existing weights can do already.

The oracles are searches on the objective: alternating least squares from random starts, and least squares over the
tangent of the existing weights in turn with a truncation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.oracles import make_samples, record
from tinyjax.core.linalg import root_of
from tinyjax.methods import fisher_tiny, tiny, tiny_unprojected
from tinyjax.methods.solvers.low_rank import best, beyond


def problem(seed, inputs=6, outputs=4, rank=None):
    rng = np.random.default_rng(seed)
    root_s = rng.normal(size=(inputs, rank or inputs))
    root_r = rng.normal(size=(outputs, outputs)) * np.arange(1, outputs + 1)
    gram = root_s @ root_s.T
    return gram, root_r @ root_r.T, gram @ rng.normal(size=(inputs, outputs))  # N in the range of S, as all moments are


def root(matrix):
    return root_of(jnp.asarray(matrix))


def objective(gram, right, cross, product):
    return 2 * np.sum(cross * product) - np.trace(gram @ product @ right @ product.T)


def alternate(gram, right, cross, rank, sweeps=400):
    """The best value over random starts: alpha and omega in turn, each a linear least squares."""
    values = []
    for seed in range(4):
        omega = np.random.default_rng(seed).normal(size=(rank, len(right)))
        alpha = np.zeros((len(gram), rank))
        for _ in range(sweeps):
            alpha = np.linalg.pinv(gram) @ cross @ omega.T @ np.linalg.pinv(omega @ right @ omega.T)
            omega = np.linalg.pinv(alpha.T @ gram @ alpha) @ alpha.T @ cross @ np.linalg.pinv(right)
        values.append(objective(gram, right, cross, alpha @ omega))
    return max(values)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("deficient", [None, 4])
def test_the_solver_reaches_the_maximum_of_alternating_least_squares(rank, deficient):
    gram, right, cross = problem(rank, rank=deficient)
    found = best(root(gram), jnp.asarray(cross), num_neurons=rank, outputs=root(right))
    got = objective(gram, right, cross, np.asarray(found.alpha @ found.omega))
    np.testing.assert_allclose(got, alternate(gram, right, cross, rank), rtol=1e-8)
    np.testing.assert_allclose(got, np.sum(found.singular_values**2), rtol=1e-8)


def test_the_identity_on_the_right_is_the_same_as_none():
    gram, _, cross = problem(5)
    inputs = root(gram)
    plain = best(inputs, jnp.asarray(cross), num_neurons=3)
    given = best(inputs, jnp.asarray(cross), num_neurons=3, outputs=root(np.eye(4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), plain, given)


def test_tiny_and_fisher_tiny_are_the_solver_at_their_grams():
    samples = make_samples(2)
    sums = record(samples, energy_matrix=True)
    b_prev, b, v = samples[:3]
    left = v - b @ np.linalg.lstsq(b, v, rcond=1e-12)[0]
    gram, cross, energy = (m / len(v) for m in (b_prev.T @ b_prev, b_prev.T @ left, v.T @ v))
    plain = best(root(gram), jnp.asarray(cross), num_neurons=2)
    np.testing.assert_allclose(tiny(sums, num_neurons=2, ridge=0.0).alpha, plain.alpha, atol=1e-9)
    right = energy + 1e-2 * np.diag(np.diag(energy))
    fisher = best(root(gram), jnp.asarray(cross), num_neurons=2, outputs=root(right))
    got = fisher_tiny(sums, num_neurons=2, ridge=0.0)
    np.testing.assert_allclose(got.alpha @ got.omega, fisher.alpha @ fisher.omega, atol=1e-9)
    assert not np.allclose(got.omega, tiny(sums, num_neurons=2, ridge=0.0).omega)
    unprojected = best(root(gram), jnp.asarray(b_prev.T @ v / len(v)), num_neurons=2)
    np.testing.assert_allclose(tiny_unprojected(sums, num_neurons=2, ridge=0.0).omega, unprojected.omega, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_two_sided_projection_is_the_optimum_over_old_and_new_together(rank):
    """max over C of rank k, U and U' of J(U O + W U' + C): least squares over U and U' given C, and C given those."""
    rng = np.random.default_rng(7 + rank)
    gram, right, cross = problem(11)
    weight, out = rng.normal(size=(6, 2)), rng.normal(size=(2, 4))
    root_s, root_r = (np.linalg.cholesky(m) for m in (gram, right))
    goal = np.linalg.solve(root_s, cross) @ np.linalg.inv(root_r).T  # J = |goal|^2 - |goal - root_s' X root_r|^2
    inside, outside = root_s.T @ weight, out @ root_r
    design = np.concatenate([np.kron(inside, np.eye(4)), np.kron(np.eye(6), outside.T)], axis=1)
    onto = design @ np.linalg.pinv(design, rcond=1e-12)
    product = np.zeros_like(goal)
    for _ in range(600):
        rest = (goal - product).ravel()
        moved = (onto @ rest).reshape(goal.shape)
        u, s, vt = np.linalg.svd(goal - moved)
        product = u[:, :rank] * s[:rank] @ vt[:rank]
    together = np.sum(goal**2) - np.sum((goal - moved - product) ** 2)
    alone = np.sum((onto @ goal.ravel()) ** 2)

    gram, right, cross, weight, out = (jnp.asarray(x) for x in (gram, right, cross, weight, out))
    left = beyond(beyond(cross, gram, weight).T, right, out.T).T
    found = best(root(gram), left, num_neurons=rank, outputs=root(right))
    np.testing.assert_allclose(alone + np.sum(found.singular_values**2), together, rtol=1e-6)
    # The new part is orthogonal to all that the old ones can do, so it descends by itself.
    np.testing.assert_allclose(np.sum(cross * (found.alpha @ found.omega)), np.sum(found.singular_values**2), rtol=1e-9)


def test_projecting_empty_slots_or_at_full_width():
    gram, _, cross = (jnp.asarray(x) for x in problem(3))
    np.testing.assert_allclose(beyond(cross, gram, jnp.zeros((6, 5))), cross)
    np.testing.assert_allclose(beyond(cross, gram, jnp.eye(6)), 0, atol=1e-9)


def test_single_precision_and_misuse():
    gram, right, cross = (jnp.asarray(x, jnp.float32) for x in problem(1))
    found = best(root(gram), cross, num_neurons=2, outputs=root(right))
    assert found.alpha.dtype == jnp.float32
    exact = best(root(problem(1)[0]), jnp.asarray(problem(1)[2]), num_neurons=2, outputs=root(problem(1)[1]))
    np.testing.assert_allclose(found.singular_values, exact.singular_values, rtol=1e-3)
    with pytest.raises(ValueError, match="num_neurons"):
        best(root(gram), cross, num_neurons=0)
