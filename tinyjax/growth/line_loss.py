"""The loss along a path through parameter space, without computing twice what does not move.

A line search asks for the loss at many amplitudes. Operations that no moving parameter reaches are evaluated once.
Where a moving kernel meets an input at rest, W + c D gives x W + c (x D): both products are formed once as well, and
the search goes on from the sum. Only what lies behind the first non-linear operation is evaluated at each amplitude.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from tinyjax.core.jaxprs import CUSTOM, JIT, REMAT, subjaxpr
from tinyjax.core.params import Params
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.estimation.recording import evaluate

_PRODUCTS = ("dot_general", "conv_general_dilated", "mul")
_LINEAR = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "neg", "reduce_sum")
_SUMS = ("add", "add_any", "sub")


class _Affine(NamedTuple):
    """base + c slope."""

    base: Array
    slope: Array


class _Later(NamedTuple):
    """A value that is known only at an amplitude: its place among those computed there."""

    index: int


class _Step(NamedTuple):
    """An operation to be evaluated at every amplitude."""

    eqn: JaxprEqn
    operands: tuple[Any, ...]
    first: int  # place of its first result


def loss_along(
    traced: Trace, params: Params, batch: Any, path: Callable[[Array], Params], affine: Collection[int]
) -> Callable[[Array], Array]:
    """The function c -> loss of `path(c)`, prepared for many evaluations.

    Args:
        traced: the loss, traced at the shapes of `params` and `batch`.
        params: the parameters at c = 0.
        batch: the batch.
        path: from c to parameters; leaves that it returns as they came do not move.
        affine: which leaves, by position in `params`, move along a straight line that starts at `params`.

    Returns:
        A function of a scalar; `vmap` it freely.
    """
    rest = jax.tree.leaves(params)
    one = jnp.ones((), jnp.result_type(jnp.float32, *(x for x in rest if jnp.issubdtype(x.dtype, jnp.floating))))
    moving = [i for i, (new, old) in enumerate(zip(jax.tree.leaves(path(one)), rest)) if new is not old]
    straight = [i for i in moving if i in affine]
    curved = [i for i in moving if i not in affine]

    def leaves(c: Array, which: Sequence[int]) -> list[Array]:
        found = jax.tree.leaves(path(c))
        return [found[i] for i in which]

    _, slopes = jax.jvp(lambda c: leaves(c, straight), (one,), (one,))
    arguments: list[Any] = [*rest, *jax.tree.leaves(batch)]
    for i, slope in zip(straight, slopes):
        arguments[i] = _Affine(arguments[i], slope)
    for place, i in enumerate(curved):
        arguments[i] = _Later(place)
    plan = _Plan(len(curved))
    loss = plan.run(traced.jaxpr.jaxpr, traced.jaxpr.consts, arguments)[0]

    def loss_at(c: Array) -> Array:
        return plan.at(c, leaves(c, curved), loss)

    return loss_at


class _Plan:
    """What is left to do at every amplitude, after everything else has been done."""

    def __init__(self, known: int):
        self._size = known
        self._steps: list[_Step] = []

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Evaluates what is at rest, and plans the rest; the results of the jaxpr, as far as known."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, arguments))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if not any(isinstance(x, _Affine | _Later) for x in operands):
                results = evaluate(eqn, operands)
            elif eqn.primitive.name in JIT | REMAT | CUSTOM:
                results = self.run(*subjaxpr(eqn), operands)
            elif (moved := _move(eqn, operands)) is not None:
                results = [moved]
            else:
                self._steps.append(_Step(eqn, tuple(operands), self._size))
                results = [_Later(self._size + k) for k in range(len(eqn.outvars))]
                self._size += len(results)
            env.update(zip(eqn.outvars, results))
        return [read(v) for v in jaxpr.outvars]

    def at(self, c: Array, values: list[Any], wanted: Any) -> Array:
        """A planned result at an amplitude."""
        values = [*values, *[None] * (self._size - len(values))]

        def read(x: Any) -> Any:
            if isinstance(x, _Later):
                return values[x.index]
            return x.base + c.astype(x.base.dtype) * x.slope if isinstance(x, _Affine) else x

        for step in self._steps:
            results = evaluate(step.eqn, [read(x) for x in step.operands])
            values[step.first : step.first + len(results)] = results
        return read(wanted)


def _move(eqn: JaxprEqn, operands: Sequence[Any]) -> _Affine | None:
    """The result of an operation that keeps a straight line straight; None for any other."""
    if any(isinstance(x, _Later) for x in operands):
        return None
    name, straight = eqn.primitive.name, [k for k, x in enumerate(operands) if isinstance(x, _Affine)]
    linear = name in _LINEAR or (name in _PRODUCTS and len(straight) == 1) or (name == "div" and straight == [0])
    out: Any = eqn.outvars[0].aval
    if not (linear or name in _SUMS) or not jnp.issubdtype(out.dtype, jnp.floating):
        return None

    def result(part: str) -> Array:
        return evaluate(eqn, [getattr(x, part) if isinstance(x, _Affine) else x for x in operands])[0]

    if linear:
        return _Affine(result("base"), result("slope"))
    signs = (1, -1 if name == "sub" else 1)
    slope = sum(sign * x.slope for sign, x in zip(signs, operands) if isinstance(x, _Affine))
    return _Affine(result("base"), jnp.broadcast_to(slope, out.shape))
