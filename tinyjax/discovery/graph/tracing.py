"""A loss function as a flat list of operations.

`trace` runs the user's unmodified loss through `jax.make_jaxpr`; `Graph` lists its equations with calls inlined, so
that an analysis is one loop over `graph.ops`. Every fact about jaxprs that changes between JAX releases (names of
call-like primitives, where a sub-jaxpr is kept, how `scan` counts its operands) lives in this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from tinyjax.core.batch import batch_size, has_samples
from tinyjax.core.params import Params, named_leaves


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
    require_arrays(params, batch)
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


def require_arrays(params: Params, batch: Any) -> None:
    """Raises a ValueError for a leaf that is neither an array (or its shape), a number nor a key."""
    for what, tree in {"params": params, "batch": batch}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            dtype = getattr(leaf, "dtype", None)
            if not isinstance(leaf, bool | int | float | complex) and (dtype is None or dtype == np.dtype(object)):
                raise ValueError(
                    f"`{what}`{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array: leave it out, "
                    "close the loss over it"
                )
