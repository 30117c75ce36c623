"""Floating-point operations of a traced function: what runs are compared by where seconds depend on the machine.

Counted are matrix products and convolutions (two operations a multiply-add) and factorisations by their leading terms;
element-wise work is left out. A scan counts its length, a conditional its dearest branch, a `while` (a line search)
`WHILE_ROUNDS` rounds.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

WHILE_ROUNDS = 2  # a line search whose first bracket holds the minimum


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Operations of one call; arguments may be `jax.ShapeDtypeStruct`s.

    Example:
        >>> flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
        60.0
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name = equation.primitive.name
    if name in _FORMULAS:
        return float(_FORMULAS[name](equation))
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(equation.params)]
    if name == "cond":
        return max(inner)
    times = {"scan": equation.params.get("length", 1), "while": WHILE_ROUNDS}.get(name, 1)
    return times * sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if isinstance(entry, ClosedJaxpr):
                yield entry.jaxpr
            elif isinstance(entry, Jaxpr):
                yield entry


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs


def _cubic(factor: float) -> Callable[[Any], float]:
    def count(equation: Any) -> float:
        *batch, rows, columns = equation.invars[0].aval.shape
        return factor * math.prod(batch) * max(rows, columns) * min(rows, columns) ** 2

    return count


def _triangular(equation: Any) -> float:
    order = equation.invars[0].aval.shape[-1]
    return order * float(np.prod(equation.invars[1].aval.shape))


# Golub and Van Loan's leading terms; eigenvectors and singular vectors included.
_FORMULAS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "cholesky": _cubic(1 / 3),
    "eigh": _cubic(9),
    "svd": _cubic(14),
    "triangular_solve": _triangular,
}
