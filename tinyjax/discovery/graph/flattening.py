"""JAX's jaxpr as a flat graph: calls inlined, loops opened once."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tinyjax.core.jaxprs import CUSTOM, JIT, REMAT, open_jaxpr, subjaxpr
from tinyjax.discovery.graph.equal_values import merged
from tinyjax.discovery.graph.graph import Graph, Op, Scan, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.graph.liveness import alive
from tinyjax.discovery.graph.tracing import Trace


def flatten(traced: Trace, *, merge: bool = True) -> Graph:
    """Inlines every call of a traced loss into one list of operations.

    What is computed twice comes once; what neither the loss nor new values of leaves depend on is left out. Without
    `merge` all operations are there, as they were traced.
    """
    jaxpr = traced.jaxpr.jaxpr
    num_params = len(traced.leaf_names)
    inputs = [
        Value(v.aval.shape, v.aval.dtype, *(("param", i) if i < num_params else ("batch", i - num_params)))
        for i, v in enumerate(jaxpr.invars)
    ]
    ops: list[Op] = []
    outs = _inline(ops, jaxpr, traced.jaxpr.consts, inputs, (), (), ())
    graph = Graph(tuple(inputs[:num_params]), tuple(inputs[num_params:]), tuple(ops), outs[0])
    return alive(*merged(graph, outs[1:])) if merge else graph


def body(op: Op) -> Graph:
    """The inside of an operation that is a jitted function, its operands as the leaves of a batch."""
    assert op.eqn is not None
    jaxpr, consts = subjaxpr(op.eqn)
    ins = [Value(value.shape, value.dtype, "batch", i) for i, value in enumerate(op.ins)]
    ops: list[Op] = []
    outs = _inline(ops, jaxpr, consts, ins, (), (), ())
    return Graph((), tuple(ins), tuple(ops), outs[0])


def num_numbers(traced: Trace) -> int:
    """How many numbers the loss computes on its way, turns of scans counted."""
    return _numbers(traced.jaxpr.jaxpr)


def _numbers(jaxpr: Jaxpr) -> int:
    return sum(_numbers_of(eqn) for eqn in jaxpr.eqns)


def _numbers_of(eqn: JaxprEqn) -> int:
    parts = [part for value in eqn.params.values() for part in (value if isinstance(value, tuple) else (value,))]
    inner = [open_jaxpr(part)[0] for part in parts if isinstance(part, Jaxpr | ClosedJaxpr)]
    if not inner:
        return sum(math.prod(getattr(out.aval, "shape", ())) for out in eqn.outvars)
    return eqn.params.get("length", 1) * max(map(_numbers, inner))


class ScanCounts(NamedTuple):
    """How the operands of a scan divide."""

    consts: int
    carry: int


def scan_counts(eqn: JaxprEqn) -> ScanCounts:
    """Numbers of constants and carries of a scan, read off the ranks: what is sliced has one axis less inside."""
    body, _ = subjaxpr(eqn)
    sliced = sum(_rank(outer) != _rank(inner) for outer, inner in zip(eqn.invars, body.invars))
    carry = sum(_rank(outer) == _rank(inner) for outer, inner in zip(eqn.outvars, body.outvars))
    return ScanCounts(consts=len(eqn.invars) - carry - sliced, carry=carry)


def _rank(v: Any) -> int:
    return len(v.aval.shape)


def _inline(
    ops: list[Op],
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    ins: Sequence[Value],
    path: tuple[int, ...],
    scans: tuple[Scan, ...],
    inside: tuple[str, ...],
    derived: bool = False,
) -> list[Value]:
    env: dict[Any, Value] = dict(zip(jaxpr.invars, ins))
    env.update((v, _constant(c)) for v, c in zip(jaxpr.constvars, consts))

    def read(v: Any) -> Value:
        return _constant(v.val) if isinstance(v, Literal) else env[v]

    def emit(name: str, sources: Sequence[Value], like: Any, at: tuple[int, ...], around: tuple[Scan, ...]) -> Value:
        out = Value(like.aval.shape, like.aval.dtype)
        ops.append(Op(name, tuple(sources), (out,), None, at, around, inside))
        return out

    for i, eqn in enumerate(jaxpr.eqns):
        at, name = (*path, i), eqn.primitive.name
        args = [read(v) for v in eqn.invars]
        here = derived or "jvp(" in str(eqn.source_info.name_stack)
        if name in JIT and eqn.params.get("name") in KNOWN_FUNCTIONS:
            outs = [_result(v) for v in eqn.outvars]
            ops.append(Op(eqn.params["name"], tuple(args), tuple(outs), eqn, at, scans, inside))
        elif name in JIT | REMAT | CUSTOM:
            outs = _inline(ops, *subjaxpr(eqn), args, at, scans, (*inside, name) if name in CUSTOM else inside, here)
        elif name == "scan":
            body, body_consts = subjaxpr(eqn)
            num_consts, num_carry = scan_counts(eqn)
            deeper = (*scans, Scan(at, eqn.params["length"], eqn.params["reverse"]))
            first_x = num_consts + num_carry
            inner = args[:num_consts]
            inner += [
                emit("scan_carry", [a], v, at, deeper)
                for a, v in zip(args[num_consts:first_x], body.invars[num_consts:])
            ]
            inner += [emit("scan_in", [a], v, at, deeper) for a, v in zip(args[first_x:], body.invars[first_x:])]
            results = _inline(ops, body, body_consts, inner, at, deeper, inside, here)
            # A carry that leaves one iteration is the carry that enters the next.
            outs = [
                emit("scan_carry", [r, entered], v, at, scans)
                for r, entered, v in zip(results[:num_carry], inner[num_consts:first_x], eqn.outvars)
            ]
            outs += [emit("scan_out", [r], v, at, scans) for r, v in zip(results[num_carry:], eqn.outvars[num_carry:])]
        elif name == "cond":
            branches = [
                _inline(ops, *open_jaxpr(branch), args[1:], (*at, b), scans, (*inside, "cond"), here)
                for b, branch in enumerate(eqn.params["branches"])
            ]
            outs = []
            for k, (*results, v) in enumerate(zip(*branches, eqn.outvars)):
                # A check that returns its argument, and raises in the other branches, is a view of it.
                quiet = [r for r, branch in zip(results, eqn.params["branches"]) if not _raises(branch, k)]
                if len(quiet) == 1 and len(results) > 1:
                    outs += quiet
                    continue
                outs.append(_result(v))
                ops.append(Op("cond_out", tuple(results), (outs[-1],), None, at, scans, inside, (args[0],)))
        else:
            outs = [_result(v) for v in eqn.outvars]
            ops.append(Op(_plain_name(eqn), tuple(args), tuple(outs), eqn, at, scans, inside, derived=here))
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _raises(branch: Jaxpr | ClosedJaxpr, result: int) -> bool:
    """Whether a result of a branch comes from a callback that is told nothing of the operands: it is there to raise."""
    jaxpr, _ = open_jaxpr(branch)
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    queue = [jaxpr.outvars[result]]
    if not isinstance(queue[0], Literal) and queue[0] not in makers:
        return False
    called = False
    while queue:
        v = queue.pop()
        if isinstance(v, Literal):
            continue
        if v not in makers:
            return False
        called |= "callback" in makers[v].primitive.name
        queue += makers[v].invars
    return called


def _plain_name(eqn: JaxprEqn) -> str:
    """The name of a primitive; under `vmap`, a sum over a named axis has become one over an axis of the array."""
    name, params = eqn.primitive.name, eqn.params
    if name == "psum" and len(eqn.invars) == 1 and params["axis_index_groups"] is None:
        return "reduce_sum" if all(isinstance(axis, int) for axis in params["axes"]) else name
    return name


def _result(v: Any) -> Value:
    return Value(v.aval.shape, getattr(v.aval, "dtype", None))


def _constant(value: Any) -> Value:
    shape, dtype = np.shape(value), getattr(value, "dtype", None)
    if dtype is None:
        dtype = np.result_type(value)
    # A typed key is no number, and of a tracer the number is not known.
    if not isinstance(dtype, np.dtype) or isinstance(value, Tracer):
        return Value(shape, dtype, "const")
    if shape != ():
        return Value(shape, dtype, "const", array=value)
    # Under a trace, JAX's own arrays would not even compare as numbers.
    return Value(shape, dtype, "const", const=np.asarray(value) if isinstance(value, jax.Array) else value)
