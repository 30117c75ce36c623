"""A whole new attention head: its pattern by a rule, its value and output projections in closed form.

For a given pattern A (which token attends to which) a head is TINY with the input A x: values and outputs are exact.
Which pattern is best is no closed form. The rule starts from a uniform one; query and key then move in the direction of
`query_key` (what the head, as it is, is asked for at its scores, in the metric of the softmax) by that of a few finite
sizes whose refitted values gain the most on samples they were not fitted to; and so on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul, root_of, top_singular
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.query_key import query_key, query_key_moments
from tinyjax.methods.solvers.traits import require_count

Attend = Callable[[Array], Array]
"""From scores (n, T, U) to the weights of the attention, 0 where masked."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
SIZES = (0.1, 0.3, 1.0, 3.0)
"""Standard deviations of the logits under the attention: from one that hardly sees a step to one that it turns over."""

ROUNDS = 3
SHRINKAGE = 1e-2
"""Ridge of both Grams of a direction, on their correlation scale."""


class Tokens(NamedTuple):
    """What a new head may read and is asked for; samples first.

    Attributes:
        queries: (n, T, D) what the query projection reads, the constant last iff it has a bias.
        keys: (n, U, E) what the key projection reads, without a constant: a softmax does not see a bias of the keys.
        values: (n, U, F) what the value projection reads, the constant last iff it has a bias.
        residual: (n, T, M) V_goal at the output projection, less what its best update does.
    """

    queries: Array
    keys: Array
    values: Array
    residual: Array


class Projections(NamedTuple):
    """Queries and keys of new heads, in units of the scores that `Attend` takes.

    Attributes:
        query: (heads, D, k).
        key: (heads, E, k).
    """

    query: Array
    key: Array


class _Head(NamedTuple):
    query: Array
    key: Array
    gain: Array


