"""One solver for every closed form: the best matrix of low rank under a quadratic cost with a Gram on either side.

TINY prices a neuron by the activity it causes (S on the inputs), Fisher-TINY also by the information of what it writes
(E on the outputs), a query-key pair by both of its ends. All maximise 2 <N, C> - tr(S C R C') over C = alpha omega.
"""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, matmul, solve, top_singular
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.traits import require_count


def best(
    inputs: Root, cross: Array, *, num_neurons: int, outputs: Root | None = None, floor: float | Array = 0.0
) -> Neurons:
    r"""The matrix C = alpha omega of rank `num_neurons` that maximises 2 <N, C> - tr(S C R C').

    With the singular value decomposition S^(-1/2) N R^(-1/2) = sum_k lambda_k u_k w_k':

        alpha_k = sqrt(lambda_k) S^(-1/2) u_k,      omega_k = sqrt(lambda_k) w_k' R^(-1/2).

    The maximum is the sum of the first lambda_k^2.

    Args:
        inputs: a root of S (D, D).
        cross: (D, Q) N.
        num_neurons: rank, static; neurons beyond the rank of N are zero.
        outputs: a root of R (Q, Q); None for the identity.
        floor: singular values that are rounding errors of it count as zero.

    Returns:
        Neurons, each with the sign that makes the largest entry of w positive.

    Raises:
        ValueError: `num_neurons` is not a positive int.

    Example:
        >>> best(root_of(S), N, num_neurons=8, outputs=root_of(R))

    Reference: Verbockhaven et al., TMLR 2024, proposition 3.2 for R = I.
    """
    whitened = inputs.whiten(cross)
    if outputs is not None:
        whitened = outputs.whiten(whitened.T).T
    u, values, vt = top_singular(whitened, require_count(num_neurons), floor=floor)
    share = jnp.sqrt(values)
    omega = share[:, None] * vt if outputs is None else outputs.unwhiten(vt.T * share).T
    return Neurons(inputs.unwhiten(u * share), omega, values)


def beyond(cross: Array, gram: Array | None, weights: Array) -> Array:
    """What is left of N when existing fan-ins may move: N - S W (W' S W)^+ W' N.

    S^(-1/2) N loses its projection on the span of S^(1/2) W. Where nothing but a matrix product lies behind W this is
    N~ - P dW*, with G = W' S W, M = W' N~ and P = S W at no cost. On the fan-out side it is `beyond(N.T, R, O.T).T`.

    Args:
        cross: (D, Q) N.
        gram: (D, D) S; None for the identity.
        weights: (D, C) W, empty slots as zero columns.

    Returns:
        (D, Q).
    """
    seen = weights if gram is None else matmul(gram, weights)
    return cross - matmul(seen, solve(matmul(weights.T, seen), matmul(weights.T, cross)))
