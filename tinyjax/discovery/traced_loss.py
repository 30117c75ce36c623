"""A loss together with what tracing it says, found once for all arguments of the same shapes."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jaxtyping import Array

from tinyjax.core.params import Params
from tinyjax.discovery.graph.tracing import Trace, require_arrays, trace
from tinyjax.discovery.sites import Discovery, discover


class TracedLoss:
    """A loss, its traces and its discoveries.

    Public functions take a `loss_fn` and make one of these for the time of the call; what they call takes it in place
    of the function. It lives no longer, since what a loss closes over may be another in the next call, or a tracer of a
    transformation that is over by then.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`.
        has_aux: whether it returns `(loss, aux)`.
    """

    def __init__(self, loss_fn: Callable[..., Any], has_aux: bool = False):
        self.loss_fn, self.has_aux = loss_fn, has_aux
        self._traces: dict[Hashable, Trace] = {}
        self._discoveries: dict[Hashable, Discovery] = {}

    def trace(self, params: Params, batch: Any) -> Trace:
        """The loss traced at the shapes of the arguments, which may be abstract; raises as `trace`."""
        key = _shapes(params, batch)
        if key not in self._traces:
            self._traces[key] = trace(self.loss_fn, params, batch, has_aux=self.has_aux)
        return self._traces[key]

    def discover(self, params: Params, batch: Any) -> Discovery:
        """The hidden dimensions at the shapes of the arguments."""
        key = _shapes(params, batch)
        if key not in self._discoveries:
            self._discoveries[key] = discover(self.trace(params, batch))
        return self._discoveries[key]

    def __call__(self, params: Params, batch: Any) -> Array:
        """The loss without aux. The function is not called anew: JAX keeps its jaxpr, which is evaluated."""
        jaxpr = jax.make_jaxpr(self.loss_fn)(params, batch)
        return eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves((params, batch)))[0]


def _shapes(params: Params, batch: Any) -> Hashable:
    """All that a trace depends on: the structure of the arguments, and shapes, dtypes and weak types of the leaves."""
    require_arrays(params, batch)
    leaves, structure = jax.tree.flatten((params, batch))
    return structure, tuple(jax.typeof(leaf) for leaf in leaves)
