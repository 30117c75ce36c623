"""Whether a loss is a mean of one term for each sample, so that a batch may be cut into chunks.

Batch normalisation in training mode, contrastive losses or a random draw shared by the batch couple the samples: the
loss of a part of the batch is then another function. The answer is read off the graph: once the samples have been
summed over, only linear operations with sample-free factors may follow on the way to the loss.
"""

from typing import Any

import numpy as np

from tinyjax.atoms import root, roots
from tinyjax.axes import Axes
from tinyjax.constants import at_numbers
from tinyjax.rules import ELEMENTWISE, RANDOM
from tinyjax.trace import VIEWS, Graph, Op, Value, behind_loss

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
        elif op.outs[0] in constant and op.name not in ELEMENTWISE | RANDOM | VIEWS | {"broadcast_in_dim"}:
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
