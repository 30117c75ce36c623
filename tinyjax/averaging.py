"""Whether a loss is a mean over the samples of its batch, as all of tinyjax takes it to be, or a sum.

A loss that sums is silently wrong wherever batches of several sizes meet: chunks, micro-batches, the parts of a growth.
It is found without running anything: the loss is traced on two numbers of samples, and both graphs are walked together.
Numbers that differ between them (the 1/n of a mean) and sums over the samples say by which factor every value scales
with the number of samples; the loss must not scale like a sum.
"""

from collections.abc import Callable
from typing import Any

import jax

from tinyjax.atoms import root, roots
from tinyjax.axes import Axes
from tinyjax.layout import Params
from tinyjax.trace import MATMULS, VIEWS, Op, Trace, Value, flatten, has_samples, trace

# By how much the terms of a value are larger in the first graph than in the second; None: not by a factor.
Factors = frozenset[float] | None

_SAME = frozenset({1.0})
_POWERS = (1, 0.5)  # of the number of samples, as in sum, sum / sqrt(n); others are also what coupled samples give
_ADDITIVE = VIEWS | frozenset(
    """add add_any sub neg broadcast_in_dim reduce_sum stop_gradient scan_carry scan_out concatenate slice stack unstack
    split select_n cond_out""".split()
)
_PRODUCTS = MATMULS | {"mul"}


def require_mean(loss_fn: Callable[..., Any], params: Params, many: Any, few: Any, *, has_aux: bool = False) -> None:
    """Raises a ValueError if the loss sums over the samples of its batch; what it cannot tell, it lets pass.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`.
        params: the parameters; only shapes matter.
        many: a batch.
        few: a batch of fewer samples.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
    """
    _refuse_sums(*(trace(loss_fn, params, batch, has_aux=has_aux) for batch in (many, few)))


def require_mean_in_parts(loss_fn: Callable[..., Any], params: Params, part: Any, *, has_aux: bool = False) -> None:
    """Raises a ValueError if the loss sums over the samples of a part of a batch; twice as many are traced beside it.

    A loss that takes no other number of samples passes: all its parts are alike.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`.
        params: the parameters; only shapes matter.
        part: samples; only shapes matter.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
    """
    one = trace(loss_fn, params, part, has_aux=has_aux)

    def doubled(leaf: Any) -> Any:
        if not has_samples(leaf, one.num_samples):
            return leaf
        return jax.ShapeDtypeStruct((2 * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)

    try:
        two = trace(loss_fn, params, jax.tree.map(doubled, part), has_aux=has_aux)
    except (TypeError, ValueError, AssertionError):
        return
    _refuse_sums(two, one)


def _refuse_sums(many: Trace, few: Trace) -> None:
    ratio = many.num_samples / few.num_samples
    first, second = map(flatten, (many, few))
    if [op.name for op in first.ops] != [op.name for op in second.ops]:
        return
    axes = Axes(first, many.batched, many.num_samples)
    dependent = set(first.batch)
    factors: dict[Value, Factors] = {}

    def of(a: Value, b: Value) -> Factors:
        return _of_constant(a, b) if a.kind == "const" else factors.get(a, _SAME)

    for op, twin in zip(first.ops, second.ops):
        varying = [i for i, v in enumerate(op.ins) if v in dependent]
        ins = [of(*pair) for pair in zip(op.ins, twin.ins)]
        if varying and op.name in _ADDITIVE:
            ins = [ins[i] for i in varying]  # a term of the parameters alone is no matter
        result = _apply(op, ins)
        if result is not None and _sums_over_samples(op, axes):
            result = frozenset(factor * ratio for factor in result)
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


def _of_constant(a: Value, b: Value) -> Factors:
    if a.const is None or b.const is None:
        return _SAME if a.shape == b.shape else None
    if a.const == b.const:
        return _SAME
    return frozenset({float(a.const) / float(b.const)}) if a.const and b.const else None


def _apply(op: Op, ins: list[Factors]) -> Factors:
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
