"""Second-order neurons: what still lowers the loss where nothing does to first order (section 4).

A neuron moves the consumer by omega (sigma'(0) alpha'b + sigma''(0) (alpha'b)^2 / 2 + ...). Where N = 0 the first term
gains nothing; of the second the loss sees E[(omega'v)(alpha'b)^2], a cubic form in the residual's third moments. Its
largest value over whitened alpha and unit omega is the best rank-one part of a partially symmetric tensor.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, matmul, relative_cutoff, root_of
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross, resolve
from tinyjax.methods.solvers.live import input_root, only_live
from tinyjax.methods.solvers.ridge import both_ways, climb, held_out_update
from tinyjax.methods.solvers.traits import require_count, traits
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.record import Statistics

NUM_OUTPUTS = 4
"""How many outputs third moments are taken for: the cost of a pass grows with it."""

_COMPRESSED = 64  # dimensions of the inputs' side in which rank-one parts are looked for; exact up to there
_ROUNDS = 50


class RankOne(NamedTuple):
    """A rank-one part of T: value () = sum_r output_r vector' T_r vector, with unit output (R,) and vector (D,)."""

    value: Array
    output: Array
    vector: Array


class _Climb(NamedTuple):
    part: RankOne
    step: Array  # how far the last round moved the vector
    count: Array  # of rounds


class _Fold(NamedTuple):
    """Moments of the half to fit on and of the other one, restricted to m directions of the inputs."""

    gram: Array  # (m, m)
    diagonal: Array  # (m, m) what the ridge multiplies
    third_moments: Array  # (R, m, m)
    gram_test: Array
    third_moments_test: Array

    def score(self, ridge: Array) -> Array:
        """What the neuron fitted to one half finds on the other, per unit of its activity there."""
        root = root_of(self.gram + ridge * self.diagonal)
        part = rank_one_part(_whitened(root, self.third_moments))
        alpha = root.unwhiten(part.vector[:, None])[:, 0]
        found = jnp.einsum("r,i,rij,j->", part.output, alpha, self.third_moments_test, alpha, precision="highest")
        size = jnp.sum(alpha * matmul(self.gram_test, alpha))
        return found / jnp.where(size > 0, size, 1)


def held_out_third(statistics: Statistics) -> Array:
    """The ridge of `second_order` whose first neuron finds most on the half of the samples it was not fitted on.

    Climbs as `held_out_ridge`; half of that is the ridge of all samples, and with an empty half it is 1. Beyond 64
    inputs, among neurons that read the 64 directions in which third moments are largest at a ridge of 1.
    """

    def fold(fitted: Moments, other: Moments) -> _Fold:
        assert fitted.third_moments is not None and other.third_moments is not None
        root = root_of(fitted.gram_prev, 1.0)
        seen = root.unwhiten(_largest(_whitened(root, fitted.third_moments), _COMPRESSED))

        def along(matrix: Array) -> Array:
            return matmul(seen.T, matmul(matrix, seen))

        return _Fold(
            gram=along(fitted.gram_prev),
            diagonal=along(jnp.diag(jnp.diagonal(fitted.gram_prev))),
            third_moments=along(fitted.third_moments),
            gram_test=along(other.gram_prev),
            third_moments_test=along(other.third_moments),
        )

    def search() -> Array:
        folds = both_ways(statistics, fold)
        return climb(statistics, lambda ridge: jnp.sum(jax.lax.map(lambda one: one.score(ridge), folds)))

    # A branch: with an empty half there is nothing to climb, and a fold of many inputs is dear.
    undecided = jnp.asarray(1, statistics.gram.dtype)
    return jax.lax.cond(jnp.all(statistics.count > 0), search, lambda: undecided)


