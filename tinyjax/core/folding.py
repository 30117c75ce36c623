"""What a program computes whatever its inputs are: constants folded, and zero times anything is zero.

Nothing is run and no array of the program's size is made: a known value is one number for all entries (an array of
shape `()`), or an array where the program closes over one. An entry that is not known is NaN.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from tinyjax.core.jaxprs import CUSTOM, JIT, REMAT, open_jaxpr, subjaxpr

Known = np.ndarray
"""A float array, of shape () where all entries are equal; NaN where an entry is not known."""

UNKNOWN: Known = np.asarray(np.nan)

_OF_NUMBERS: dict[str, Callable[..., Any]] = dict(
    add=np.add, add_any=np.add, sub=np.subtract, neg=np.negative, abs=np.abs, sign=np.sign, max=np.maximum,
    min=np.minimum, sqrt=np.sqrt, square=np.square, exp=np.exp, log=np.log, floor=np.floor, pow=np.power,
    eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal,
    is_finite=np.isfinite, copy=np.positive, copy_p=np.positive, stop_gradient=np.positive,
    optimization_barrier=np.positive,
)  # fmt: skip
_OF_BOOLEANS: dict[str, Callable[..., Any]] = {"and": np.logical_and, "or": np.logical_or, "not": np.logical_not}


def fold(jaxpr: Jaxpr, consts: Sequence[Any], ins: Sequence[Known]) -> list[Known]:
    """What is known of the results of a program.

    Args:
        jaxpr: the program.
        consts: the arrays it closes over.
        ins: what is known of its inputs.

    Returns:
        One value a result, each of shape () or of the result's shape.

    Example:
        >>> program = jax.make_jaxpr(lambda x, y: (x * 0.0, x + y))(1.0, 2.0)
        >>> [float(known) for known in fold(program.jaxpr, program.consts, [UNKNOWN, UNKNOWN])]
        [0.0, nan]
    """
    env: dict[Any, Known] = dict(zip(jaxpr.invars, ins))
    env.update((v, _constant(c)) for v, c in zip(jaxpr.constvars, consts))
    for eqn in jaxpr.eqns:
        known = [_constant(v.val) if isinstance(v, Literal) else env[v] for v in eqn.invars]
        with np.errstate(all="ignore"):
            env.update(zip(eqn.outvars, _apply(eqn, known)))
    return [_constant(v.val) if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def agree(one: Known, other: Known) -> Known:
    """What holds in both cases."""
    both = np.where(one == other, one, np.nan)
    return both if both.ndim == 0 or not np.isnan(both).all() else UNKNOWN


def _constant(value: Any) -> Known:
    if isinstance(value, Tracer) or jnp.issubdtype(getattr(value, "dtype", np.float64), jax.dtypes.extended):
        return UNKNOWN
    number = np.asarray(value)
    if number.dtype.kind in "cOSU":
        return UNKNOWN
    number = number.astype(float)
    return number.ravel()[0] * np.ones(()) if number.size and (number == number.ravel()[0]).all() else number


def _apply(eqn: JaxprEqn, ins: list[Known]) -> list[Known]:
    name = eqn.primitive.name
    if name in JIT | REMAT | CUSTOM:
        return fold(*subjaxpr(eqn), ins)
    if name == "cond":
        branches = [open_jaxpr(branch) for branch in eqn.params["branches"]]
        if not np.isnan(ins[0]):
            branches = [branches[int(np.clip(ins[0], 0, len(branches) - 1))]]
        results = [fold(*branch, ins[1:]) for branch in branches]
        return [reduce(agree, cases) for cases in zip(*results)]
    if len(eqn.outvars) > 1:
        return [UNKNOWN for _ in eqn.outvars]
    out = _result(eqn, name, ins)
    aval: Any = eqn.outvars[0].aval
    return [np.broadcast_to(out, aval.shape) if out.ndim else out]


def _result(eqn: JaxprEqn, name: str, ins: list[Known]) -> Known:
    aval: Any = eqn.outvars[0].aval
    shape, dtype = aval.shape, getattr(aval, "dtype", None)
    if name == "mul":
        return np.where((ins[0] == 0) | (ins[1] == 0), 0.0, ins[0] * ins[1])
    if name == "div":
        # An unknown divisor is taken not to be zero; a whole number is not divided.
        return np.where((ins[0] == 0) & (ins[1] != 0), 0.0, _whole(ins[0] / ins[1], dtype))
    if name == "integer_pow":
        return ins[0] ** float(eqn.params["y"])
    if name == "convert_element_type":
        return _converted(ins[0], dtype)
    if name in _OF_BOOLEANS and not np.issubdtype(dtype, np.bool_):
        return UNKNOWN
    if name in _OF_NUMBERS or name in _OF_BOOLEANS:
        values = (_OF_NUMBERS.get(name) or _OF_BOOLEANS[name])(*ins)
        return np.where(reduce(np.logical_or, map(np.isnan, ins)), np.nan, values)
    if name == "select_n":
        which, *cases = ins
        chosen = reduce(lambda rest, i: np.where(which == i, cases[i], rest), range(len(cases)), UNKNOWN)
        return np.where(np.isnan(which), reduce(agree, cases), chosen)
    if name == "dot_general":
        return np.zeros(()) if any(v.ndim == 0 and v == 0 for v in ins) else UNKNOWN
    return _moved(eqn, name, ins, shape)


def _moved(eqn: JaxprEqn, name: str, ins: list[Known], shape: tuple[int, ...]) -> Known:
    """The results of operations that move entries, or add them."""
    x = ins[0] if ins else UNKNOWN
    shapes: list[tuple[int, ...]] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
    if name == "concatenate":
        if all(v.ndim == 0 and v == x for v in ins):
            return x
        parts = [np.broadcast_to(v, source) for v, source in zip(ins, shapes)]
        return np.concatenate(parts, axis=eqn.params["dimension"])
    if name == "reduce_sum":
        size = np.prod([shapes[0][axis] for axis in eqn.params["axes"]])
        return x * size if x.ndim == 0 else x.sum(axis=tuple(eqn.params["axes"]))
    if name in ("reduce_max", "reduce_min") and x.ndim == 0:
        return x
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "slice", "rev") and x.ndim == 0:
        return x
    if name == "broadcast_in_dim":
        own = [shape[d] if x.shape[i] != 1 else 1 for i, d in enumerate(eqn.params["broadcast_dimensions"])]
        spread = [1] * len(shape)
        for d, size in zip(eqn.params["broadcast_dimensions"], own):
            spread[d] = size
        return np.broadcast_to(x.reshape(spread), shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        return x.reshape(shape)
    if name == "transpose":
        return x.transpose(eqn.params["permutation"])
    if name == "slice":
        bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"] or [1] * x.ndim)
        return x[tuple(slice(*bound) for bound in bounds)]
    return UNKNOWN


def _converted(x: Known, dtype: Any) -> Known:
    if np.issubdtype(dtype, np.bool_):
        return np.where(np.isnan(x), np.nan, x != 0)
    return _whole(x, dtype)


def _whole(x: Known, dtype: Any) -> Known:
    return np.trunc(x) if np.issubdtype(dtype, np.integer) else x
