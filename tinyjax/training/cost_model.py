"""A cost model: what a traced function computes, and how long that takes on a machine that was timed once.

Operations are those of matrix products, convolutions (two a multiply-add) and factorisations by their leading terms.
Starting an operation of whatever kind takes as long as `OVERHEAD` of them, and few channels as long as the `LANES` of a
vector. A scan counts its length, a conditional its dearest branch, a `while` (a line search) `WHILE_ROUNDS` rounds. All
is counted from the trace, so that nothing is compiled. One run of a program gives the rate of others of its kind:
gradient steps are mostly products, growths mostly factorisations and searches, so each has its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

WHILE_ROUNDS = 2  # a line search whose first bracket holds the minimum
OVERHEAD = 40_000  # measured on CPUs, steps and growths of perceptrons of 32 to 256 neurons alike
LANES = 16  # float32 in a vector of 512 bits
VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient", "copy", "split"}


class Work(NamedTuple):
    """What a function does.

    Attributes:
        operations: floating-point operations of products and factorisations.
        vectorised: the same, with the channels of convolutions rounded up to full vectors.
        calls: operations of any kind that are started, before any fusion.
    """

    operations: float
    vectorised: float
    calls: float

    @property
    def cost(self) -> float:
        """What its time is proportional to, in floating-point operations."""
        return self.vectorised + OVERHEAD * self.calls


def work(function: Callable[..., Any], *args: Any) -> Work:
    """What one call does; arguments may be `jax.ShapeDtypeStruct`s, nothing is computed.

    Example:
        >>> work.work(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
        Work(operations=60.0, vectorised=60.0, calls=1.0)
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The operations of one call, see `work`.

    Example:
        >>> work.flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
        60.0
    """
    return work(function, *args).operations


def total(parts: Iterable[tuple[Work, float]]) -> Work:
    """The work of a run: programs with how often each is called.

    Example:
        >>> work.total([(work.Work(10.0, 10.0, 4.0), 3), (work.Work(100.0, 160.0, 8.0), 1)])
        Work(operations=130.0, vectorised=190.0, calls=20.0)
    """
    sums = np.zeros(len(Work._fields))
    for part, times in parts:
        sums += times * np.array(part)
    return Work(*map(float, sums))


def calibrate(done: Work, seconds: float) -> float:
    """The rate of a machine, in seconds an operation, from a program that took so many seconds.

    Raises:
        ValueError: seconds that are not positive, or a program that does nothing.

    Example:
        >>> print(f"{work.calibrate(work.Work(1e9, 1e9, 0.0), 0.02):.0e}")
        2e-11
    """
    if not (seconds > 0 and done.cost > 0):
        raise ValueError(f"a calibration run needs work and a positive time; got {done}, {seconds} s")
    return seconds / done.cost


def seconds(rate: float, done: Work) -> float:
    """How long some work takes at a rate, compilation not included.

    With `budget` it holds a schedule to the time of a gradient step: `forecast.step_work` has the work of one.

    Example:
        >>> rate = 1e-11  # or `calibrate`
        >>> work.seconds(rate, work.Work(1e9, 2e9, 0.0))
        0.02
        >>> step = forecast.step_work(loss_fn, params, batch, optimizer, sites)
        >>> within = tinyjax.schedules.budget(schedule, lambda widths: work.seconds(rate, step(widths)), limit=1e-3)
    """
    return rate * done.cost


def _of_jaxpr(jaxpr: Jaxpr) -> Work:
    return total((_of_equation(equation), 1) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> Work:
    name = equation.primitive.name
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner(equation.params)]
    if name in _FORMULAS or not inner:
        operations = float(_FORMULAS.get(name, lambda _: 0)(equation))
        padding = _padding(equation) if name == "conv_general_dilated" else 1
        return Work(operations, operations * padding, float(name not in VIEWS))
    if name == "cond":
        return max(inner, key=lambda branch: branch.cost)
    times = {"scan": equation.params.get("length", 1), "while": WHILE_ROUNDS}.get(name, 1)
    return total((part, times) for part in inner)


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


def _padding(equation: Any) -> float:
    """Output channels rounded up to full vectors, relative to them."""
    channels = equation.outvars[0].aval.shape[equation.params["dimension_numbers"].out_spec[1]]
    return -(-channels // LANES) * LANES / channels


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
