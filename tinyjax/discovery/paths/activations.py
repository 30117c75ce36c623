"""The activation behind a product as a function of numbers, read off the jaxpr.

Most of the library needs to know of an activation only that it maps 0 to 0. Gates and what happens beyond the first
order need the function itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.discovery.dimensions.constant_folding import number_of
from tinyjax.discovery.dimensions.primitives import ELEMENTWISE
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.def_use import DefUse, is_layout
from tinyjax.discovery.graph.graph import ADDITIONS, Op, Value
from tinyjax.discovery.paths.refusals import CannotGrow


def activation_between(def_use: DefUse, use: Product, end: Value) -> Callable[[Array], Array]:
    """What lies between the pre-activation of a product, its bias added, and a later value, as an elementwise function.

    Raises:
        CannotGrow: something else than elementwise operations of the pre-activation and constants.
    """
    (start,) = use.op.outs
    order: list[tuple[Op, tuple[Any, ...]]] = []  # operations in order, their operands as values or constants
    done = {start}
    stack: list[tuple[Value, Op, Iterator[Value]]] = []  # what is being looked into, its operands still to look at

    def enter(value: Value) -> None:
        if value in done or value in def_use.views or number_of(def_use, value) is not None:
            return
        op = def_use.made_by.get(value)
        if op is None or not (is_layout(op) or op.name in ELEMENTWISE):
            raise CannotGrow("depends on something else")
        stack.append((value, op, iter(op.ins)))

    enter(end)
    while stack:
        value, op, sources = stack[-1]
        source = next(sources, None)
        if source is None:
            done.add(value)
            order.append((op, op.ins))
            stack.pop()
            continue
        if def_use.vector(source) is not None and (use.bias is None or op.name not in ADDITIONS):
            raise CannotGrow("has parameters of its own besides the bias")
        enter(source)

    def scalar(z: Array) -> Array:
        values: dict[Value, Any] = {start: z.astype(start.dtype)}

        def read(value: Value) -> Any:
            if value in values:
                return values[value]
            number = number_of(def_use, value)
            return jnp.asarray(0 if number is None else number, value.dtype)  # the bias is in z already

        for op, ins in order:
            values[op.outs[0]] = _apply(op, [read(v) for v in ins])
        return values[end].astype(z.dtype)

    return jnp.vectorize(scalar)


def _apply(op: Op, operands: Sequence[Any]) -> Any:
    """An elementwise operation on scalars."""
    if op.name == "convert_element_type":
        return operands[0].astype(op.outs[0].dtype)
    if is_layout(op) or op.name == "stop_gradient":  # a copy moves with what it is a copy of
        return operands[0]
    assert op.eqn is not None
    return op.eqn.primitive.bind(*operands, **op.params)


_STEP = 2.0**-6
_ROUNDING = 1e-4  # of sigma, what counts as no even part at all: float32 leaves 1e-5 at this step


def curvature(activation: Callable[[Array], Array]) -> float:
    r"""sigma''(0); for an even part k |z|, that of the parabola nearest to it over standard normal z, $k\sqrt{2/\pi}$.

    Args:
        activation: elementwise, with sigma(0) = 0.

    Returns:
        A number, 0 where the even part at 0 vanishes to second order: tanh, sin, the identity, z^4.

    Example:
        >>> print(f"{curvature(jax.nn.silu):.3f} {curvature(jax.nn.relu):.3f} {curvature(jnp.tanh):.3f}")
        0.500 0.399 0.000
    """
    with jax.ensure_compile_time_eval():
        steps = jnp.asarray([_STEP, 2 * _STEP])
        values = activation(jnp.concatenate([steps, -steps]))
        even = [(float(values[i]) + float(values[2 + i])) / 2 for i in (0, 1)]
        size = float(jnp.max(jnp.abs(values)))
    if abs(even[1]) <= _ROUNDING * size:
        return 0.0
    growth = math.log2(abs(even[1] / even[0])) if even[0] else math.inf  # the power of z that the even part is
    if growth > 3:
        return 0.0
    if growth < 1.5:
        return even[0] / _STEP * math.sqrt(2 / math.pi)
    return (4 * even[0] - even[1] / 4) / 3 * 2 / _STEP**2  # without the fourth power
