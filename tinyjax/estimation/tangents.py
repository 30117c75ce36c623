"""Pushes the inputs of a product along the path of a slot to what reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.discovery.graph.graph import Address, Op, Value
from tinyjax.discovery.paths.slot_paths import Tangent
from tinyjax.estimation.recording import evaluate

_KINKS = ("select_n", "clamp")  # those of `max`, `min` and `abs` JAX knows


def carry(tangent: Tangent, x: Array, recorded: Mapping[Address, Array]) -> Array:
    """The tangents of the consumer's input with respect to the fan-in of a slot.

    Args:
        tangent: the path.
        x: `(*stack, rows, D)` input of the producer, with the constant 1 last iff it has a bias.
        recorded: the tapped operands, by address.

    Returns:
        `(*stack, rows of the consumer, heads * offsets, D)`.
    """
    start, end = tangent.producer.outputs, tangent.layout
    inputs, capacity = x.shape[-1], start.factors[tangent.slot]
    chunks = -(-inputs // capacity)
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, chunks * capacity - inputs)])
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], chunks, capacity), -2, 0)
    lead = x.shape[:-1]
    sizes = [start.factors[f] for f in start.cols]
    alone = [size if f == tangent.slot else 1 for f, size in zip(start.cols, sizes)]
    x = jnp.broadcast_to(x.reshape(*lead, *alone), (*lead, *sizes)).reshape(*lead, -1)  # every head reads the same

    def push(value: Array, recorded: Mapping[Address, Array]) -> Array:
        carried = {tangent.producer.op.outs[0]: value.astype(tangent.producer.op.outs[0].dtype)}
        for op in tangent.ops:
            carried[op.outs[0]] = _derivative(tangent, op, carried, recorded)
        return carried[tangent.read]

    for _ in tangent.producer.op.stack:
        push = jax.vmap(push)
    moved = jax.vmap(lambda columns: end.to_matrix(push(start.from_matrix(columns), recorded)))(x)
    moved = jnp.moveaxis(moved.reshape(*moved.shape[:-1], -1, capacity), 0, -2)
    return moved.reshape(*moved.shape[:-2], -1)[..., :inputs]


def _derivative(tangent: Tangent, op: Op, carried: Mapping[Value, Array], recorded: Mapping[Address, Array]) -> Array:
    """The tangent of an operation's result, at an empty slot."""
    assert op.eqn is not None
    if op.name == "stop_gradient":
        return carried[op.ins[0]]  # a copy moves with what it is a copy of
    eqn, moving = op.eqn, [i for i, v in enumerate(op.ins) if v in carried]
    values: list[Any] = [jnp.full(v.shape, tangent.scalars.get(v, 0), v.dtype) for v in op.ins]
    if op.path in tangent.taps:
        values[tangent.taps[op.path]] = recorded[op.path]
    for i, v in enumerate(op.ins):
        if v in tangent.factors:
            values[i] = jnp.broadcast_to(recorded[tangent.factors[v]], v.shape)

    def run(*operands: Array) -> Array:
        (out,) = evaluate(eqn, [*_replaced(values, moving, operands)])
        return out

    def derivative(held: Mapping[Value, Any]) -> Array:
        at = [jnp.full(op.ins[i].shape, held[op.ins[i]], op.ins[i].dtype) for i in moving]
        return jax.jvp(run, at, [carried[op.ins[i]] for i in moving])[1]

    if op.name in _KINKS:  # the mean slope of both sides, whatever the derivative at 0 is defined to be
        return (derivative(tangent.near[0]) + derivative(tangent.near[1])) / 2
    return derivative(tangent.empty)


def _replaced(values: Sequence[Any], where: Sequence[int], new: Sequence[Array]) -> list[Any]:
    at = dict(zip(where, new))
    return [at.get(i, value) for i, value in enumerate(values)]
