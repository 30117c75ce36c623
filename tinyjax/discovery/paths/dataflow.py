"""What lies between the producer of a hidden dimension and its consumers.

A site can grow when the consumer reads, row by row and slot by slot, what the producer wrote: then the producer's input
is the tangent of a new neuron's fan-in, and an empty neuron (fan-in and bias zero) must arrive at the consumer as zero.
`Flow` follows one product forward and knows of every value whether its rows are still the producer's, and what an empty
slot holds there.
"""

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.constant_folding import at_numbers, is_steep
from tinyjax.discovery.dimensions.parameter_entries import Meeting, leaves_behind
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, REDUCTIONS
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.graph.def_use import DefUse, is_view
from tinyjax.discovery.graph.graph import OWN, Op, Value
from tinyjax.discovery.paths.row_factors import RowFactor, _is_one, _is_zero, _itself

ROW_BY_ROW = ""
WINDOW_MEAN = "reduce_window_mean"
"""What a sum over windows becomes that is divided by the number of pixels in each."""

_SUMS = ("add", "add_any", "sub")
_NORMS = ("tinyjax_centred", "tinyjax_inverse_rms")
_GROUPED = (
    "`WidthGroupNorm` normalises it: a newborn changes the statistics of its group or, alone in one, is rescaled "
    "whatever its fan-in; a batch normalisation grows, and between matrix products so do `WidthRMSNorm` and "
    "`WidthLayerNorm`"
)


