"""When to grow, where, and by how many: host-side functions of plain numbers.

A schedule is a function `(step, widths, history) -> {site: neurons to add now}`; {} means train on. Schedules keep no
state: everything follows from the step, the current widths and the records of past growths, so a resumed run goes on as
if it had never stopped, and a growth that failed is made up for later. Steps count whatever the caller counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tinyjax.core.whole_numbers import whole_number

Widths = Mapping[str, int]
Additions = dict[str, int]
Cost = Callable[[str, Widths], float]
Gains = Callable[[Sequence[Any]], Mapping[str, float]]


class Schedule(Protocol):
    """Neurons to add now, by site name.

    Attributes (of the call): `step`, counted from 0; `widths`, used slots by site in the order in which the sites are
    to be visited; `history`, the records of past growths, newest last.
    """

    def __call__(self, step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions: ...  # noqa: D102


def every(
    period: int,
    neurons: int | Mapping[str, int],
    *,
    final: int | Mapping[str, int],
    start: int = 0,
    until: int | None = None,
) -> Schedule:
    """Adds neurons at all sites at once, each `period` steps (section 5.2).

    Args:
        period: steps between growths.
        neurons: how many to add at a time, for all sites or by name.
        final: final widths, never exceeded; sites that a mapping leaves out do not grow.
        start: step of the first growth.
        until: no growth from this step on.

    Returns:
        A schedule.

    Raises:
        ValueError: for a period, number of neurons or width below 1.

    Example:
        >>> tinyjax.every(100, 4, final=10)(200, {"fc1": 4, "fc2": 8}, [])
        {'fc1': 4, 'fc2': 2}
    """
    is_due = _calendar(period, start, until)
    room = _room(neurons, final)

    def schedule(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        del history
        return room(widths) if is_due(step) else {}

    return schedule


def round_robin(
    period: int,
    neurons: int | Mapping[str, int],
    *,
    final: int | Mapping[str, int],
    start: int = 0,
    until: int | None = None,
) -> Schedule:
    """Adds neurons at one site after the other, in the order of `widths`; full sites pass their turn on.

    Args:
        period: steps between growths.
        neurons: how many to add at a time, for all sites or by name.
        final: final widths, never exceeded; sites that a mapping leaves out do not grow.
        start: step of the first growth.
        until: no growth from this step on.

    Returns:
        A schedule.

    Raises:
        ValueError: for a period, number of neurons or width below 1.

    Example:
        >>> tinyjax.schedules.round_robin(100, 4, final=10)(100, {"fc1": 4, "fc2": 8}, [])
        {'fc2': 2}
    """
    is_due = _calendar(period, start, until)
    room = _room(neurons, final)

    def schedule(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        del history
        open_sites = room(widths)
        if not open_sites or not is_due(step):
            return {}
        names = list(widths)
        turn = (step - start) // period % len(names)
        name = next(name for name in names[turn:] + names[:turn] if name in open_sites)
        return {name: open_sites[name]}

    return schedule


def latest_gains(history: Sequence[Any]) -> dict[str, float]:
    """The newest finite `gain_predicted` of every site."""
    gains: dict[str, float] = {}
    for record in history:
        for name, gain in record.gain_predicted.items():
            if np.isfinite(gain):
                gains[name] = float(gain)
    return gains


def most_gain(
    period: int,
    neurons: int | Mapping[str, int],
    *,
    final: int | Mapping[str, int],
    cost: Cost,
    gains: Gains = latest_gains,
    start: int = 0,
    until: int | None = None,
) -> Schedule:
    """Adds neurons where the last known gain per cost is largest.

    Sites without a known gain go first, in order, so that each is measured once.

    Args:
        period: steps between growths.
        neurons: how many to add at a time, for all sites or by name.
        final: final widths, never exceeded; sites that a mapping leaves out do not grow.
        cost: `(site, widths) -> cost of one neuron there`: `parameter_cost(sites)` or `flop_cost(sites)`.
        gains: from the records of past growths to the gain of each site. Predicted gains are in the units of different
            layers; where those do not compare, give the scores of `score_sites`, measured outside.
        start: step of the first growth.
        until: no growth from this step on.

    Returns:
        A schedule.

    Raises:
        ValueError: for a period, number of neurons or width below 1; when called, for a cost that is not positive.

    Example:
        >>> schedule = tinyjax.schedules.most_gain(100, 4, final=64, cost=costs.parameter_cost(sites))
        >>> scores = {}  # by site name, kept up to date by the training loop: float(score_sites(...)[name].gain)
        >>> schedule = schedules.most_gain(100, 4, final=64, cost=costs.flop_cost(sites), gains=lambda history: scores)
    """
    is_due = _calendar(period, start, until)
    room = _room(neurons, final)

    def schedule(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        open_sites = room(widths)
        if not open_sites or not is_due(step):
            return {}
        known = gains(history)

        def rate(name: str) -> float:
            price = cost(name, widths)
            if not price > 0:
                raise ValueError(f"`cost` of a neuron at site `{name}` is {price}; it must be positive")
            return known.get(name, float("inf")) / (price * open_sites[name])

        name = max(open_sites, key=rate)
        return {name: open_sites[name]}

    return schedule


def early(total: int, events: int, *, final: int | Mapping[str, int], fraction: float = 0.25) -> Schedule:
    """All growth in the first part of training, evenly: the best timing at equal epochs in our pilots.

    Growth i of `events` falls on step `(i + 1) * fraction * total // events` and adds an equal share of what is missing
    to the final widths, so that the last growth reaches them whatever happened before.

    Args:
        total: length of training, in the unit in which the schedule is called.
        events: number of growths.
        final: final widths; sites that a mapping leaves out do not grow.
        fraction: part of training in which to grow.

    Returns:
        A schedule.

    Raises:
        ValueError: for a fraction outside (0, 1], or more growths than steps in that part.

    Example:
        >>> tinyjax.early(1000, 5, final=64)(50, {"fc1": 4}, [])
        {'fc1': 12}
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction}")
    span = int(fraction * total)
    if not 1 <= whole_number(events, "`events`") <= span:
        raise ValueError(f"`events` must be in 1 .. {span}, the steps that `fraction` leaves for growth; got {events}")
    left = {(i + 1) * span // events: events - i for i in range(events)}
    room = _room(None, final)

    def schedule(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        del history
        if step not in left:
            return {}
        return {name: -(-missing // left[step]) for name, missing in room(widths).items()}

    return schedule


def _calendar(period: int, start: int, until: int | None) -> Callable[[int], bool]:
    period = whole_number(period, "`period`", least=1, clause="at least 1 step")
    start = whole_number(start, "`start`")
    return lambda step: step >= start and (until is None or step < until) and (step - start) % period == 0


def _room(neurons: int | Mapping[str, int] | None, final: int | Mapping[str, int]) -> Callable[[Widths], Additions]:
    """What each site may add now: `neurons` (None: any number) but not beyond `final`; full sites are left out."""
    for what, value in (("neurons", neurons), ("final", final)):
        numbers: Iterable[Any] = value.values() if isinstance(value, Mapping) else (value,)
        for number in numbers:
            if number is not None:
                whole_number(number, f"`{what}`", least=1)

    def room(widths: Widths) -> Additions:
        for value in (neurons, final):
            unknown = sorted(set(value) - set(widths)) if isinstance(value, Mapping) else []
            if unknown:
                raise ValueError(f"no site `{unknown[0]}`; the sites are {', '.join(f'`{n}`' for n in widths)}")
        added = {}
        for name, width in widths.items():
            missing = max(0, (final.get(name, 0) if isinstance(final, Mapping) else final) - width)
            step = neurons.get(name, 0) if isinstance(neurons, Mapping) else neurons
            added[name] = missing if step is None else min(step, missing)
        return {name: count for name, count in added.items() if count}

    return room
