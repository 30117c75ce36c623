"""Ridges chosen on held-out samples: fit on one half, score on the other, both ways.

A fit with ridge r moves the pre-activations by X = (S + r diag S)^-1 N; on the other half it lowers the bottleneck by
2 <N2, X> - <X, S2 X>. A fit to both halves then takes half the ridge. The best ridge is found by climbing from r = 1
uphill over half decades: with few outputs a ridge costs one Cholesky factor, so the four or five that a climb visits
are cheaper than an `eigh`, which would give all of them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import cholesky_solve, correlation, inner, matmul, solve
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross
from tinyjax.statistics.averages import Moments, half
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.slices import one_gate, one_head
from tinyjax.statistics.spectra import Spectrum

T = TypeVar("T")

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

    def score(self, ridge: Array) -> Array:
        """2 <N2, X> - <X, S2 X> with X = (S1 + ridge diag)^-1 N1, ()."""
        scaled, inverse_scale = correlation(self.gram, self.diagonal)
        x = inverse_scale * cholesky_solve(scaled, inverse_scale * self.cross, ridge)
        return 2 * inner(self.cross_test, x) - inner(x, matmul(self.gram_test, x))


def held_out_update(statistics: Statistics) -> Array:
    """The ridge of `best_update` whose update generalises best from one half of the samples to the other.

    From 1 uphill in half decades to the nearest maximum, between 10^-8 and 10^4. Half of that is the ridge of a fit to
    both halves: the best ridge falls as one over the number of samples. With an empty half nothing can be compared and
    the ridge is 1. A ridge chosen before by `with_ridges` is kept.

    Example:
        >>> bool(tinyjax.methods.held_out_update(statistics) > 0)
        True
    """
    if statistics.ridge_update is not None:
        return statistics.ridge_update

    def fold(a: Moments, b: Moments) -> Fold:
        return Fold(a.gram, a.cross, jnp.diagonal(a.gram), b.gram, b.cross)

    return choose(statistics, fold)


def held_out_ridge(statistics: Statistics) -> Array:
    """The ridge of `tiny` whose neurons generalise best from one half of the samples to the other.

    Both halves are projected by the update fitted on the first, at its own ridge `held_out_update`. Climbs as there.
    A ridge chosen before by `with_ridges` is kept.

    Example:
        >>> bool(tinyjax.methods.held_out_ridge(statistics) > 0)
        True
    """
    if statistics.ridge is not None:
        return statistics.ridge
    statistics = one_gate(statistics, 0)  # neurons are fitted gate by gate
    update_ridge = held_out_update(statistics)

    def crosses(a: Moments, b: Moments) -> tuple[Array, Array]:
        delta = solve(a.gram, a.cross, update_ridge)
        return residual_cross(a, delta), residual_cross(b, delta)

    return choose_for_inputs(statistics, crosses)


def with_ridges(statistics: Statistics) -> Statistics:
    """The statistics with both ridges chosen: methods and updates then share them instead of choosing again.

    A site with heads has a ridge for the neurons of each.

    They stay with the halves (`keep_half`), where they are as much larger as the samples are fewer.
    """
    update_ridge = held_out_update(statistics)
    statistics = dataclasses.replace(statistics, ridge_update=update_ridge)
    if statistics.heads is None:
        return dataclasses.replace(statistics, ridge=held_out_ridge(statistics))
    each = jax.lax.map(lambda head: held_out_ridge(one_head(statistics, head)), jnp.arange(statistics.heads))
    return dataclasses.replace(statistics, ridge=each)


def choose(statistics: Statistics, fold: Callable[[Moments, Moments], Fold]) -> Array:
    """Half the ridge with the largest sum of held-out scores over both ways, uphill from 1.

    Args:
        statistics: both halves.
        fold: (means of the half to fit on, means of the half to score on) -> what is fitted and scored.

    Returns:
        () in the dtype of the statistics.
    """
    folds = both_ways(statistics, fold)
    return climb(statistics, lambda ridge: jnp.sum(jax.lax.map(lambda one: one.score(ridge), folds)))


def choose_for_inputs(statistics: Statistics, crosses: Callable[[Moments, Moments], tuple[Array, Array]]) -> Array:
    """`choose` for S: with its spectra, a score costs D^2 operations in the eigenbasis of the fitted half.

    Args:
        statistics: both halves.
        crosses: (means of the half to fit on, means of the half to score on) -> the linear form of either, (D, Q).
    """
    spectra = statistics.spectra
    if statistics.grams is not None:
        return _choose_for_readers(statistics, crosses)
    if spectra is None:

        def fold(a: Moments, b: Moments) -> Fold:
            cross, cross_test = crosses(a, b)
            return Fold(a.gram_prev, cross, jnp.diagonal(a.gram_prev), b.gram_prev, cross_test)

        return choose(statistics, fold)

    fitted = jax.tree.map(lambda x: x[:2], spectra.spectrum)
    cross, cross_test = (jax.vmap(Spectrum.turn)(fitted, x) for x in both_ways(statistics, crosses))
    # X has the rows w_i N_i with w = 1 / (eigenvalues + ridge), so the score is a quadratic form in w.
    linear = jnp.sum(cross_test * cross, 2)
    quadratic = spectra.other * matmul(cross, cross.mT)

    def score_at(ridge: Array) -> Array:
        w = 1 / jax.vmap(Spectrum.shifted, (0, None))(fitted, ridge)
        return 2 * inner(linear, w) - inner(w, matmul(quadratic, w[:, :, None])[:, :, 0])

    return climb(statistics, score_at)


def _choose_for_readers(statistics: Statistics, crosses: Callable[[Moments, Moments], tuple[Array, Array]]) -> Array:
    """`choose_for_inputs` where every reader of a stream has an S of its own: their scores add."""

    def folds_of(a: Moments, b: Moments) -> Fold:
        cross, cross_test = crosses(a, b)
        assert a.grams is not None and b.grams is not None and a.reads is not None
        mine = a.reads[:, None]
        diagonal = jnp.diagonal(a.grams, axis1=-2, axis2=-1)
        return Fold(a.grams, mine * cross, diagonal, b.grams, mine * cross_test)

    folds = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), both_ways(statistics, folds_of))
    return climb(statistics, lambda ridge: jnp.sum(jax.lax.map(lambda one: one.score(ridge), folds)))


def both_ways(statistics: Statistics, function: Callable[[Moments, Moments], T]) -> T:
    """A function of (means of one half, means of the other), both ways, stacked.

    Never by `vmap`: batched LAPACK calls of some size wait for each other for ever on a machine of two cores.
    """
    halves = [dataclasses.replace(half(statistics, i), spectrum=None, other=None) for i in (0, 1)]
    first, second = (jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in (halves, halves[::-1]))
    return jax.lax.map(lambda both: function(*both), (first, second))


class _Step(NamedTuple):
    index: Array  # the best so far
    score: Array  # there
    direction: Array  # in which to look next: 1 or -1; 0 at the end
    seen: Array  # how many scores: the first is the start's and always better than nothing
    turned: Array  # whether there is no other direction left


def climb(statistics: Statistics, score_at: Callable[[Array], Array]) -> Array:
    """The nearest local maximum uphill from `_START`; a tie is won by the larger ridge.

    With an empty half there is nothing to climb and no work. The start is scored by the first turn of the loop, so
    that scoring is compiled once.
    """
    grid = jnp.asarray([10.0**e for e in _EXPONENTS], statistics.gram.dtype)

    def step(state: _Step) -> _Step:
        index = state.index + state.direction
        found = score_at(grid[index])
        first = state.seen == 0
        better = first | (found > state.score) | ((found == state.score) & (state.direction > 0))
        direction = jnp.where(better, state.direction, jnp.where(state.turned, 0, -state.direction))
        index = jnp.where(better, index, state.index)
        at_end = (index + direction < 0) | (index + direction >= len(grid))
        return _Step(
            index=index,
            score=jnp.where(better, found, state.score),
            direction=jnp.where(at_end, 0, direction),
            seen=state.seen + 1,
            turned=~first,
        )

    comparable = jnp.all(statistics.count > 0)
    start = jnp.where(comparable, _START - 1, _START)
    state = _Step(start, jnp.zeros_like(grid[0]), jnp.where(comparable, 1, 0), jnp.asarray(0), jnp.asarray(False))
    best = grid[jax.lax.while_loop(lambda state: state.direction != 0, step, state).index]
    # Chosen for half of the samples: a mean over all has half the variance.
    return jnp.where(comparable, best / 2, _UNDECIDED)


held_out_best_update = partial(best_update, ridge=held_out_update)


def ridge_of_update(ridge: Ridge, update_ridge: Ridge | None) -> Ridge:
    """The ridge of the best update behind a method: its own if given, else that of the neurons if it is a number."""
    if update_ridge is not None:
        return update_ridge
    return held_out_update if callable(ridge) else ridge
