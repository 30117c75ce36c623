"""NORTH with pre-activations: random neurons that are uncorrelated with the ones already there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, root_of, top_singular
from tinyjax.core.neurons import HE_NORM, Neurons
from tinyjax.methods.solvers.live import live_inputs
from tinyjax.methods.solvers.ridge import held_out_update
from tinyjax.methods.solvers.traits import require_count, require_key, traits
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=True, stochastic=True, residual=held_out_update)
def north(statistics: Statistics, *, num_neurons: int, ridge: float | Array = 0.0, key: Array | None = None) -> Neurons:
    """Random fan-ins whose pre-activations are orthogonal to those of the existing neurons; fan-out zero.

    alpha = S^(-1/2) (I - Pi) g with g ~ N(0, I) and Pi the projector on the span of S^(1/2) W_prev, then scaled to the
    mean norm of the existing fan-ins. The published recipe draws one random number a sample, r, and takes S^-1 B V r
    with V a basis of the samples' directions orthogonal to all pre-activations: the same directions in law, from sums
    alone. Its lengths are not kept: they are those of S^(-1/2), which inputs that hardly vary make as large as they
    like (470 on MNIST's pixels, where existing neurons have 1.5; training does not recover from that).

    Args:
        statistics: sums at the current parameters, with `weight_prev`.
        num_neurons: k, static.
        ridge: on the correlation scale; 0 is exact.
        key: a new key for every growth.

    Returns:
        Neurons with `omega` zero and singular values 1; neurons beyond the admissible dimension rank(S) - rank(S^(1/2)
        W_prev) are zero and have singular value 0, so that all are if the existing neurons already span the input.

    Raises:
        ValueError: `key` is None, `num_neurons` is not a positive int, or `ridge` is negative.

    Example:
        >>> neurons = tinyjax.methods.north(statistics, num_neurons=2, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Maile et al., When, where, and how to add new neurons to ANNs, 2022; TMLR 2024 paper, appendix B.2.
    """
    key, num_neurons = require_key(key, "north"), require_count(num_neurons)
    alpha, dimension = uncorrelated(statistics, num_neurons, ridge, key)
    outputs = statistics.cross_prev.shape[-1]
    return admissible(with_mean_norm(alpha, statistics.weight_prev), dimension, outputs=outputs)


def uncorrelated(statistics: Statistics, num_neurons: int, ridge: float | Array, key: Array) -> tuple[Array, Array]:
    """Random fan-ins (D, k) with pre-activations orthogonal to the old ones; the admissible dimension.

    A ridge changes their law and not the orthogonality: (root^+' u)' S W = u' root^+ S W.
    """
    gram = moments(statistics).gram_prev
    root = root_of(gram, ridge)
    basis, rank = span(root.whiten(matmul(gram, statistics.weight_prev)))
    draw = jax.random.normal(key, (len(gram), num_neurons), basis.dtype)
    return root.unwhiten(draw - matmul(basis, matmul(basis.T, draw))), root.rank - rank


def with_mean_norm(alpha: Array, weights: Array) -> Array:
    """Fan-ins of the mean norm of the existing ones (D, C); of He's, sqrt(2), where there are none."""
    norms, lengths = jnp.linalg.norm(weights, axis=0), jnp.linalg.norm(alpha, axis=0)
    used = jnp.sum(norms > 0)
    mean_norm = jnp.where(used > 0, jnp.sum(norms) / jnp.maximum(used, 1), HE_NORM)
    return alpha * (mean_norm / jnp.where(lengths == 0, 1, lengths))


def span(columns: Array) -> tuple[Array, Array]:
    """An orthonormal basis of the span of columns of any scale, padded with zeros, and its dimension."""
    norms = jnp.linalg.norm(columns, axis=0)
    basis, values, _ = top_singular(columns / jnp.where(norms == 0, 1, norms), min(columns.shape))
    return basis, jnp.sum(values > 0)


def admissible(alpha: Array, dimension: Array, *, outputs: int) -> Neurons:
    """Neurons with the first `dimension` fan-ins and no fan-out; more would depend on each other."""
    kept = jnp.arange(alpha.shape[1]) < dimension
    omega = jnp.zeros((alpha.shape[1], outputs), alpha.dtype)
    return Neurons(jnp.where(kept, alpha, 0), omega, kept.astype(alpha.dtype))


@traits(function_preserving=True, stochastic=True, residual=held_out_update)
def north_weight(statistics: Statistics, *, num_neurons: int, key: Array | None = None) -> Neurons:
    """Random fan-ins orthogonal to those of the existing neurons, with their mean norm; bias and fan-out zero.

    Args:
        statistics: sums at the current parameters, with `weight_prev`; of the sums only the live inputs matter.
        num_neurons: k, static.
        key: a new key for every growth.

    Returns:
        Neurons with `omega` zero and singular values 1; neurons beyond the admissible dimension (live inputs minus rank
        of the weights) are zero and have singular value 0. Without any existing neuron the norm is He's, sqrt(2).

    Raises:
        ValueError: `key` is None, or `num_neurons` is not a positive int.

    Example:
        >>> neurons = tinyjax.methods.north_weight(statistics, num_neurons=2, key=key)
        >>> neurons.alpha.shape, neurons.omega.shape  # inputs and bias; outputs
        ((5, 2), (2, 12))

    Reference: Maile et al., When, where, and how to add new neurons to ANNs, 2022.
    """
    key, num_neurons = require_key(key, "north_weight"), require_count(num_neurons)
    mean = moments(statistics)
    live = live_inputs(mean)
    if statistics.bias_prev:
        live = live.at[-1].set(False)
    weights = jnp.where(live[:, None], statistics.weight_prev, 0)
    basis, rank = span(weights)
    draw = jnp.where(live[:, None], jax.random.normal(key, (len(live), num_neurons), weights.dtype), 0)
    alpha = jnp.where(live[:, None], draw - matmul(basis, matmul(basis.T, draw)), 0)
    return admissible(with_mean_norm(alpha, weights), jnp.sum(live) - rank, outputs=mean.cross_prev.shape[1])