class Flow:
    """The values computed from one product along one hidden dimension.

    Attributes:
        mixing: for every value that depends on the product along the dimension, why its rows are no longer the
            product's (`ROW_BY_ROW`, the empty string, where they are).
        empty: what an empty slot holds there, where that is a known number.
        unsilent_op: for a value at which an empty slot is not zero, the operation that made it so.
        pools: for every value, the poolings and reductions over rows on the way to it, in order.
        degree: for every value that scales with a power of the product, that power; statistics of a normalisation are
            told by it (a mean has degree 1, a variance 2, a normalised value 0).
        epsilon: the constants added to statistics of degree 2.
        modulated: operations in which rows met a summary of themselves.
        normalised: those of them that left degree 0.
        summaries: number of entries of every such summary; the number of slots for a statistic over all rows.
        met: for every parameter leaf that met the flow slot by slot, the operations in which it did.
        weights: for every value, the factors that its rows were multiplied by one by one.
        beside: operations in which a vector was multiplied by a factor of the rows before both met the flow.
        counted: for every leaf that tells a norm of `tinyjax.models` which slots it counts, the operations that ask.
        refusal: why the dimension cannot grow wherever it is read (such a norm, a slope that is not finite), or "".
        gates: values that multiply the flow slot by slot, and which are given with each new neuron.
        ops: the operations that read any of these values, in order.

    `others` are the
    results of further products that write the dimension, in the same rows, empty where its slots are.
    """

    def __init__(
        self,
        axes: Axes,
        wiring: DefUse,
        producer: Product,
        slots: Atom,
        gates: frozenset[Value] = frozenset(),
        others: Sequence[Value] = (),
    ):
        starts = (*producer.op.outs, *others)
        self.mixing: dict[Value, str] = dict.fromkeys(starts, ROW_BY_ROW)
        self.empty: dict[Value, Any] = {start: _zero(start) for start in starts}
        self.unsilent_op: dict[Value, str] = {}
        self.pools: dict[Value, tuple[Op, ...]] = dict.fromkeys(starts, ())
        self.degree: dict[Value, float] = dict.fromkeys(starts, 1.0)
        self.epsilon: list[float] = []
        self.modulated: list[Op] = []
        self.normalised: list[Op] = []
        self.summaries: set[int] = set()
        self.met: dict[int, list[Meeting]] = {}
        self.weights: dict[Value, tuple[RowFactor, ...]] = dict.fromkeys(starts, ())
        self.beside: set[Op] = set()
        self.counted: dict[int, list[Op]] = {}
        self.refusal = ""
        self._axes, self._wiring, self._slots, self.gates = axes, wiring, slots, gates
        # Steps of the scans around the producer are rows, unless its kernel has one layer for each.
        self._row_scans = frozenset() if producer.kernel.stack else frozenset(producer.op.scans)
        self.ops: list[Op] = []
        walk = wiring.walk(starts)
        for op in walk:
            self.ops.append(op)
            self._follow(op)
            walk.reach(v for v in op.outs if v in self.mixing)

    def _follow(self, op: Op) -> None:
        if op.name in _NORMS:
            self._count(op)
        if op.name == "tinyjax_group_norm":
            self.refusal = _GROUPED
        along = [out for out in op.outs if self._has_slots(out)]
        if not along:
            return  # the dimension ends here: a consumer, or a reduction over it
        self._meet_parameters(op)
        # Weights are told apart by identity: what adds none hands on the very tuple, as streams collect many.
        weights = list({id(self.weights[v]): self.weights[v] for v in op.ins if v in self.weights}.values())
        why, own = self._mixed_by(op)
        if len(weights) > 1:
            why = why or f"its rows are weighted in two ways before `{op.name}`"
        if self._is_steep(op):
            self.refusal = self.refusal or f"the gradient of `{op.name}` is not finite where a neuron is empty"
        value = self._empty_value(op)
        pools = min((self.pools[v] for v in op.ins if v in self.pools), key=len)
        if self.divides_by_count(op):
            pools = (*pools[:-1], dataclasses.replace(pools[-1], name=WINDOW_MEAN))
        degree = self._degree(op)
        weighted = (*weights[0], *own) if own else weights[0]
        for out in along:
            self.mixing[out] = why
            self.pools[out] = (*pools, op) if self._pools(op) else pools
            self.weights[out] = weighted
            if degree is not None:
                self.degree[out] = degree
            if value is not None:
                self.empty[out] = np.asarray(value).astype(out.dtype)
            self._record_unsilent(op, out)

    def _has_slots(self, value: Value) -> bool:
        return self._axes.has(value, self._slots)

    def _mixed_by(self, op: Op) -> tuple[str, tuple[RowFactor, ...]]:
        """Why the rows are no longer the product's, and the factors they are multiplied by here."""
        reasons = [self.mixing[v] for v in op.ins if v in self.mixing]
        if op.name == "scan_carry":
            return "it is carried from one step of a scan to the next", ()
        if op.name in OWN or _is_elementwise(op):
            mixed = next((r for r in reasons if r != ROW_BY_ROW), ROW_BY_ROW)
            if op.name in OWN or op.name in _SUMS:
                return mixed or self._modulated_by(op), ()
            outside = [i for i, v in enumerate(op.ins) if v not in self.mixing and v not in self.gates]
            differing = [i for i in outside if not self._same_in_all_rows(op.ins[i])]
            if self.divides_by_count(op):
                differing = []
            weights = [weight for i in differing if (weight := self._weight(op, i)) is not None]
            if len(weights) < len(differing):
                mixed = mixed or f"its rows are weighted one by one in `{op.name}`"
            return mixed or self._modulated_by(op), tuple(weights)
        if self._pools(op):
            return reasons[0], ()
        return f"its rows are mixed by `{op.name}`", ()

    def _pools(self, op: Op) -> bool:
        """Whether an operation summarises rows, or sets zeros beside them."""
        if op.name == "pad":
            inner = any(inner for _, _, inner in op.params["padding_config"])
            return not inner and self._wiring.scalar(op.ins[1]) == 0
        return op.name in REDUCTIONS or op.name.startswith("reduce_window")

    def divides_by_count(self, op: Op) -> bool:
        """Whether a sum over windows is divided by the number of pixels each window holds, padding left out."""
        if op.name != "div" or op.ins[0] not in self.mixing or not self.pools[op.ins[0]]:
            return False
        value, pool = op.ins[1], self.pools[op.ins[0]][-1]
        while (maker := self._wiring.made_by.get(value)) is not None and _is_layout(maker):
            value = maker.ins[0]
        same = maker is not None and maker.name == pool.name == "reduce_window_sum" and maker.params == pool.params
        return same and maker is not None and self._wiring.scalar(maker.ins[0]) == 1

    def _weight(self, op: Op, operand: int) -> RowFactor | None:
        """An operand that differs between rows, as a factor of the rows; None where it is no such thing."""
        if op.name == "mul":
            factor = _itself
        elif op.name == "div" and operand == 1:
            factor = jnp.reciprocal
        elif op.name == "select_n" and operand == 0 and (which := self.selected(op)) is not None:
            factor = (_is_zero, _is_one)[which]
        else:
            return None
        value, meeting = op.ins[operand], op
        while self._has_slots(value):
            found = self.factored(value)
            if found is not None:
                op, operand = found
                (leaf, through), *_ = leaves_behind(self._wiring, self._axes, op.ins[1 - operand]).items()
                self.met.setdefault(leaf, []).append(Meeting(meeting, through))
                self.beside.add(op)
            else:
                maker = self._wiring.made_by.get(value)
                if maker is None or not _is_layout(maker):
                    return None
                op, operand = maker, 0
            value = op.ins[operand]
        return RowFactor(op, operand, value, factor)

    def factored(self, value: Value) -> tuple[Op, int] | None:
        """Of a vector along the slots times something else, the product and which operand is the other.

        A root-mean-square norm may multiply what it divides by with its scale first.
        """
        op = self._wiring.made_by.get(value)
        if op is None or op.name != "mul":
            return None
        vectors = [i for i, v in enumerate(op.ins) if self._has_slots(v) and self._wiring.vector(v) is not None]
        return (op, 1 - vectors[0]) if len(vectors) == 1 else None

    def is_vector(self, value: Value) -> bool:
        """Whether a value is a parameter vector along the slots, the same in all rows."""
        found = self._wiring.vector(value)
        return found is not None and self._has_slots(found[1]) and self._only_slots(found[1])

    def _only_slots(self, value: Value) -> bool:
        return all(a is self._slots for axis in self._axes.dimensions(value) for a in axis)

    def downstream(self, start: Value) -> "Flow":
        """The same flow from one of its values on."""
        part = copy.copy(self)
        part.ops = []
        walk = self._wiring.walk([start])
        for op in walk:
            part.ops.append(op)
            walk.reach(v for v in op.outs if v in self.mixing)
        part.mixing = {v: self.mixing[v] for v in walk.reached if v in self.mixing}
        return part

    def is_weight(self, op: Op, value: Value) -> bool:
        """Whether an operand from outside is a factor of the rows, which `weights` tell of."""
        (out,) = op.outs
        before = min(len(self.weights[v]) for v in op.ins if v in self.weights)
        return len(self.weights[out]) > before and not self._same_in_all_rows(value)

    def selected(self, op: Op) -> int | None:
        """Which of two cases of a `select_n` is the flow, the other one being zero."""
        cases = op.ins[1:]
        inside = [i for i, v in enumerate(cases) if v in self.mixing]
        zero = [i for i, v in enumerate(cases) if v not in self.mixing and self._wiring.scalar(v) == 0]
        return inside[0] if len(cases) == 2 and len(inside) == len(zero) == 1 else None

    def _count(self, op: Op) -> None:
        """Notes which leaf tells a norm of `tinyjax.models` what it counts; without one it would count newborns."""
        found = self._wiring.vector(op.ins[1])
        if found is None or op.ins[0] not in self.mixing:
            self.refusal = f"`counted` of a norm (`{op.name}`) is no parameter: it would count neurons still to be born"
        else:
            self.counted.setdefault(found[0].leaf, []).append(op)

    def _modulated_by(self, op: Op) -> str:
        """Statistics over rows may meet the rows they are of only to normalise them: shift and scale, degree 1 to 0."""
        if len({len(self.pools[v]) for v in op.ins if v in self.pools}) < 2:
            return ROW_BY_ROW
        degree = self._degree(op)
        self.modulated.append(op)
        chains = sorted((self.pools[v] for v in op.ins if v in self.pools), key=len)
        # A mean over pixels and then over samples is one over both; a pooling before the norm is a summary of its own.
        self.summaries |= {math.prod(p.outs[0].shape) for p in (*chains[0], chains[-1][-1])}
        if op.name in ("mul", "div") and degree == 0:
            self.normalised.append(op)
        elif op.name != "sub" or degree != 1:
            return f"its rows meet a summary of themselves in `{op.name}`"
        return ROW_BY_ROW

    def pools_met(self, op: Op) -> int:
        """How often the operands of an operation that follow the flow have been summarised."""
        return min(len(self.pools[v]) for v in op.ins if v in self.pools)

    def meets_root(self, op: Op) -> bool:
        """Whether a leaf meets the flow in an operation through a square root: a running variance in use."""
        return any(m.op is op and m.through & {"sqrt", "rsqrt"} for found in self.met.values() for m in found)

    def degree_met(self, op: Op) -> float | None:
        """Degree of the operand of an operation that follows the flow."""
        return next((self.degree.get(v) for v in op.ins if v in self.mixing), None)

    def _degree(self, op: Op) -> float | None:
        """Of the result, where it is a power of the product."""
        inside = [v for v in op.ins if v in self.mixing]
        degrees = [self.degree[v] for v in inside if v in self.degree]
        if len(degrees) < len(inside):
            return None
        first = degrees[0]
        if is_view(op) or op.name in ("broadcast_in_dim", "reduce_sum", "reduce_window_sum", "stop_gradient", "neg"):
            return first
        if op.name == "mul":
            return sum(degrees)
        if op.name == "div":
            return first - degrees[1] if len(inside) == 2 else (first if op.ins[0] in inside else -first)
        if op.name == "square":
            return 2 * first
        if op.name == "integer_pow":
            return op.params["y"] * first
        if op.name in ("sqrt", "rsqrt"):
            return first / 2 if op.name == "sqrt" else -first / 2
        if op.name in ("max", "clamp"):
            return first if first == 2 and self.pools[inside[0]] else None
        if op.name in _SUMS:
            return self._degree_of_sum(op, inside, degrees)
        if op.name == "select_n":
            return first if all(self._is_nan(v) for v in op.ins[1:] if v not in self.mixing) else None
        return None

    def _is_nan(self, value: Value) -> bool:
        """Whether a value is NaN throughout: `jnp.var` returns it for statistics of nothing."""
        constant = self._wiring.scalar(value)
        return constant is not None and bool(np.isnan(constant))

    def _degree_of_sum(self, op: Op, inside: list[Value], degrees: list[float]) -> float | None:
        if len(inside) == 2:
            return degrees[0] if degrees[0] == degrees[1] else None
        (other,) = [v for v in op.ins if v not in self.mixing] or [None]
        constant = None if other is None else self._wiring.scalar(other)
        if constant is not None and degrees[0] == 2 and self.pools[inside[0]]:
            self.epsilon.append(float(constant))
        return degrees[0]

    def _same_in_all_rows(self, value: Value) -> bool:
        """Whether an operand from outside treats all rows of the product alike (it may differ between slots)."""
        queue, seen = deque([value]), {value}
        while queue:  # the nearest first: what differs is mostly near, and what lies behind it may be the whole network
            value = queue.popleft()
            if self._wiring.steps.get(value, frozenset()) & self._row_scans:
                return False
            if self._only_slots(value):
                continue
            op = self._wiring.made_by.get(value)
            if op is None or not (op.name in ELEMENTWISE or _is_layout(op)):
                return False
            queue += [v for v in op.ins if v not in seen]
            seen.update(op.ins)
        return True

    def _empty_value(self, op: Op) -> Any:
        known = [self.known(v, op.name in _SUMS) for v in op.ins]
        if op.name in OWN:  # zero gives zero; what they give elsewhere depends on other slots or on a draw
            return 0 if any(k is not None and k == 0 for v, k in zip(op.ins, known) if v in self.mixing) else None
        if op.name in ("mul", "and") and any(k is not None and k == 0 for k in known):
            return 0 if all(k is None or np.isfinite(k) for k in known) else np.nan
        if op.name == "div" and known[0] is not None and known[0] == 0:
            return np.nan if known[1] is not None and known[1] == 0 else 0
        if op.name == "select_n" and all(k is not None for k in known[1:]) and len({float(k) for k in known[1:]}) == 1:
            return known[1]
        if (
            op.name in ("cond_out", "scan_carry")
            and all(k is not None for k in known)
            and len({float(k) for k in known}) == 1
        ):
            return known[0]
        if is_view(op) or op.name in (
            "broadcast_in_dim",
            "scan_in",
            "scan_out",
            "reduce_max",
            "reduce_min",
            "scan_carry",
            "reduce_window_max",
        ):
            return known[0]
        if op.name in ("reduce_sum", "reduce_window_sum", "pad", "slice", "rev", "cumsum"):
            return 0 if known[0] is not None and known[0] == 0 else None
        if op.name == "dot_general":
            return 0 if any(k is not None and k == 0 for v, k in zip(op.ins, known) if v in self.mixing) else None
        if op.name in ELEMENTWISE and all(k is not None for k in known) and op.eqn is not None:
            return at_numbers(op, known)
        return None

    def _is_steep(self, op: Op) -> bool:
        """Whether an operation has an infinite slope at an empty slot: times a gradient of zero that would be NaN."""
        return is_steep(op, [self.known(v, False) for v in op.ins], [v in self.mixing for v in op.ins])

    def known(self, value: Value, shifts: bool) -> Any:
        """What an empty slot holds in an operand; a parameter vector that is *added* (`shifts`) is zero there."""
        source = self._behind_layout(value, shifts)
        number = self._at_hand(source, shifts)
        factors, seen = [source] if shifts and number is None else [], set[Value]()
        while factors:  # a running mean, times its momentum
            factor = self._behind_layout(factors.pop(), shifts)
            found, op = self._at_hand(factor, shifts), self._wiring.made_by.get(factor)
            if found is not None and found == 0:
                return 0
            product = found is None and op is not None and op.name in ("mul", "div") and factor not in seen
            if op is not None and product and self._axes.parameter_only(factor):
                factors += op.ins[:1] if op.name == "div" else op.ins
            seen.add(factor)
        return number

    def _at_hand(self, value: Value, shifts: bool) -> Any:
        """What an empty slot holds in an operand, as far as that is known without asking for what it is made of."""
        if value in self.empty:
            return self.empty[value]
        if value.const is None and shifts and self._wiring.vector(value) is not None and self._has_slots(value):
            return _zero(value)
        return value.const

    def _behind_layout(self, value: Value, shifts: bool) -> Value:
        while self._at_hand(value, shifts) is None and (op := self._wiring.made_by.get(value)) is not None:
            if op.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
                break
            value = op.ins[0]
        return value

    def _meet_parameters(self, op: Op) -> None:
        if op.name in OWN:
            return
        for value in op.ins:
            if value in self.mixing or not self._has_slots(value):
                continue
            for leaf, through in leaves_behind(self._wiring, self._axes, value).items():
                self.met.setdefault(leaf, []).append(Meeting(op, through))

    def _record_unsilent(self, op: Op, out: Value) -> None:
        earlier = [self.unsilent_op[v] for v in op.ins if v in self.unsilent_op]
        value = self.empty.get(out)
        if value is not None and value == 0:
            return
        self.unsilent_op[out] = earlier[0] if earlier else op.name


def _is_elementwise(op: Op) -> bool:
    return op.name in ELEMENTWISE or op.name == "scan_out" or _is_layout(op)


def _is_layout(op: Op) -> bool:
    return op.name == "broadcast_in_dim" or is_view(op)


def _zero(value: Value) -> Any:
    return np.zeros((), value.dtype)
