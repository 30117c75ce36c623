"""What all methods share: the neurons they return, the traits they declare, the inputs and outputs that are alive.

A method is a pure function `method(statistics, *, num_neurons, key=None) -> Neurons`. It sees sums, never a network.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.core.whole_numbers import whole_number
from tinyjax.methods.solvers.best_update import Ridge
from tinyjax.methods.solvers.by_gate import gate_by_gate
from tinyjax.methods.solvers.by_head import over_heads
from tinyjax.methods.solvers.residual_stream import born_read
from tinyjax.statistics.output_metric import in_outputs, orthonormal
from tinyjax.statistics.record import Statistics, turned

Method = Callable[..., "Neurons"]
_F = TypeVar("_F", bound=Callable[..., Any])
T = TypeVar("T")


def traits(
    *,
    function_preserving: bool,
    stochastic: bool,
    needs: Mapping[str, Any] = MappingProxyType({}),
    residual: Ridge | None = None,
) -> Callable[[_F], _F]:
    """Declares on a method what its callers must know, and lets it grow heads and gated units, one after the other.

    Args:
        function_preserving: adding the neurons changes no output of the network, so the loss says nothing about their
            amplitude.
        stochastic: the method needs a key.
        needs: options of `estimate` for what it reads besides the usual sums, such as `{"energy_matrix": True}`;
            `make_grow_step` estimates with them.
        residual: the ridge of the best update from whose residual the method starts unless it is called with a `ridge`
            of its own; growths then sum convolutions against that residual at once, several times cheaper. None for a
            method that starts elsewhere, or reads `link`.

    Example:
        >>> @tinyjax.methods.traits(function_preserving=True, stochastic=False)
        ... def silent(statistics, *, num_neurons, key=None):
        ...     neurons = tinyjax.methods.tiny(statistics, num_neurons=num_neurons)
        ...     return neurons._replace(omega=jnp.zeros_like(neurons.omega))
        >>> methods.is_function_preserving(silent)
        True
    """

    def declare(method: _F) -> _F:
        @functools.wraps(method)
        def method_of_any(statistics: Statistics, *, num_neurons: int, key: Array | None = None, **options: Any) -> Any:
            if statistics.slope is not None and statistics.slope < 0:
                rising = method_of_any(turned(statistics), num_neurons=num_neurons, key=key, **options)
                copies = function_preserving and rising.delta is not None
                return rising if copies else _falling(rising)
            one = functools.partial(method, **options)
            plain, basis = orthonormal(statistics)
            if basis is not None:
                return in_outputs(one(plain, num_neurons=num_neurons, key=key), basis)
            if statistics.heads is not None:
                return over_heads(one, statistics, num_neurons=require_count(num_neurons), key=key)
            if statistics.normed and function_preserving:
                return born_read(statistics, one(statistics, num_neurons=num_neurons, key=key))
            if statistics.gates is None:
                return one(statistics, num_neurons=num_neurons, key=key)
            return gate_by_gate(one, statistics, num_neurons=require_count(num_neurons), key=key)

        declarations = dict(function_preserving=function_preserving, stochastic=stochastic, needs=needs)
        vars(method_of_any).update(declarations, residual=residual)
        return cast(_F, method_of_any)

    return declare


def _falling(neurons: Neurons) -> Neurons:
    """The neurons of the network that rises where this one falls at 0: what they write has the other sign.

    A delta stays as it is, and so do neurons of second order.
    """
    if neurons.second_order is None:
        return neurons._replace(omega=-neurons.omega)
    return neurons._replace(omega=jnp.where(neurons.second_order[:, None] > 0, neurons.omega, -neurons.omega))


def declared(function: Callable[..., Any], name: str, default: T) -> T:
    """A trait that a function declares, also through `functools.partial` and `functools.wraps`."""
    while not hasattr(function, name):
        inner = getattr(function, "func", None) or getattr(function, "__wrapped__", None)
        if inner is None:
            return default
        function = inner
    return getattr(function, name)


def is_function_preserving(method: Method) -> bool:
    """Whether a method declares that its neurons change no output of the network."""
    return declared(method, "function_preserving", default=False)


def is_stochastic(method: Method) -> bool:
    """Whether a method declares that it needs a key."""
    return declared(method, "stochastic", default=False)


def needs(*functions: Callable[..., Any] | None) -> dict[str, Any]:
    """The options of `estimate` that functions of statistics declare to need; the larger where two ask for a number.

    Example:
        >>> methods.needs(tinyjax.methods.fisher_tiny, tinyjax.methods.random0)
        {'energy_matrix': True}
    """
    found: dict[str, Any] = {}
    for function in functions:
        wanted: Mapping[str, Any] = {} if function is None else declared(function, "needs", default={})
        found |= {name: max(value, found.get(name, value)) for name, value in wanted.items()}
    return found


def common_residual(*methods: Method | None) -> Ridge | None:
    """The ridge of the best update from whose residual all methods start; None where that is not known of all.

    Example:
        >>> methods.common_residual(tinyjax.methods.tiny0, tinyjax.methods.random0) is tinyjax.methods.held_out_update
        True
        >>> methods.common_residual(partial(tinyjax.methods.tiny, ridge=0.0)) is None
        True
    """
    first, *others = [
        None if _has_own_ridge(method) else declared(method, "residual", None) for method in methods if method
    ]
    return first if all(other is first for other in others) else None


def _has_own_ridge(method: Callable[..., Any]) -> bool:
    """Whether a ridge is bound to a method, by `functools.partial` in any depth."""
    inner = getattr(method, "func", None) or getattr(method, "__wrapped__", None)
    bound = getattr(method, "keywords", {})
    return not bound.keys().isdisjoint(("ridge", "update_ridge")) or (inner is not None and _has_own_ridge(inner))


def require_key(key: Array | None, method: str) -> Array:
    """The key, or an error that says who needs one."""
    if key is None:
        raise ValueError(
            f"`{method}` draws random numbers: pass `key=`, a new one at every growth (a key closed over by a jitted "
            "or scanned function would give the same neurons each time)"
        )
    return require_array(key)


def require_array(key: Any) -> Array:
    """The key, or an error for a seed or anything else that is none."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"`key` must be a PRNG key, `jax.random.key(seed)`, got {key!r}")
    return cast(Array, key)


def require_count(num_neurons: int) -> int:
    """The number of neurons, or an error if there is nothing to add."""
    return whole_number(num_neurons, "`num_neurons`", least=1, clause="an int >= 1 known at trace time")


def require_no_stream(statistics: Statistics, method: str) -> None:
    """Raises a ValueError for a residual stream: a method that reads the consumers' weights as one matrix."""
    if statistics.grams is not None:
        raise ValueError(
            f"`{method}` reads one fan-out a neuron, and every reader of a residual stream has its own: pass `tiny`, "
            "`tiny0` or `gradmax`"
        )
