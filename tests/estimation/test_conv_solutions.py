"""From a convolutional model to S, N, dW*, psi and singular values, against loops over pixels (float64, 1e-10).

The twin runs the model itself by loops, takes V_goal from the formula of the loss, solves least squares on the raw rows
and never sees a jaxpr.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import tinyjax
from tests.support.conv_oracle import GEOMETRIES, slow_patches, slow_sums
from tinyjax.methods import best_update, bottleneck, residual_cross
from tinyjax.statistics.averages import moments

SAMPLES, INPUTS, CHANNELS, OUTPUTS = 24, 2, 3, 2
LETTERS = {1: ("NHC", "HIO"), 2: ("NHWC", "HWIO")}
FAST = ("2-1-SAME-SAME", "1-2-SAME-((2, 0), (0, 1))", "kernel-larger-than-image", "one-axis-dilated")


class Layout:
    """Channels last, or channels first."""

    def __init__(self, rank, channels_first):
        image, kernel = LETTERS[rank]
        self.numbers = ("NC" + image[1:-1], "OI" + kernel[:-2]) if channels_first else (image, kernel)
        self.first = channels_first

    def image(self, x):
        return jnp.moveaxis(x, -1, 1) if self.first else x

    def kernel(self, k):
        return jnp.moveaxis(k, (-1, -2), (0, 1)) if self.first else k

    def vector(self, b, rank):
        return b.reshape(-1, *[1] * rank) if self.first else b

    def convolve(self, x, kernel, window):
        image, letters = self.numbers
        return lax.conv_general_dilated(
            x, kernel, window.strides, window.padding, None, window.dilation, (image, letters, image)
        )


def cases():
    for i, (name, geo) in enumerate(GEOMETRIES.items()):
        if geo.space and not geo.between:
            for channels_first in (False, True):
                fast = name in FAST and channels_first == (FAST.index(name) % 2 == 0)
                marks = () if fast else pytest.mark.slow
                yield pytest.param(geo, channels_first, i % 2 == 0, i // 2 % 2 == 0, id=f"{name}-{channels_first}",
                                   marks=marks)  # fmt: skip


@pytest.mark.parametrize("geo, channels_first, bias_prev, bias", cases())
def test_solutions_equal_loops_over_pixels(geo, channels_first, bias_prev, bias):
    rng, rank = np.random.default_rng(0), len(geo.space)
    kernel = rng.normal(size=(*geo.producer.size, INPUTS, CHANNELS))
    kernel_next = rng.normal(size=(*geo.consumer.size, CHANNELS, OUTPUTS))
    shift, shift_next = bias_prev * rng.normal(size=CHANNELS), bias * rng.normal(size=OUTPUTS)
    x = rng.normal(size=(SAMPLES, *geo.space, INPUTS))

    # The twin
    answers = np.stack([slow_patches(image, geo.producer, False) for image in x]) @ kernel.reshape(-1, CHANNELS)
    h = np.tanh(answers + shift)
    rows = np.stack([slow_patches(image, geo.consumer, bias) for image in h])
    z = rows[..., : math.prod(kernel_next.shape[:-1])] @ kernel_next.reshape(-1, OUTPUTS) + shift_next
    t = rng.normal(size=z.shape)
    v = -2 * (z - t)
    flat, goals = rows.reshape(-1, rows.shape[-1]), v.reshape(-1, OUTPUTS)
    delta = np.linalg.lstsq(flat, goals, rcond=1e-12)[0]
    sums = {k: a.sum(0) / SAMPLES for k, a in slow_sums(x, h, v, geo, bias_prev, bias).items()}
    left = slow_sums(x, h, v, geo, bias_prev, bias, delta)["cross_prev"].sum(0) / SAMPLES
    values, vectors = np.linalg.eigh(sums["gram_prev"])
    kept = values > 1e-11 * values[-1]
    singular = np.linalg.svd((vectors[:, kept] / np.sqrt(values[kept])).T @ left, compute_uv=False)

    # The product
    layout = Layout(rank, channels_first)
    params = {"k": layout.kernel(jnp.asarray(kernel)), "u": layout.kernel(jnp.asarray(kernel_next))}
    params |= {"b": layout.vector(jnp.asarray(shift), rank)} if bias_prev else {}
    params |= {"c": layout.vector(jnp.asarray(shift_next), rank)} if bias else {}

    def loss_fn(p, batch):
        h = jnp.tanh(layout.convolve(batch["x"], p["k"], geo.producer) + p.get("b", 0))
        z = layout.convolve(h, p["u"], geo.consumer) + p.get("c", 0)
        return jnp.sum((z - batch["t"]) ** 2) / z.shape[0]

    batch = {"x": layout.image(jnp.asarray(x)), "t": layout.image(jnp.asarray(t))}
    (site,) = tinyjax.find_sites(loss_fn, params, batch)
    assert site.growable and (site.producers[0].bias is not None, site.consumers[0].bias is not None) == (
        bias_prev, bias,
    )  # fmt: skip

    @functools.partial(jax.jit, static_argnums=2)
    def solve(params, batch, site):
        statistics = tinyjax.estimate(loss_fn, params, batch, site)
        update = best_update(statistics)
        return moments(statistics), update, residual_cross(moments(statistics), update), bottleneck(statistics)

    mean, update, cross, found = solve(params, batch, site)

    def close(found, expected):
        assert found.shape == np.shape(expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(1.0, np.abs(expected).max()))

    for field in ("gram_prev", "cross_prev", "gram", "cross"):
        close(getattr(mean, field), sums[field])
    if np.linalg.matrix_rank(flat, 1e-9 * np.linalg.norm(flat)) == flat.shape[1]:
        close(update, delta)
    close(flat @ np.asarray(update), flat @ delta)
    close(cross, left)
    close(found.before, np.sum(v**2) / SAMPLES)
    close(found.after, np.sum((goals - flat @ delta) ** 2) / SAMPLES)
    close(found.gains[: len(singular)], singular**2)
