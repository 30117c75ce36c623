"""What runs are compared with: the best update without neurons, and no growth at all."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import tinyjax
from tinyjax import methods
from tinyjax.training.schedules.basic import Additions, Widths


@methods.traits(function_preserving=True, stochastic=False)
def no_neurons(
    statistics: tinyjax.Statistics, *, num_neurons: int, key: jax.Array | None = None
) -> tinyjax.methods.Neurons:
    """Adds nothing: what remains of a growth is the best update."""
    inputs, outputs = statistics.cross_prev.shape[-2:]
    zeros = partial(jnp.zeros, dtype=statistics.cross_prev.dtype)
    return tinyjax.methods.Neurons(zeros((inputs, num_neurons)), zeros((num_neurons, outputs)), zeros(num_neurons))


def never(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
    """The schedule of a network that does not grow."""
    del step, widths, history
    return {}
