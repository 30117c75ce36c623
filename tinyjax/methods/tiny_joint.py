"""New neurons and the update of the existing weights, optimised together (problem 7, appendix C.4).

For every choice of neurons the best update is G^+ (M - P' alpha omega). Put back, it leaves a problem of the form of
proposition 3.2 in which only that part of the input counts which the existing neurons do not compute already:
S_perp = S - P G^+ P', with the same N.
"""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, matmul, relative_cutoff, root_of, solve
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.ridge import Fold, choose, held_out_update
from tinyjax.methods.solvers.traits import traits
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.record import Statistics


@traits(function_preserving=False, stochastic=False)
def tiny_joint(
    statistics: Statistics,
    *,
    num_neurons: int,
    ridge: Ridge | None = None,
    update_ridge: Ridge = held_out_update,
    key: Array | None = None,
) -> Neurons:
    """The neurons that lower the bottleneck the most when the existing weights follow, and their own update `delta`.

    Neurons and `delta` belong together and take one amplitude: paired with the best update of proposition 3.1 the
    neurons can be worse than nothing. At ridge 0 the first-order decrease of the loss is exactly the decrease of psi.

    Args:
        statistics: sums at the current parameters of a dense site.
        num_neurons: k, static; neurons beyond the rank are zero.
        ridge: of the neurons, on the correlation scale of S; default `held_out_joint` at the same `update_ridge`.
        update_ridge: of the update, on the correlation scale of G.
        key: not used, here for the signature of a method.

    Returns:
        Neurons with `delta` (H, M); the k-th lowers psi by lambda_k^2 on top of the best update alone, at ridge 0.

    Raises:
        ValueError: `num_neurons` is not a positive int, a ridge is negative, or the consumer is a convolution.

    Example:
        >>> neurons = tinyjax.methods.tiny_joint(statistics, num_neurons=2)
        >>> neurons.delta.shape  # of the weights and biases that are there
        (13, 12)

    Reference: Verbockhaven et al., TMLR 2024, problem 7 and appendix C.4.
    """
    mean = moments(statistics)
    link = _dense_link(mean)
    update_ridge = resolve(update_ridge, statistics)
    ridge = held_out_joint(statistics, update_ridge=update_ridge) if ridge is None else resolve(ridge, statistics)
    cross = residual_cross(mean, solve(mean.gram, mean.cross, update_ridge))
    root = _unexplained(input_root(mean, ridge), root_of(mean.gram, update_ridge), link)
    neurons = only_live(mean, best(root, cross, num_neurons=num_neurons, floor=jnp.sqrt(mean.energy)))
    move = matmul(neurons.alpha, neurons.omega)
    return neurons._replace(delta=solve(mean.gram, mean.cross - matmul(link.T, move), update_ridge))


def held_out_joint(statistics: Statistics, *, update_ridge: float | Array) -> Array:
    """The ridge of `tiny_joint` whose neurons, with their update, generalise best from one half to the other.

    Args:
        statistics: sums of a dense site.
        update_ridge: of the update, fixed.
    """

    def fold(a: Moments, b: Moments) -> Fold:
        link, link_test = _dense_link(a), _dense_link(b)
        delta = solve(a.gram, a.cross, update_ridge)
        follow = solve(a.gram, link.T, update_ridge)  # neurons C make the update follow by -follow @ C
        mixed = matmul(link_test, follow)
        return Fold(
            gram=a.gram_prev - matmul(link, follow),
            cross=residual_cross(a, delta),
            diagonal=jnp.diagonal(a.gram_prev),
            gram_test=b.gram_prev - mixed - mixed.T + matmul(follow.T, matmul(b.gram, follow)),
            cross_test=residual_cross(b, delta) - matmul(follow.T, b.cross - matmul(b.gram, delta)),
        )

    return choose(statistics, fold)


def _dense_link(moments: Moments) -> Array:
    if moments.link is None or moments.link.shape[0] != 1:
        raise ValueError(
            "`tiny_joint` needs a dense consumer: for a convolution S is an approximation and has no joint form. "
            "Use `tiny` with `best_update`, or `tiny0`."
        )
    return moments.link[0]


def _unexplained(root_prev: Root, root: Root, link: Array) -> Root:
    """A root of S - P G^+ P', from roots of S and of G.

    On the scale where S is the identity the matrix is I - R'R, whose eigenvalues are 1 minus squared canonical
    correlations, all in [0, 1]: there a difference of two large matrices can be cut relative to S and not to itself.
    """
    correlations = root.whiten(root_prev.whiten(link).T)  # R (H, D)
    identity = jnp.eye(link.shape[0], dtype=link.dtype)
    values, vectors = jnp.linalg.eigh(identity - matmul(correlations.T, correlations))
    kept = ~(values <= relative_cutoff(link.dtype))
    inverse = vectors * jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return Root(
        whiten=lambda x: matmul(inverse.T, root_prev.whiten(x)),
        unwhiten=lambda u: root_prev.unwhiten(matmul(inverse, u)),
        rank=jnp.sum(kept),
    )
