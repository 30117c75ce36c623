"""Closed forms for the dimensions of an attention head, against a head written in NumPy loops and against searches.

The head is softmax(x Wq Wk' x' + mask) x Wv Wo; its loss is a quadratic of the output and a cross term. Nothing here
shares code with the product: moments are sums over tokens one by one, slopes are differences of the loss.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tests.support.compiled import compiled
from tinyjax.methods import query_key, query_key_gain, query_key_moments, query_key_scales

SAMPLES, TOKENS, FEATURES, WIDTH = 40, 5, 4, 2
ZERO = np.zeros(())


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


class Head:
    """One causal head with a random target; `loss` takes what is added to the logits."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(SAMPLES, TOKENS, FEATURES)) @ rng.normal(size=(FEATURES, FEATURES))
        self.x1 = np.concatenate([self.x, np.ones((SAMPLES, TOKENS, 1))], axis=-1)
        self.mask = np.tril(np.ones((TOKENS, TOKENS), bool))
        self.w_query = rng.normal(size=(FEATURES + 1, WIDTH)) / 4  # bias row last
        self.w_key = rng.normal(size=(FEATURES, WIDTH)) / 4
        self.w_value = rng.normal(size=(FEATURES, 3))
        self.logits = self.x1 @ self.w_query @ (self.x @ self.w_key).transpose(0, 2, 1)
        teacher = softmax(
            np.where(self.mask, self.x @ rng.normal(size=(FEATURES, FEATURES)) @ self.x.transpose(0, 2, 1), -1e9)
        )
        self.target = teacher @ self.x @ self.w_value + 0.1 * rng.normal(size=(SAMPLES, TOKENS, 3))

    def attention(self, added=ZERO):
        return softmax(np.where(self.mask, self.logits + added, -1e9))

    def loss(self, added=ZERO):
        return np.sum((self.attention(added) @ self.x @ self.w_value - self.target) ** 2) / SAMPLES

    def goal(self):
        """-n dloss/dlogits, by the derivative of the softmax written out."""
        probability, value = self.attention(), self.x @ self.w_value
        per_key = np.einsum("nto,nso->nts", 2 * (probability @ value - self.target), value)
        return -probability * (per_key - np.sum(probability * per_key, axis=-1, keepdims=True))

    def moments(self):
        return compiled(query_key_moments)(*(jnp.asarray(a) for a in (self.x1, self.x, self.attention(), self.goal())))


def test_query_key_moments_are_sums_over_pairs_of_tokens():
    head = Head(0)
    probability, goal = head.attention(), head.goal()
    gram_query, gram_key, cross = np.zeros((5, 5)), np.zeros((4, 4)), np.zeros((5, 4))
    for n in range(SAMPLES):
        for t in range(TOKENS):
            gram_query += np.outer(head.x1[n, t], head.x1[n, t]) / SAMPLES
            mean = probability[n, t] @ head.x[n]
            for s in range(TOKENS):
                away = head.x[n, s] - mean
                gram_key += probability[n, t, s] * np.outer(away, away) / (SAMPLES * TOKENS)
                cross += goal[n, t, s] * np.outer(head.x1[n, t], head.x[n, s]) / SAMPLES
    found = head.moments()
    np.testing.assert_allclose(found.gram_query, gram_query, rtol=1e-10)
    np.testing.assert_allclose(found.gram_key, gram_key, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.cross, cross, rtol=1e-9, atol=1e-12)


def test_what_a_softmax_does_not_see():
    """A bias of the new key adds the same to all logits of a query, and masked pairs ask for nothing."""
    head = Head(1)
    goal = head.goal()
    np.testing.assert_allclose(np.sum(goal, axis=-1), 0, atol=1e-12)
    assert np.all(goal[:, ~head.mask] == 0)
    np.testing.assert_allclose(np.einsum("nti,nts->i", head.x1, goal), 0, atol=1e-11)


@pytest.mark.parametrize("seed", [0, 1])
def test_query_key_slope_of_the_loss_is_the_prediction(seed):
    head = Head(seed)
    moments = head.moments()
    weights = dict(weight_query=jnp.asarray(head.w_query), weight_key=jnp.asarray(head.w_key))
    pair = compiled(query_key, num_neurons=1)(moments, **weights)
    added = head.x1 @ np.asarray(pair.alpha @ pair.omega) @ head.x.transpose(0, 2, 1)
    step = 1e-5
    slope = (head.loss(step * added) - head.loss(-step * added)) / (2 * step)
    np.testing.assert_allclose(slope, -np.sum(pair.singular_values**2), rtol=1e-5)
    np.testing.assert_allclose(slope, -np.sum(moments.cross * (pair.alpha @ pair.omega)), rtol=1e-5)


