"""The query-key dimension of an attention head: new pairs of a query and a key feature in closed form.

A new pair adds (alpha' x_i)(omega x_j) to the logit of query i and key j, a bilinear form C = alpha omega between two
tokens. What is asked of it is N = E[sum_ij v_ij x_i x_j'], v = -n dloss/dlogit. What it costs is how much it moves the
attention: S are the second moments of the queries' tokens, R those of the keys' tokens around their mean under the
attention (the Fisher information of the softmax), and the solver is the one of TINY.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import root_of
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.low_rank import best, beyond


class QueryKeyMoments(NamedTuple):
    """Means over samples of what decides about new pairs; heads may be mapped over.

    Attributes:
        gram_query: (D, D) S = E[sum_i x_i x_i'], over the tokens of the queries.
        gram_key: (E, E) R, the covariance of the keys' tokens under the attention, averaged over the queries.
        cross: (D, E) N = E[sum_ij v_ij x_i x_j'].
        energy: () E[sum_ij v_ij^2].
    """

    gram_query: Array
    gram_key: Array
    cross: Array
    energy: Array


def query_key_moments(queries: Array, keys: Array, attention: Array, goal: Array) -> QueryKeyMoments:
    """The moments of one head.

    A softmax does not see what is added to all logits of a query, so a bias of the new key would do nothing: the
    constant belongs to the tokens of the queries alone.

    Args:
        queries: (n, T, D) tokens that the query projection reads, with the constant 1 last iff it has a bias.
        keys: (n, U, E) tokens that the key projection reads, without a constant.
        attention: (n, T, U) probabilities, 0 where masked.
        goal: (n, T, U) V_goal = -n dloss/dlogits, at the logits as the softmax sees them.

    Example:
        >>> x = jax.random.normal(key, (8, 3, 4))  # samples, tokens, features
        >>> attention, goal = jnp.full((8, 3, 3), 1 / 3), x[..., :3]
        >>> methods.query_key_moments(x, x, attention, goal).cross.shape
        (4, 4)
    """
    num_samples, num_queries = attention.shape[:2]
    mean = _sum("nts,nse->nte", attention, keys)
    # sum_ts A_ts (x_s - mean_t)(x_s - mean_t)': the first term needs the attention that a key receives, no more
    received = jnp.sum(attention, axis=1)
    spread = _sum("ns,nse,nsf->ef", received, keys, keys) - _sum("nte,ntf->ef", mean, mean)
    return QueryKeyMoments(
        gram_query=_sum("ntd,nte->de", queries, queries) / num_samples,
        gram_key=spread / (num_samples * num_queries),
        cross=_sum("ntd,nts,nse->de", queries, goal, keys) / num_samples,
        energy=jnp.sum(goal**2) / num_samples,
    )


def query_key(
    moments: QueryKeyMoments,
    *,
    num_neurons: int,
    weight_query: Array | None = None,
    weight_key: Array | None = None,
    ridge: float | Array = 0.0,
) -> Neurons:
    r"""The `num_neurons` query-key pairs with the largest first-order decrease of the loss per move of the attention.

    They maximise 2 <N, C> - tr(S C R C') over C = alpha omega, less what the existing projections could do: the loss
    falls by <N, C> = sum lambda_k^2 per unit of C, to first order exactly. S and R are a Kronecker approximation of the
    true cost, which `query_key_gain` evaluates.

    Args:
        moments: of one head.
        num_neurons: k, static; pairs beyond the rank are zero.
        weight_query: (D, C) the existing query projection, bias row last iff the tokens have a constant; None for none.
        weight_key: (E, C) the existing key projection, without its bias.
        ridge: of both Grams, on their correlation scale; 0 is exact.

    Returns:
        Neurons: alpha (D, k) reads the queries' tokens, omega (k, E) the keys'. In units of the logits: a model that
        multiplies logits by a scale needs both divided by its root (`query_key_scales` where it follows the width).

    Raises:
        ValueError: `num_neurons` is not a positive int, or `ridge` is negative.

    Example:
        >>> x = jax.random.normal(key, (8, 3, 4))  # samples, tokens, features
        >>> attention, goal = jnp.full((8, 3, 3), 1 / 3), x[..., :3]
        >>> moments = methods.query_key_moments(x, x, attention, goal)
        >>> alpha, omega, *_ = methods.query_key(moments, num_neurons=2)
        >>> alpha.shape, omega.shape
        ((4, 2), (2, 4))
    """
    cross = moments.cross
    if weight_query is not None:
        cross = beyond(cross, moments.gram_query, weight_query)
    if weight_key is not None:
        cross = beyond(cross.T, moments.gram_key, weight_key).T
    inputs, outputs = root_of(moments.gram_query, ridge), root_of(moments.gram_key, ridge)
    whole = outputs.whiten(inputs.whiten(moments.cross).T)
    return best(inputs, cross, num_neurons=num_neurons, outputs=outputs, floor=jnp.linalg.norm(whole))


def query_key_gain(queries: Array, keys: Array, attention: Array, goal: Array, neurons: Neurons) -> Array:
    """What new pairs gain at their best amplitude, in the cost that `query_key` approximates: <N, C>^2 / Q(C), ().

    Q(C) = E[sum_i Var_j(x_i' C x_j)] with j drawn from the attention of query i. Arrays as for `query_key_moments`.
    """
    logits = _sum("ntd,dk,ke,nse->nts", queries, neurons.alpha, neurons.omega, keys)
    mean = jnp.sum(attention * logits, axis=-1, keepdims=True)
    cost = jnp.sum(attention * (logits - mean) ** 2) / len(logits)
    slope = jnp.sum(goal * logits) / len(logits)
    return jnp.where(cost > 0, slope**2 / jnp.where(cost > 0, cost, 1), 0)


def query_key_scales(width: int, num_neurons: int) -> tuple[float, float]:
    """Factors that keep the function of a model with logits q k' / sqrt(width) when the width grows.

    Args:
        width: query-key dimension before.
        num_neurons: how many are added.

    Returns:
        What alpha and omega are multiplied by, and what the existing query projection with its bias is multiplied by.

    Raises:
        ValueError: `width` or `num_neurons` is below 1.
    """
    if width < 1 or num_neurons < 1:
        raise ValueError(f"`width` and `num_neurons` must be at least 1, got {width} and {num_neurons}")
    after = width + num_neurons
    return after**0.25, (after / width) ** 0.5


def _sum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
