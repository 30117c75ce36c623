"""Batch normalisation at the birth of a channel.

A normalisation rescales a new channel whatever its fan-in, so the amplitude of a birth means nothing unless the
normalisation is the identity on it at that moment: scale = sqrt(var + eps) and shift = mean of the channel's response
on the batch, and the same running statistics, so that training and evaluation agree.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.capture import record
from tinyjax.layout import Params
from tinyjax.site import Norm, Site
from tinyjax.sites import discover
from tinyjax.trace import trace
from tinyjax.window import Window

Moments = tuple[Array, Array]


def response_moments(
    loss_fn: Callable[..., Any], params: Params, batch: Any, site: Site, alpha: Array, *, has_aux: bool = False
) -> Moments:
    """Mean and variance, over samples and pixels, of what new neurons answer to a batch before any normalisation.

    One forward pass up to the producer; XLA drops the rest.

    Args:
        loss_fn: the loss.
        params: the parameters.
        batch: a batch.
        site: a site with a `norm`.
        alpha: (D, k) fan-in, bias row last iff the producer has a bias.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        mean (k,), variance (k,).
    """
    traced = trace(loss_fn, params, batch, has_aux=has_aux)
    (path,) = discover(traced).paths[site.name]
    recorded = record(traced, jax.tree.leaves((params, batch)), [path.producer])
    x = path.producer.inputs.to_matrix(recorded[path.producer.op.path]).astype(alpha.dtype)
    has_bias = site.producers[0].bias is not None
    weight = alpha[:-1] if has_bias else alpha
    if path.geometry is None:
        answer = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
    else:
        image = x.reshape(traced.num_samples, *path.geometry.space, -1)
        answer = _convolve(image, weight, path.geometry.producer)
    answer = answer.reshape(-1, alpha.shape[-1])
    answer = answer + alpha[-1] if has_bias else answer
    return jnp.mean(answer, axis=0), jnp.var(answer, axis=0)


def identity_at_birth(norm: Norm, moments: Moments, gamma: Array) -> Mapping[str, Array]:
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


def _convolve(x: Array, weight: Array, window: Window) -> Array:
    """The convolution of an image (n, *space, C) with a matrix (prod(size) * C, k): (n, *out, k)."""
    spatial = "HWD"[: len(window.size)]
    return jax.lax.conv_general_dilated(
        x,
        weight.reshape(*window.size, x.shape[-1], -1),
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=jax.lax.Precision.HIGHEST,
    )
