"""The even part of an activation at 0: what is left of a neuron to which nothing is asked to first order.

Near 0, sigma(z) = sigma'(0) z + curvature z^2 / 2 + ... An odd function (tanh) has no even part, a line neither. ReLU
has a kink there: its even part is |z| / 2, of which no parabola is the expansion, but which a parabola resembles.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

_STEP = 2.0**-6
_ROUNDING = 1e-4  # of sigma, what counts as no even part at all: float32 leaves 1e-5 at this step


def curvature(activation: Callable[[Array], Array]) -> float:
    r"""sigma''(0); for an even part k |z|, that of the parabola nearest to it over standard normal z, $k\sqrt{2/\pi}$.

    Args:
        activation: elementwise, with sigma(0) = 0.

    Returns:
        A number, 0 where the even part at 0 vanishes to second order: tanh, sin, the identity, z^4.

    Example:
        >>> print(f"{curvature(jax.nn.silu):.3f} {curvature(jax.nn.relu):.3f} {curvature(jnp.tanh):.3f}")
        0.500 0.399 0.000
    """
    with jax.ensure_compile_time_eval():
        steps = jnp.asarray([_STEP, 2 * _STEP])
        values = activation(jnp.concatenate([steps, -steps]))
        even = [(float(values[i]) + float(values[2 + i])) / 2 for i in (0, 1)]
        size = float(jnp.max(jnp.abs(values)))
    if abs(even[1]) <= _ROUNDING * size:
        return 0.0
    growth = math.log2(abs(even[1] / even[0])) if even[0] else math.inf  # the power of z that the even part is
    if growth > 3:
        return 0.0
    if growth < 1.5:
        return even[0] / _STEP * math.sqrt(2 / math.pi)
    return (4 * even[0] - even[1] / 4) / 3 * 2 / _STEP**2  # without the fourth power
