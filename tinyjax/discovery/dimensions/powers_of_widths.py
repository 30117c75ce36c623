"""Which powers of which capacities a number follows, from its ratios in two trials at other capacities."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tinyjax.discovery.dimensions.trace_differences import Difference

_POWERS = [Fraction(n, d) for n, d in ((1, 4), (1, 3), (1, 2), (1, 1), (3, 2), (2, 1), (3, 1))]
_POWERS += [-p for p in _POWERS]


class Trial(NamedTuple):
    """The loss at other capacities.

    Attributes:
        logs: logarithm of new / old capacity, by site.
        moved: the values that differ, by operation and operand.
        torn: for sites whose tensors do not have the sizes that they should, one of them in words.
    """

    logs: dict[str, float]
    moved: dict[tuple[int, int], Difference]
    torn: dict[str, str]


def exponents(first: Trial, second: Trial, place: tuple[int, int]) -> dict[str, Fraction] | None:
    """Which capacities a value follows, and to which powers; None where it is no product of powers of one or two."""
    ratios = [trial.moved[place].ratio if place in trial.moved else 1.0 for trial in (first, second)]
    if ratios[0] is None or ratios[1] is None:
        return None
    want = math.log(ratios[0]), math.log(ratios[1])
    rounding = max(trial.moved[place].rounding for trial in (first, second) if place in trial.moved)
    coarse = rounding > 1e-4  # in bfloat16 only the usual powers can be told
    powers = [p for p in _POWERS if not coarse or abs(p) in (Fraction(1, 2), 1)]
    errors = {(name, p): _error(first, second, want, ((name, p),)) for name in first.logs for p in powers}
    best = min(errors, key=errors.__getitem__)
    if errors[best] < rounding:
        return dict([best])
    if coarse:
        return None
    # of two: what is left of the ratio after the first is looked up among the powers of the second
    left = {}
    for name, p in itertools.product(first.logs, _POWERS):
        left.setdefault(round(float(p) * first.logs[name] * 1e4), []).append((name, p))
    for name, p in itertools.product(first.logs, _POWERS):
        rest = round((want[0] - float(p) * first.logs[name]) * 1e4)
        for other in (o for near in (rest - 1, rest, rest + 1) for o in left.get(near, ())):
            if other[0] != name and _error(first, second, want, ((name, p), other)) < rounding:
                return {name: p, other[0]: other[1]}
    return None


def _error(first: Trial, second: Trial, want: tuple[float, float], powers: Sequence[tuple[str, Fraction]]) -> float:
    """How far a value is from a product of powers, in logarithms."""
    return max(
        abs(sum(float(p) * trial.logs[name] for name, p in powers) - log) for trial, log in zip((first, second), want)
    )