def find_heads(
    attend: Attend,
    tokens: Tokens,
    *,
    num_heads: int,
    width: int,
    value_width: int,
    used: Array | int | None = None,
    used_values: Array | int | None = None,
    ridges: tuple[float, ...] = RIDGES,
    rounds: int = ROUNDS,
) -> Projections:
    """Queries and keys of `num_heads` new heads, one after the other, each in what those before it leave.

    A head's held-out gain is never below that of uniform attention. Where uniform attention stays the best the query
    takes the direction found and the key is zero: query and key both zero would be a saddle they never leave.

    Args:
        attend: the model's own way from scores to weights (scale, mask, softmax).
        tokens: samples to search in.
        num_heads: how many, static.
        width: k, query-key dimension of a head, static.
        value_width: value dimension of a head, static.
        used: how many of the k to use, may be traced; None for all. The others are zero.
        used_values: the same for the value dimension.
        ridges: of the value fit, on the correlation scale: the one that generalises best from one half of the samples
            to the other under uniform attention is taken for each head.
        rounds: steps of query and key, static.

    Returns:
        The projections; values and outputs follow from their patterns (`value_neurons`).

    Raises:
        ValueError: a number that is no int of at least 1.

    Example:
        >>> x, goal = jax.random.normal(key, (2, 16, 5, 4))  # samples, tokens, features
        >>> tokens = methods.Tokens(x, x, x, goal)
        >>> heads = methods.find_heads(jax.nn.softmax, tokens, num_heads=1, width=3, value_width=2)
        >>> heads.query.shape, heads.key.shape
        ((1, 4, 3), (1, 4, 3))
    """
    width, value_width = require_count(width), require_count(value_width)
    used = width if used is None else used
    used_values = value_width if used_values is None else used_values

    def one(residual: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        left = tokens._replace(residual=residual)
        head, ridge = _find(attend, left, width, value_width, used, used_values, ridges, rounds)
        read = _read(attend, left, head.query, head.key)
        return residual - _apply(read, value_neurons(read, residual, value_width, used_values, ridge)), head[:2]

    _, found = jax.lax.scan(one, tokens.residual, None, length=require_count(num_heads))
    return Projections(*found)


def value_neurons(
    read: Array, residual: Array, value_width: int, used: Array | int | None = None, ridge: float | Array = 0.0
) -> Neurons:
    """The best values and outputs of a head with a given pattern: TINY with the input A x, exact at ridge 0.

    Args:
        read: (n, T, F) A x, what the pattern collects of the tokens.
        residual: (n, T, M).
        value_width: value dimension, static.
        used: how many of them to use, may be traced; None for all.
        ridge: on the correlation scale.

    Returns:
        Neurons: alpha (F, value_width), omega (value_width, M); the bottleneck falls by the sum of lambda^2 at ridge 0.

    Example:
        >>> x, goal = jax.random.normal(key, (2, 16, 5, 4))
        >>> methods.value_neurons(jnp.cumsum(x, axis=1), goal, 2).alpha.shape
        (4, 2)
    """
    return _solve(*_value_moments(read, residual), value_width, value_width if used is None else used, ridge)


def _find(
    attend: Attend,
    tokens: Tokens,
    width: int,
    value_width: int,
    used: Array | int,
    used_values: Array | int,
    ridges: tuple[float, ...],
    rounds: int,
) -> tuple[_Head, Array]:
    """One head, and the ridge of its values."""
    queries, keys = tokens.queries, tokens.keys

    def gain(query: Array, key: Array, ridge: Array) -> Array:
        return held_out_value_gain(_read(attend, tokens, query, key), tokens.residual, value_width, used_values, ridge)

    query, key = jnp.zeros((queries.shape[-1], width), queries.dtype), jnp.zeros((keys.shape[-1], width), keys.dtype)
    choices = jnp.asarray(ridges, queries.dtype)
    gains = jax.lax.map(lambda ridge: gain(query, key, ridge), choices)
    ridge = choices[jnp.argmax(gains)]

    def step(state: tuple[_Head, Array], _: None) -> tuple[tuple[_Head, Array], None]:
        head = state[0]
        direction = _direction(attend, tokens, head, value_width, used_values, ridge)

        def moved(size: Array) -> _Head:
            product = matmul(head.query, head.key.T) + size * matmul(direction.query, direction.key.T)
            query, key = _balanced(product, width, used)
            return _Head(query, key, gain(query, key, ridge))

        tried = jax.lax.map(moved, jnp.asarray(SIZES, queries.dtype))
        top = jnp.argmax(tried.gain)
        better = tried.gain[top] > head.gain
        return (jax.tree.map(lambda new, old: jnp.where(better, new[top], old), tried, head), direction.query), None

    start = (_Head(query, key, jnp.max(gains)), query)
    (head, ahead), _ = jax.lax.scan(step, start, None, length=rounds)
    flat = ~jnp.any(head.query != 0)
    return head._replace(query=jnp.where(flat & (jnp.arange(width) < used), ahead, head.query)), ridge


def _direction(
    attend: Attend, tokens: Tokens, head: _Head, value_width: int, used_values: Array | int, ridge: Array
) -> _Head:
    """Where query and key should go, at unit size: the logits then have unit variance under the attention."""
    queries, keys, values, residual = tokens
    weights = attend(_scores(queries, keys, head.query, head.key))
    read = _collect(weights, values)
    neurons = value_neurons(read, residual, value_width, used_values, ridge)
    written = matmul(matmul(values, neurons.alpha), neurons.omega)
    left = residual - _apply(read, neurons)

    def asked(scores: Array) -> Array:
        return jnp.vdot(left, _collect(attend(scores), written), precision="highest")

    scores = _scores(queries, keys, head.query, head.key)
    weights = jnp.abs(weights)  # dropout scales rows, padding leaves them empty
    total = jnp.sum(weights, axis=-1, keepdims=True)
    moments = query_key_moments(queries, keys, weights / jnp.where(total > 0, total, 1), jax.grad(asked)(scores))
    pairs = query_key(moments, num_neurons=head.query.shape[1], ridge=SHRINKAGE)
    size = _spread(attend, scores, _scores(queries, keys, pairs.alpha, pairs.omega.T))
    root = jnp.where(size > 0, 1 / jnp.sqrt(jnp.where(size > 0, size, 1)), 0)
    return _Head(root * pairs.alpha, root * pairs.omega.T, size)


def held_out_value_gain(
    read: Array, residual: Array, value_width: int, used: Array | int, ridge: float | Array
) -> Array:
    """What values and outputs fitted to the even samples gain on the odd ones, and the other way; their mean, ()."""
    halves = [_value_moments(read[i::2], residual[i::2]) for i in (0, 1)]

    def score(fitted: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
        neurons, (gram, cross) = _solve(*fitted, value_width, used, ridge), other
        square = matmul(neurons.alpha.T, matmul(gram, neurons.alpha))
        slope = inner(matmul(neurons.alpha.T, cross), neurons.omega)
        return 2 * slope - inner(square, matmul(neurons.omega, neurons.omega.T))

    return (score(halves[0], halves[1]) + score(halves[1], halves[0])) / 2


def _value_moments(read: Array, residual: Array) -> tuple[Array, Array]:
    """S and N: means over samples of sums over tokens."""
    return _sum("ntf,ntg->fg", read, read) / len(read), _sum("ntf,ntm->fm", read, residual) / len(read)


def _solve(gram: Array, cross: Array, value_width: int, used: Array | int, ridge: float | Array) -> Neurons:
    found = best(root_of(gram, ridge), cross, num_neurons=value_width)
    kept = jnp.arange(value_width) < used
    return Neurons(
        jnp.where(kept, found.alpha, 0),
        jnp.where(kept[:, None], found.omega, 0),
        jnp.where(kept, found.singular_values, 0),
    )


def _spread(attend: Attend, scores: Array, change: Array) -> Array:
    """Standard deviation of the change of the logits under the attention, from how the attention moves: chi^2."""
    weights, moved = jax.jvp(attend, (scores,), (change,))
    on = weights != 0
    return jnp.sqrt(jnp.mean(jnp.sum(jnp.where(on, moved**2 / jnp.where(on, jnp.abs(weights), 1), 0), axis=-1)))


def _balanced(product: Array, width: int, used: Array | int) -> tuple[Array, Array]:
    """Query and key of equal norms for a product of rank at most `width`, of which the first `used` are kept."""
    u, values, vt = top_singular(product, width)
    root = jnp.sqrt(jnp.where(jnp.arange(width) < used, values, 0))
    return u * root, vt.T * root


def _read(attend: Attend, tokens: Tokens, query: Array, key: Array) -> Array:
    return _collect(attend(_scores(tokens.queries, tokens.keys, query, key)), tokens.values)


def _scores(queries: Array, keys: Array, query: Array, key: Array) -> Array:
    return _sum("ntk,nuk->ntu", matmul(queries, query), matmul(keys, key))


def _collect(weights: Array, values: Array) -> Array:
    return _sum("ntu,nuf->ntf", weights, values)


def _apply(read: Array, neurons: Neurons) -> Array:
    return matmul(matmul(read, neurons.alpha), neurons.omega)


def _sum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
