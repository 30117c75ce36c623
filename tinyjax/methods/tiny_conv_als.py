"""TINY for convolutions on the objective itself, where `tiny` solves the paper's bound of it (lemma C.2).

The move of new channels is linear in F = the matrices alpha omega_m, and its square is a quadratic form in all of F at
once, (O D) x (O D). The paper bounds that form by r S to get a singular value decomposition. For thin layers the form
itself is affordable: least squares for the fan-out given the fan-in, and for the fan-in given the fan-out, in turn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import inner, matmul, root_of, solve
from tinyjax.core.neurons import Neurons
from tinyjax.methods.solvers.best_update import Ridge, best_update, residual_cross
from tinyjax.methods.solvers.gains import update_gain
from tinyjax.methods.solvers.live import only_live
from tinyjax.methods.solvers.low_rank import best
from tinyjax.methods.solvers.traits import traits
from tinyjax.statistics.averages import Moments, moments
from tinyjax.statistics.record import Statistics


class ConvProblem(NamedTuple):
    """The bottleneck of a convolution as a function of new channels, without approximation; means over samples.

    Attributes:
        gram: (O, D, O, D) sum over output pixels of the patches that two offsets read.
        cross: (D, M, O) N, of those patches and the residual of the best update.
        energy: () mean |residual|^2, the bottleneck psi.
    """

    gram: Array
    cross: Array
    energy: Array


class ConvGains(NamedTuple):
    """How much `num_neurons` new channels lower the bottleneck of a convolution.

    Attributes:
        predicted: () sum of lambda^2 of the paper's approximation; a lower bound of what it gains at amplitude 1.
        approximation: () its true gain at its best amplitude.
        als: () the true gain of `tiny_conv_als`.
        bound: () of any number of channels: F unconstrained.
    """

    predicted: Array
    approximation: Array
    als: Array
    bound: Array


@traits(function_preserving=False, stochastic=False, needs={"offset_gram": True})
def tiny_conv_als(
    statistics: Statistics,
    *,
    num_neurons: int,
    update_ridge: Ridge = 0.0,
    num_steps: int = 30,
    key: Array | None = None,
) -> Neurons:
    r"""The channels that lower the bottleneck of a convolution, by alternating least squares from `tiny`'s.

    Minimises E sum_j |v_j - V_j(alpha, omega)|^2, in which V is the convolution of a convolution. Each step is an exact
    least-squares solution, so the gain never falls; the optimum found is a local one. Cost: a factorisation of
    (k O) x (k O) and one of (k D) x (k D) matrices for each step. The fit is exact, with no ridge: give it many more
    output pixels than (D + M O) k numbers, or it fits noise. At a dense layer it is `tiny` without ridge.

    Args:
        statistics: sums at the current parameters, with `offset_gram`.
        num_neurons: k, static.
        update_ridge: of the best update whose residual the channels are to explain; 0 is exact.
        num_steps: pairs of solutions.
        key: not used, here for the signature of a method.

    Returns:
        Neurons balanced as those of `tiny`: with alpha omega = sum_k s_k a_k w_k' in the metric of S, singular values
        s_k in descending order.

    Raises:
        ValueError: `num_neurons` is not a positive int, or the statistics have no `offset_gram`.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site, offset_gram=True))
        >>> neurons = tinyjax.methods.tiny_conv_als(estimate(params, batch), num_neurons=2, num_steps=3)

    Reference: objective of Verbockhaven et al., TMLR 2024, eq. 56.
    """
    mean = moments(statistics)
    problem = conv_problem(mean, best_update(statistics, ridge=update_ridge))
    return only_live(mean, alternate_kernels(problem, num_neurons=num_neurons, num_steps=num_steps))


def conv_problem(moments: Moments, delta: Array) -> ConvProblem:
    """What an update of the consumer leaves for new channels to do.

    Args:
        moments: means over samples, with `offset_gram`.
        delta: (H, M) the update; the best one where `link` is None (`cross_prev` is of its residual then).

    Raises:
        ValueError: there is no `offset_gram`.
    """
    if moments.offset_gram is None:
        raise ValueError("these statistics have no `offset_gram`: pass `offset_gram=True` to `estimate`")
    offsets, inputs = moments.offset_gram.shape[:2]
    cross = residual_cross(moments, delta).reshape(inputs, -1, offsets)
    return ConvProblem(moments.offset_gram, cross, moments.energy - update_gain(moments, delta))


def alternate_kernels(problem: ConvProblem, *, num_neurons: int, num_steps: int = 30) -> Neurons:
    """The channels of `tiny_conv_als`, from the problem itself."""
    start = approximation(problem, num_neurons)

    def step(_: int, alpha: Array) -> Array:
        return _best_alpha(problem, alpha, _best_omega(problem, alpha))

    alpha = jax.lax.fori_loop(0, num_steps, step, start.alpha)
    return _balanced(problem, alpha, _best_omega(problem, alpha))


def approximation(problem: ConvProblem, num_neurons: int) -> Neurons:
    """The solution of the paper (lemma C.3): `tiny`, exact."""
    offsets, inputs = problem.gram.shape[:2]
    gram = min(offsets, inputs) * _diagonal(problem)
    cross = problem.cross.reshape(inputs, -1)
    return best(root_of(gram), cross, num_neurons=num_neurons, floor=jnp.sqrt(problem.energy))


def conv_gain(problem: ConvProblem, neurons: Neurons) -> Array:
    """By how much the channels lower the bottleneck at amplitude 1: 2 <N, alpha omega> - E sum_j |V_j|^2, ()."""
    slope, square = _slope_and_square(problem, neurons)
    return 2 * slope - square


def best_conv_gain(problem: ConvProblem, neurons: Neurons) -> Array:
    """The gain at the best amplitude, <v, V>^2 / |V|^2; 0 for channels that do not move the output, ()."""
    slope, square = _slope_and_square(problem, neurons)
    moves = square > 0
    return jnp.where(moves, slope**2 / jnp.where(moves, square, 1), 0)


def conv_bound(problem: ConvProblem) -> Array:
    """The gain when F is any matrix, more than any number of channels can have, ()."""
    offsets, inputs = problem.gram.shape[:2]
    cross = problem.cross.transpose(2, 0, 1).reshape(offsets * inputs, -1)
    return inner(cross, solve(problem.gram.reshape(offsets * inputs, -1), cross))


def conv_gains(
    statistics: Statistics, *, num_neurons: int, update_ridge: Ridge = 0.0, num_steps: int = 30
) -> ConvGains:
    """What the paper's approximation costs: its gain, that of `tiny_conv_als`, and the bound of both.

    All are in the batch, without a ridge, in units of mean |V_goal|^2.

    Args:
        statistics: sums at the current parameters, with `offset_gram`.
        num_neurons: of the two methods, static.
        update_ridge: of the best update beforehand; 0 is exact.
        num_steps: of `tiny_conv_als`.

    Raises:
        ValueError: `num_neurons` is not a positive int, or the statistics have no `offset_gram`.

    Example:
        >>> estimate = jax.jit(partial(tinyjax.estimate, loss_fn, sites=site, offset_gram=True))
        >>> gains_of = jax.jit(partial(tinyjax.methods.conv_gains, num_neurons=2, num_steps=3))
        >>> gains = gains_of(estimate(params, batch))
        >>> bool(gains.als <= gains.bound * 1.01)
        True
    """
    problem = conv_problem(moments(statistics), best_update(statistics, ridge=update_ridge))
    return gains_of(problem, num_neurons=num_neurons, num_steps=num_steps)


def gains_of(problem: ConvProblem, *, num_neurons: int, num_steps: int = 30) -> ConvGains:
    """`conv_gains` from the problem itself."""
    start = approximation(problem, num_neurons)
    return ConvGains(
        predicted=jnp.sum(start.singular_values**2),
        approximation=best_conv_gain(problem, start),
        als=conv_gain(problem, alternate_kernels(problem, num_neurons=num_neurons, num_steps=num_steps)),
        bound=conv_bound(problem),
    )


def _diagonal(problem: ConvProblem) -> Array:
    """S without its factor r: (D, D)."""
    return jnp.einsum("odoe->de", problem.gram)


def _slope_and_square(problem: ConvProblem, neurons: Neurons) -> tuple[Array, Array]:
    """<N, alpha omega> and E sum_j |V_j|^2."""
    product = matmul(neurons.alpha, neurons.omega).reshape(problem.cross.shape)
    moved = _einsum("odpe,emp->dmo", problem.gram, product)
    return inner(problem.cross, product), inner(product, moved)


def _best_omega(problem: ConvProblem, alpha: Array) -> Array:
    """The fan-out (k, M, O) that lowers the bottleneck the most, given the fan-in."""
    num_neurons, outputs = alpha.shape[1], problem.cross.shape[1]
    gram = _einsum("odpe,dk,el->kolp", problem.gram, alpha, alpha)
    cross = _einsum("dmo,dk->kom", problem.cross, alpha)
    rows = gram.shape[0] * gram.shape[1]
    omega = solve(gram.reshape(rows, rows), cross.reshape(rows, outputs))
    return omega.reshape(num_neurons, -1, outputs).transpose(0, 2, 1)


def _best_alpha(problem: ConvProblem, alpha: Array, omega: Array) -> Array:
    """The fan-in (D, k) that lowers the bottleneck the most, given the fan-out; `alpha` gives the shape."""
    mixed = _einsum("kmo,lmp->kolp", omega, omega)
    gram = _einsum("odpe,kolp->dkel", problem.gram, mixed).reshape(alpha.size, alpha.size)
    cross = _einsum("dmo,kmo->dk", problem.cross, omega)
    return solve(gram, cross.reshape(-1, 1)).reshape(alpha.shape)


def _balanced(problem: ConvProblem, alpha: Array, omega: Array) -> Neurons:
    """The same alpha omega, as orthogonal neurons with norms shared between both sides."""
    root = root_of(_diagonal(problem))
    product = matmul(alpha, omega.reshape(alpha.shape[1], -1))
    floor = jnp.sqrt(problem.energy)
    return best(root, matmul(_diagonal(problem), product), num_neurons=alpha.shape[1], floor=floor)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
