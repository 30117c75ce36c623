"""Ridges chosen on held-out samples: fit on one half, score on the other, both ways.

A fit with ridge r moves the pre-activations by X = (S + r diag S)^-1 N; on the other half it lowers the bottleneck by
2 <N2, X> - <X, S2 X>. A fit to both halves then takes half the ridge. The best ridge is found by climbing from r = 1
uphill over half decades: with few outputs a ridge costs one Cholesky factor, so the four or five that a climb visits
are cheaper than an `eigh`, which would give all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import cholesky_solve, correlation, inner, matmul, solve
from tinyjax.methods.heads import one_head
from tinyjax.methods.update import residual_cross
from tinyjax.statistics import Moments, Statistics, half, one_gate

_EXPONENTS = [e / 2 for e in range(-16, 9)]  # half decades; above 10^4 no direction changes any more
_START = _EXPONENTS.index(0.0)  # the middle of the best ridges measured
_UNDECIDED = 1.0  # for statistics with an empty half


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

    From 1 uphill in half decades to the nearest maximum, between 10^-8 and 10^4. Half of that is the ridge of a fit to
    both halves: the best ridge falls as one over the number of samples. With an empty half nothing can be compared and
    the ridge is 1. A ridge chosen before by `with_ridges` is kept.

    Example:
        >>> bool(tinyjax.held_out_update(statistics) > 0)
        True
    """
    if statistics.ridge_update is not None:
        return statistics.ridge_update

    def fold(a: Moments, b: Moments) -> Fold:
        return Fold(a.gram, a.cross, jnp.diagonal(a.gram), b.gram, b.cross)

    return choose(statistics, fold)


def held_out(statistics: Statistics) -> Array:
    """The ridge of `tiny` whose neurons generalise best from one half of the samples to the other.

    Both halves are projected by the update fitted on the first, at its own ridge `held_out_update`. Climbs as there.
    A ridge chosen before by `with_ridges` is kept.

    Example:
        >>> bool(tinyjax.held_out(statistics) > 0)
        True
    """
    if statistics.ridge is not None:
        return statistics.ridge
    statistics = one_gate(statistics, 0)  # neurons are fitted gate by gate
    update_ridge = held_out_update(statistics)

    def fold(a: Moments, b: Moments) -> Fold:
        delta = solve(a.gram, a.cross, update_ridge)
        cross, cross_test = residual_cross(a, delta), residual_cross(b, delta)
        return Fold(a.gram_prev, cross, jnp.diagonal(a.gram_prev), b.gram_prev, cross_test)

    return choose(statistics, fold)


def with_ridges(statistics: Statistics) -> Statistics:
    """The statistics with both ridges chosen: methods and updates then share them instead of choosing again.

    A site with heads has a ridge for the neurons of each.

    They stay with the halves (`keep_half`), so that a fit to one half uses the ridges of the whole.
    """
    update_ridge = held_out_update(statistics)
    statistics = dataclasses.replace(statistics, ridge_update=update_ridge)
    if statistics.heads is None:
        return dataclasses.replace(statistics, ridge=held_out(statistics))
    each = jax.lax.map(lambda head: held_out(one_head(statistics, head)), jnp.arange(statistics.heads))
    return dataclasses.replace(statistics, ridge=each)


def choose(statistics: Statistics, fold: Callable[[Moments, Moments], Fold]) -> Array:
    """Half the ridge with the largest sum of held-out scores over both ways, uphill from 1.

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
        folds = jax.lax.map(lambda both: fold(*both), (fitted, other))
        best = _climb(lambda index: jnp.sum(jax.lax.map(lambda one: score(one, grid[index]), folds)), len(grid))
        return grid[best] / 2  # chosen for half of the samples: a mean over all has half the variance

    # A branch, not a `where`: factoring is most of a growth's work on a wide layer.
    return jax.lax.cond(jnp.all(statistics.count > 0), decide, lambda: jnp.asarray(_UNDECIDED, grid.dtype))


def score(fold: Fold, ridge: Array) -> Array:
    """2 <N2, X> - <X, S2 X> with X = (S1 + ridge diag)^-1 N1, ()."""
    scaled, inverse_scale = correlation(fold.gram, fold.diagonal)
    x = inverse_scale * cholesky_solve(scaled, inverse_scale * fold.cross, ridge)
    return 2 * inner(fold.cross_test, x) - inner(x, matmul(fold.gram_test, x))


class _Step(NamedTuple):
    index: Array  # the best so far
    score: Array  # there
    direction: Array  # in which to look next: 1 or -1
    turned: Array  # whether there is no other direction left


def _climb(score_at: Callable[[Array], Array], size: int) -> Array:
    """The index of the nearest local maximum uphill from `_START`; a tie is won by the larger index."""

    def step(state: _Step) -> _Step:
        index = state.index + state.direction
        found = score_at(index)
        better = (found > state.score) | ((found == state.score) & (state.direction > 0))
        moved = state._replace(index=index, score=found, turned=jnp.array(True))
        turned = state._replace(direction=-state.direction * ~state.turned, turned=jnp.array(True))
        state = jax.tree.map(lambda a, b: jnp.where(better, a, b), moved, turned)
        at_end = (state.index + state.direction < 0) | (state.index + state.direction >= size)
        return state._replace(direction=jnp.where(at_end, 0, state.direction))

    start = jnp.asarray(_START)
    state = _Step(start, score_at(start), jnp.asarray(1), jnp.asarray(False))
    return jax.lax.while_loop(lambda state: state.direction != 0, step, state).index
