"""Gates for new gated units: random starts, then ascent on what the best unit behind the gate would gain.

For a gate beta the best unit omega g(beta'x)(mu'x) is TINY with the input b = g(beta'x) x. Its gain is a smooth
function of beta whose gradient needs no derivative of the solver: at the best (mu, omega) they may be held fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import correlation, matmul, root_of
from tinyjax.methods.solvers.low_rank import best

RIDGES = (1e-2, 1e-1, 1.0, 10.0)
SIZES = (0.3, 1.0, 3.0)
"""Root mean squares of a start's pre-activation: a gate that is nearly linear, one that bends, one that switches."""

LARGEST = 10.0
"""Root mean square beyond which no gate is pushed: it switches by then, and larger weights only train worse."""


class Problem(NamedTuple):
    """The rows in which gates are searched.

    Attributes:
        gating: (rows, B) input of the gate.
        inputs: (rows, D) input of the producer.
        goal: (rows, M) what the units are asked for.
    """

    gating: Array
    inputs: Array
    goal: Array


class Unit(NamedTuple):
    """The best unit behind a gate: fan-in (D,), fan-out (M,), gain () = lambda^2 in units of mean |goal|^2 a row."""

    fan_in: Array
    fan_out: Array
    gain: Array


class _Climb(NamedTuple):
    gate: Array
    unit: Unit
    step: Array


def find_gates(
    activation: Callable[[Array], Array],
    gating: Array,
    inputs: Array,
    goal: Array,
    odd: Array,
    *,
    num_gates: int,
    key: Array,
    starts: int = 12,
    steps: int = 20,
    ridges: tuple[float, ...] = RIDGES,
) -> Array:
    """Gates whose best units gain the most, one after the other, each in what those before it leave.

    Of `starts` random gates the one is taken (with one of the `ridges`) whose unit, fitted to one half of the samples,
    gains the most on the other; from there `steps` of ascent, each kept if it gains more on all samples. A local
    optimum: which gate is best is no closed form.

    Args:
        activation: of the gate, elementwise.
        gating: (rows, B) input of the gate, with its constant.
        inputs: (rows, D) input of the producer, with its constant.
        goal: (rows, M) the residual.
        odd: (rows, 1) booleans, which rows belong to odd samples.
        num_gates: how many, static.
        key: for the starts.
        starts: random gates to begin with, static.
        steps: of ascent, static.
        ridges: on the correlation scale, static.

    Returns:
        (B, num_gates); zero where the gate's input does not vary.
    """
    _, scale = correlation(matmul(gating.T, gating) / len(gating))
    ridge = jnp.asarray(ridges, goal.dtype)

    def one(goal: Array, key: Array) -> tuple[Array, Array]:
        problem = Problem(gating, inputs, goal)
        gates = _starts(gating, scale[:, 0], key, starts)
        scores = jax.lax.map(lambda gate: held_out_scores(activation, problem, odd, gate, ridge), gates)
        start, chosen = jnp.unravel_index(jnp.argmax(scores), scores.shape)
        gate = climb(activation, problem, gates[start], ridge[chosen], steps=steps)
        unit = best_unit(activation, problem, gate, ridge[chosen])
        response = activation(matmul(gating, gate)) * matmul(inputs, unit.fan_in)
        return goal - response[:, None] * unit.fan_out, gate

    _, found = jax.lax.scan(one, goal, jax.random.split(key, num_gates))
    return found.T


def best_unit(activation: Callable[[Array], Array], problem: Problem, gate: Array, ridge: Array) -> Unit:
    """TINY with one neuron and the input g(beta'x) x."""
    opened = activation(matmul(problem.gating, gate))[:, None] * problem.inputs
    gram, cross = matmul(opened.T, opened) / len(opened), matmul(opened.T, problem.goal) / len(opened)
    found = best(root_of(gram, ridge), cross, num_neurons=1)
    return Unit(found.alpha[:, 0], found.omega[0], found.singular_values[0] ** 2)


def held_out_scores(
    activation: Callable[[Array], Array], problem: Problem, odd: Array, gate: Array, ridges: Array
) -> Array:
    """For every ridge, what units fitted to one half of the samples gain on the other; the mean of both ways."""
    opened = activation(matmul(problem.gating, gate))[:, None] * problem.inputs
    halves = [jnp.where(keep, opened, 0) for keep in (~odd, odd)]
    grams, crosses = [matmul(b.T, b) for b in halves], [matmul(b.T, problem.goal) for b in halves]

    def score(ridge: Array) -> Array:
        total = jnp.zeros((), opened.dtype)
        for fitted, other in ((0, 1), (1, 0)):
            unit = best(root_of(grams[fitted], ridge), crosses[fitted], num_neurons=1)
            alpha, omega = unit.alpha[:, 0], unit.omega[0]
            quadratic = jnp.sum(alpha * matmul(grams[other], alpha)) * jnp.sum(omega**2)
            total += 2 * jnp.sum(alpha * matmul(crosses[other], omega)) - quadratic
        return total / (2 * len(opened))

    return jax.lax.map(score, ridges)


def climb(
    activation: Callable[[Array], Array], problem: Problem, gate: Array, ridge: Array, *, steps: int = 20
) -> Array:
    """A gate from which no step of ascent tried gains more.

    The direction is the gradient preconditioned by the gate input's second moments, so no unit of an input matters; the
    length doubles after a step that was kept and is quartered after one that was not.
    """
    rows = problem.gating
    metric = root_of(matmul(rows.T, rows) / len(rows), 1e-3)

    def objective(gate: Array, unit: Unit) -> Array:
        opened = activation(matmul(rows, gate))[:, None] * problem.inputs
        response = matmul(opened, unit.fan_in)
        penalty = ridge * jnp.sum(jnp.mean(opened**2, axis=0) * unit.fan_in**2)
        asked = jnp.mean(response * matmul(problem.goal, unit.fan_out))
        return 2 * asked - (jnp.mean(response**2) + penalty) * jnp.sum(unit.fan_out**2)

    def step(state: _Climb, _: None) -> tuple[_Climb, None]:
        gradient = jax.grad(objective)(state.gate, state.unit)
        direction = metric.unwhiten(metric.whiten(gradient[:, None]))[:, 0]
        length = _size(rows, direction)
        size = jnp.where(length > 0, state.step * _size(rows, state.gate) / jnp.where(length > 0, length, 1), 0)
        gate = state.gate + size * direction
        unit = best_unit(activation, problem, gate, ridge)
        better = (unit.gain > state.unit.gain) & (_size(rows, gate) < LARGEST)
        taken = _Climb(gate, unit, 2 * state.step)
        kept = state._replace(step=state.step / 4)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), taken, kept), None

    start = _Climb(gate, best_unit(activation, problem, gate, ridge), jnp.asarray(0.5, gate.dtype))
    return jax.lax.scan(step, start, None, length=steps)[0].gate


def _starts(gating: Array, scale: Array, key: Array, count: int) -> Array:
    """Random gates, alike for inputs of any unit, at sizes in turn: (count, B)."""
    gates = jax.random.normal(key, (count, len(scale)), scale.dtype) * scale
    sizes = jax.vmap(lambda gate: _size(gating, gate))(gates)
    wanted = jnp.asarray([SIZES[i % len(SIZES)] for i in range(count)], scale.dtype)
    return gates * (wanted / jnp.where(sizes > 0, sizes, 1))[:, None]


def _size(gating: Array, gate: Array) -> Array:
    return jnp.sqrt(jnp.mean(matmul(gating, gate) ** 2))
