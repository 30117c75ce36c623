"""Batch normalisation at the birth of a channel.

A normalisation rescales a new channel whatever its fan-in, so the amplitude of a birth means nothing unless the
normalisation is the identity on it at that moment: scale = sqrt(var + eps) and shift = mean of the channel's response
on the batch, and the same running statistics, so that training and evaluation agree.

Running averages that are corrected for their start at zero (Haiku's, and Equinox's in mode "batch") are divided by
1 - decay^steps in evaluation: there a newborn is the identity only once that factor is close to 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.params import Params
from tinyjax.core.site import Norm
from tinyjax.core.windows import convolve
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.kinds.convolution import ConvolutionPath
from tinyjax.discovery.paths.path import Path
from tinyjax.estimation.recording import record

ResponseMoments = tuple[Array, Array]


def response_moments(
    traced: Trace, path: Path, params: Params, batch: Any, alpha: Array, *, bias: bool
) -> ResponseMoments:
    """Mean and variance, over samples and pixels, of what new neurons answer to a batch before any normalisation.

    One forward pass up to the producer; XLA drops the rest.

    Args:
        traced: the loss at these shapes.
        path: the way through the site, from `discover(traced)`.
        params: the parameters.
        batch: a batch.
        alpha: (D, k) fan-in, bias row last iff the producer has a bias.
        bias: whether it has one.

    Returns:
        mean (k,), variance (k,).
    """
    recorded = record(traced, jax.tree.leaves((params, batch)), [path.producer])
    x = path.producer.inputs.to_matrix(recorded[path.producer.op.path]).astype(alpha.dtype)
    weight = alpha[:-1] if bias else alpha
    if isinstance(path, ConvolutionPath):
        image = x.reshape(traced.num_samples, *path.geometry.space, -1)
        answer = convolve(image, weight, path.geometry.producer)
    else:
        answer = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
    answer = answer.reshape(-1, alpha.shape[-1])
    answer = answer + alpha[-1] if bias else answer
    return jnp.mean(answer, axis=0), jnp.var(answer, axis=0)


def identity_at_birth(norm: Norm, moments: ResponseMoments, gamma: Array) -> Mapping[str, Array]:
    """What the leaves of a normalisation hold for neurons born at amplitude `gamma` (its sign is that of the twin).

    Args:
        norm: of the site.
        moments: mean (k,) and variance (k,) of the neurons at amplitude 1.
        gamma: ().

    Returns:
        Values by leaf, (k,), for `write(..., birth=...)`.
    """
    mean = jnp.sign(gamma) * jnp.sqrt(jnp.abs(gamma)) * moments[0]
    variance = jnp.abs(gamma) * moments[1]
    values = {norm.scale: jnp.sqrt(variance + norm.epsilon), norm.shift: mean}
    values |= {} if norm.mean is None else {norm.mean: mean}
    return values | ({} if norm.var is None else {norm.var: variance})
