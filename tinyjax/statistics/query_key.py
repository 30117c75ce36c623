"""The sums of a query-key dimension: what is asked of the scores, pair of tokens by pair of tokens."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.statistics.sums import Sums


def score_sums(
    sizes: tuple[int, int, int, int, int], repeated: int, x: Array, y: Array, q: Array, v: Array, weights: Array | None
) -> Sums:
    r"""The record of a pair of queries and keys; heads are in front of every field, as layers.

    S sums x x' over the tokens of the queries, block by block where several queries share a head of keys; N~ sums
    v_ij x_i y_j'; R is the covariance of the keys' tokens under the attention, averaged over the queries (the Fisher
    information of the softmax), or their plain second moment where the attention is not found. G, M and P belong to the
    existing keys: their update U moves the scores by q_i' U y_j.

    Args:
        sizes: samples n, heads a, queries a head g, tokens t and s.
        repeated: how often the keys of a head are repeated (r).
        x: `(*stack, n a g t, D)` tangents of the queries, with the constant last iff they have a bias.
        y: `(*stack, n a r s, E)` tangents of the keys, repeated r times.
        q: `(*stack, n a g t, C)` queries.
        v: `(*stack, n a g t s)` V_goal at the scores.
        weights: `(*stack, n a g t s)` of the attention, or None.
    """
    n, heads, queries, tokens, keys = sizes
    lead = v.shape[:-1]
    x, q = (_by_half(array.reshape(*lead, n, heads, queries, tokens, -1), len(lead)) for array in (x, q))
    y = _by_half(y.reshape(*lead, n, heads, repeated, keys, -1)[..., 0, :, :], len(lead))
    v = _by_half(v.reshape(*lead, n, heads, queries, tokens, keys), len(lead))
    gram = _sum("...znagti,...znagtj->...azgij", x, x)
    alone = jnp.eye(queries, dtype=x.dtype)
    size = queries * x.shape[-1]
    cross = _sum("...znagti,...znagts,...znase->...azgie", x, v, y)
    return Sums(
        gram_prev=_sum("...gij,gh->...gihj", gram, alone).reshape(*gram.shape[:-3], size, size),
        cross_prev=cross.reshape(*cross.shape[:-3], size, -1),
        gram=_sum("...znagtc,...znagtd->...azcd", q, q),
        cross=_sum("...znagtc,...znagts,...znase->...azce", q, v, y),
        link=_sum("...znagti,...znagtc->...azgic", x, q).reshape(*gram.shape[:-3], 1, size, -1),
        energy=_sum("...znagts,...znagts->...az", v, v),
        energy_matrix=None,
        gram_out=_spread(sizes, y, weights if weights is None else _by_half(weights.reshape(*lead, *sizes), len(lead))),
    )


def _spread(sizes: tuple[int, int, int, int, int], y: Array, weights: Array | None) -> Array:
    """R: (*stack, heads, 2, E, E)."""
    _, _, queries, tokens, keys = sizes
    if weights is None:
        return _sum("...znase,...znasf->...azef", y, y) / keys
    weights = jnp.abs(weights)  # dropout scales rows, padding leaves them empty
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    mean = _sum("...znagts,...znase->...znagte", weights, y)
    received = jnp.sum(weights, axis=(-3, -2))
    square = _sum("...znas,...znase,...znasf->...azef", received, y, y)
    return (square - _sum("...znagte,...znagtf->...azef", mean, mean)) / (queries * tokens)


def _by_half(array: Array, depth: int) -> Array:
    """`(*stack, n, ...)` as `(*stack, 2, n / 2, ...)`: even samples, odd samples (zeros to even)."""
    if array.shape[depth] % 2:
        array = jnp.pad(array, [(0, int(d == depth)) for d in range(array.ndim)])
    lead, rest = array.shape[:depth], array.shape[depth + 1 :]
    return jnp.moveaxis(array.reshape(*lead, -1, 2, *rest), depth + 1, depth)


def _sum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