def test_query_key_pairs_are_the_optimum_of_their_objective():
    """Gradient ascent over the old and the new projections together, from several starts."""
    head = Head(2)
    moments = head.moments()
    s, r, n = moments.gram_query, moments.gram_key, moments.cross
    w_query, w_key = jnp.asarray(head.w_query), jnp.asarray(head.w_key)

    def gain(free):
        move = free[0] @ w_key.T + w_query @ free[1] + free[2] @ free[3]
        return 2 * jnp.sum(n * move) - jnp.sum((s @ move) * (move @ r))

    def ascend(key, parts):
        keys = jax.random.split(key, 4)
        shapes = [(5, WIDTH), (WIDTH, 4), (5, 1), (1, 4)]
        scale = jnp.linalg.norm(n) ** 0.5 / jnp.trace(s)
        start = tuple(scale * jax.random.normal(k, shape) * on for k, shape, on in zip(keys, shapes, parts))
        found = _climb(lambda free: -gain(tuple(x * on for x, on in zip(free, parts))), start)
        return -found

    old = max(ascend(jax.random.key(i), (1, 1, 0, 0)) for i in range(2))
    both = max(ascend(jax.random.key(i), (1, 1, 1, 1)) for i in range(4))
    pair = compiled(query_key, num_neurons=1)(moments, weight_query=w_query, weight_key=w_key)
    np.testing.assert_allclose(old + pair.singular_values[0] ** 2, both, rtol=1e-4)


def _climb(loss, start):
    """The minimum reached by BFGS."""
    flat, restore = jax.flatten_util.ravel_pytree(start)
    value = jax.jit(jax.value_and_grad(lambda x: loss(restore(x))))
    return scipy.optimize.minimize(value, flat, jac=True, method="BFGS", options={"maxiter": 2000, "gtol": 1e-12}).fun


def test_query_key_beats_random_pairs_on_the_loss_itself():
    head = Head(3)

    def decrease(product):
        added = head.x1 @ product @ head.x.transpose(0, 2, 1)
        unit = 1 / np.sqrt(np.mean(added**2))
        return head.loss() - min(head.loss(a * unit * added) for a in np.geomspace(1e-3, 10, 30))

    pair = compiled(query_key, num_neurons=1)(head.moments())
    ours = decrease(np.asarray(pair.alpha @ pair.omega))
    rng = np.random.default_rng(0)
    random = [decrease(np.outer(rng.normal(size=5), rng.normal(size=4))) for _ in range(20)]
    assert ours > np.mean(random) * 2


def test_query_key_gain_is_the_exact_cost_summed_over_pairs():
    head = Head(4)
    pair = compiled(query_key, num_neurons=2)(head.moments())
    added = head.x1 @ np.asarray(pair.alpha @ pair.omega) @ head.x.transpose(0, 2, 1)
    probability, cost = head.attention(), 0.0
    for n in range(SAMPLES):
        for t in range(TOKENS):
            mean = probability[n, t] @ added[n, t]
            cost += probability[n, t] @ (added[n, t] - mean) ** 2 / SAMPLES
    want = (np.sum(head.goal() * added) / SAMPLES) ** 2 / cost
    x1, x, probability, goal = (jnp.asarray(a) for a in (head.x1, head.x, probability, head.goal()))
    np.testing.assert_allclose(compiled(query_key_gain)(x1, x, probability, goal, pair), want, rtol=1e-9)


def test_scales_keep_the_logits_of_a_model_that_divides_by_the_root_of_its_width():
    head = Head(5)
    pair = compiled(query_key, num_neurons=2)(head.moments())
    before = head.x1 @ head.w_query @ (head.x @ head.w_key).transpose(0, 2, 1) / np.sqrt(WIDTH)
    new, old = query_key_scales(WIDTH, 2)
    w_query = np.concatenate([old * head.w_query, new * np.asarray(pair.alpha)], axis=1)
    w_key = np.concatenate([head.w_key, new * np.asarray(pair.omega).T], axis=1)
    after = head.x1 @ w_query @ (head.x @ w_key).transpose(0, 2, 1) / np.sqrt(WIDTH + 2)
    added = head.x1 @ np.asarray(pair.alpha @ pair.omega) @ head.x.transpose(0, 2, 1)
    np.testing.assert_allclose(after, before + added, atol=1e-12)


def test_query_key_misuse_and_single_precision():
    head = Head(6)
    with pytest.raises(ValueError, match="width"):
        query_key_scales(0, 2)
    with pytest.raises(ValueError, match="num_neurons"):
        query_key(head.moments(), num_neurons=0)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), head.moments())
    exact, got = (compiled(query_key, num_neurons=2)(m) for m in (head.moments(), single))
    assert got.alpha.dtype == jnp.float32
    np.testing.assert_allclose(got.alpha @ got.omega, exact.alpha @ exact.omega, rtol=1e-3, atol=1e-5)
    full = compiled(query_key, num_neurons=1)(head.moments(), weight_query=jnp.eye(5))
    assert np.all(full.alpha == 0), "nothing is new when the old projection reaches everything"
