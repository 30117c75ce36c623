"""Norms of new neurons, fixed instead of searched."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.traits import Method


def normalize(neurons: Neurons, *, alpha: float | None = None, omega: float | None = None) -> Neurons:
    """Neurons whose root mean square norm is `alpha` on the fan-in and `omega` on the fan-out side.

    The mean is over the neurons that are not empty; None leaves a side as it is, and an empty side stays empty.

    Args:
        neurons: alpha (D, k) and omega (k, Q).
        alpha: norm of the fan-in, e.g. sqrt(1e-3).
        omega: norm of the fan-out.

    Example:
        >>> neurons = tinyjax.growth.normalize(tinyjax.methods.tiny(statistics, num_neurons=1), alpha=0.5, omega=2.0)
        >>> print(f"{jnp.linalg.norm(neurons.alpha):.2f} {jnp.linalg.norm(neurons.omega):.2f}")
        0.50 2.00

    Reference: Verbockhaven et al., TMLR 2024, appendix E.3.1.
    """
    return neurons._replace(
        alpha=_with_norm(neurons.alpha, alpha, axis=-2), omega=_with_norm(neurons.omega, omega, axis=-1)
    )


def normalized(method: Method, *, alpha: float | None = None, omega: float | None = None) -> Method:
    """The method followed by `normalize`, a method itself.

    Example:
        >>> method = tinyjax.growth.normalized(tinyjax.methods.tiny, alpha=1e-3**0.5, omega=1e-3**0.5)
        >>> grow_step = tinyjax.make_grow_step(
        ...     loss_fn, site, num_neurons=2, method=method, amplitude=tinyjax.growth.fixed(1.0), update=None
        ... )
    """

    @functools.wraps(method)
    def with_norms(*args: Any, **kwargs: Any) -> Neurons:
        return normalize(method(*args, **kwargs), alpha=alpha, omega=omega)

    return with_norms


def _with_norm(vectors: Array, norm: float | None, *, axis: int) -> Array:
    if norm is None:
        return vectors
    unit = jnp.max(jnp.abs(vectors))
    vectors = vectors / jnp.where(unit == 0, 1, unit)  # squares of unscaled entries may leave float32's range
    squares = jnp.sum(vectors**2, axis=axis)
    used = jnp.maximum(jnp.sum(squares != 0), 1).astype(vectors.dtype)
    mean = jnp.sum(squares) / used
    return vectors * (norm / jnp.sqrt(jnp.where(mean == 0, 1, mean)))
