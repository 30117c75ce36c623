"""Ridges chosen on held-out samples: fit on one half, score on the other, both ways.

A fit with ridge r moves the pre-activations by X = (S + r diag S)^-1 N; on the other half it lowers the bottleneck by
2 <N2, X> - <X, S2 X>. In the eigenbasis of the first half's correlation matrix this is a quadratic form in the filter
factors 1 / (eigenvalue + r), so one `eigh` a half gives the score of every ridge at once.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import correlation, matmul, solve
from tinyjax.methods.update import residual_cross
from tinyjax.statistics import Moments, Statistics, half

# Half decades, in descending order so that a tie is won by the larger ridge. Above 10^4 no direction changes any more.
_EXPONENTS = [e / 2 for e in range(8, -17, -1)]
_CORE = slice(_EXPONENTS.index(2.0), _EXPONENTS.index(-4.0) + 1)
_UNDECIDED = 1.0  # the middle of the best ridges measured, for statistics with an empty half


class Fold(NamedTuple):
    """One half to fit on, the other to score on.

    Attributes:
        gram: (D, D) quadratic form of the fitted half.
        cross: (D, Q) linear form of the fitted half.
        diagonal: (D,) what the ridge multiplies.
        gram_test: (D, D) quadratic form of the other half.
        cross_test: (D, Q) linear form of the other half.
    """

    gram: Array
    cross: Array
    diagonal: Array
    gram_test: Array
    cross_test: Array


def held_out_update(statistics: Statistics) -> Array:
    """The ridge of `best_update` whose update generalises best from one half of the samples to the other.

    The grid is 10^2 .. 10^-4 in half decades; while its edge wins it is extended, to at most 10^4 and 10^-8. With an
    empty half nothing can be compared and the ridge is 1. A ridge chosen before by `with_ridges` is kept.
    """
    if statistics.ridge_update is not None:
        return statistics.ridge_update

    def fold(a: Moments, b: Moments) -> Fold:
        return Fold(a.gram, a.cross, jnp.diagonal(a.gram), b.gram, b.cross)

    return choose(statistics, fold)


def held_out(statistics: Statistics) -> Array:
    """The ridge of `tiny` whose neurons generalise best from one half of the samples to the other.

    Both halves are projected by the update fitted on the first, at its own ridge `held_out_update`. Grid as there. A
    ridge chosen before by `with_ridges` is kept.
    """
    if statistics.ridge is not None:
        return statistics.ridge
    update_ridge = held_out_update(statistics)

    def fold(a: Moments, b: Moments) -> Fold:
        delta = solve(a.gram, a.cross, update_ridge)
        cross, cross_test = residual_cross(a, delta), residual_cross(b, delta)
        return Fold(a.gram_prev, cross, jnp.diagonal(a.gram_prev), b.gram_prev, cross_test)

    return choose(statistics, fold)


def with_ridges(statistics: Statistics) -> Statistics:
    """The statistics with both ridges chosen: methods and updates then share them instead of choosing again.

    They stay with the halves (`keep_half`), so that a fit to one half uses the ridges of the whole.
    """
    update_ridge = held_out_update(statistics)
    statistics = dataclasses.replace(statistics, ridge_update=update_ridge)
    return dataclasses.replace(statistics, ridge=held_out(statistics))


def choose(statistics: Statistics, fold: Callable[[Moments, Moments], Fold]) -> Array:
    """The ridge with the largest sum of held-out scores over both ways.

    Args:
        statistics: both halves.
        fold: (means of the half to fit on, means of the half to score on) -> what is fitted and scored.

    Returns:
        () in the dtype of the statistics.
    """
    grid = jnp.asarray([10.0**e for e in _EXPONENTS], statistics.gram.dtype)

    def decide() -> Array:
        halves = [half(statistics, i) for i in (0, 1)]
        fitted, other = (jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in (halves, halves[::-1]))
        scores = jax.lax.map(lambda both: score(fold(*both), grid), (fitted, other))
        return grid[_climb(scores[0] + scores[1])]

    # A branch, not a `where`: the two eigendecompositions are most of a growth's work on a wide layer.
    return jax.lax.cond(jnp.all(statistics.count > 0), decide, lambda: jnp.asarray(_UNDECIDED, grid.dtype))


def score(fold: Fold, ridges: Array) -> Array:
    """2 <N2, X> - <X, S2 X> with X = (S1 + r diag)^-1 N1, for every ridge r: (R,)."""
    scaled, inverse_scale = correlation(fold.gram, fold.diagonal)
    values, vectors = jnp.linalg.eigh(scaled)
    basis = vectors * inverse_scale
    cross, cross_test = matmul(basis.T, fold.cross), matmul(basis.T, fold.cross_test)
    linear = jnp.sum(cross * cross_test, axis=1)
    quadratic = matmul(matmul(basis.T, fold.gram_test), basis) * matmul(cross, cross.T)
    filters = 1 / (jnp.maximum(values, 0) + ridges[:, None])  # (R, D)
    return 2 * matmul(filters, linear) - jnp.sum(matmul(filters, quadratic) * filters, axis=1)


def _climb(scores: Array) -> Array:
    """Index of the best score of the core grid; from an edge of it, on uphill."""
    core = _CORE.start + jnp.argmax(scores[_CORE])
    # How far the scores go on rising from each edge of the core.
    lower, upper = scores[: _CORE.start + 1][::-1], scores[_CORE.stop - 1 :]
    down, up = (jnp.sum(jnp.cumprod(side[1:] > side[:-1])) for side in (lower, upper))
    return core + jnp.where(core == _CORE.stop - 1, up, jnp.where(core == _CORE.start, -down, 0))
