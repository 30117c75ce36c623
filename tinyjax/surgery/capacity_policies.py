"""How many slots to allocate: policies `(needed, final) -> capacities` that see all sites at once.

Every new capacity of any site costs one recompilation of everything, so sites move in lock-step where their final
widths are known: the site that is furthest on sets a fraction, and every site goes to that fraction of its final width.
A policy is a pure function of the widths needed now (used slots plus the neurons about to be added).
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real

from tinyjax.core.whole_numbers import whole_number

Capacities = dict[str, int]
Policy = Callable[[Mapping[str, int], Mapping[str, int] | None], Capacities]


def exact(needed: Mapping[str, int], final: Mapping[str, int] | None = None) -> Capacities:
    """Exactly the slots needed: the least work a step, one recompilation a growth.

    Args:
        needed: slots needed now, by site name.
        final: final widths by site name, or None where they are not known.

    Returns:
        Capacities by site name.

    Example:
        >>> tinyjax.surgery.exact({"fc1": 11, "fc2": 3})
        {'fc1': 11, 'fc2': 3}
    """
    del final
    return dict(needed)


def full(needed: Mapping[str, int], final: Mapping[str, int] | None = None) -> Capacities:
    """The final widths from the start: one compilation, the full network's work at every step.

    Args:
        needed: slots needed now, by site name.
        final: final widths by site name.

    Returns:
        Capacities by site name.

    Raises:
        ValueError: when `final` is None or lacks a site.

    Example:
        >>> tinyjax.surgery.full({"fc1": 11}, {"fc1": 64})
        {'fc1': 64}
    """
    if final is None:
        raise ValueError(
            "the policy `full` allocates the final widths: pass `final`, or use `multiple_of` or `geometric`"
        )
    return {name: max(n, _final(final, name)) for name, n in needed.items()}


def multiple_of(multiple: int) -> Policy:
    """Capacities rounded up to multiples, never beyond a final width unless that many are needed.

    Args:
        multiple: the multiple, at least 1; 8 costs about 6 % of step time and saves most recompilations.

    Returns:
        A policy.

    Raises:
        ValueError: for a multiple below 1, or a site that `final` lacks (when the policy is called).

    Example:
        >>> tinyjax.multiple_of(8)({"fc1": 11, "fc2": 3}, {"fc1": 64, "fc2": 128})
        {'fc1': 16, 'fc2': 32}
    """
    multiple = whole_number(multiple, "`multiple`", least=1)

    def up(n: float) -> int:
        return math.ceil(n / multiple) * multiple

    return _lock_step(up, lambda n, last: min(up(n), max(last, n)) / last)


def geometric(ratio: float) -> Policy:
    """Capacities on a geometric ladder that ends at the final widths (or starts at 1 where those are not known).

    Args:
        ratio: step of the ladder, above 1.

    Returns:
        A policy.

    Raises:
        ValueError: for a ratio not above 1, or a site that `final` lacks (when the policy is called).

    Example:
        >>> tinyjax.surgery.geometric(2.0)({"fc1": 11, "fc2": 3}, {"fc1": 64, "fc2": 128})
        {'fc1': 16, 'fc2': 32}
    """
    if not isinstance(ratio, Real) or not ratio > 1:
        raise ValueError(f"`ratio` must be above 1, got {ratio}")

    def up(n: float) -> int:
        rung = 1.0
        while math.ceil(rung) < n:
            rung *= ratio
        return math.ceil(rung) if n > 0 else 0

    def fraction(n: int, last: int) -> float:
        rung = max(1.0, n / last)
        while n > 0 and rung / ratio >= n / last:
            rung /= ratio
        return rung if n > 0 else 0.0

    return _lock_step(up, fraction, on_grid=math.ceil)


def _lock_step(
    up: Callable[[float], int],
    fraction: Callable[[int, int], float],
    on_grid: Callable[[float], int] | None = None,
) -> Policy:
    """A policy from `up` (one site alone) and `fraction` (needed, final -> fraction of the final width to go to)."""

    def policy(needed: Mapping[str, int], final: Mapping[str, int] | None = None) -> Capacities:
        if final is None:
            return {name: up(n) for name, n in needed.items()}
        share = max((fraction(n, _final(final, name)) for name, n in needed.items()), default=0.0)
        # 1e-9: the fraction of the leading site times its final width must not be rounded up past its own capacity
        grid = {name: (on_grid or up)(share * final[name] - 1e-9) for name in needed}
        return {name: max(n, min(grid[name], final[name])) for name, n in needed.items()}

    return policy


def _final(final: Mapping[str, int], name: str) -> int:
    if not isinstance(final, Mapping):
        raise ValueError(f"`final` must be a dict of widths by site name, got {final!r}")
    if final.get(name, 0) < 1:
        raise ValueError(f"`final` gives site `{name}` no width of at least 1; it has {dict(final)}")
    return final[name]
