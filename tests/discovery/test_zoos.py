"""VGG and ResNet as the model zoos of Flax NNX and Equinox write them: found, grown, and run at another width.

Nothing in these models is made for growing: lists of blocks, strided bottlenecks with a shortcut, adaptive pooling,
dropout that is switched off, batch statistics over a named axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tinyjax
from tests.support.zoo.images import positive_variances, running_statistics
from tests.support.zoo.layers import f64

SAMPLES, SIDE, CLASSES = 32, 8, 3


class Zoo(NamedTuple):
    """A model and where it must be able to grow."""

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    growable: dict[str, int]
    refused: dict[str, str]


def images(*shape: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {"x": jnp.asarray(rng.normal(size=(SAMPLES, *shape))), "y": jnp.arange(SAMPLES) % CLASSES}


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1).mean()


# Flax NNX


class ConvBlock(nnx.Module):
    def __init__(self, num_conv, inputs, outputs, *, rngs):
        widths = [inputs, *[outputs] * num_conv]
        self.conv_layers = nnx.List(nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip(widths, widths[1:]))

    def __call__(self, x):
        for conv in self.conv_layers:
            x = nnx.relu(conv(x))
        return nnx.max_pool(x, (2, 2), strides=(2, 2))


class NNXVGG(nnx.Module):
    def __init__(self, *, rngs):
        self.block0, self.block1 = ConvBlock(1, 2, 4, rngs=rngs), ConvBlock(2, 4, 5, rngs=rngs)
        self.classifier = nnx.Sequential(
            nnx.Conv(5, 6, (2, 2), rngs=rngs),
            nnx.Conv(6, 6, (1, 1), rngs=rngs),
            lambda x: x.mean((1, 2)),
            nnx.Linear(6, CLASSES, rngs=rngs),
        )

    def __call__(self, x):
        return self.classifier(self.block1(self.block0(x)))


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, stride, *, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv0, self.bn0 = conv(inputs, width, (1, 1)), nnx.BatchNorm(width, rngs=rngs)
        self.conv1, self.bn1 = conv(width, width, (3, 3), strides=stride, padding=1), nnx.BatchNorm(width, rngs=rngs)
        self.conv2, self.bn2 = conv(width, 4 * width, (1, 1)), nnx.BatchNorm(4 * width, rngs=rngs)
        self.shortcut = nnx.Sequential(
            conv(inputs, 4 * width, (1, 1), strides=stride), nnx.BatchNorm(4 * width, rngs=rngs)
        )

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = nnx.relu(self.bn1(self.conv1(y)))
        return nnx.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class NNXResNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(2, 5, (5, 5), strides=2, padding=2, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(5, rngs=rngs)
        self.blocks = nnx.List([Bottleneck(5, 4, 2, rngs=rngs)])
        self.fc = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn(self.conv(x))), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


def of_nnx(net: nnx.Module, growable: dict[str, int], refused: dict[str, str]) -> Zoo:
    graph, state = nnx.split(net)

    def loss_fn(state, batch):
        net = nnx.merge(graph, state)
        return cross_entropy(net(batch["x"]), batch), nnx.state(net)

    return Zoo(loss_fn, positive_variances(f64(nnx.as_pure(state))), images(SIDE, SIDE, 2), growable, refused)


def nnx_vgg() -> Zoo:
    growable = {"block0/conv_layers/0": 4, "block1/conv_layers/0": 5, "block1/conv_layers/1": 5}
    return of_nnx(NNXVGG(rngs=nnx.Rngs(0)), growable | {"classifier/layers/0": 6, "classifier/layers/1": 6}, {})


def nnx_resnet() -> Zoo:
    refused = {"conv": "different windows", "blocks/0/conv2": "2 producers"}
    return of_nnx(NNXResNet(rngs=nnx.Rngs(0)), {"blocks/0/conv0": 4, "blocks/0/conv1": 4}, refused)


# Equinox


def equinox_vgg() -> Zoo:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    conv = partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
    relu = eqx.nn.Lambda(jax.nn.relu)
    features = [conv(2, 4, key=next(keys)), relu, eqx.nn.MaxPool2d(2, 2), conv(4, 5, key=next(keys)), relu]
    features += [eqx.nn.MaxPool2d(2, 2), eqx.nn.AdaptiveAvgPool2d((1, 1)), eqx.nn.Lambda(jnp.ravel)]
    head = [eqx.nn.Linear(5, 6, key=next(keys)), relu, eqx.nn.Dropout(0.5), eqx.nn.Linear(6, CLASSES, key=next(keys))]
    net = eqx.nn.inference_mode(eqx.nn.Sequential(features + head))
    arrays, static = eqx.partition(net, eqx.is_inexact_array)

    def loss_fn(arrays, batch):
        return cross_entropy(jax.vmap(eqx.combine(arrays, static))(batch["x"]), batch), None

    growable = {"layers/0": 4, "layers/3": 5, "layers/8": 6}
    return Zoo(loss_fn, f64(arrays), images(2, SIDE, SIDE), growable, {})


class BasicBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    downsample: eqx.nn.Conv2d

    def __init__(self, inputs, width, stride, key):
        keys = jax.random.split(key, 3)
        conv, norm = partial(eqx.nn.Conv2d, use_bias=False), partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch")
        self.conv1, self.bn1 = conv(inputs, width, 3, stride, 1, key=keys[0]), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, 1, key=keys[1]), norm(width)
        self.downsample = conv(inputs, width, 1, stride, key=keys[2])

    def __call__(self, x, state):
        y, state = self.bn1(self.conv1(x), state)
        y, state = self.bn2(self.conv2(jax.nn.relu(y)), state)
        return jax.nn.relu(y + self.downsample(x)), state


class EquinoxResNet(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    block: BasicBlock
    avgpool: eqx.nn.AdaptiveAvgPool2d
    fc: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(2, 4, 3, padding=1, use_bias=False, key=keys[0])
        self.bn1 = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.block = BasicBlock(4, 5, 2, keys[1])
        self.avgpool = eqx.nn.AdaptiveAvgPool2d((1, 1))
        self.fc = eqx.nn.Linear(5, CLASSES, key=keys[2])

    def __call__(self, x, state):
        x, state = self.bn1(self.conv1(x), state)
        x, state = self.block(jax.nn.relu(x), state)
        return self.fc(jnp.ravel(self.avgpool(x))), state


def equinox_resnet() -> Zoo:
    arrays, static = eqx.partition(eqx.nn.make_with_state(EquinoxResNet)(jax.random.key(0)), eqx.is_inexact_array)

    def loss_fn(arrays, batch):
        net, state = eqx.combine(arrays, static)
        run = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, state = run(batch["x"], state)
        return cross_entropy(logits, batch), (arrays[0], eqx.filter(state, eqx.is_inexact_array))

    batch = images(2, SIDE, SIDE)
    params = running_statistics(f64(arrays))
    refused = {"0/conv1": "different windows", "0/block/conv2": "2 producers"}
    return Zoo(loss_fn, params, batch, {"0/block/conv1": 5}, refused)


@pytest.mark.parametrize("build", [nnx_vgg, nnx_resnet, equinox_vgg, equinox_resnet])
def test_every_width_that_no_shortcut_ties_is_found(build):
    zoo = build()
    sites = tinyjax.find_sites(zoo.loss_fn, zoo.params, zoo.batch, has_aux=True)
    assert {site.name: site.capacity for site in sites.growable} == zoo.growable, sites
    refused = [site for site in sites if not site.growable]
    assert {site.name for site in refused} == set(zoo.refused)
    assert all(zoo.refused[site.name] in site.reason for site in refused)


@pytest.mark.slow
@pytest.mark.parametrize("build", [nnx_vgg, nnx_resnet, equinox_vgg, equinox_resnet])
def test_growing_every_site_and_running_the_same_code_at_another_width(build):
    zoo = build()
    sites = tinyjax.find_sites(zoo.loss_fn, zoo.params, zoo.batch, has_aux=True).growable
    thin = tinyjax.thin(zoo.params, sites, 2)
    grow_step = tinyjax.make_grow_step(
        zoo.loss_fn, sites, num_neurons=1, method=partial(tinyjax.methods.tiny, ridge=1e-2), has_aux=True
    )
    grown, info = grow_step(thin, zoo.batch)
    losses = [float(info.loss_before[sites[0].name]), *(float(info.loss_after[name]) for name in sites.names)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0]
    assert all(int(info.width[name]) == 3 for name in sites.names)
    np.testing.assert_allclose(zoo.loss_fn(grown, zoo.batch)[0], losses[-1], rtol=1e-10)
    small, widths = tinyjax.compact(grown, sites)
    assert set(widths.values()) == {3}
    np.testing.assert_allclose(zoo.loss_fn(small, zoo.batch)[0], losses[-1], rtol=1e-10)
