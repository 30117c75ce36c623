"""A cost model: what a traced function computes and moves, and how long that takes on a machine that was timed twice.

Operations are those of matrix products, convolutions (two a multiply-add) and factorisations by their leading terms.
Bytes are what every operation reads and writes, as if nothing were fused. A scan counts its length, a conditional its
dearest branch, a `while` (a line search) `WHILE_ROUNDS` rounds. Both are counted from the trace, so that nothing is
compiled; seconds are a combination of the two, fitted to two programs that were run.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

WHILE_ROUNDS = 2  # a line search whose first bracket holds the minimum
VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient", "copy", "split"}


class Work(NamedTuple):
    """What a function does.

    Attributes:
        operations: floating-point operations of products and factorisations.
        bytes: read and written by all operations, before any fusion.
    """

    operations: float
    bytes: float


class Rates(NamedTuple):
    """What a machine needs, both >= 0.

    Attributes:
        operation: seconds an operation.
        byte: seconds a byte.
    """

    operation: float
    byte: float


def work(function: Callable[..., Any], *args: Any) -> Work:
    """What one call does; arguments may be `jax.ShapeDtypeStruct`s, nothing is computed.

    Example:
        >>> work(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5))).operations
        60.0
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The operations of one call, see `work`."""
    return work(function, *args).operations


def total(parts: Iterable[tuple[Work, float]]) -> Work:
    """The work of a run: programs with how often each is called.

    Example:
        >>> total([(Work(10.0, 4.0), 3), (Work(100.0, 8.0), 1)])
        Work(operations=130.0, bytes=20.0)
    """
    operations, moved = 0.0, 0.0
    for part, times in parts:
        operations, moved = operations + times * part.operations, moved + times * part.bytes
    return Work(operations, moved)


def calibrate(first: tuple[Work, float], second: tuple[Work, float]) -> Rates:
    """The rates at which two programs take the seconds that were measured.

    Take programs unlike each other, such as a training step and a growth on a few samples. Where no rates >= 0 explain
    both, the one rate that explains them best (in ratio) is kept and the other is zero.

    Args:
        first: work and seconds of a program.
        second: of another one.

    Raises:
        ValueError: seconds that are not positive, or a program that does nothing.

    Example:
        >>> calibrate((Work(100.0, 0.0), 2.0), (Work(100.0, 50.0), 3.0))
        Rates(operation=0.02, byte=0.02)
    """
    for done, seconds in (first, second):
        if not seconds > 0 or not max(done) > 0:
            raise ValueError(f"a calibration run needs work and a positive time; got {done}, {seconds} s")
    # Rows in units of the time measured: errors count in ratio.
    rows = np.array([[value / seconds for value in done] for done, seconds in (first, second)])
    scale = np.maximum(rows.max(0), np.finfo(float).tiny)
    found, *_ = np.linalg.lstsq(rows / scale, np.ones(2))
    if (found < 0).any():
        alone = [np.linalg.lstsq(rows[:, [i]] / scale[i], np.ones(2))[0][0] for i in range(2)]
        errors = [np.abs(rows[:, i] / scale[i] * alone[i] - 1).sum() for i in range(2)]
        found = np.where(np.arange(2) == np.argmin(errors), alone, 0)
    operation, byte = (float(value) for value in np.maximum(found, 0) / scale)
    return Rates(operation, byte)


def seconds(rates: Rates, done: Work) -> float:
    """How long some work takes, compilation not included.

    With `budget` it holds a schedule to a time: `cost=lambda widths: seconds(rates, step_work(widths))`.

    Example:
        >>> seconds(Rates(0.02, 0.02), Work(100.0, 50.0))
        3.0
    """
    return rates.operation * done.operations + rates.byte * done.bytes


def _of_jaxpr(jaxpr: Jaxpr) -> Work:
    return total((_of_equation(equation), 1) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> Work:
    name = equation.primitive.name
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(equation.params)]
    if name in _FORMULAS or not inner:
        formula = _FORMULAS.get(name, lambda _: 0)
        return Work(float(formula(equation)), 0.0 if name in VIEWS else _traffic(equation))
    if name == "cond":
        return Work(*(max(values) for values in zip(*inner)))
    times = {"scan": equation.params.get("length", 1), "while": WHILE_ROUNDS}.get(name, 1)
    return total((part, times) for part in inner)


def _traffic(equation: Any) -> float:
    read = [v.aval for v in equation.invars if not isinstance(v, Literal)]
    return float(sum(_bytes(aval) for aval in (*read, *(v.aval for v in equation.outvars))))


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0) if hasattr(aval, "shape") else 0


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
