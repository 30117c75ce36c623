"""The residual networks that benchmarks run: the ResNet-18 of the paper at other widths and depths."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import tinyjax
from experiments.activations import relu
from tinyjax import data
from tinyjax.models import ResNet18


class Network(NamedTuple):
    """A loss in training mode and parameters for it."""

    model: ResNet18
    variables: Any

    def loss_fn(self, variables: Any, batch: data.Batch) -> tuple[jax.Array, Any]:
        logits, updates = self.model.apply(variables, batch.image, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean(), updates

    def sites(self, batch: data.Batch) -> tinyjax.Sites:
        few = data.Batch(batch.image[:4], batch.label[:4])
        return tinyjax.find_sites(self.loss_fn, self.variables, few, has_aux=True).growable


def residual(stream: tuple[int, ...], widths: tuple[int, ...], images: Any, seed: int = 0) -> Network:
    """A network of `stream` channels by stage and inner `widths` by block, for images like these."""
    model = ResNet18(widths, 10, relu, stream)
    init = jax.jit(lambda key: model.init(key, images, train=False))
    return Network(model, init(jax.random.key(seed)))


def random_batch(samples: int, size: int, channels: int = 3) -> data.Batch:
    """Noise in the shape of images, for timing alone."""
    images = np.random.default_rng(0).normal(size=(samples, size, size, channels)).astype(np.float32)
    return data.Batch(images, np.arange(samples) % 10)
