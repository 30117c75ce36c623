"""The search for gates of new gated units, against quasi-Newton ascents from many starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

from tinyjax.methods import find_gates
from tinyjax.methods.solvers.gated_units import Problem, best_unit, climb


def swish(x):
    return x * expit(x)


def search_problem(seed, n=200, d=4, outputs=2):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), np.ones((n, 1))], axis=1)
    teacher = swish(x @ rng.normal(size=d + 1))[:, None] * (x @ rng.normal(size=(d + 1, 1)))
    goal = teacher @ rng.normal(size=(1, outputs)) + 0.5 * rng.normal(size=(n, outputs))
    return x, goal - goal.mean(0)


@jax.jit
def find_one(x, goal, odd, key):
    return find_gates(jax.nn.silu, x, x, goal, odd, num_gates=1, key=key)[:, 0]


def unit_gain(x, goal, gate):
    """What the best unit behind a gate gains, by QR and SVD."""
    basis = np.linalg.qr(swish(x @ gate)[:, None] * x)[0]
    return np.linalg.svd(basis.T @ goal)[1][0] ** 2 / len(x)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gate_found_is_as_good_as_many_quasi_newton_ascents(seed):
    x, goal = search_problem(seed)
    starts = np.random.default_rng(9).normal(size=(8, x.shape[1]))
    runs = [scipy.optimize.minimize(lambda b: -unit_gain(x, goal, b), start, method="L-BFGS-B") for start in starts]
    best = max(-run.fun for run in runs)
    odd = np.arange(len(x))[:, None] % 2 == 1
    found = unit_gain(x, goal, np.asarray(find_one(x, goal, odd, jax.random.key(seed))))
    assert found > 0.95 * best, (found, best)  # .962 to .999 over six seeds, with gates ten to a hundred times smaller
    drawn = np.mean([unit_gain(x, goal, start) for start in starts])
    assert found > 1.2 * drawn


def test_the_ascent_ends_where_quasi_newton_does():
    x, goal = search_problem(4)
    problem = Problem(jnp.asarray(x), jnp.asarray(x), jnp.asarray(goal))
    start = jnp.asarray(np.random.default_rng(0).normal(size=x.shape[1]))
    gate = jax.jit(lambda g: climb(jax.nn.silu, problem, g, jnp.asarray(0.0), steps=150))(start)
    run = scipy.optimize.minimize(lambda b: -unit_gain(x, goal, b), np.asarray(start), method="L-BFGS-B")
    assert unit_gain(x, goal, np.asarray(gate)) > 0.99 * -run.fun > 1.02 * unit_gain(x, goal, np.asarray(start))
    unit = jax.jit(lambda g: best_unit(jax.nn.silu, problem, g, jnp.asarray(0.0)))(gate)
    np.testing.assert_allclose(unit.gain, unit_gain(x, goal, np.asarray(gate)), rtol=1e-8)
