"""What holds a schedule back: a budget, training that still gets on by itself, gains that are not worth it.

Each takes a schedule and gives one that asks for less. Losses are not in the records of growths: where they decide, the
training loop keeps a list of them, which the schedule reads when it is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinyjax.training.schedules.basic import Additions, Gains, Schedule, Widths


def budget(schedule: Schedule, cost: Callable[[Widths], float], *, limit: float) -> Schedule:
    """Holds a schedule to a budget: neurons are granted one by one, site by site, while the network stays within it.

    Args:
        schedule: what to hold back.
        cost: widths -> cost of the network: `partial(parameters, sites)`, `partial(forward_flops, sites)`, or the
            seconds of a gradient step on this machine, see `work.seconds`.
        limit: largest cost allowed.

    Returns:
        A schedule.

    Example:
        >>> within = tinyjax.schedules.budget(schedule, partial(costs.parameters, sites), limit=100)
        >>> within(100, {"hidden_1": 4, "hidden_2": 4}, [])
        {'hidden_1': 3, 'hidden_2': 2}
    """

    def held(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        wanted = schedule(step, widths, history)
        granted = dict.fromkeys(wanted, 0)
        refused: set[str] = set()
        while open_sites := [name for name in wanted if granted[name] < wanted[name] and name not in refused]:
            for name in open_sites:
                after = {n: w + granted.get(n, 0) + (n == name) for n, w in widths.items()}
                if cost(after) <= limit:
                    granted[name] += 1
                else:
                    refused.add(name)
        return {name: count for name, count in granted.items() if count}

    return held


def plateau(schedule: Schedule, losses: Sequence[Any], *, window: int, least: float = 0.01) -> Schedule:
    """Lets a schedule grow only when training has stopped to improve.

    That is when the mean of the last `window` losses is not lower than the mean of the `window` before by more than the
    fraction `least`. With fewer than two windows of losses nothing grows.

    Args:
        schedule: what to hold back; `every(1, ...)` leaves the timing to the plateau.
        losses: since the last growth, oldest first, kept by the caller: appended to after each step (training losses,
            or validation losses as often as they are measured) and cleared after a growth.
        window: losses that are averaged.
        least: relative decrease that counts as progress.

    Returns:
        A schedule.

    Raises:
        ValueError: for a window below 1.

    Example:
        >>> losses = []
        >>> schedule = tinyjax.schedules.plateau(tinyjax.every(1, 4, final=64), losses, window=50)
        >>> for record in tinyjax.fit(loss_fn, params, batches, optimizer, schedule, key, sites=site, num_neurons=4):
        ...     if record.growth is not None:
        ...         losses.clear()
        ...     losses.append(record.loss)
    """
    _require_window(window)

    def held(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        means = _last_means(losses, window)
        stuck = means is not None and means[1] >= (1 - least) * means[0]
        return schedule(step, widths, history) if stuck else {}

    return held


def worthwhile(schedule: Schedule, losses: Sequence[Any], gains: Gains, *, window: int, worth: float = 1.0) -> Schedule:
    """Lets a schedule grow only where a growth is expected to gain more than training does.

    Training gains the difference between the mean of the `window` losses before the last `window` and the mean of
    those; it may be negative. A site is left out while its gain is at most `worth` times as much. With fewer than two
    windows of losses nothing grows.

    Args:
        schedule: what to hold back.
        losses: since the last growth, as for `plateau`.
        gains: from the records of past growths to the gain of each site in the unit of the loss: what `score_sites`
            measures. Sites without a known gain are let through.
        window: losses that are averaged, the stretch of training that a growth is compared with.
        worth: how much of that a growth has to gain.

    Returns:
        A schedule.

    Raises:
        ValueError: for a window below 1.

    Example:
        >>> losses, scores = [], {}
        >>> schedule = schedules.worthwhile(tinyjax.every(1, 4, final=64), losses, lambda history: scores, window=50)
    """
    _require_window(window)

    def held(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        means = _last_means(losses, window)
        if means is None:
            return {}
        progress, known = means[0] - means[1], gains(history)
        wanted = schedule(step, widths, history)
        return {name: k for name, k in wanted.items() if known.get(name, np.inf) > worth * progress}

    return held


def _require_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"`window` must be at least 1 loss, got {window}")


def _last_means(losses: Sequence[Any], window: int) -> tuple[float, float] | None:
    """Means of the two last windows, the earlier first; None before there are two."""
    if len(losses) < 2 * window:
        return None
    last = np.asarray(losses[-2 * window :], float)
    return float(last[:window].mean()), float(last[window:].mean())
