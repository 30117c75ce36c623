"""A loss function as a flat list of operations.

`trace` runs the user's unmodified loss through `jax.make_jaxpr`; `Graph` lists its equations with calls inlined, so
that an analysis is one loop over `graph.ops`. Every fact about jaxprs that changes between JAX releases (names of
call-like primitives, where a sub-jaxpr is kept, how `scan` counts its operands) lives in this file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tinyjax.equal_values import merged
from tinyjax.graph import MATMULS as MATMULS
from tinyjax.graph import OWN, Graph, Op, Scan, Value
from tinyjax.graph import VIEWS as VIEWS
from tinyjax.layout import Params, named_leaves
from tinyjax.liveness import alive
from tinyjax.liveness import behind_loss as behind_loss

JIT = frozenset({"jit", "pjit", "closed_call", "core_call", "xla_call"})
REMAT = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


class Trace(NamedTuple):
    """A traced loss.

    Attributes:
        jaxpr: the closed jaxpr of `loss_fn(params, batch)`; its first output is the loss.
        leaf_names: paths of the parameter leaves, the jaxpr's first inputs.
        batched: for each batch leaf (the remaining inputs), whether its leading axis counts samples.
        num_samples: number of samples in the batch.
    """

    jaxpr: ClosedJaxpr
    leaf_names: tuple[str, ...]
    batched: tuple[bool, ...]
    num_samples: int


def trace(loss_fn: Callable[..., Any], params: Params, batch: Any, *, has_aux: bool = False) -> Trace:
    """Traces `loss_fn(params, batch)` without running it.

    Raises:
        ValueError: the loss is no function, a leaf no array, two leaves have one path; the batch is empty or ragged or
            holds a raw key; the loss is not a real scalar; with `has_aux`, the function does not return a pair.
    """
    if not callable(loss_fn):
        raise ValueError(f"`loss_fn` must be a function of `(params, batch)`, got {loss_fn!r}")
    _require_arrays("params", params)
    _require_arrays("batch", batch)
    if not jax.tree.leaves(params):
        raise ValueError("`params` has no leaves: pass the pytree of arrays that the loss reads")
    names = named_leaves(params)
    num_samples = batch_size(batch)
    jaxpr, out = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
    loss = out
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError("with `has_aux=True`, `loss_fn` must return a pair `(loss, aux)`")
        loss = out[0]
    if not hasattr(loss, "shape"):
        raise ValueError(
            f"`loss_fn` must return one scalar, not {jax.tree.structure(loss)}; pass `has_aux=True` if it returns "
            "`(loss, aux)`"
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, np.floating):
        raise ValueError(
            f"`loss_fn` must return a real scalar, the mean over the samples; it returns {loss.dtype}{list(loss.shape)}"
        )
    return Trace(
        jaxpr=jaxpr,
        leaf_names=tuple(names),
        batched=tuple(has_samples(leaf, num_samples) for leaf in jax.tree.leaves(batch)),
        num_samples=num_samples,
    )


def _require_arrays(what: str, tree: Any) -> None:
    """Raises a ValueError for a leaf that is neither an array (or its shape), a number nor a key."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if not isinstance(leaf, bool | int | float | complex) and (dtype is None or dtype == np.dtype(object)):
            raise ValueError(
                f"`{what}`{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array: leave it out, "
                "close the loss over it"
            )


def has_samples(leaf: Any, num_samples: int) -> bool:
    """Whether the leading axis of a leaf of a batch counts its samples.

    It does in every array; typed PRNG keys have one for each sample or are passed whole, like 0-d leaves.
    """
    return np.ndim(leaf) > 0 and (not _is_key(leaf) or np.shape(leaf)[0] == num_samples)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def map_samples(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with a function applied to every leaf that has samples; the others are kept."""
    num_samples = batch_size(batch)
    return jax.tree.map(lambda leaf: function(jnp.asarray(leaf)) if has_samples(leaf, num_samples) else leaf, batch)


def take_samples(batch: Any, start: int, stop: int) -> Any:
    """The samples `start` to `stop` of a batch; leaves without samples are kept whole.

    Raises:
        ValueError: there are as many keys that are kept whole as samples are taken, so that each would get one.
    """
    num_samples = batch_size(batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if _is_key(leaf) and not has_samples(leaf, num_samples) and has_samples(leaf, stop - start):
            raise ValueError(
                f"`batch`{jax.tree_util.keystr(path)} holds {stop - start} PRNG keys for {num_samples} samples, of "
                f"which {stop - start} are looked at alone: pass one key a sample, or one and split it in the loss"
            )
    return map_samples(lambda x: x[start:stop], batch)


def batch_size(batch: Any) -> int:
    """Number of samples of a batch.

    Raises:
        ValueError: no leaf has a leading axis, the leading axes differ, the batch is empty, or a leaf is a raw key.
    """
    sizes, keys = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        where = f"`batch`{jax.tree_util.keystr(path)}"
        if np.shape(leaf) == (2,) and getattr(leaf, "dtype", None) == np.uint32:
            raise ValueError(f"{where} looks like a raw uint32 PRNG key; pass a typed key, `jax.random.key(seed)`")
        if np.ndim(leaf) > 0:
            (keys if _is_key(leaf) else sizes)[where] = np.shape(leaf)[0]
    sizes = sizes or keys
    if not sizes:
        raise ValueError("`batch` has no array with a leading sample axis")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {n}" for where, n in sizes.items())
        raise ValueError(f"every leaf of `batch` must have the samples as its leading axis, but {listed}")
    (num_samples,) = set(sizes.values())
    if num_samples == 0:
        raise ValueError("`batch` is empty: it holds 0 samples")
    return num_samples


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


def subjaxpr(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr of a call-like equation, and its constants."""
    inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    return open_jaxpr(inner)


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


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, whether it came closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


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
        if name in JIT and eqn.params.get("name") in OWN:
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
