"""Whether an optimizer keeps free slots free: found by trying it, on leaves of which some slabs are zero.

Most transformations treat an entry by itself, or scale a leaf as a whole; then zero gradients leave zeros alone. Those
that subtract a mean, whiten or project to low rank write what the other entries hold into the free ones too.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr

from tinyjax.core.jaxprs import open_jaxpr
from tinyjax.core.params import Params, path_name

STAND_IN = 4  # entries along an axis of a stand-in leaf; half of them are free
LATE = 10_000  # steps at which it is tried too: what mixes may begin late in a training
STEPS = 3  # the first starts from a blank state, the others do not

DECOMPOSITIONS = frozenset("svd eigh eig qr geqrf householder_product lu cholesky schur fft".split())

Kinds = tuple[tuple[tuple[int, ...], str], ...]


def require_unmixed(optimizer: Any, params: Params, slots: Mapping[str, set[int]] | None = None) -> None:
    """Raises a ValueError for an optimizer that moves zeros whose gradients are zero.

    Args:
        optimizer: an Optax optimizer.
        params: the parameters that it sees; only shapes and dtypes matter.
        slots: by leaf path the axes along which slots lie; None for any axis of any leaf.
    """
    leaves, treedef = jax.tree.flatten(params)
    dtypes = [jnp.promote_types(jnp.result_type(x), jnp.float32).name for x in leaves]
    kinds = tuple((jnp.shape(x), dtype) for x, dtype in zip(leaves, dtypes))
    small = tuple((tuple(min(n, STAND_IN) for n in shape), dtype) for shape, dtype in kinds)
    step = _step_of(optax.with_extra_args_support(optimizer))
    try:
        operations = _operations(optimizer.init, step, treedef, kinds)
    except TypeError:  # it asks for arguments that only its own training loop has
        return
    for name, operation in _decomposed(operations, params):
        if slots is None or name in slots:
            raise ValueError(
                f"with this optimizer free slots would not stay free: it mixes the entries of `{name}` by "
                f"`{operation}`, from which zeros come back only up to rounding. Leave out the transformation that "
                "does it (a projection to low rank, a whitening?)"
            )
    try:
        alike = [name for name, _ in _operations(optimizer.init, step, treedef, small)] == [n for n, _ in operations]
    except (TypeError, ValueError):  # it holds an array of the true shapes, such as a mask
        alike = False
    # What an optimizer does may depend on the size of a leaf.
    found = _moved(optimizer.init, step, treedef, small if alike else kinds)
    for name, axis, size in found:
        if slots is None or axis in slots.get(name, ()):
            raise ValueError(
                f"with this optimizer free slots would not stay free: in a trial, entries of `{name}` that were zero "
                f"along axis {axis}, with gradients of zero, got updates of up to {size:.2g}. Leave out what mixes the "
                "entries of a leaf (a mean over it, a whitening, a projection to low rank) or moves zeros (noise)"
            )


@functools.lru_cache(maxsize=64)
def _step_of(optimizer: optax.GradientTransformationExtraArgs) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A step of an optimizer that may ask for the loss, which is taken to be constant."""

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        zero = np.zeros((), np.float32)
        return optimizer.update(grads, state, params, value=zero, grad=grads, value_fn=lambda params: zero)

    return step


@functools.lru_cache(maxsize=64)
def _operations(init: Any, step: Any, treedef: Any, kinds: Kinds) -> tuple[tuple[str, int], ...]:
    """The operations of a step, each with the size of its largest operand."""
    tree = treedef.unflatten([jax.ShapeDtypeStruct(*kind) for kind in kinds])
    return tuple(_inside(jax.make_jaxpr(step)(tree, jax.eval_shape(init, tree), tree).jaxpr))


def _inside(jaxpr: Jaxpr) -> Iterator[tuple[str, int]]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, max((getattr(v.aval, "size", 0) for v in eqn.invars), default=0)
        parts = [part for value in eqn.params.values() for part in (value if isinstance(value, tuple) else (value,))]
        for part in parts:
            if isinstance(part, Jaxpr | ClosedJaxpr):
                yield from _inside(open_jaxpr(part)[0])


def _decomposed(operations: Sequence[tuple[str, int]], params: Params) -> list[tuple[str, str]]:
    """Leaves with the operations that decompose arrays of their size."""
    known = sorted({operation for operation in operations if operation[0] in DECOMPOSITIONS})
    leaves = [(path_name(path), jnp.size(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    return [(name, operation) for name, size in leaves for operation, other in known if size == other]


@functools.lru_cache(maxsize=64)
def _moved(init: Any, step: Any, treedef: Any, kinds: Kinds) -> tuple[tuple[str, int, float], ...]:
    """Leaves and axes along which free entries move, and by how much."""
    with jax.ensure_compile_time_eval():
        step, init, rng = jax.jit(step), jax.jit(init), np.random.default_rng(0)
        names = [
            path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(treedef.unflatten(range(len(kinds))))
        ]
        found: list[tuple[str, int, float]] = []
        for axis in range(max((len(shape) for shape, _ in kinds), default=0)):
            live = [_live(shape, axis) for shape, _ in kinds]

            def draw(live: list[np.ndarray] = live) -> Any:
                return treedef.unflatten(
                    [(rng.normal(size=m.shape) * m).astype(dtype) for m, (_, dtype) in zip(live, kinds)]
                )

            params = draw()
            state, largest = init(params), np.zeros(len(kinds))
            for i in range(STEPS + 1):
                if i == STEPS:
                    state = jax.tree.map(_late, state)
                updates, state = step(draw(), state, params)
                outside = [np.where(m, 0, np.abs(np.asarray(x))) for m, x in zip(live, jax.tree.leaves(updates))]
                largest = np.fmax(largest, [np.max(np.nan_to_num(x, nan=np.inf), initial=0) for x in outside])
            found += [(name, axis, float(size)) for name, size in zip(names, largest) if size > 0]
        return tuple(found)


def _late(x: Any) -> Any:
    """A count of steps in a state, as it is late in a training."""
    return jnp.full_like(x, LATE) if jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.integer) else x


def _live(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Which entries are not free: the first half along an axis, all of a leaf without it or of one slot."""
    if axis >= len(shape) or shape[axis] < 2:
        return np.ones(shape, bool)
    first = np.arange(shape[axis]) < (shape[axis] + 1) // 2
    return np.broadcast_to(first.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
