"""A whole new head, against NumPy loops, gradient searches and differences of the loss. Float64."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tinyjax import methods
from tinyjax.methods.solvers.attention_heads import held_out_value_gain

SAMPLES, TOKENS, FEATURES, OUTPUTS, WIDTH, VALUES = 60, 5, 4, 3, 2, 2
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))


def attend(scores):
    return jax.nn.softmax(jnp.where(CAUSAL, scores / 2**0.5, -jnp.inf))


def problem(seed):
    """Tokens whose target is another head's output: causal, with a pattern worth finding."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SAMPLES, TOKENS, FEATURES))
    x1 = np.concatenate([x, np.ones((SAMPLES, TOKENS, 1))], axis=-1)
    teacher = weights_by_loops(x1 @ rng.normal(size=(5, 2)), x @ rng.normal(size=(4, 2)))
    target = teacher @ x1 @ rng.normal(size=(5, 2)) @ rng.normal(size=(2, OUTPUTS))
    residual = target + 0.3 * rng.normal(size=(SAMPLES, TOKENS, OUTPUTS))
    return methods.Tokens(*(jnp.asarray(a) for a in (x1, x, x1, residual)))


def weights_by_loops(q, k):
    weights = np.zeros((SAMPLES, TOKENS, TOKENS))
    for n in range(SAMPLES):
        for t in range(TOKENS):
            exp = [np.exp(q[n, t] @ k[n, s] / 2**0.5) for s in range(t + 1)]
            weights[n, t, : t + 1] = np.array(exp) / sum(exp)
    return weights


@functools.cache
def found(seed):
    return jax.jit(functools.partial(methods.find_heads, attend, num_heads=1, width=WIDTH, value_width=VALUES))(
        problem(seed)
    )


def read_by(tokens, query, key):
    weights = weights_by_loops(np.asarray(tokens.queries @ query), np.asarray(tokens.keys @ key))
    return weights @ np.asarray(tokens.values)


def uniform(tokens):
    return np.einsum("ts,nsf->ntf", CAUSAL / CAUSAL.sum(1, keepdims=True), np.asarray(tokens.values))


def gain_of(read, tokens):
    """sum of the first lambda^2, by a QR of the rows instead of a Gram."""
    rows = read.reshape(-1, read.shape[-1]) / SAMPLES**0.5
    goal = np.asarray(tokens.residual).reshape(-1, OUTPUTS) / SAMPLES**0.5
    return np.sum(np.linalg.svd(np.linalg.qr(rows)[0].T @ goal, compute_uv=False)[:VALUES] ** 2)


@pytest.mark.parametrize("pattern", ["uniform", "found"])
def test_values_of_a_given_pattern_are_the_optimum_and_the_slope_of_the_loss_is_theirs(pattern):
    tokens = problem(0)
    read = uniform(tokens) if pattern == "uniform" else read_by(tokens, found(0).query[0], found(0).key[0])
    neurons = methods.value_neurons(jnp.asarray(read), tokens.residual, VALUES)
    np.testing.assert_allclose(np.sum(neurons.singular_values**2), gain_of(read, tokens), rtol=1e-9)

    def loss(parts):
        move = read @ parts[0] @ parts[1]
        return jnp.sum((tokens.residual - move) ** 2) / SAMPLES

    start = [0.3 * jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(1)), [(5, 2), (2, 3)])]
    flat, restore = jax.flatten_util.ravel_pytree(start)
    climbed = scipy.optimize.minimize(
        jax.jit(jax.value_and_grad(lambda z: loss(restore(z)))), flat, jac=True, method="BFGS"
    )
    gain = loss([jnp.zeros((5, 2)), jnp.zeros((2, 3))]) - climbed.fun
    np.testing.assert_allclose(np.sum(neurons.singular_values**2), gain, rtol=1e-7)
    # d loss / d gamma at gamma = 0 of values and outputs that both grow with its root; V_goal is 2 x the residual
    step = 1e-6
    at = [float(loss([g**0.5 * neurons.alpha, g**0.5 * neurons.omega])) for g in (0, step, 2 * step)]
    slope = (-3 * at[0] + 4 * at[1] - at[2]) / (2 * step)
    np.testing.assert_allclose(slope, -2 * np.sum(neurons.singular_values**2), rtol=1e-5)


