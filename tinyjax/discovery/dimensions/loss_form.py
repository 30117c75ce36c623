"""Whether a loss is a mean over the samples of its batch, as all of tinyjax takes it to be, or a sum.

A loss that sums is silently wrong wherever batches of several sizes meet: chunks, micro-batches, the parts of a growth.
It is found without running anything: the loss is traced on two numbers of samples, and both graphs are walked together.
Numbers that differ between them (the 1/n of a mean) and sums over the samples say by which factor every value scales
with the number of samples; the loss must not scale like a sum.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tinyjax.core.batch import has_samples
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.constant_folding import at_numbers
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE, RANDOM
from tinyjax.discovery.dimensions.unification import root, roots
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.graph import LAYOUTS, MATMULS, VIEWS, Graph, Op, Value
from tinyjax.discovery.graph.liveness import behind_loss
from tinyjax.discovery.graph.tracing import Trace

# By how much the terms of a value are larger in the first graph than in the second; None: not by a factor.
SampleFactors = frozenset[float] | None

_SAME = frozenset({1.0})
_POWERS = (1, 0.5)  # of the number of samples, as in sum, sum / sqrt(n); others are also what coupled samples give
_ADDITIVE = VIEWS | frozenset(
    """add add_any sub neg broadcast_in_dim reduce_sum stop_gradient scan_carry scan_out concatenate slice stack unstack
    split select_n cond_out""".split()
)
_PRODUCTS = MATMULS | {"mul"}


def require_mean_in_parts(traced: Callable[[Any], Trace], part: Any) -> None:
    """Raises a ValueError if the loss sums over the samples of a part of a batch; twice as many are traced beside it.

    A loss that takes no other number of samples passes: all its parts are alike.

    Args:
        traced: from samples to the loss traced on them.
        part: samples; only shapes matter.
    """
    one = traced(part)

    def doubled(leaf: Any) -> Any:
        if not has_samples(leaf, one.num_samples):
            return leaf
        return jax.ShapeDtypeStruct((2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)

    try:
        two = traced(jax.tree.map(doubled, part))
    except (TypeError, ValueError, AssertionError):
        return
    require_mean(two, one)


def require_mean(many: Trace, few: Trace) -> None:
    """Raises a ValueError if the loss sums over the samples of its batch; what it cannot tell, it lets pass.

    Args:
        many: the loss traced on a batch.
        few: the loss traced on fewer samples.
    """
    ratio = many.num_samples / few.num_samples
    first, second = map(flatten, (many, few))
    if [op.name for op in first.ops] != [op.name for op in second.ops]:
        return
    axes = Axes(first, many.batched, many.num_samples)
    dependent = set(first.batch)
    makers, twins = ({out: op for op in graph.ops for out in op.outs} for graph in (first, second))
    factors: dict[Value, SampleFactors] = {}

    def of(a: Value, b: Value) -> SampleFactors:
        return _of_constant(a, b) if a.kind == "const" else factors.get(a, _SAME)

    for op, twin in zip(first.ops, second.ops):
        varying = [i for i, v in enumerate(op.ins) if v in dependent]
        ins = [of(*pair) for pair in zip(op.ins, twin.ins)]
        if varying and op.name in _ADDITIVE:
            ins = [ins[i] for i in varying]  # a term of the parameters alone is no matter
        result = _apply(op, ins)
        if result is not None and _sums_over_samples(op, axes):
            result = frozenset(factor * ratio for factor in result)
        if result is not None and _accumulates(op, makers):
            lengths = [found[scan.ins[1]].scans[-1].length for scan, found in ((op, makers), (twin, twins))]
            result = frozenset(factor * lengths[0] / lengths[1] for factor in result)
        factors.update(dict.fromkeys(op.outs, result))
        dependent.update(op.outs if varying else ())
    found = factors.get(first.loss, _SAME) if first.loss in dependent else None
    for power in _POWERS:
        if found is not None and any(abs(factor / ratio**power - 1) < 1e-3 for factor in found):
            how = "it is larger" if power == 1 else f"it is multiplied by their number to the power {power:g}"
            raise ValueError(
                f"the loss sums over the samples of its batch: on more samples of the same kind {how}. Take the mean "
                "over them, so that parts of a batch are comparable"
            )


def _of_constant(a: Value, b: Value) -> SampleFactors:
    if a.const is None or b.const is None:
        return _SAME if a.shape == b.shape else None
    if a.const == b.const:
        return _SAME
    return frozenset({float(a.const) / float(b.const)}) if a.const and b.const else None


def _apply(op: Op, ins: list[SampleFactors]) -> SampleFactors:
    known = [factors for factors in ins if factors is not None]
    if len(known) < len(ins):
        return None
    if op.name in _ADDITIVE:
        return frozenset().union(*known) or _SAME
    if op.name in _PRODUCTS:
        return frozenset(x * y for x in known[0] for y in known[1])
    if op.name == "div":
        return frozenset(x / y for x in known[0] for y in known[1])
    return _SAME if all(factors == _SAME for factors in known) else None


def _sums_over_samples(op: Op, axes: Axes) -> bool:
    if op.name not in MATMULS | {"reduce_sum"}:
        return False

    def counts(value: Value) -> bool:
        return any(atom is root(axes.samples) for axis in axes[value] for atom in roots(axis))

    return any(map(counts, op.ins)) and not any(map(counts, op.outs))


def _accumulates(op: Op, makers: Mapping[Value, Op]) -> bool:
    """Whether the carry that leaves a scan is what entered a step plus something else: a sum over the steps."""
    if op.name != "scan_carry" or len(op.ins) != 2:
        return False
    result, entered = op.ins
    while (maker := makers.get(result)) is not None and maker.name in VIEWS:
        (result,) = maker.ins[:1]
    return maker is not None and maker.name in ("add", "add_any") and entered in maker.ins


# Linear in each operand on its own; `mul` and `div` are linear in the summed operand when the other has no samples.
_LINEAR = frozenset(
    """add add_any sub neg convert_element_type reshape broadcast_in_dim squeeze transpose copy copy_p reduce_sum
    stop_gradient scan_carry scan_in scan_out concatenate slice stack unstack split name optimization_barrier
    sharding_constraint""".split()
)
_BILINEAR = frozenset(("mul", "dot_general", "conv_general_dilated"))


def coupling(graph: Graph, axes: Axes) -> str:
    """What couples the samples of a batch in the loss; "" when the loss is a mean of per-sample terms."""
    if len(axes.sample_atoms()) > 1:
        return "it divides them into parts of its own"
    needed = behind_loss(graph)
    summed: set[Value] = set()  # computed from a sum over the samples
    dependent = set(graph.batch)  # computed from the batch
    numbers = _numbers(graph, axes)
    known = -1
    while known < len(summed) + len(dependent):  # again until what leaves a step of a scan has entered the next
        known = len(summed) + len(dependent)
        for op in graph.ops:
            numbered = any(v in numbers for v in op.ins) and not any(v in numbers for v in op.outs)
            if not numbered and not any(v in dependent for v in op.ins) and op.name not in RANDOM:
                continue
            dependent.update(op.outs)
            if not any(v in needed for v in op.outs):
                continue
            why = _couples(op, axes, summed, dependent) or _picks(op, axes, numbers)
            if why:
                return why
            if any(v in summed for v in op.ins) or _sums(op, axes):
                summed.update(op.outs)
            if op.name == "scan_carry" and len(op.ins) == 2:
                result, entered = op.ins
                dependent.update({entered} if result in dependent else ())
                summed.update({entered} if result in summed else ())
    return "" if graph.loss in summed else "the samples are not averaged at the end"


Numbers = dict[Value, tuple[np.ndarray | None, ...]]


def _numbers(graph: Graph, axes: Axes) -> Numbers:
    """The values that number the samples (`jnp.arange(n)`), by columns: their entries, None for a column of others."""
    numbers: Numbers = {}
    constant: set[Value] = set()
    for op in graph.ops:
        if op.name != "scan_carry" and all(v.kind == "const" or v in constant for v in op.ins):
            constant.update(op.outs)
        if not any(_samples_in(v, axes) for v in op.outs):
            continue
        if op.name == "concatenate" and any(v in numbers for v in op.ins):
            numbers[op.outs[0]] = tuple(column for v in op.ins for column in numbers.get(v, (None,) * v.shape[-1]))
        elif op.name == "iota" or any(v in numbers for v in op.ins):
            entries = [_entries(v, numbers) for v in op.ins]
            if op.eqn is not None and all(e is not None for e in entries):
                numbers[op.outs[0]] = (at_numbers(op, entries),)
        elif op.outs[0] in constant and op.name not in ELEMENTWISE | RANDOM | LAYOUTS:
            numbers[op.outs[0]] = (None,)  # `jnp.linspace` and the like
    return numbers


def _entries(value: Value, numbers: Numbers) -> Any:
    if value.const is not None:
        return np.asarray(value.const, value.dtype)
    columns = numbers.get(value, (None,))
    return columns[0] if len(columns) == 1 else None


def _picks(op: Op, axes: Axes, numbers: Numbers) -> str:
    """Samples may be looked up only one by one in their own order, `logits[jnp.arange(n), labels]`."""
    if op.name != "gather":
        numbered = any(v in numbers or (v.kind == "const" and _samples_in(v, axes)) for v in op.ins)
        if not numbered or any(v in numbers for v in op.outs):
            return ""
        return f"constants that differ from sample to sample (`jnp.arange`?) meet the batch in `{op.name}`"
    dimensions = op.params["dimension_numbers"]
    for column, d in enumerate(dimensions.start_index_map):
        if not any(atom is root(axes.samples) for atom in roots(axes[op.ins[0]][d])):
            continue
        columns = numbers.get(op.ins[1], ())
        entries = columns[column] if column < len(columns) else None
        if entries is None or not np.array_equal(np.ravel(entries), np.arange(axes.samples.size)):
            return "`gather` picks among the samples"
    return ""


def _samples_in(value: Value, axes: Axes) -> int:
    along = sum(atom is root(axes.samples) for axis in axes[value] for atom in roots(axis))
    return along + (value in axes.stepped)


def _sums(op: Op, axes: Axes) -> bool:
    """Whether an operation removes the samples axis."""
    return any(_samples_in(v, axes) for v in op.ins) and not any(_samples_in(v, axes) for v in op.outs)


def _couples(op: Op, axes: Axes, summed: set[Value], dependent: set[Value]) -> str:
    if any(_samples_in(v, axes) > 1 for v in (*op.ins, *op.outs)):
        return f"`{op.name}` pairs the samples with each other"
    if op.name == "scan_carry" and op.path in axes.steps:
        return "a scan carries something from sample to sample"
    keyed = any(_samples_in(v, axes) for v in op.ins[:1])  # a key for every sample
    if op.name in RANDOM and not keyed and any(_samples_in(v, axes) for v in op.outs):
        return f"`{op.name}` draws random numbers for the whole batch"
    known = op.name in _LINEAR or op.name in _BILINEAR or op.name == "div"
    if _sums(op, axes) and not (op.name == "reduce_sum" or op.name in _BILINEAR):
        return f"`{op.name}` is taken over the samples"
    if _works_along_samples(op, axes):
        return f"`{op.name}` works along the samples"
    touched = [v in summed for v in op.ins]
    if not any(touched):
        return ""
    if any(v in dependent and not s for v, s in zip(op.ins, touched)) or any(_samples_in(v, axes) for v in op.outs):
        return f"a statistic of the batch meets its samples in `{op.name}` (batch normalisation?)"
    if not known or (op.name in _BILINEAR and sum(touched) > 1) or (op.name == "div" and touched[1]):
        return f"a mean over the batch goes through `{op.name}`"
    return ""


def _works_along_samples(op: Op, axes: Axes) -> bool:
    """Whether an operation other than a sum treats the samples axis as more than a batch axis."""
    mark = f"it passes through `{op.name}`"
    if mark not in root(axes.samples).marks:
        return False
    return op.name != "gather" and any(_samples_in(v, axes) for v in op.ins)
