"""Roots of positive semi-definite matrices and truncated singular value decompositions.

Every solve works on the *correlation scale*: S = D^(1/2) C D^(1/2) with D = diag(S), so the unit of an input never
decides what is numerically zero, and a ridge S + r D means the same for every unit. Inputs of zero variance (free
slots) are replaced by rows of the identity and stay out. All cut-offs are relative. NaN in, NaN out: comparisons are
written so that NaN counts as "not small".

The pieces are jitted: called outside `jit` they compile as a whole and not operation by operation, and a program that
solves several times traces them once.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

_DIRECT_UP_TO = 32  # smallest dimension above which the smaller Gram is faster than a direct SVD (measured)


class Root(NamedTuple):
    """A root F of a positive semi-definite matrix S = F F', as the two maps in which it is used.

    Attributes:
        whiten: X (D, q) -> F^+ X.
        unwhiten: U (D, q) -> (F')^+ U; so `unwhiten(whiten(X))` solves S Y = X.
        rank: () number of directions kept.
    """

    whiten: Callable[[Array], Array]
    unwhiten: Callable[[Array], Array]
    rank: Array


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` at full precision: float32 products on accelerators may otherwise be computed in bfloat16."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def inner(a: Array, b: Array) -> Array:
    """The Frobenius inner product of two matrices."""
    return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST)


def relative_cutoff(dtype: jnp.dtype) -> float:
    """What counts as zero relative to the largest eigenvalue: 1e-10 in float64, 1e-6 in anything narrower."""
    return 1e-10 if jnp.finfo(dtype).bits >= 64 else 1e-6


@jax.jit
def correlation(
    matrix: Float[Array, "d d"], diagonal: Float[Array, " d"] | None = None
) -> tuple[Float[Array, "d d"], Float[Array, "d 1"]]:
    """The matrix on the correlation scale, and the factors that bring vectors there.

    Args:
        matrix: (D, D) positive semi-definite.
        diagonal: (D,) the variances that define the scale; default the matrix's own diagonal.

    Returns:
        (D, D) the matrix with unit diagonal, rows of the identity where the variance is zero; (D, 1) 1 / standard
        deviation, 0 where the variance is zero.
    """
    variance = jnp.diagonal(matrix) if diagonal is None else diagonal
    live = ~(variance <= 0)
    inverse_scale = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, variance, 1)), 0)[:, None]
    # two products instead of one with the outer product: 1e-15 squared and 1e15 squared leave float32's range
    scaled = (matrix * inverse_scale) * inverse_scale.T
    return scaled + jnp.diag(jnp.where(live, 0, 1).astype(matrix.dtype)), inverse_scale


def root_of(matrix: Float[Array, "d d"], ridge: float | int | Float[Array, ""] = 0.0) -> Root:
    """A root of S + ridge diag(S).

    `ridge` the Python number 0 is exact: eigenvalues of the correlation matrix below `relative_cutoff` count as zero,
    and solutions have the smallest norm, so that `unwhiten(whiten(X))` is the pseudo-inverse applied to X (for X in
    the range of S, which holds for all moments). Any other ridge, a traced 0 included, goes through a Cholesky factor
    and is at least the rounding error of the dtype.

    Args:
        matrix: (D, D) positive semi-definite.
        ridge: >= 0, on the correlation scale.

    Raises:
        ValueError: the ridge is a negative number.
    """
    if isinstance(ridge, int | float):
        if ridge < 0:
            raise ValueError(f"`ridge` must be >= 0, got {ridge}")
        if ridge == 0:
            return _by_eigenvectors(matrix)
    return _by_cholesky(matrix, ridge)


def solve(
    matrix: Float[Array, "d d"], rhs: Float[Array, "d q"], ridge: float | int | Float[Array, ""] = 0.0
) -> Float[Array, "d q"]:
    """(S + ridge diag(S))^+ X, of shape (D, q)."""
    root = root_of(matrix, ridge)
    return root.unwhiten(root.whiten(rhs))


def some_solution(matrix: Float[Array, "d d"], rhs: Float[Array, "d q"]) -> Float[Array, "d q"]:
    """X (D, q) with S X = S S^+ Y up to rounding, where only that image counts and not the norm of X.

    By a Cholesky factor, at a tenth of what the solution of smallest norm costs, for Y in the range of S.
    """
    return solve(matrix, rhs, jnp.zeros((), matrix.dtype))


def cholesky_solve(
    matrix: Float[Array, "d d"], rhs: Float[Array, "d q"], ridge: float | int | Float[Array, ""]
) -> Float[Array, "d q"]:
    """(C + ridge I)^-1 X for a matrix on the correlation scale; the ridge is at least the dtype's rounding error."""
    lower = _cholesky(matrix, jnp.asarray(ridge, matrix.dtype))
    return solve_triangular(lower, solve_triangular(lower, rhs, lower=True), lower=True, trans=1)


class _EigenRoot(NamedTuple):
    """What the exact root is applied with: the root, the null space of S, a root of its Gram, 1 / deviations, rank."""

    root: Array
    null: Array
    null_root: Array
    inverse_scale: Array
    rank: Array


def _by_eigenvectors(matrix: Float[Array, "d d"]) -> Root:
    found = _eigen_root(matrix)
    return Root(partial(_eigen_whiten, found), partial(_eigen_unwhiten, found), found.rank)


@jax.jit
def _eigen_root(matrix: Float[Array, "d d"]) -> _EigenRoot:
    scaled, inverse_scale = correlation(matrix)
    values, vectors = jnp.linalg.eigh(scaled)
    kept = ~(values <= relative_cutoff(matrix.dtype) * values[-1])
    root = vectors * jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)

    # A solution on the correlation scale is not yet the one of smallest norm: take out its part in the null space of S.
    null = jnp.where(kept, 0, vectors) * inverse_scale
    null = null / jnp.where(kept, 1, jnp.linalg.norm(null, axis=0))
    jitter = 10 * len(values) * jnp.finfo(matrix.dtype).eps
    null_gram = matmul(null.T, null) + jnp.diag(jnp.where(kept, 1, jitter))
    null_root = jnp.linalg.cholesky(null_gram)
    return _EigenRoot(root, null, null_root, inverse_scale, jnp.sum(kept) - jnp.sum(inverse_scale == 0))