@traits(function_preserving=False, stochastic=False, needs={"third_moments": NUM_OUTPUTS})
def second_order(
    statistics: Statistics, *, num_neurons: int, ridge: Ridge = held_out_third, key: Array | None = None
) -> Neurons:
    r"""The neurons of which the second order of the activation lowers the loss the most.

    With v the residual of the best update and T_w = S^(-1/2) E[(w'v) b b'] S^(-1/2), over unit w and a

        mu = max a' T_w a,      alpha = sqrt(mu) S^(-1/2) a,      omega = sqrt(mu) w sign(sigma''(0)).

    For a given w that is the top eigenvector of T_w, for a given a the w along E[(a'S^(-1/2)b)^2 v]: both in turn, from
    the best of all eigenvectors, to a local maximum; then the same for what is left of T. The fan-outs are
    combinations of the outputs that the statistics hold third moments for. Neurons come in pairs, alpha and -alpha with
    the same omega: what they do to first order, where it can only harm, cancels (four neurons in pairs lowered the loss
    of a stuck network by 64 %, four without by 16 %). Where N~ = 0 the loss falls by

        gamma^(3/2) |sigma''(0)| / 2 sum_k mu_k^(5/2)

    to leading order in the amplitude. For ReLU, whose even part is |z| / 2, it falls by gamma E[(omega'v) |alpha'b|]/2
    instead. A parabola resembles |z|: these directions had .85 to .99 of the largest rate where random ones had .22 to
    .29 (means over 12 problems each of five kinds of inputs; .22 at worst, under heavy tails).

    Args:
        statistics: sums at the current parameters, with `third_moments`.
        num_neurons: k, static; neurons of which nothing is asked are zero.
        ridge: on the correlation scale, S + ridge diag(S); a number or a function of the statistics.
        key: not used, here for the signature of a method.

    Returns:
        Neurons with mu as singular values, and their `second_order` rates |sigma''(0)| mu^(5/2) / 2. The first of a
        pair has the sign of alpha that helps to first order, if only by a little; the last of an odd number is alone.

    Raises:
        ValueError: `num_neurons` is not a positive int, `ridge` is negative, or there are no third moments; the
            statistics refuse to hold any where the even part of the activation vanishes at 0 (tanh).

    Example:
        >>> grow_step = tinyjax.make_grow_step(
        ...     loss_fn, site, num_neurons=2, method=methods.completed(methods.tiny, methods.second_order)
        ... )

    Reference: Verbockhaven et al., TMLR 2024, section 4: neurons of order two where TINY finds none.
    """
    num_neurons = require_count(num_neurons)
    mean, outputs = moments(statistics), statistics.third_outputs
    if mean.third_moments is None or outputs is None:
        raise ValueError(
            f"`second_order` needs third moments: ask `estimate` for `third_moments={NUM_OUTPUTS}` (`make_grow_step` "
            "does); convolutions, heads and gates have none"
        )
    root = input_root(mean, resolve(ridge, statistics))
    parts = rank_one_parts(_whitened(root, mean.third_moments), -(-num_neurons // 2))
    twice = jnp.repeat(jnp.argsort(-parts.value), 2)[:num_neurons]
    value, output, vector = (x[twice] for x in parts)
    value = jnp.where(value <= relative_cutoff(value.dtype) * jnp.sqrt(mean.energy), 0, value)
    share = jnp.sqrt(value)
    omega = jnp.sign(statistics.curvature) * share[:, None] * matmul(output, outputs)
    rate = abs(statistics.curvature) / 2 * share * value**2
    alpha = root.unwhiten(vector.T * share)
    left = residual_cross(mean, best_update(statistics, ridge=held_out_update))
    slope = jnp.sum(matmul(alpha.T, left) * omega, axis=1)
    tells = jnp.abs(slope) > relative_cutoff(value.dtype) * jnp.sqrt(mean.energy) * value
    largest = jnp.take_along_axis(alpha, jnp.argmax(jnp.abs(alpha), axis=0)[None], axis=0)[0]
    mirrored = jnp.arange(num_neurons) % 2 == 1
    alpha = jnp.where((jnp.where(tells, slope, largest) < 0) ^ mirrored, -alpha, alpha)
    return only_live(mean, Neurons(alpha, omega, value, second_order=rate))


def rank_one_parts(tensor: Array, num_parts: int) -> RankOne:
    """The largest rank-one part of T (R, D, D), then that of the rest, and so on: `num_parts` of them, stacked.

    Local maxima. Beyond 64 dimensions, of T restricted to those in which it is largest.
    """
    basis = _largest(tensor, max(_COMPRESSED, num_parts))
    tensor = matmul(basis.T, matmul(tensor, basis))

    def step(tensor: Array, _: None) -> tuple[Array, RankOne]:
        found = rank_one_part(tensor)
        taken = jnp.einsum("r,i,j->rij", found.output, found.vector, found.vector)
        return tensor - found.value * taken, found._replace(vector=matmul(basis, found.vector))

    return jax.lax.scan(step, tensor, None, length=num_parts)[1]


def rank_one_part(tensor: Array) -> RankOne:
    """A local maximum of sum_r c_r a' T_r a over unit c and a, from the best of all eigenvectors of all T_r."""

    def best_output(vector: Array) -> RankOne:
        along = jnp.einsum("i,rij,j->r", vector, tensor, vector, precision="highest")
        value = jnp.linalg.norm(along)
        return RankOne(value, along / jnp.where(value > 0, value, 1), vector)

    def climb_once(state: _Climb) -> _Climb:
        combined = jnp.einsum("r,rij->ij", state.part.output, tensor, precision="highest")
        vector = jnp.linalg.eigh(combined)[1][:, -1]
        vector = jnp.where(jnp.vdot(vector, state.part.vector) < 0, -vector, vector)
        return _Climb(best_output(vector), jnp.linalg.norm(vector - state.part.vector), state.count + 1)

    def moving(state: _Climb) -> Array:
        return (state.step > 100 * jnp.finfo(tensor.dtype).eps) & (state.count < _ROUNDS)

    vectors = jax.lax.map(lambda one: jnp.linalg.eigh(one)[1].T, tensor).reshape(-1, tensor.shape[1])
    starts = jax.lax.map(best_output, vectors)
    start = jax.tree.map(lambda x: x[jnp.argmax(starts.value)], starts)
    return jax.lax.while_loop(moving, climb_once, _Climb(start, jnp.ones_like(start.value), jnp.asarray(0))).part


def _largest(tensor: Array, size: int) -> Array:
    """Orthonormal directions (D, m), m = min(D, size), in which T (R, D, D) is largest."""
    if tensor.shape[1] <= size:
        return jnp.eye(tensor.shape[1], dtype=tensor.dtype)
    return jnp.linalg.eigh(jnp.einsum("rij,rjk->ik", tensor, tensor, precision="highest"))[1][:, -size:]


def _whitened(root: Root, third_moments: Array) -> Array:
    """S^(-1/2) T_r S^(-1/2) for every r, symmetric to the last bit."""

    def one(matrix: Array) -> Array:
        found = root.whiten(root.whiten(matrix).T)
        return (found + found.T) / 2

    return jax.lax.map(one, third_moments)
