"""Whether a loss is a mean of one term for each sample, so that a batch may be cut into chunks.

Batch normalisation in training mode, contrastive losses or a random draw shared by the batch couple the samples: the
loss of a part of the batch is then another function. The answer is read off the graph: once the samples have been
summed over, only linear operations with sample-free factors may follow on the way to the loss.
"""

from tinyjax.atoms import root, roots
from tinyjax.axes import RANDOM, Axes
from tinyjax.trace import Graph, Op, Value, behind_loss

# Linear in each operand on its own; `mul` and `div` are linear in the summed operand when the other has no samples.
_LINEAR = frozenset(
    """add add_any sub neg convert_element_type reshape broadcast_in_dim squeeze transpose copy copy_p reduce_sum
    stop_gradient carry stack unstack name optimization_barrier sharding_constraint""".split()
)
_BILINEAR = frozenset(("mul", "dot_general", "conv_general_dilated"))


def coupling(graph: Graph, axes: Axes) -> str:
    """What couples the samples of a batch in the loss; "" when the loss is a mean of per-sample terms."""
    needed = behind_loss(graph)
    summed: set[Value] = set()  # computed from a sum over the samples
    dependent = set(graph.batch)  # computed from the batch
    for op in graph.ops:
        if not any(v in dependent for v in op.ins) and op.name not in RANDOM:
            continue
        dependent.update(op.outs)
        if not any(v in needed for v in op.outs):
            continue
        why = _couples(op, axes, summed, dependent)
        if why:
            return why
        if any(v in summed for v in op.ins) or _sums(op, axes):
            summed.update(op.outs)
    return "" if graph.loss in summed else "the samples are not averaged at the end"


def _samples_in(value: Value, axes: Axes) -> int:
    return sum(atom is root(axes.samples) for axis in axes[value] for atom in roots(axis))


def _sums(op: Op, axes: Axes) -> bool:
    """Whether an operation removes the samples axis."""
    return any(_samples_in(v, axes) for v in op.ins) and not any(_samples_in(v, axes) for v in op.outs)


def _couples(op: Op, axes: Axes, summed: set[Value], dependent: set[Value]) -> str:
    if any(_samples_in(v, axes) > 1 for v in (*op.ins, *op.outs)):
        return f"`{op.name}` pairs the samples with each other"
    if op.name in RANDOM and any(_samples_in(v, axes) for v in op.outs):
        return f"`{op.name}` draws random numbers for the whole batch"
    if op.name == "iota" and any(_samples_in(v, axes) for v in op.outs):
        return "the samples are numbered (`iota`)"
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