@functools.cache
def ascended(seed):
    """The best gain of any pattern, by ascent from several starts with values refitted."""
    tokens = problem(seed)

    def value(flat):
        query, key = flat[:10].reshape(5, 2), flat[10:].reshape(4, 2)
        read = attend(jnp.einsum("ntk,nsk->nts", tokens.queries @ query, tokens.keys @ key)) @ tokens.values
        rows, goal = read.reshape(-1, 5), tokens.residual.reshape(-1, OUTPUTS)
        inner = goal.T @ rows @ jnp.linalg.solve(rows.T @ rows, rows.T @ goal) / SAMPLES
        return -jnp.sum(jnp.linalg.eigvalsh(inner)[-VALUES:])

    both = jax.jit(jax.value_and_grad(value))
    starts = np.random.default_rng(0).normal(size=(5, 18))
    return -min(scipy.optimize.minimize(both, s, jac=True, method="BFGS").fun for s in starts)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_rule_gains_more_than_uniform_attention_and_much_of_what_ascent_finds(seed):
    tokens, (query, key) = problem(seed), found(seed)
    read, flat = read_by(tokens, query[0], key[0]), uniform(tokens)
    scores = [
        max(float(held_out_value_gain(jnp.asarray(r), tokens.residual, VALUES, VALUES, ridge)) for ridge in (1e-3, 0.1))
        for r in (read, flat)
    ]
    assert scores[0] >= scores[1]
    gain, without = gain_of(read, tokens), gain_of(flat, tokens)
    rng = np.random.default_rng(seed)
    drawn = np.mean([gain_of(read_by(tokens, rng.normal(size=(5, 2)), rng.normal(size=(4, 2))), tokens)
                     for _ in range(20)])  # fmt: skip
    assert gain > max(without, drawn)
    assert gain - without > 0.5 * (ascended(seed) - without)


def test_the_score_of_a_pattern_is_what_one_half_of_the_samples_gains_on_the_other():
    tokens = problem(3)
    read, goal = uniform(tokens), np.asarray(tokens.residual)
    total = 0.0
    for i in (0, 1):
        rows, other = read[i::2].reshape(-1, 5), read[1 - i :: 2].reshape(-1, 5)
        asked = goal[i::2].reshape(-1, OUTPUTS)
        q, r = np.linalg.qr(rows)
        u, s, vt = np.linalg.svd(q.T @ asked)
        move = np.linalg.solve(r, u[:, :VALUES] * s[:VALUES]) @ vt[:VALUES]
        left = goal[1 - i :: 2].reshape(-1, OUTPUTS)
        total += (np.sum(left**2) - np.sum((left - other @ move) ** 2)) / (SAMPLES / 2) / 2
    np.testing.assert_allclose(
        held_out_value_gain(jnp.asarray(read), tokens.residual, VALUES, VALUES, 0.0), total, rtol=1e-9
    )


def test_a_choice_does_not_depend_on_the_unit_of_the_loss_or_of_the_tokens():
    tokens, (query, key) = problem(0), found(0)
    scaled = tokens._replace(residual=1e3 * tokens.residual, keys=10 * tokens.keys)
    other = jax.jit(functools.partial(methods.find_heads, attend, num_heads=1, width=WIDTH, value_width=VALUES))(scaled)
    np.testing.assert_allclose(other.query[0] @ other.key[0].T * 10, query[0] @ key[0].T, rtol=1e-6, atol=1e-8)


def test_second_heads_take_what_the_first_leave_and_unused_dimensions_stay_zero():
    tokens = problem(1)
    query, key = methods.find_heads(attend, tokens, num_heads=2, width=3, value_width=VALUES, used=1)
    assert np.any(query[:, :, 0] != 0) and np.any(key[:, :, 0] != 0)
    assert np.all(query[:, :, 1:] == 0) and np.all(key[:, :, 1:] == 0)
    first = read_by(tokens, query[0], key[0])
    neurons = methods.value_neurons(jnp.asarray(first), tokens.residual, VALUES, used=1)
    assert np.all(neurons.alpha[:, 1] == 0) and np.all(neurons.omega[1] == 0) and neurons.singular_values[1] == 0
    assert not np.allclose(query[0] @ key[0].T, query[1] @ key[1].T)


def test_where_uniform_attention_is_the_best_query_and_key_are_no_saddle():
    """The target is the mean of the tokens so far: no other pattern gains more."""
    tokens = problem(2)
    tokens = tokens._replace(residual=jnp.asarray(uniform(tokens)[..., :3]))
    query, key = methods.find_heads(attend, tokens, num_heads=1, width=WIDTH, value_width=3)
    assert np.all(key == 0) and np.any(query != 0)


def test_single_precision_and_misuse():
    tokens = jax.tree.map(lambda x: x.astype(jnp.float32), problem(0))
    query, key = methods.find_heads(attend, tokens, num_heads=1, width=WIDTH, value_width=VALUES)
    assert query.dtype == jnp.float32
    np.testing.assert_allclose(query[0] @ key[0].T, found(0).query[0] @ found(0).key[0].T, rtol=2e-2, atol=1e-3)
    for heads, width, values in ((0, 2, 2), (1, 0, 2), (1, 2, 0)):
        with pytest.raises(ValueError, match="must be an int >= 1"):
            methods.find_heads(attend, tokens, num_heads=heads, width=width, value_width=values)
