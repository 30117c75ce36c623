"""How large a growth is: norms of new neurons, and line searches over the amplitude.

The function moves by the amplitude gamma >= 0: alpha and omega by sqrt(gamma) each, an update of existing weights by
gamma. A search is a function `search(loss_at, *, dtype, unit) -> LineSearch`, where `loss_at` maps a scalar amplitude
to the loss of the network that would result; `fixed(gamma)` has the same signature and evaluates nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from tinyjax.methods.solvers.traits import declared

LossAt = Callable[[Array], Array]
_MAX_ROUNDS = 6


class LineSearch(NamedTuple):
    """The outcome of a search.

    Attributes:
        amplitude: () the amplitude with the lowest loss; 0 if none is better than adding nothing. Negative only from
            `twin_search`.
        loss: () the loss there; NaN from `fixed`, which evaluates nothing.
        loss_at_zero: () the loss at amplitude 0; NaN from `fixed`.
    """

    amplitude: Array
    loss: Array
    loss_at_zero: Array


class _State(NamedTuple):
    gammas: Array  # (points,) of the round to come; the first is 0
    amplitude: Array  # the best positive one so far
    loss: Array  # there
    loss_at_zero: Array
    round: Array  # how many are over
    refining: Array  # whether the round to come lies between the neighbours of the best, and is the last
    done: Array


def searches(amplitude: Callable[..., LineSearch]) -> bool:
    """Whether an amplitude rule, or a `functools.partial` of one, looks at the loss (unknown rules are taken to)."""
    return declared(amplitude, "searches", default=True)


def fixed(gamma: float) -> Callable[..., LineSearch]:
    """The amplitude `gamma`, whatever the loss.

    Raises:
        ValueError: `gamma` is negative.

    Example:
        >>> float(tinyjax.growth.fixed(0.5)(None, dtype=jnp.float32).amplitude)
        0.5
    """
    if gamma < 0:
        raise ValueError(f"`gamma` must be >= 0, got {gamma}")

    def amplitude(loss_at: LossAt, *, dtype: Any, unit: ArrayLike = 1.0) -> LineSearch:
        nan = jnp.full((), jnp.nan, dtype)
        return LineSearch(jnp.full((), gamma, dtype), nan, nan)

    vars(amplitude)["searches"] = False
    return amplitude


def line_search(
    loss_at: LossAt,
    *,
    dtype: Any,
    unit: ArrayLike = 1.0,
    bracket: tuple[float, float] = (1e-3, 1e1),
    points: int = 12,
    maximum: float = float("inf"),
) -> LineSearch:
    """The amplitude gamma >= 0 with the lowest loss.

    Rounds of `points` amplitudes: 0 and a geometric grid over the bracket; while the best one is an edge, the bracket
    next to that edge; at the end a grid between the neighbours of the best. Each round is one `vmap` of `loss_at`,
    which is compiled once: 2 rounds (24 evaluations) when the first bracket holds the minimum, at most 6. Losses that
    are not finite count as infinite, and amplitude 0 wins ties: it adds nothing.

    Args:
        loss_at: scalar amplitude -> scalar loss.
        dtype: of the amplitudes.
        unit: what `bracket` and `maximum` are multiples of, may be traced. An amplitude has the unit of one over the
            loss; with the amplitude at which the linear model predicts a loss of zero, no choice depends on the unit.
        bracket: first range of amplitudes, both ends positive.
        points: evaluations a round.
        maximum: no amplitude beyond it is considered.

    Raises:
        ValueError: an empty bracket, fewer than 4 points, or a loss that is not a scalar.

    Example:
        >>> found = tinyjax.growth.line_search(lambda g: (g - 0.3) ** 2, dtype=jnp.float32)
        >>> print(f"{found.amplitude:.1f}")
        0.3
    """
    low, high = bracket
    if not 0 < low < high:
        raise ValueError(f"`bracket` must satisfy 0 < low < high, got {bracket}")
    if points < 4:
        raise ValueError(f"`points` must be at least 4 (zero, two ends and something between), got {points}")
    loss = jax.eval_shape(loss_at, jax.ShapeDtypeStruct((), dtype))
    if loss.shape != ():
        raise ValueError(f"`loss_at` must return a scalar, got shape {loss.shape}: take the mean over the samples")

    unit = jnp.asarray(unit, dtype)
    largest = maximum * unit * (1 + 1e-5)  # the end of the grid must not be rounded out of it

    def search_round(state: _State) -> _State:
        losses = jax.vmap(loss_at)(state.gammas)
        loss_at_zero = losses[0]
        losses = jnp.where(jnp.isfinite(losses) & (state.gammas <= largest), losses, jnp.inf)
        best = 1 + jnp.argmin(losses[1:])
        better = losses[best] < state.loss
        found = state._replace(
            amplitude=jnp.where(better, state.gammas[best], state.amplitude),
            loss=jnp.where(better, losses[best], state.loss),
            loss_at_zero=loss_at_zero,
            round=state.round + 1,
        )
        return _next_round(found, losses, best, largest)

    start = _State(
        gammas=_grid(low * unit, high * unit, points),
        amplitude=jnp.zeros((), dtype),
        loss=jnp.full((), jnp.inf, loss.dtype),
        loss_at_zero=jnp.full((), jnp.inf, loss.dtype),
        round=jnp.zeros((), jnp.int32),
        refining=jnp.zeros((), bool),
        done=jnp.zeros((), bool),
    )
    end = jax.lax.while_loop(lambda s: ~s.done, search_round, start)
    # A decrease within rounding is none; False also where the loss at zero is NaN: then nothing is added.
    rounding = 4 * jnp.finfo(loss.dtype).eps * jnp.abs(end.loss_at_zero)
    improved = end.loss < end.loss_at_zero - rounding
    amplitude = jnp.where(improved, end.amplitude, 0)
    return LineSearch(amplitude, jnp.where(improved, end.loss, end.loss_at_zero), end.loss_at_zero)


vars(line_search)["searches"] = True


def _next_round(state: _State, losses: Array, best: Array, largest: Array) -> _State:
    """Moves the bracket when an edge has won, refines when not, ends after a refinement."""
    gammas, last = state.gammas, len(state.gammas) - 1
    low, high = gammas[1], gammas[last]
    lower_edge = (best == 1) & ((losses[1] < losses[2]) | jnp.isinf(losses[1]))
    upper_edge = (best == last) & (losses[last] < losses[last - 1]) & (high < largest)
    extend = (lower_edge | upper_edge) & ~state.refining & (state.round < _MAX_ROUNDS - 1)
    step = gammas[2] / gammas[1]
    centre = jnp.where(state.amplitude > 0, state.amplitude, gammas[best])
    bottom = jnp.where(extend, jnp.where(lower_edge, low * (low / high), high), centre / step)
    top = jnp.where(extend, jnp.where(lower_edge, low, high * (high / low)), centre * step)
    return state._replace(gammas=_grid(bottom, top, last + 1), refining=~extend, done=state.refining)


def _grid(low: Array, high: Array, points: int) -> Array:
    """0 and `points` - 1 amplitudes from `low` to `high`, geometric."""
    exponents = jnp.linspace(0, 1, points - 1, dtype=low.dtype)
    return jnp.concatenate([jnp.zeros((1,), low.dtype), low * (high / low) ** exponents])


def trusted_search(loss_at: LossAt, *, dtype: Any, unit: ArrayLike = 1.0) -> LineSearch:
    """`line_search` no further than 0.03 `unit`, a fraction of the step at which the linear model predicts a zero loss.

    The default for the best update. An open search follows a network that already fits its batch to amplitudes a
    hundred times larger, which sharpens its outputs on those samples and costs accuracy on others.

    Example:
        >>> found = tinyjax.growth.trusted_search(lambda g: (g - 0.3) ** 2, dtype=jnp.float32, unit=2.0)
        >>> print(f"{found.amplitude:.2f}")
        0.06
    """
    return line_search(loss_at, dtype=dtype, unit=unit, bracket=(1e-5, 0.03), maximum=0.03)


vars(trusted_search)["searches"] = True


def twin_search(loss_at: LossAt, *, dtype: Any, **options: Any) -> LineSearch:
    """`line_search` over both twins: amplitude -gamma stands for the neurons (-alpha, -omega) at amplitude gamma.

    Both neurons make the same move to first order in a linear regime, but they are different neurons under ReLU.

    Args:
        loss_at: scalar amplitude of either sign -> scalar loss.
        dtype: of the amplitudes.
        **options: of `line_search`.

    Example:
        >>> found = tinyjax.growth.twin_search(lambda g: (g + 0.3) ** 2, dtype=jnp.float32)
        >>> print(f"{found.amplitude:.1f}")
        -0.3
    """
    signs = jnp.asarray([1, -1], dtype)
    twins = jax.vmap(lambda sign: line_search(lambda gamma: loss_at(sign * gamma), dtype=dtype, **options))(signs)
    best = jnp.argmin(jnp.where(jnp.isnan(twins.loss), jnp.inf, twins.loss))
    return LineSearch(signs[best] * twins.amplitude[best], twins.loss[best], twins.loss_at_zero[best])


vars(twin_search)["searches"] = True
