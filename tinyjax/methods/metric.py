"""Statistics with a metric on the outputs, brought to coordinates in which it is the identity.

A query-key pair costs tr(S C R C'), R being the covariance of the keys' tokens under the attention. With R = F F' and
C = C_w F^(-1), that is tr(S C_w C_w'): every method then applies as it stands, and its fan-outs are brought back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.linalg import factor, inner, matmul, solve
from tinyjax.statistics import Statistics

SHRINKAGE = 1e-2
"""Ridge of R on its correlation scale: directions in which keys hardly differ are not worth large weights."""


def orthonormal(statistics: Statistics) -> tuple[Statistics, Array | None]:
    """The statistics in coordinates of the outputs in which `gram_out` is the identity, and the way back.

    `energy`, at the scores, is replaced by what all moves together could gain in this metric.

    Returns:
        The statistics without `gram_out`, and B (Q, Q): omega in the network's coordinates is omega B'. None where
        there is no metric.
    """
    if statistics.gram_out is None:
        return statistics, None
    total = jnp.maximum(statistics.count[0] + statistics.count[1], 1)
    metric = (statistics.gram_out[0] + statistics.gram_out[1]) / total
    basis = factor(metric, SHRINKAGE).unwhiten(jnp.eye(len(metric), dtype=metric.dtype))
    cross = matmul(statistics.cross_prev, basis)
    gains = jax.vmap(lambda gram, cross: inner(cross, solve(gram, cross)))(statistics.gram_prev, cross)
    shrunk = metric + SHRINKAGE * jnp.diag(jnp.diagonal(metric))
    plain = dataclasses.replace(
        statistics,
        cross_prev=cross,
        cross=matmul(statistics.cross, basis),
        energy=gains,
        weight=matmul(statistics.weight, matmul(shrunk, basis)),
        gram_out=None,
    )
    return plain, basis


def in_outputs(neurons: Any, basis: Array | None) -> Any:
    """Neurons with fan-outs and update in the network's coordinates."""
    if basis is None:
        return neurons
    delta = None if neurons.delta is None else matmul(neurons.delta, basis.T)
    return neurons._replace(omega=matmul(neurons.omega, basis.T), delta=delta)
