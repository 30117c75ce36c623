"""The values of a graph that are computed from constants alone, and where two traces of one loss hold others.

A model divides by numbers that it computes from the shapes of its parameters. In a trace they are constants: `Folded`
evaluates them where they meet what depends on parameters or on the batch, and `differences` compares two traces of the
same loss, at two sets of capacities, there. Sizes are no values: of arrays only what both have is compared, and bounds
of slices are left out.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tinyjax.core.jaxprs import open_jaxpr
from tinyjax.discovery.dimensions.constant_folding import at_numbers
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, RANDOM
from tinyjax.discovery.graph.graph import LAYOUTS, VIEWS, Graph, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.graph.liveness import behind_loss

LARGEST = 2**22
"""Entries of a constant array that is still evaluated."""

_NUMBERS = {"integer_pow": "y", "top_k": "k"}  # numbers that an operation keeps among its parameters
_FIRST_ONLY = frozenset("dynamic_slice gather".split())  # the other operands say where
_FIRST_TWO = frozenset("dynamic_update_slice".split())
_SCATTERS = frozenset("scatter scatter_add scatter-add scatter_mul scatter_min scatter_max scatter-mul".split())
_FAST = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "sqrt": np.sqrt, "exp": np.exp,
    "log": np.log, "max": np.maximum, "min": np.minimum, "square": np.square, "abs": np.abs, "sin": np.sin,
    "cos": np.cos, "floor": np.floor, "pow": np.power, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


class Difference(NamedTuple):
    """A place where two traces hold different values.

    Attributes:
        op: index of the operation among those that depend on parameters or the batch.
        operand: which operand is the value; -1 for a number of the operation itself.
        ratio: new / old where all entries have the same; None where it is no ratio.
        what: the value, in words.
        rounding: of the ratio.
    """

    op: int
    operand: int
    ratio: float | None
    what: str
    rounding: float = 8e-6


class Structure(NamedTuple):
    """The first operation in which two traces are different programs, in words.

    Operations that only rearrange entries may differ: an `einsum` of three operands orders them by size.
    """

    what: str


class Folded:
    """A graph with its constants evaluated on demand.

    Args:
        graph: the graph, as it was traced: what is equal at one capacity need not be at another.
        known: filled by all graphs that are compared: how constants are computed, and a number for each way.
        kept: filled by them, too: arrays that must live as long.

    Attributes:
        graph: the graph.
        ops: what the loss depends on and what depends on parameters, the batch or the step of a scan.
        used_by: for a value, the indices of the operations among `ops` that read it.
    """

    def __init__(self, graph: Graph, known: dict[Any, int], kept: list[Any]):
        self.graph = graph
        self._class: dict[Value, int] = {}  # equal for constants that are computed alike
        self._known, self._kept = known, kept
        self._made_by: dict[Value, Op] = {}
        self._values: dict[Value, np.ndarray | None] = {}
        needed = behind_loss(graph)
        self.ops: list[Op] = []
        for op in graph.ops:
            if not any(v in needed for v in op.outs):
                continue
            if op.eqn is not None and op.name not in KNOWN_FUNCTIONS and all(self.is_constant(v) for v in op.ins):
                params = tuple(sorted((name, repr(value)) for name, value in op.params.items()))
                for i, out in enumerate(op.outs):
                    alike = op.name, params, i, out.shape, *(self._class_of(v) for v in op.ins)
                    self._class[out] = self._known.setdefault(alike, len(self._known))
                    self._made_by[out] = op
            else:
                self.ops.append(op)
        self.used_by: dict[Value, list[int]] = {}
        for i, op in enumerate(self.ops):
            for v in {*op.ins, *op.chosen_by}:
                self.used_by.setdefault(v, []).append(i)

    def is_constant(self, value: Value) -> bool:
        """Whether a value is computed from constants alone."""
        return value.kind == "const" or value in self._class

    def _class_of(self, value: Value) -> int:
        if value not in self._class:
            alike: Any = ("array", id(value.array)) if value.const is None else (str(value.dtype), str(value.const))
            if value.const is None:
                self._kept.append(value.array)  # an array that lives keeps its id
            self._class[value] = self._known.setdefault((alike, value.shape), len(self._known))
        return self._class[value]

    def value(self, value: Value) -> np.ndarray | None:
        """What a constant holds, as a number where all of its entries are equal; None where that is not known."""
        stack = [value]
        while stack:
            v = stack[-1]
            if v in self._values:
                stack.pop()
                continue
            op = self._made_by.get(v)
            missing = [] if op is None else [x for x in op.ins if x not in self._values]
            if missing:
                stack += missing
                continue
            self._values[v] = _given(v) if op is None else _evaluate(op, v, [self._values[x] for x in op.ins])
        return self._values[value]

    def is_drawn(self, value: Value) -> bool:
        """Whether a constant is computed from random numbers."""
        seen, stack = set(), [value]
        while stack:
            op = self._made_by.get(stack.pop())
            if op is None or op in seen:
                continue
            if op.name in RANDOM:
                return True
            seen.add(op)
            stack += op.ins
        return False


def _given(v: Value) -> np.ndarray | None:
    if v.const is not None:
        return np.asarray(v.const, v.dtype)
    if v.array is None or math.prod(v.shape) > LARGEST or not isinstance(v.dtype, np.dtype):
        return None
    with jax.ensure_compile_time_eval():
        return _as_number(np.asarray(v.array))


def _as_number(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1)[0] if x.ndim and x.size and (x == x.reshape(-1)[0]).all() else x


def _evaluate(op: Op, out: Value, values: list[np.ndarray | None]) -> np.ndarray | None:
    """What an operation makes of constants."""
    known = [x for x in values if x is not None]
    if len(known) < len(values) or not isinstance(out.dtype, np.dtype):
        return None
    numbers = all(np.ndim(x) == 0 for x in known)
    if numbers and known and (op.name == "broadcast_in_dim" or (op.name in VIEWS and op.name in ELEMENTWISE)):
        return np.asarray(known[0], out.dtype)
    if numbers and known and op.name in VIEWS:
        return known[0]
    if numbers and op.name in _FAST:
        with np.errstate(all="ignore"):
            return np.asarray(_FAST[op.name](*known), out.dtype)
    if numbers and op.name == "div" and np.issubdtype(out.dtype, np.floating):
        with np.errstate(all="ignore"):
            return np.asarray(np.divide(*known), out.dtype)
    if len(op.outs) > 1 or math.prod(out.shape) > LARGEST:
        return None
    if not (numbers and op.name in ELEMENTWISE):
        if any(math.prod(v.shape) > LARGEST for v in op.ins):
            return None
        known = [np.broadcast_to(np.asarray(x), v.shape) for x, v in zip(known, op.ins)]
    return _as_number(at_numbers(op, known))


def differences(old: Folded, new: Folded) -> list[Difference] | Structure:
    """Where two traces of one loss hold other values; a `Structure` where they are two programs."""
    pairs = [_computing(folded) for folded in (old, new)]
    found: list[Difference] = []
    for (i, a), (_, b) in itertools.zip_longest(*pairs, fillvalue=(-1, None)):
        if a is None or b is None or a.name != b.name or len(a.ins) != len(b.ins):
            return Structure(f"`{a.name if a is not None else pairs[0][-1][1].name}`")
        for j, (x, y) in enumerate(zip((*a.ins, *a.chosen_by), (*b.ins, *b.chosen_by))):
            if old.is_constant(x) != new.is_constant(y):
                return Structure(f"an operand of `{a.name}`")
            if old.is_constant(x) and not _says_where(a, j):
                found += [Difference(i, j, *change) for change in _changes(old, x, new, y, a.name)]
        found += [Difference(i, -1, *change) for change in _own_changes(a, b)]
    return found


def _computing(folded: Folded) -> list[tuple[int, Op]]:
    """The operations that do more than rearrange entries."""
    return [(i, op) for i, op in enumerate(folded.ops) if op.name == "scan_in" or op.name not in LAYOUTS]


def _says_where(op: Op, operand: int) -> bool:
    """Whether an operand of an operation is a position: a size, and no value."""
    if op.name in _SCATTERS:
        return operand == 1
    return (op.name in _FIRST_ONLY and operand > 0) or (op.name in _FIRST_TWO and operand > 1)


def _changes(old: Folded, x: Value, new: Folded, y: Value, user: str) -> Iterator[tuple[Any, ...]]:
    """How a constant changes: () where it does not, one ratio or None with the value in words where it does."""
    if old._class_of(x) == new._class_of(y):
        return
    if old.is_drawn(x):
        yield None, f"random numbers that `{user}` takes (another shape draws others)"
        return
    a, b = old.value(x), new.value(y)
    if a is None or b is None:
        yield None, f"a constant of shape {list(x.shape)} that `{user}` takes and that is computed in another way"
        return
    tried = [_ratio(p, q) for p, q in _common(a, b)]
    if any(ratio == 1 for ratio in tried):
        return
    ratio = next((ratio for ratio in tried if ratio is not None), None)
    word = f"the number {float(a):.6g}" if np.ndim(a) == 0 else f"an array of shape {list(x.shape)}"
    coarse = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    yield ratio, f"{word} in `{user}`", 1.5 * float(jnp.finfo(x.dtype).eps) if coarse else 8e-6


def _common(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What two arrays have in common; an axis that is a product is also compared by its inner factor."""
    if np.ndim(a) == 0 or np.ndim(b) == 0 or a.shape == b.shape:
        yield (a, b)
        return
    if a.ndim != b.ndim:
        return
    ways = []
    for n, m in zip(a.shape, b.shape):
        inner = [k for k in range(2, min(n, m)) if n % k == 0 and m % k == 0] if n != m else []
        outer = [(n // k, k) for k in inner] + [(k, n // k) for k in inner]
        new = [(m // k, k) for k in inner] + [(k, m // k) for k in inner]
        ways.append([((n,), (m,)), *zip(outer, new)][:8])
    for way in itertools.islice(itertools.product(*ways), 64):
        shapes = [[size for axis in way for size in axis[side]] for side in (0, 1)]
        box = tuple(slice(0, min(p, q)) for p, q in zip(*shapes))
        yield a.reshape(shapes[0])[box], b.reshape(shapes[1])[box]


def _ratio(a: np.ndarray, b: np.ndarray) -> float | None:
    """New / old where all entries have the same ratio."""
    if np.array_equal(a, b, equal_nan=np.issubdtype(np.asarray(a).dtype, np.inexact)):
        return 1.0
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    live = a != 0
    if not live.any() or (b[~live] != 0).any() or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    ratios = b[live] / a[live]
    first = float(ratios.reshape(-1)[0])
    return first if first > 0 and np.allclose(ratios, first, rtol=1e-6, atol=0) else None


def _own_changes(a: Op, b: Op) -> Iterator[tuple[float | None, str]]:
    """Values that operations hold themselves: exponents, how often a loop turns, numbers of a loop's body, draws."""
    name = _NUMBERS.get(a.name)
    if name is not None and a.params[name] != b.params[name]:
        yield None, f"{a.params[name]}, the `{name}` of `{a.name}`"
    if a.name == "random_bits" and a.outs[0].shape != b.outs[0].shape:
        yield None, f"random numbers of shape {list(a.outs[0].shape)} (another shape draws others)"
    if a.name == "scan_carry" and a.stack != b.stack:
        yield None, f"the number of turns of a loop, {a.stack[-1] if a.stack else b.stack}"
    if a.eqn is not None and a.name not in KNOWN_FUNCTIONS:
        for x, y in itertools.zip_longest(_inner_numbers(a.params), _inner_numbers(b.params)):
            if x != y:
                yield None, f"the number {x} inside `{a.name}`"
                return


def _inner_numbers(params: Mapping[str, Any]) -> Iterator[float]:
    """The numbers in the programs inside an operation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Jaxpr | ClosedJaxpr):
                yield from _literals(open_jaxpr(part)[0])


def _literals(jaxpr: Jaxpr) -> Iterator[float]:
    for eqn in jaxpr.eqns:
        yield from (float(v.val) for v in eqn.invars if isinstance(v, Literal) and np.ndim(v.val) == 0)
        yield from _inner_numbers(eqn.params)
