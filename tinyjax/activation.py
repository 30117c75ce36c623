"""The activation behind a product as a function of numbers, read off the jaxpr.

Most of the library needs to know of an activation only that it maps 0 to 0. Gates and what happens beyond the first
order need the function itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.constants import number_of
from tinyjax.rules import ELEMENTWISE
from tinyjax.trace import Op, Value
from tinyjax.uses import Use
from tinyjax.wiring import Wiring, is_view


class NotElementwise(ValueError):
    """What lies behind a product is no function of its pre-activation alone; the message continues "it ..."."""


def activation_between(wiring: Wiring, use: Use, end: Value) -> Callable[[Array], Array]:
    """What lies between the pre-activation of a product, its bias added, and a later value, as an elementwise function.

    Raises:
        NotElementwise: something else than elementwise operations of the pre-activation and constants.
    """
    (start,) = use.op.outs
    order: list[tuple[Op, tuple[Any, ...]]] = []  # operations in order, their operands as values or constants
    done = {start}
    stack: list[tuple[Value, Op, Iterator[Value]]] = []  # what is being looked into, its operands still to look at

    def enter(value: Value) -> None:
        if value in done or value in wiring.views or number_of(wiring, value) is not None:
            return
        op = wiring.made_by.get(value)
        view = op is not None and (is_view(op) or op.name == "broadcast_in_dim")
        if op is None or not (view or op.name in ELEMENTWISE):
            raise NotElementwise("depends on something else")
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
        if wiring.vector(source) is not None and (use.bias is None or op.name not in ("add", "add_any")):
            raise NotElementwise("has parameters of its own besides the bias")
        enter(source)

    def scalar(z: Array) -> Array:
        values: dict[Value, Any] = {start: z.astype(start.dtype)}

        def read(value: Value) -> Any:
            if value in values:
                return values[value]
            number = number_of(wiring, value)
            return jnp.asarray(0 if number is None else number, value.dtype)  # the bias is in z already

        for op, ins in order:
            values[op.outs[0]] = _apply(op, [read(v) for v in ins])
        return values[end].astype(z.dtype)

    return jnp.vectorize(scalar)


def _apply(op: Op, operands: Sequence[Any]) -> Any:
    """An elementwise operation on scalars."""
    if op.name == "convert_element_type":
        return operands[0].astype(op.outs[0].dtype)
    if is_view(op) or op.name in ("broadcast_in_dim", "stop_gradient"):  # a copy moves with what it is a copy of
        return operands[0]
    assert op.eqn is not None
    return op.eqn.primitive.bind(*operands, **op.params)
