"""How far new channels move the output of their consumer, where S only bounds it.

For a convolution the square of the move V(theta) is a quadratic form in the fan-ins and fan-outs of *all* kernel
offsets together, and r S is the paper's bound of it (eq. 71): neurons computed with S are too small, often by an order
of magnitude, and what they gain is not the sum of lambda^2 but what they gain at their best amplitude. A linear pass of
the few new channels over the samples gives the square itself.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.kernels import rows
from tinyjax.core.params import Params
from tinyjax.core.site import Sites
from tinyjax.core.windows import num_offsets, out_shape
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.kinds.convolution import ConvolutionPath
from tinyjax.discovery.paths.image_geometry import Geometry
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.recording import record
from tinyjax.methods import Neurons, Squares
from tinyjax.statistics.convolution.linear_map import linear_move

_ENTRIES = 2**23  # temporary numbers a chunk may hold


def bounded_squares(loss: TracedLoss, params: Params, batch: Any, sites: Sites) -> dict[str, Squares]:
    """`squared_moves` for every site whose S is only a bound, by name: functions of neurons.

    Args:
        loss: the loss.
        params: the parameters that the statistics were taken at.
        batch: the batch that they were taken from.
        sites: of the model.
    """
    if not any(rows(kernel) > site.capacity for site in sites for kernel in site.consumers):  # no kernel offsets
        return {}
    traced, paths = loss.trace(params, batch), loss.discover(params, batch).paths
    return {
        site.name: partial(
            squared_moves, traced, paths[site.name], params, batch, bias=site.producers[0].bias is not None
        )
        for site in sites
        if any(is_bounded(path) for path in paths[site.name])
    }


def is_bounded(path: Path) -> bool:
    """Whether S only bounds the squares of the moves through a path: the consumer reads several pixels."""
    return isinstance(path, ConvolutionPath) and num_offsets(path.geometry.consumer) > 1


def squared_moves(
    traced: Trace, paths: Sequence[Path], params: Params, batch: Any, neurons: Neurons, *, bias: bool
) -> Array:
    """Mean |V(theta)|^2 of several sets of new channels, over all samples, the even and the odd ones.

    One forward pass up to the producers; XLA drops the rest. Samples pass in chunks from there on.

    Args:
        traced: the loss at these shapes.
        paths: the ways through the site, from `discover(traced)`; they have a geometry.
        params: the parameters that the statistics were taken at.
        batch: the batch that they were taken from.
        neurons: k sets, alpha (k, D, K) and omega (k, K, Q).
        bias: whether the producer has a bias.

    Returns:
        (k, 3).
    """
    recorded = record(traced, jax.tree.leaves((params, batch)), [path.producer for path in paths])
    images = []
    for path in paths:
        assert isinstance(path, ConvolutionPath), "a path with pixels"
        x = path.producer.inputs.to_matrix(recorded[path.producer.op.path]).astype(neurons.alpha.dtype)
        images.append((path.geometry, x.reshape(traced.num_samples, *path.geometry.space, -1)))

    def of_one_set(neurons: Neurons) -> Array:
        squares = jnp.sum(jnp.stack([_by_sample(geometry, x, neurons, bias) for geometry, x in images]), axis=0)
        return jnp.stack([squares.mean(), squares[::2].mean(), squares[1::2].mean()])

    return jax.lax.map(of_one_set, neurons)


def _by_sample(geometry: Geometry, x: Array, neurons: Neurons, bias: bool) -> Array:
    """|V(theta)|^2 of every sample, (n,)."""
    move = partial(linear_move, producer=geometry.producer, consumer=geometry.consumer, between=geometry.between)

    def square(image: Array) -> Array:
        return jnp.sum(move(image[None], neurons.alpha, neurons.omega, bias_prev=bias) ** 2)

    middle = out_shape(geometry.space, geometry.producer)
    inputs, middle, out = (int(np.prod(space)) for space in (geometry.space, middle, geometry.out))
    outputs = neurons.omega.shape[-1] // num_offsets(geometry.consumer)
    entries = inputs * x.shape[-1] + middle * neurons.alpha.shape[-1] + out * outputs
    return jax.lax.map(square, x, batch_size=max(1, min(len(x), _ENTRIES // entries)))
