"""A residual stream: a new coordinate is written by all writers together, and every reader pays for it in its own unit.

Writers l and readers m of a stream: a coordinate s = sum_l alpha_l.h_l is read by omega_m. Reader m sees s / sigma_m
behind its norm, and only the writers before it, so the second moments S_m of what it sees differ from reader to reader:

    J(alpha, omega) = 2 alpha' N omega - sum_m |omega_m|^2 alpha' S_m alpha

is no singular value decomposition. For one side given it is least squares for the other (alternating least squares),
and the best single reader, which TINY gives exactly, is a start that comes within a few percent of the optimum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import matmul, relative_cutoff, root_of, solve, top_singular
from tinyjax.core.neurons import HE_NORM as _NORM
from tinyjax.methods.solvers.best_update import best_update, residual_cross
from tinyjax.methods.solvers.ridge import held_out_update
from tinyjax.statistics.averages import moments
from tinyjax.statistics.record import Statistics

MOST_STEPS = 50


class Coordinates(NamedTuple):
    """New coordinates of a stream, in the order in which they were found.

    Attributes:
        alpha: (D, k) what writers write, one below the other.
        omega: (k, Q) what readers read, side by side.
        singular_values: (k,) the root of what each gains.
    """

    alpha: Array
    omega: Array
    singular_values: Array


def alternate_readers(
    grams: Array,
    reads: Array,
    cross: Array,
    *,
    num_neurons: int,
    ridge: float | Array = 0.0,
    floor: float | Array = 0.0,
) -> Coordinates:
    """The coordinates that lower the bottleneck the most, one after the other: a local optimum.

    Each starts at the best that is read by a single reader and alternates, at most `MOST_STEPS` times, between the
    best fan-out and the best fan-in; what it does is then taken out of N. With a single reader it is `best`.

    Args:
        grams: (R, D, D) S_m for every reader.
        reads: (R, Q) 1 where a column of N belongs to the reader.
        cross: (D, Q) N, zero where a reader comes before a writer.
        num_neurons: k, static; coordinates beyond the rank are zero.
        ridge: of every S_m, on its correlation scale; 0 is exact.
        floor: singular values that are rounding errors of it count as zero.

    Returns:
        Balanced as by `best`: |omega|^2 = sum_m |omega_m|^2 alpha' S_m alpha / |omega|^2 = singular value.
    """
    inverse_roots = jax.lax.map(lambda gram: root_of(gram, ridge).whiten(jnp.eye(len(gram), dtype=gram.dtype)), grams)
    shrunk = grams + jnp.asarray(ridge, grams.dtype) * jax.vmap(lambda s: jnp.diag(jnp.diagonal(s)))(grams)

    def single(root: Array, columns: Array, cross: Array) -> tuple[Array, Array]:
        u, values, _ = top_singular(matmul(root, cross * columns), 1)
        return matmul(root.T, u)[:, 0], values[0]

    def fan_out_of(alpha: Array, cross: Array) -> tuple[Array, Array]:
        """The best fan-out and what it gains."""
        asked = matmul(cross.T, alpha[:, None])[:, 0]
        paid = matmul(reads.T, _price(shrunk, alpha)[:, None])[:, 0]
        omega = jnp.where(paid > 0, asked / jnp.where(paid > 0, paid, 1), 0)
        return omega, jnp.sum(asked * omega)

    def one(cross: Array, _: Any) -> tuple[Array, Coordinates]:
        starts, values = jax.lax.map(lambda reader: single(reader[0], reader[1], cross), (inverse_roots, reads))
        alpha = starts[jnp.argmax(values)]
        omega, gain = fan_out_of(alpha, cross)

        def step(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
            alpha, omega, gain, _, count = state
            weights = matmul(reads, omega[:, None] ** 2)[:, 0]
            total = jnp.einsum("r,rde->de", weights, grams, precision="highest")
            moved = solve(total, matmul(cross, omega[:, None]), ridge)[:, 0]
            found, better = fan_out_of(moved, cross)
            kept = better > gain
            alpha, omega = jnp.where(kept, moved, alpha), jnp.where(kept, found, omega)
            return alpha, omega, jnp.maximum(better, gain), gain, count + 1

        def goes_on(state: tuple[Array, Array, Array, Array, Array]) -> Array:
            _, _, gain, before, count = state
            return (count < MOST_STEPS) & (gain - before > relative_cutoff(gain.dtype) * gain)

        start = alpha, omega, gain, jnp.full_like(gain, -1), jnp.asarray(0)
        alpha, omega, gain, _, _ = jax.lax.while_loop(goes_on, step, start)
        left = cross - _written(grams, reads, alpha[:, None], omega[None])
        return left, _balanced(alpha, omega, gain)

    _, found = jax.lax.scan(one, cross, None, length=num_neurons)
    found = jax.tree.map(lambda x: x[jnp.argsort(-found.singular_values)], found)
    values = found.singular_values
    kept = ~(values <= relative_cutoff(values.dtype) * jnp.maximum(values[0], floor))
    return Coordinates(
        jnp.where(kept, found.alpha.T, 0), jnp.where(kept[:, None], found.omega, 0), jnp.where(kept, values, 0)
    )


def readers_square(grams: Array, reads: Array, alpha: Array, omega: Array) -> Array:
    """Mean |V(theta)|^2 = sum_m tr(A' S_m A W_m W_m'), of all coordinates together, ()."""
    moved = jnp.einsum("rde,dk,el->rkl", grams, alpha, alpha, precision="highest")
    return jnp.einsum("rkl,kq,rq,lq->", moved, omega, reads, omega, precision="highest")


def readers_fan_out(grams: Array, reads: Array, cross: Array, alpha: Array, ridge: float = 1e-6) -> Array:
    """The fan-outs (k, Q) that lower the bottleneck the most for given fan-ins, (A' S_m A)^+ A' N_m for each reader."""
    asked = matmul(alpha.T, cross)

    def of_one(reader: tuple[Array, Array]) -> Array:
        gram, columns = reader
        return solve(matmul(alpha.T, matmul(gram, alpha)), asked * columns, ridge)

    return jnp.sum(jax.lax.map(of_one, (grams, reads)), axis=0)


def readers_fan_in(grams: Array, reads: Array, cross: Array, omega: Array, ridge: float | Array) -> Array:
    """The fan-ins (D, k) for given fan-outs, each the best for what those before it leave."""

    def one_in(cross: Array, omega: Array) -> tuple[Array, Array]:
        weights = matmul(reads, omega[:, None] ** 2)[:, 0]
        total = jnp.einsum("r,rde->de", weights, grams, precision="highest")
        alpha = solve(total, matmul(cross, omega[:, None]), ridge)
        return cross - _written(grams, reads, alpha, omega[None]), alpha[:, 0]

    return jax.lax.scan(one_in, cross, omega)[1].T


def born_read(statistics: Statistics, neurons: Any) -> Any:
    """Neurons born without a fan-out, turned round: with the fan-out they would need, and without a fan-in.

    Where a norm sees what a new coordinate holds, only a fan-in of zero keeps the function. Those that have a fan-out
    stay as they are. Fan-outs have norm sqrt(2).
    """
    mean = moments(statistics)
    assert mean.grams is not None and mean.reads is not None
    cross = residual_cross(mean, best_update(statistics, ridge=held_out_update))
    omega = readers_fan_out(mean.grams, mean.reads, cross, neurons.alpha)
    largest = jnp.max(jnp.abs(omega), axis=1, keepdims=True)
    omega = omega / jnp.where(largest == 0, 1, largest)  # squares of unscaled entries may overflow float32
    norm = jnp.linalg.norm(omega, axis=1, keepdims=True)
    omega = omega * (_NORM / jnp.where(norm == 0, 1, norm))
    has_fan_out = jnp.any(neurons.omega != 0)
    return neurons._replace(
        alpha=jnp.where(has_fan_out, neurons.alpha, 0), omega=jnp.where(has_fan_out, neurons.omega, omega)
    )


def _price(grams: Array, alpha: Array) -> Array:
    """The price of a fan-in for every reader, alpha' S_m alpha: (R,)."""
    return jnp.einsum("rde,d,e->r", grams, alpha, alpha, precision="highest")


def _written(grams: Array, reads: Array, alpha: Array, omega: Array) -> Array:
    """S_m A W_m for every reader, side by side: (D, Q)."""
    return jnp.einsum("rde,ek,kq,rq->dq", grams, alpha, omega, reads, precision="highest")


def _balanced(alpha: Array, omega: Array, gain: Array) -> Coordinates:
    """The same alpha omega with |omega|^2 the root of the gain, and the largest entry of omega positive."""
    value = jnp.sqrt(jnp.maximum(gain, 0))
    square = jnp.sum(omega**2)
    scale = jnp.where(square > 0, jnp.sqrt(value / jnp.where(square > 0, square, 1)), 0)
    scale = scale * jnp.where(omega[jnp.argmax(jnp.abs(omega))] < 0, -1, 1)
    return Coordinates(jnp.where(scale != 0, alpha / jnp.where(scale != 0, scale, 1), 0), omega * scale, value)
