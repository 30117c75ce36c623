"""Statistics with a metric on the outputs, brought to coordinates in which it is the identity.

A query-key pair costs tr(S C R C'), R being the covariance of the keys' tokens under the attention. With R = F F' and
C = C_w F^(-1), that is tr(S C_w C_w'): every method then applies as it stands, and its fan-outs are brought back.
Consumers that read only some of the rows that S is a sum over are brought to one scale the same way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul, root_of, solve
from tinyjax.statistics.record import Statistics

SHRINKAGE = 1e-2
"""Ridge of R on its correlation scale: directions in which keys hardly differ are not worth large weights."""


def orthonormal(statistics: Statistics) -> tuple[Statistics, Array | None]:
    """The statistics in coordinates of the outputs in which the metric is the identity, and the way back.

    `energy`, at the scores of queries and keys, is replaced by what all moves together could gain in this metric.

    Returns:
        The statistics without `gram_out` and `shares`, and B (Q, Q): omega in the network's coordinates is omega B'.
        None where there is no metric.
    """
    if statistics.shares is not None:
        return _evenly(statistics, statistics.shares)
    if statistics.gram_out is None:
        return statistics, None
    total = jnp.maximum(statistics.count[0] + statistics.count[1], 1)
    metric = (statistics.gram_out[0] + statistics.gram_out[1]) / total
    basis = root_of(metric, SHRINKAGE).unwhiten(jnp.eye(len(metric), dtype=metric.dtype))
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


def _evenly(statistics: Statistics, shares: tuple[float, ...]) -> tuple[Statistics, Array]:
    """The statistics with v over the root of its consumer's share of the rows, and the way back."""
    root = jnp.sqrt(jnp.array(shares, statistics.cross_prev.dtype))
    matrix, null = statistics.energy_matrix, statistics.null
    plain = dataclasses.replace(
        statistics,
        cross_prev=statistics.cross_prev / root,
        cross=statistics.cross / root,
        weight=statistics.weight * root,
        energy_matrix=None if matrix is None else matrix / root / root[:, None],
        null=null and null._replace(cross_prev=null.cross_prev / root, cross=null.cross / root),
        shares=None,
    )
    return plain, jnp.diag(1 / root)


def in_outputs(neurons: Any, basis: Array | None) -> Any:
    """Neurons with fan-outs and update in the network's coordinates."""
    if basis is None:
        return neurons
    delta = None if neurons.delta is None else matmul(neurons.delta, basis.T)
    return neurons._replace(omega=matmul(neurons.omega, basis.T), delta=delta)
