"""Third moments of a site: what its residual asks of products of two inputs, in a pass of their own.

A neuron omega sigma(alpha'b) whose first order vanishes still moves by omega (alpha'b)^2 sigma''(0) / 2. What that
gains follows from E[(w'v) b b'] for the outputs w it may write to. The residual v and the few outputs w in which it is
largest are known after a first pass over the samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul
from tinyjax.core.site import Site
from tinyjax.discovery.kinds.hidden_layer import HiddenPath
from tinyjax.discovery.paths.activations import curvature
from tinyjax.discovery.paths.path import Path
from tinyjax.estimation.rows import path_rows
from tinyjax.estimation.summation import SitePass
from tinyjax.methods import best_update, held_out_update
from tinyjax.statistics.averages import moments
from tinyjax.statistics.dense import halves, with_constant
from tinyjax.statistics.record import Statistics


class Residual(NamedTuple):
    """What is looked at in the second pass.

    Attributes:
        update: (*stack, H, M) the best update, which leaves the residual v - update' b.
        outputs: (*stack, R, M) orthonormal directions in which the residual is largest.
    """

    update: Array
    outputs: Array


def even_part(site: Site, paths: Sequence[Path]) -> float:
    """The curvature at 0 of the activation of a site.

    Raises:
        ValueError: the activation has none, or the site is not one of two matrix products with an elementwise
            activation between them. The message names the site.
    """
    about = f"third moments of site `{site.name}` "
    activations = [path.activation if isinstance(path, HiddenPath) else None for path in paths]
    for path, activation in zip(paths, activations):
        if activation is None:
            raise ValueError(
                f"{about}are known for an elementwise activation between two matrix products; here lies {path.between}"
            )
    assert activations[0] is not None
    found = curvature(activations[0])
    if not found:
        raise ValueError(
            f"{about}say nothing: the even part of its activation vanishes at 0 (tanh, a linear layer), so neurons and "
            "their twins do the same to second order. Complete by `random0` or `random` there"
        )
    return found


def find_residual(statistics: Statistics, num_outputs: int) -> Residual:
    """The best update of a site with `energy_matrix`, and the outputs in which what it leaves is largest."""
    mean = moments(statistics)
    assert mean.energy_matrix is not None
    update = best_update(statistics, ridge=held_out_update)
    explained = matmul(mean.cross.T, update)
    left = mean.energy_matrix - explained - explained.T + matmul(update.T, matmul(mean.gram, update))
    return Residual(update, jnp.linalg.eigh(left)[1][:, ::-1][:, :num_outputs].T)


def third_sums(at: SitePass, residual: Residual) -> Array:
    """(*stack, 2, R, D, D) sum of (w_r'v) b_prev b_prev' over even and odd samples."""
    total = jnp.zeros(())
    for path in at.paths:
        rows = path_rows(at, path)
        b_prev = halves(with_constant(rows.x, at.site.producers[0].bias is not None), at.num_samples)
        b = with_constant(rows.h, residual.update.shape[-2] > rows.h.shape[-1])
        left = rows.v - matmul(b, residual.update)
        along = halves(matmul(left, jnp.swapaxes(residual.outputs, -1, -2)), at.num_samples)

        def one(weights: Array, b_prev: Array = b_prev) -> Array:
            return matmul(jnp.swapaxes(b_prev, -1, -2), weights[..., None] * b_prev)

        found = jax.lax.map(one, jnp.moveaxis(along, -1, 0))
        total = total + jnp.moveaxis(found, 0, -3)
    return total
