"""How many neurons to add: rules that read the statistics and give a number, zero included.

A rule is a pure function `rule(statistics) -> number of neurons`, traced. `make_grow_step(..., how_many=rule)` adds no
more than it says. A rule may be given its options with `functools.partial`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, matmul, relative_cutoff, root_of
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root
from tinyjax.methods.solvers.ridge import held_out_ridge, ridge_of_update
from tinyjax.methods.solvers.traits import require_no_stream
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.output_metric import orthonormal
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.sums import Null

HowMany = Callable[[Statistics], Array]


def significant(statistics: Statistics, *, level: float = 0.05, ridge: Ridge = 1.0) -> Array:
    r"""The number of singular values that noise would not give.

    The contribution of a sample to N is e_i r_i', with r = v - dW*' b what the best update leaves and
    e = b_prev - P G^+ b what the existing neurons do not say of the producer's input. Were nothing but noise left, the
    sum with random signs, N_r = sum_i sign_ri e_i r_i', would be distributed like N. Counted are the singular values
    of S^(-1/2) N above the m-th largest of the largest ones of R draws S^(-1/2) N_r, m = level (R + 1): the largest
    of 19 at level .05. Noise then exceeds it with probability `level`, whatever the distribution of the inputs and
    the unit of the loss, as long as samples are many compared with the existing neurons.

    Args:
        statistics: with `null`: ask `estimate` or `make_grow_step` for `null_draws=19`.
        level: probability that noise alone gives a neuron.
        ridge: of S, on the correlation scale. It decides about power, not about the level: with 0 and no more samples
            than inputs nothing can be significant.

    Returns:
        () int32.

    Raises:
        ValueError: no null draws, or too few for the level.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site, null_draws=19))
        >>> count = int(jax.jit(tinyjax.methods.significant)(estimate(params, batch)))

    Reference: Hemerik, Goeman and Finos, Robust testing in generalized linear models by sign flipping score
    contributions, JRSS B 2020.
    """
    if statistics.gates is not None:
        raise ValueError(
            "`significant` knows no null for gated units and heads: gates and patterns were chosen on the same samples"
        )
    statistics, _ = orthonormal(statistics)
    mean = moments(statistics)
    if mean.null is None:
        raise ValueError("`significant` needs null draws: ask `estimate` or `make_grow_step` for `null_draws=19`")
    draws = mean.null.cross.shape[0]
    rank = math.floor(level * (draws + 1) + 1e-9)
    if not 1 <= rank <= draws:
        least = math.ceil(1 / level - 1e-9) - 1 if 0 < level < 1 else 0
        cure = f"ask for at least {least}" if least else "it must lie between 0 and 1"
        raise ValueError(f"`level` is {level} with {draws} null draws: {cure}")
    delta = best_update(statistics)
    outer = root_of(mean.gram)
    root = input_root(mean, resolve(ridge, statistics))

    def largest(null: Null) -> Array:
        return _squares(root, _flipped(mean, null, delta, outer))[-1]

    squares = _squares(root, residual_cross(mean, delta))
    # What is left of noise after a fit of H weights has 1 - H/n of its energy, and once more so in the draws.
    count = jnp.sum(statistics.count)
    shrunk = jnp.maximum(1 - outer.rank / count, 0)
    threshold = jnp.sort(jax.lax.map(largest, mean.null))[draws - rank] / jnp.where(shrunk > 0, shrunk, jnp.nan)
    rounding = relative_cutoff(squares.dtype) ** 2 * mean.energy
    return jnp.sum((squares > threshold) & (squares > rounding), dtype=jnp.int32)


def rank_trigger(statistics: Statistics, *, threshold: float = 0.97, cutoff: float = 1e-3) -> Array:
    """As many neurons as the existing ones have dimensions beyond `threshold` of their number.

    The effective dimension is the number of eigenvalues of the second moment of the activities above `cutoff` times
    the largest, the bias left out; those of a convolution are summed over its offsets. A layer whose neurons repeat
    each other does not grow.

    Args:
        statistics: sums at the current parameters.
        threshold: gamma, of the width.
        cutoff: relative, what counts as no dimension.

    Returns:
        () int32, floor(effective dimension - threshold x width), at least 0.

    Example:
        >>> int(tinyjax.methods.rank_trigger(statistics, threshold=0.5)) <= 2  # half of 4 neurons
        True

    Reference: Maile et al., When, where, and how to add new neurons to ANNs, 2022, section 3.
    """
    require_no_stream(statistics, "rank_trigger")
    slots = statistics.weight_prev.shape[1]
    gram = moments(statistics).gram
    rows = len(gram) - statistics.bias
    blocks = gram[:rows, :rows].reshape(rows // slots, slots, rows // slots, slots)
    values = jnp.linalg.eigvalsh(jnp.einsum("oaob->ab", blocks))
    dimension = jnp.sum((values > cutoff * values[-1]) & (values > 0))
    return jnp.maximum(jnp.floor(dimension - threshold * statistics.width), 0).astype(jnp.int32)


def fraction(statistics: Statistics, *, share: float = 0.25) -> Array:
    """A share of the present width, rounded up: () int32.

    Example:
        >>> int(tinyjax.methods.fraction(statistics, share=0.3))  # of 4 neurons
        2

    Raises:
        ValueError: `share` is negative.
    """
    if share < 0:
        raise ValueError(f"`share` must be >= 0, got {share}")
    return jnp.ceil(share * statistics.width).astype(jnp.int32)


def energy(
    statistics: Statistics, *, share: float = 0.9, ridge: Ridge = held_out_ridge, update_ridge: Ridge | None = None
) -> Array:
    """The fewest neurons that have `share` of the gain of all: of the sum of lambda^2 of `tiny`.

    Args:
        statistics: sums at the current parameters.
        share: in [0, 1].
        ridge: as for `tiny`.
        update_ridge: as for `tiny`.

    Returns:
        () int32, 0 where there is nothing to gain.

    Example:
        >>> int(tinyjax.methods.energy(statistics, share=1.0, ridge=0.0)) > 0
        True

    Raises:
        ValueError: `share` is outside [0, 1], or a ridge is negative.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], got {share}")
    statistics, _ = orthonormal(statistics)
    mean = moments(statistics)
    cross = residual_cross(mean, best_update(statistics, ridge=ridge_of_update(ridge, update_ridge)))
    squares = _squares(input_root(mean, resolve(ridge, statistics)), cross)[::-1]
    squares = jnp.where(squares > relative_cutoff(squares.dtype) ** 2 * mean.energy, squares, 0)
    before = jnp.cumsum(squares) - squares
    wanted = share * jnp.sum(squares) * (1 - 1e-6)  # the last neuron is not needed for a rounding error
    return jnp.sum((before < wanted) & (squares > 0), dtype=jnp.int32)


def _squares(root: Root, cross: Array) -> Array:
    """The squared singular values of S^(-1/2) N, ascending."""
    whitened = root.whiten(cross)
    whitened = whitened if whitened.shape[0] < whitened.shape[1] else whitened.T
    return jnp.maximum(jnp.linalg.eigvalsh(matmul(whitened, whitened.T)), 0)


def _flipped(mean: Moments, null: Null, delta: Array, outer: Root) -> Array:
    """Sum of sign (b_prev - P G^+ b) (v - dW' b)' of one draw: (D, Q)."""
    shape = mean.cross_prev.shape
    left = jnp.einsum("odh,hm->dmo", null.link, delta, precision="highest").reshape(shape)
    explained = outer.unwhiten(outer.whiten(null.cross - matmul(null.gram, delta)))
    assert mean.link is not None  # null draws are refused without
    again = jnp.einsum("odh,hm->dmo", mean.link, explained, precision="highest").reshape(shape)
    return null.cross_prev - left - again
