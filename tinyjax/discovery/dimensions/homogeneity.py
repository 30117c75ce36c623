"""Which leaves to multiply so that a model's function stays, when numbers in it are multiplied: analysis of units.

Let some numbers of a program be multiplied by c^p, with p known, and some leaves by c^e, with e unknown. Every tensor
is then multiplied by a power of c, linear in the unknowns, as long as sums add equal powers and functions that are not
homogeneous (tanh, exp) see the power 0. These conditions are linear equations; with the loss at power 0 they say which
leaves make up for the numbers, or that none do.
"""

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tinyjax.discovery.dimensions.trace_differences import Folded
from tinyjax.discovery.graph.graph import VIEWS, Op, Value

Form = dict[int, Fraction]
"""A power of c: coefficients by leaf, and the constant under `KNOWN`."""

KNOWN = -1
_FIRST = VIEWS | frozenset(
    """broadcast_in_dim neg abs reduce_sum reduce_max reduce_min cumsum cummax cummin rev slice stop_gradient real imag
    scan_out gather dynamic_slice split reduce_window_sum reduce_window_max reduce_window_min psum""".split()
)
_EQUAL = {
    name: None for name in "add add_any sub max min concatenate pad cond_out scan_carry clamp atan2 rem".split()
} | {"select_n": (1, None), "dynamic_update_slice": (0, 2)}
_COMPARED = frozenset("eq ne lt le gt ge".split())
_SUMMED = frozenset("mul dot_general conv_general_dilated".split())
_POWERS = {"square": Fraction(2), "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "cbrt": Fraction(1, 3)}
_SIGNS = frozenset("sign is_finite argmax argmin".split())


def compensation(
    folded: Folded, leaves: Sequence[int], powers: Mapping[tuple[int, int], Fraction]
) -> dict[int, Fraction] | None:
    """The powers by which leaves make up for numbers; None where they cannot.

    Args:
        folded: the program.
        leaves: the leaves that may be multiplied, the preferred ones first.
        powers: of the numbers, by the operation (its index in `folded.ops`) and the operand.
    """
    forms: dict[Value, Form] = {folded.graph.params[leaf]: {leaf: Fraction(1)} for leaf in leaves}
    given: dict[int, dict[int, Fraction]] = {}
    for (i, operand), power in powers.items():
        given.setdefault(i, {})[operand] = power
    system = _System({leaf: rank for rank, leaf in enumerate(leaves)})
    queue = sorted({*given, *(i for value in forms for i in folded.used_by.get(value, ()))})
    waiting = set(queue)
    while queue:
        i = heapq.heappop(queue)
        op = folded.ops[i]
        known = given.get(i, {})
        if any(not 0 <= operand < len(op.ins) for operand in known):
            return None
        ins = [{KNOWN: known[j]} if j in known else forms.get(v, {}) for j, v in enumerate(op.ins)]
        out = _through(folded, op, ins, system)
        if not out:
            continue
        for value in op.outs:
            forms[value] = out
            for user in folded.used_by.get(value, ()):
                if user not in waiting:  # what a scan hands on is compared where it leaves
                    waiting.add(user)
                    heapq.heappush(queue, user)
    system.require(forms.get(folded.graph.loss, {}))
    return system.solved()


def _through(folded: Folded, op: Op, ins: list[Form], system: "_System") -> Form:
    """The power of what an operation returns; conditions go into the system."""
    if op.name in _FIRST:
        return ins[0]
    if op.name in _SUMMED:
        return _sum(ins[0], ins[1])
    if op.name == "div":
        return _sum(ins[0], ins[1], Fraction(-1))
    if op.name in _EQUAL or op.name in _COMPARED:
        start, stop = _EQUAL.get(op.name) or (0, None)
        seen = [form for form, v in zip(ins[start:stop], op.ins[start:stop]) if form or not _has_no_unit(folded, v)]
        for form in seen[1:]:
            system.require(_sum(seen[0], form, Fraction(-1)))
        equal = bool(seen) and all(seen)
        if not equal:  # one of them has the power 0, and so have all
            return {}
        return {} if op.name in _COMPARED or op.name == "atan2" else seen[0]
    if (exponent := exponent_of(op)) is not None:
        return _times(ins[0], exponent)
    if op.name == "pow" and folded.is_constant(op.ins[1]) and not ins[1]:
        exponent = folded.value(op.ins[1])
        if exponent is not None and np.ndim(exponent) == 0:
            return _times(ins[0], Fraction(float(exponent)).limit_denominator(1000))
    if op.name not in _SIGNS:
        for form in ins:
            system.require(form)
    return {}


def exponent_of(op: Op) -> Fraction | None:
    """The power that an operation raises its operand to, None where it is no power."""
    return Fraction(op.params["y"]) if op.name == "integer_pow" else _POWERS.get(op.name)


def _has_no_unit(folded: Folded, value: Value) -> bool:
    """Whether a constant is 0 or infinite throughout, which no factor changes."""
    number = folded.value(value) if folded.is_constant(value) else None
    return number is not None and np.ndim(number) == 0 and (float(number) == 0 or bool(np.isinf(float(number))))


def _sum(a: Form, b: Form, sign: Fraction = Fraction(1)) -> Form:  # noqa: B008
    total = {key: a.get(key, Fraction(0)) + sign * b.get(key, Fraction(0)) for key in {**a, **b}}
    return {key: x for key, x in total.items() if x}


def _times(a: Form, factor: Fraction) -> Form:
    return {key: factor * x for key, x in a.items() if factor}


class _System:
    """Linear equations, eliminated as they come: every one is solved for its most preferred leaf."""

    def __init__(self, ranks: Mapping[int, int]):
        self._ranks = ranks
        self._rows: dict[int, Form] = {}  # leaf -> the other terms that it equals
        self._failed = False

    def require(self, form: Form) -> None:
        """Adds the equation that a power is 0."""
        form = self._reduced(form)
        unknown = [key for key in form if key != KNOWN]
        if not unknown:
            self._failed |= bool(form)
            return
        pivot = min(unknown, key=self._ranks.__getitem__)
        scale = -1 / form.pop(pivot)
        row = _times(form, scale)
        for leaf, other in self._rows.items():
            if pivot in other:
                self._rows[leaf] = _sum({k: x for k, x in other.items() if k != pivot}, _times(row, other[pivot]))
        self._rows[pivot] = row

    def _reduced(self, form: Form) -> Form:
        total: Form = {}
        for key, x in form.items():
            total = _sum(total, _times(self._rows[key], x) if key in self._rows else {key: x})
        return total

    def solved(self) -> dict[int, Fraction] | None:
        """The leaves with a power, all others at 0; None without a solution."""
        if self._failed:
            return None
        return {leaf: row[KNOWN] for leaf, row in self._rows.items() if KNOWN in row}