@jax.jit
def _eigen_whiten(found: _EigenRoot, x: Array) -> Array:
    return matmul(found.root.T, x * found.inverse_scale)


@jax.jit
def _eigen_unwhiten(found: _EigenRoot, u: Array) -> Array:
    x = matmul(found.root, u) * found.inverse_scale
    coefficients = jax.scipy.linalg.cho_solve((found.null_root, True), matmul(found.null.T, x))
    return jnp.where(found.inverse_scale != 0, x - matmul(found.null, coefficients), 0)


@jax.jit
def _cholesky(matrix: Float[Array, "d d"], ridge: Float[Array, ""]) -> Float[Array, "d d"]:
    """The lower Cholesky factor of C + ridge I, with a ridge of at least the rounding error of the dtype."""
    size = len(matrix)
    ridge = jnp.maximum(ridge, size * jnp.finfo(matrix.dtype).eps)
    # LAPACK reads columns: the transpose of rows is already in its order, and the matrix is symmetric.
    return lax.linalg.cholesky((matrix + ridge * jnp.eye(size, dtype=matrix.dtype)).T, symmetrize_input=False)


def _by_cholesky(matrix: Float[Array, "d d"], ridge: float | int | Float[Array, ""]) -> Root:
    lower, inverse_scale, rank = _cholesky_root(matrix, jnp.asarray(ridge, matrix.dtype))
    return Root(
        partial(_cholesky_whiten, lower, inverse_scale), partial(_cholesky_unwhiten, lower, inverse_scale), rank
    )


@jax.jit
def _cholesky_root(matrix: Float[Array, "d d"], ridge: Float[Array, ""]) -> tuple[Array, Array, Array]:
    scaled, inverse_scale = correlation(matrix)
    return _cholesky(scaled, ridge), inverse_scale, jnp.sum(inverse_scale != 0)


@jax.jit
def _cholesky_whiten(lower: Array, inverse_scale: Array, x: Array) -> Array:
    return solve_triangular(lower, x * inverse_scale, lower=True)


@jax.jit
def _cholesky_unwhiten(lower: Array, inverse_scale: Array, u: Array) -> Array:
    return solve_triangular(lower, u, lower=True, trans=1) * inverse_scale


@partial(jax.jit, static_argnames="num")
def top_singular(
    matrix: Float[Array, "d q"], num: int, floor: float | int | Float[Array, ""] = 0.0
) -> tuple[Float[Array, "d k"], Float[Array, " k"], Float[Array, "k q"]]:
    """The `num` largest singular triplets, padded with zeros beyond the numerical rank.

    The sign of each pair of vectors is the one that makes the largest entry of the right vector positive, so that the
    same sums give the same neurons.

    Args:
        matrix: (d, q).
        num: number of triplets k; may exceed min(d, q).
        floor: singular values below `relative_cutoff` times the larger of `floor` and the first one count as zero.

    Returns:
        u (d, k), values (k,), v' (k, q).
    """
    rank = min(num, *matrix.shape)
    if min(matrix.shape) <= _DIRECT_UP_TO:
        u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
        u, values, vt = u[:, :rank], values[:rank], vt[:rank]
    else:
        u, values, vt = _svd_by_gram(matrix, rank)
    kept = ~(values <= relative_cutoff(matrix.dtype) * jnp.maximum(values[0], floor))
    largest = jnp.take_along_axis(vt, jnp.argmax(jnp.abs(vt), axis=1)[:, None], axis=1)[:, 0]
    sign = jnp.where(largest < 0, -1, 1).astype(matrix.dtype)
    u, vt = jnp.where(kept, u * sign, 0), jnp.where(kept[:, None], vt * sign[:, None], 0)
    pad = (0, num - rank)
    return jnp.pad(u, ((0, 0), pad)), jnp.pad(jnp.where(kept, values, 0), pad), jnp.pad(vt, (pad, (0, 0)))


def _svd_by_gram(
    matrix: Float[Array, "d q"], num: int
) -> tuple[Float[Array, "d k"], Float[Array, " k"], Float[Array, "k q"]]:
    """The first singular triplets from the smaller Gram matrix.

    Squaring loses singular values below sqrt(eps) of the first, so the Gram only gives a subspace; a small SVD of the
    matrix restricted to it (Rayleigh-Ritz) restores the accuracy and the orthogonality of a direct SVD.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, values, ut = _svd_by_gram(matrix.T, num)
        return ut.T, values, v.T
    unit = jnp.max(jnp.abs(matrix))
    unit = jnp.where(unit == 0, 1, unit)
    scaled = matrix / unit
    _, vectors = jnp.linalg.eigh(matmul(scaled.T, scaled))
    subspace = vectors[:, ::-1][:, :num]
    u, values, vt = jnp.linalg.svd(matmul(matrix, subspace), full_matrices=False)
    return u, values, matmul(vt, subspace.T)
