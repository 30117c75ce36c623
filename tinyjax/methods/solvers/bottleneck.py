"""The expressivity bottleneck: how far the move that backpropagation asks for is from any move the layer can make."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul, root_of
from tinyjax.methods.solvers.best_update import best_update, residual_cross
from tinyjax.statistics.averages import moments
from tinyjax.statistics.output_metric import orthonormal
from tinyjax.statistics.record import Statistics


class Bottleneck(NamedTuple):
    """The bottleneck of one layer and what can be gained there.

    Attributes:
        before: () mean |v|^2, the bottleneck of a layer that may not move.
        after: () psi, what the best update of the existing weights leaves (definition 3.1).
        gains: (min(D, Q),) lambda_k^2 in descending order, what the k-th new neuron lowers psi by (eq. 9; for
            convolutions a lower bound).
    """

    before: Array
    after: Array
    gains: Array


def bottleneck(statistics: Statistics) -> Bottleneck:
    """The expressivity bottleneck and the gains of the best new neurons, without any ridge.

    Example:
        >>> before, after, gains = tinyjax.methods.bottleneck(statistics)
        >>> bool(0 <= after <= before)
        True

    Reference: Verbockhaven et al., TMLR 2024, definition 3.1, proposition 3.1, eq. 9.
    """
    statistics, _ = orthonormal(statistics)
    mean = moments(statistics)
    delta = best_update(statistics)
    after = mean.energy - 2 * inner(mean.cross, delta) + inner(delta, matmul(mean.gram, delta))
    whitened = root_of(mean.gram_prev).whiten(residual_cross(mean, delta))
    gains = jnp.linalg.svd(whitened, compute_uv=False) ** 2
    return Bottleneck(mean.energy, jnp.maximum(after, 0), gains)
