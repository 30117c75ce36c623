"""A jaxpr evaluated by NumPy, one equation after the other: nothing is compiled, and nothing is shared with XLA.

For small arrays this is far quicker than compiling, which is what lets a test look at hundreds of models. Primitives
that are not listed here are run by JAX.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from tinyjax.core.jaxprs import CUSTOM, JIT, REMAT, open_jaxpr, subjaxpr
from tinyjax.discovery.graph.flattening import scan_counts

_erf = np.vectorize(math.erf, otypes=[float])


def evaluate(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, traced by JAX and computed by NumPy."""
    return traced(function, *args)(*args)


def traced(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function at the shapes of `args`, to be called as often as one likes."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(shape)

    def call(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            outs = run(closed.jaxpr, closed.consts, [_host(x) for x in jax.tree.leaves(args)])
        return jax.tree.unflatten(structure, outs)

    return call


def run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr."""
    env = dict(zip(jaxpr.constvars, map(_host, consts))) | dict(zip(jaxpr.invars, args))

    def read(v: Any) -> Any:
        return np.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        ins, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name in JIT | REMAT | CUSTOM:
            outs = run(*subjaxpr(eqn), ins)
        elif name == "scan":
            outs = _scan(eqn, ins)
        elif name == "cond":
            branches = eqn.params["branches"]
            outs = run(*open_jaxpr(branches[int(np.clip(ins[0], 0, len(branches) - 1))]), ins[1:])
        elif name == "while":
            outs = _while(eqn, ins)
        elif name in RULES and not any(isinstance(x, jax.Array) for x in ins):
            out = RULES[name](eqn.params, *ins)
            outs = out if isinstance(out, list) else [out]
        else:
            out = eqn.primitive.bind(*ins, **eqn.params)
            outs = [_host(x) for x in (out if eqn.primitive.multiple_results else [out])]
        for v, x in zip(eqn.outvars, outs):
            env[v] = x if isinstance(x, jax.Array) else np.asarray(x, v.aval.dtype)
            assert env[v].shape == v.aval.shape, (name, env[v].shape, v.aval)
    return [read(v) for v in jaxpr.outvars]


def _host(x: Any) -> Any:
    """NumPy's own, but for typed keys."""
    return x if jnp.issubdtype(getattr(x, "dtype", np.float64), jax.dtypes.prng_key) else np.asarray(x)


def _scan(eqn: Any, ins: list[Any]) -> list[Any]:
    (num_consts, num_carry), (body, consts), length = scan_counts(eqn), subjaxpr(eqn), eqn.params["length"]
    fixed, carry, xs = ins[:num_consts], ins[num_consts : num_consts + num_carry], ins[num_consts + num_carry :]
    ys: list[Any] = [None] * length
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        outs = run(body, consts, [*fixed, *carry, *(x[i] for x in xs)])
        carry, ys[i] = outs[:num_carry], outs[num_carry:]
    return [*carry, *(np.stack(y) for y in zip(*ys))]


def _while(eqn: Any, ins: list[Any]) -> list[Any]:
    m, k = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    asked, fixed, carry = ins[:m], ins[m : m + k], ins[m + k :]
    while run(*open_jaxpr(eqn.params["cond_jaxpr"]), [*asked, *carry])[0]:
        carry = run(*open_jaxpr(eqn.params["body_jaxpr"]), [*fixed, *carry])
    return carry


def _dot(p: Any, x: Any, y: Any) -> Any:
    (xc, yc), (xb, yb) = p["dimension_numbers"]
    left, right = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    for a, b in zip((*xc, *xb), (*yc, *yb)):
        right[b] = left[a]
    free = [left[d] for d in range(x.ndim) if d not in (*xc, *xb)] + [
        right[d] for d in range(y.ndim) if d not in (*yc, *yb)
    ]
    return np.einsum(x, left, y, right, [left[d] for d in xb] + free)


def _convolution(p: Any, image: Any, kernel: Any) -> Any:
    """A sum over the pixels of the window, group by group."""
    numbers, groups, batches = p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"]
    x, k = image.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)  # NC..., OI...
    rank = x.ndim - 2
    if batches > 1:  # what a gradient of a grouped convolution becomes
        x = np.concatenate(np.split(x, batches, 0), 1)
        groups = batches
    x = _pad_value(x, 0, [(0, 0, 0)] * 2 + [(*pads, d - 1) for pads, d in zip(p["padding"], p["lhs_dilation"])])
    size, dilation, strides = k.shape[2:], p["rhs_dilation"], p["window_strides"]
    space = [max((x.shape[2 + i] - (size[i] - 1) * dilation[i] - 1) // strides[i] + 1, 0) for i in range(rank)]
    out = np.zeros((x.shape[0], k.shape[0], *space), np.result_type(x, k))
    for group in range(groups):
        mine, outs = np.split(x, groups, 1)[group], np.split(k, groups, 0)[group]
        first = group * outs.shape[0]
        for at in product(*map(range, size)):
            seen = mine[(..., *(slice(a * d, a * d + (n - 1) * s + 1, s) if n else slice(0) for a, d, n, s in
                                zip(at, dilation, space, strides)))]  # fmt: skip
            out[:, first : first + outs.shape[0]] += np.einsum("nc...,oc->no...", seen, outs[(..., *at)])
    return out.transpose(np.argsort(numbers.out_spec))


def _pad_value(x: Any, value: Any, config: Sequence[tuple[int, int, int]]) -> Any:
    for axis, (low, high, inner) in enumerate(config):
        n = x.shape[axis]
        if inner and n:
            wide = np.full((*x.shape[:axis], n + (n - 1) * inner, *x.shape[axis + 1 :]), value, x.dtype)
            wide[(slice(None),) * axis + (slice(None, None, inner + 1),)] = x
            x = wide
        cut = slice(max(-low, 0), x.shape[axis] - max(-high, 0))
        x = x[(slice(None),) * axis + (cut,)]
        pads = [(0, 0)] * axis + [(max(low, 0), max(high, 0))] + [(0, 0)] * (x.ndim - axis - 1)
        x = np.pad(x, pads, constant_values=value)
    return x


def _window(reduce: Callable[..., Any], start: float) -> Callable[..., Any]:
    def rule(p: Any, x: Any) -> Any:
        if np.issubdtype(x.dtype, np.integer) and not np.isfinite(start):
            raise NotImplementedError
        x = _pad_value(x, start, [(*pads, d - 1) for pads, d in zip(p["padding"], p["base_dilation"])])
        size, strides, dilation = p["window_dimensions"], p["window_strides"], p["window_dilation"]
        space = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape, size, dilation, strides)]
        found = [
            x[tuple(slice(a * d, a * d + (n - 1) * s + 1, s) for a, d, n, s in zip(at, dilation, space, strides))]
            for at in product(*map(range, size))
        ]
        return reduce(np.stack(found), axis=0)

    return rule


def _broadcast(p: Any, x: Any) -> Any:
    shape, at = p["shape"], p["broadcast_dimensions"]
    sizes = [1] * len(shape)
    for d, n in zip(at, x.shape):
        sizes[d] = n
    return np.broadcast_to(x.reshape(sizes), shape)


def _select(p: Any, which: Any, *cases: Any) -> Any:
    out = cases[0]
    for i, case in enumerate(cases[1:], 1):
        out = np.where(which.astype(int) == i, case, out)
    return out


def _cumulative(function: Callable[..., Any]) -> Callable[..., Any]:
    def rule(p: Any, x: Any) -> Any:
        axis = p["axis"]
        return np.flip(function(np.flip(x, axis), axis), axis) if p["reverse"] else function(x, axis)

    return rule


def _integer_pow(p: Any, x: Any) -> Any:
    return x ** p["y"] if p["y"] >= 0 else 1 / x ** -p["y"]


def _slice(p: Any, x: Any) -> Any:
    strides = p["strides"] or (1,) * x.ndim
    return x[tuple(slice(*s) for s in zip(p["start_indices"], p["limit_indices"], strides))]


def _gather(p: Any, x: Any, indices: Any) -> Any:
    """Windows of `x`, one at each vector of indices; where windows leave `x` they are moved back, or filled."""
    numbers, sizes, mode = p["dimension_numbers"], p["slice_sizes"], p["mode"]
    batch = indices.shape[:-1]
    starts = [np.zeros(batch, int) for _ in sizes]
    for column, d in enumerate(numbers.start_index_map):
        starts[d] = indices[..., column].astype(int)
    for d, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        starts[d] = np.indices(batch)[b]
    rooms = [n - size for n, size in zip(x.shape, sizes)]
    inside = np.all([(start >= 0) & (start <= room) for start, room in zip(starts, rooms)], axis=0)
    kept = [d for d in range(x.ndim) if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    window = [1] * len(kept)
    at = []
    for d, (start, room, size) in enumerate(zip(starts, rooms, sizes)):
        along = [size if d == other else 1 for other in kept]
        at.append(
            np.clip(start, 0, room).reshape(*batch, *window) + (np.arange(size).reshape(along) if d in kept else 0)
        )
    out = x[tuple(np.broadcast_arrays(*at))] if at else np.broadcast_to(x, batch)
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = p["fill_value"]
        if fill is None:
            fill = np.nan if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min if x.dtype != bool else True
        out = np.where(inside.reshape(*batch, *window), out, fill)
    else:
        assert inside.all() or mode == jax.lax.GatherScatterMode.CLIP, mode
    return np.moveaxis(out, range(len(batch), out.ndim), numbers.offset_dims)


def _iota(p: Any) -> Any:
    shape, d = p["shape"], p["dimension"]
    return np.broadcast_to(np.arange(shape[d]).reshape([-1 if a == d else 1 for a in range(len(shape))]), shape)


def _split(p: Any, x: Any) -> list[Any]:
    return np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"])


def _logistic(p: Any, x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, *ins: function(*ins)


def _over_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, x: function(x, axis=tuple(p["axes"]))


def _same(p: Any, x: Any) -> Any:
    return x


RULES: dict[str, Callable[..., Any]] = {
    **{name: _plain(getattr(np, name)) for name in
       "exp exp2 log log1p expm1 sin cos tan tanh sinh cosh arcsinh sqrt cbrt floor ceil sign square abs".split()},
    **{name: _plain(function) for name, function in {
        "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum,
        "min": np.minimum, "neg": np.negative, "atan": np.arctan, "asinh": np.arcsinh, "erf": _erf, "pow": np.power,
        "rsqrt": lambda x: 1 / np.sqrt(x), "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal, "is_finite": np.isfinite,
        "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    }.items()},
    "div": lambda p, x, y: x / y if np.issubdtype(x.dtype, np.floating) else np.fix(x / y),
    "and": lambda p, x, y: x & y, "or": lambda p, x, y: x | y, "not": lambda p, x: ~x,
    "logistic": _logistic, "integer_pow": _integer_pow, "select_n": _select,
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    **dict.fromkeys("stop_gradient name copy copy_p reduce_precision".split(), _same),
    "optimization_barrier": lambda p, *xs: list(xs),
    "reshape": lambda p, x: x.transpose(p["dimensions"] or range(x.ndim)).reshape(p["new_sizes"]),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])), "broadcast_in_dim": _broadcast,
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]), "slice": _slice, "split": _split,
    "rev": lambda p, x: np.flip(x, p["dimensions"]), "pad": lambda p, x, v: _pad_value(x, v, p["padding_config"]),
    "reduce_sum": _over_axes(np.sum), "reduce_max": _over_axes(np.max), "reduce_min": _over_axes(np.min),
    "reduce_prod": _over_axes(np.prod), "reduce_and": _over_axes(np.all), "reduce_or": _over_axes(np.any),
    "gather": _gather, "iota": _iota,
    "cumsum": _cumulative(np.cumsum), "cumprod": _cumulative(np.cumprod),
    "dot_general": _dot, "conv_general_dilated": _convolution,
    "reduce_window_sum": _window(np.sum, 0.0), "reduce_window_max": _window(np.max, -np.inf),
}  # fmt: skip
