"""Small models of images and sequences whose hidden dimensions are known by hand, in the manner of `zoo`.

Chains are long on purpose: every neighbouring pair of layers is a site, and one compilation checks them all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from tests.support.zoo.layers import Model, data, draw, f64

IMAGES: dict[str, Callable[[], Model]] = {}
NORMALISED: dict[str, Callable[[], Model]] = {}
KINKED: dict[str, Callable[[], Model]] = {}


def register(table: dict[str, Callable[[], Model]]) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    def add(build: Callable[[], Model]) -> Callable[[], Model]:
        table[build.__name__] = build
        return build

    return add


image = register(IMAGES)
normalised = register(NORMALISED)
kinked = register(KINKED)


def squares(apply: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A smooth loss of outputs of any shape, the mean over samples."""
    return lambda params, batch: jnp.mean((apply(params, batch["x"]) - 0.3) ** 2)


def variables_of(net: nn.Module, batch: Any) -> Any:
    """Drawn in float64; the initialisers are not run."""
    return positive_variances(f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"])))


def positive_variances(tree: Any) -> Any:
    positive = lambda path, leaf: jnp.abs(leaf) + 0.5 if "var" in jax.tree_util.keystr(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(positive, tree)


def linen(net: nn.Module, batch: Any, growable: Any, refused: Any = {}) -> Model:  # noqa: B006
    return Model(squares(net.apply), variables_of(net, batch), batch, growable, refused)


@image
def convolutions() -> Model:
    """Strides in producer and consumer, SAME, VALID and explicit padding, even kernels, 1x1, dilation, no bias."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3, 3), name="same")(x))
            x = nn.tanh(nn.Conv(2, (2, 3), strides=(2, 1), padding="VALID", name="strided")(x))
            x = nn.tanh(nn.Conv(3, (2, 2), padding=((2, 0), (0, 1)), use_bias=False, name="even")(x))
            x = nn.tanh(nn.Conv(4, (1, 1), name="pixelwise")(x))
            x = nn.tanh(nn.Conv(2, (3, 2), kernel_dilation=(1, 2), padding="SAME", name="dilated")(x))
            return nn.Conv(2, (2, 2), strides=2, use_bias=False, name="last")(x)

    return linen(Net(), data(5, 7, 5, 2), {"same": 3, "strided": 2, "even": 3, "pixelwise": 4, "dilated": 2})


@image
def channels_first() -> Model:
    """`lax.conv` on NCHW images with OIHW kernels, then a flatten with the channels first."""

    def apply(p, x):
        x = jnp.tanh(lax.conv(x, p["k1"], (1, 1), "SAME") + p["b1"][:, None, None])
        x = jnp.tanh(lax.conv(x, p["k2"], (2, 1), "VALID") + p["b2"].reshape(1, -1, 1, 1))
        return x.reshape(x.shape[0], -1) @ p["u"] + p["c"]

    params = draw(k1=(3, 2, 3, 3), b1=(3,), k2=(4, 3, 2, 3), b2=(4,), u=(4 * 2 * 4, 3), c=(3,))
    return Model(squares(apply), params, data(5, 2, 5, 6), {"k1": 3, "k2": 4})


@image
def mixed_dimension_numbers() -> Model:
    """Image, kernel and result each in another order: HWNC, IHWO, CNHW."""

    def apply(p, x):
        x = jnp.moveaxis(x, 0, 2)
        x = lax.conv_general_dilated(x, p["k1"], (1, 2), "SAME", dimension_numbers=("HWNC", "IHWO", "CNHW"))
        x = jnp.tanh(x + p["b1"][:, None, None, None])
        return lax.conv_general_dilated(x, p["k2"], (1, 1), "VALID", dimension_numbers=("CNHW", "HOWI", "NHWC"))

    params = draw(k1=(2, 3, 2, 3), b1=(3,), k2=(3, 4, 2, 3))
    return Model(squares(apply), params, data(4, 5, 6, 2), {"k1": 3})


@image
def one_dimension() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3,), strides=2, name="first")(x))
            x = nn.tanh(nn.Conv(4, (2,), kernel_dilation=2, padding=((2, 0),), name="causal")(x))
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    return linen(Net(), data(6, 9, 2), {"first": 3, "causal": 4})


@image
def flattened() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3, 3), strides=2, name="conv")(x))
            x = nn.tanh(nn.Dense(4, name="dense")(x.reshape(x.shape[0], -1)))
            return nn.Dense(2, name="head")(x)

    return linen(Net(), data(5, 5, 7, 2), {"conv": 3, "dense": 4})


@image
def average_pools() -> Model:
    """Overlapping, padded and strided average pools, one of them after another, then the mean over all pixels."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3, 3), name="first")(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            x = nn.tanh(nn.Conv(4, (2, 2), name="second")(x))
            x = nn.avg_pool(x, (3, 2), strides=(1, 1), padding="SAME")
            x = nn.avg_pool(x, (2, 3), strides=(1, 2))
            x = nn.tanh(nn.Conv(3, (1, 2), padding="SAME", name="third")(x))
            return nn.Dense(2, name="head")(x.mean((1, 2)))

    return linen(Net(), data(5, 8, 8, 2), {"first": 3, "second": 4, "third": 3})


@image
def means_that_keep_axes() -> Model:
    """A mean over one of two spatial axes, then over the other, both kept at length one."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3, 3), name="first")(x)).mean(2, keepdims=True)
            x = nn.tanh(nn.Conv(4, (2, 1), name="rows")(x))
            x = nn.tanh(nn.Conv(3, (1, 1), name="pixelwise")(x.mean(1, keepdims=True)))
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    return linen(Net(), data(5, 5, 4, 2), {"first": 3, "rows": 4, "pixelwise": 3})


@image
def used_twice() -> Model:
    """The same two kernels on two images: the rows of both uses are summed."""

    def apply(p, x):
        def tower(x):
            return lax.conv(
                jnp.tanh(lax.conv(x, p["k"], (1, 1), "SAME") + p["b"][:, None, None]), p["u"], (2, 2), "SAME"
            )

        return tower(x) * tower(2 * x[:, :, ::-1])

    return Model(squares(apply), draw(k=(3, 2, 2, 3), b=(3,), u=(2, 3, 2, 2)), data(4, 2, 5, 4), {"k": 3})


@image
def pool_then_flatten() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.avg_pool(nn.tanh(nn.Conv(3, (3, 3), name="conv")(x)), (2, 2), strides=(2, 2))
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    return linen(Net(), data(5, 6, 4, 2), {"conv": 3})


@image
def padding_between() -> Model:
    """Zeros set beside the pixels by hand, on one side and beyond a crop; pools that leave their padding out."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(3, (3, 3), name="first")(x))
            x = jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)))
            x = nn.tanh(nn.Conv(4, (3, 2), padding="VALID", name="second")(x))
            x = nn.avg_pool(x, (3, 2), strides=(2, 1), padding="SAME", count_include_pad=False)
            x = nn.tanh(nn.Conv(3, (2, 2), name="third")(x))
            x = nn.avg_pool(lax.pad(x, 0.0, ((0, 0, 0), (1, -1, 0), (0, 1, 0), (0, 0, 0))), (2, 2), strides=(1, 2))
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    return linen(Net(), data(5, 4, 5, 2), {"first": 3, "second": 4, "third": 3})


@image
def dense_over_pixels() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(3, name="pixels")(x))
            x = nn.tanh(nn.Conv(4, (3, 2), name="conv")(x))
            x = nn.tanh(nn.Dense(3, name="again")(x))
            return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))

    return linen(Net(), data(4, 4, 3, 2), {"pixels": 3, "conv": 4, "again": 3})


@image
def sequence_mean() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(3, name="tokens")(x))
            x = nn.tanh(nn.Dense(4, name="more")(x))
            return nn.Dense(2, name="head")(x.mean(1))

    return linen(Net(), data(5, 4, 2), {"tokens": 3, "more": 4})


@image
def sequence_flattened() -> Model:
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]).reshape(x.shape[0], -1) @ p["u"]

    return Model(squares(apply), draw(w=(2, 3), b=(3,), u=(12, 2)), data(5, 4, 2), {"w": 3})


@image
def sequence_flattened_by_einsum() -> Model:
    """The head holds one matrix for each time step; nothing is reshaped, and the units come first."""

    def apply(p, x):
        return jnp.einsum("nth,hto->no", jnp.tanh(x @ p["w"] + p["b"]), p["u"])

    return Model(squares(apply), draw(w=(2, 3), b=(3,), u=(3, 4, 2)), data(5, 4, 2), {"w": 3})


@image
def image_summed_by_einsum() -> Model:
    """One axis of pixels is summed by the product, divided by its length beforehand; the other one is flattened."""

    def apply(p, x):
        h = jnp.tanh(lax.conv(x, p["k"], (1, 1), "SAME")) / x.shape[3]
        return jnp.einsum("nchw,cho->no", h, p["u"])

    params = draw(k=(3, 2, 3, 3), u=(3, 4, 2))
    return Model(squares(apply), params, data(4, 2, 4, 5), {"k": 3})


@image
def two_readers() -> Model:
    """Two convolutions with the same window read one channel; only one has a bias."""

    def apply(p, x):
        h = jnp.tanh(lax.conv(x, p["k"], (1, 1), "SAME") + p["b"][:, None, None])
        left = lax.conv(h, p["u"], (2, 2), "SAME") + p["c"][:, None, None]
        return jnp.concatenate([left, lax.conv(h, p["v"], (2, 2), "SAME")], 1)

    params = draw(k=(3, 2, 3, 3), b=(3,), u=(2, 3, 2, 2), c=(2,), v=(3, 3, 2, 2))
    return Model(squares(apply), params, data(4, 2, 5, 4), {"k": 3})


@image
def nnx_convolutions() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            conv = partial(nnx.Conv, rngs=rngs)
            self.first, self.second = conv(2, 3, (3, 3)), conv(3, 4, (2, 2), strides=2, padding="VALID")
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.second(jnp.tanh(self.first(x))))
            return self.head(nnx.avg_pool(x, (2, 2)).mean((1, 2)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return Model(squares(lambda p, x: nnx.merge(graph, p)(x)), f64(state), data(5, 6, 6, 2), {"first": 3, "second": 4})


@image
def equinox_convolutions() -> Model:
    """One sample at a time under `vmap`: the batch of every convolution is made by the batching rule."""
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        eqx.nn.Conv2d(2, 3, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.AvgPool2d(2, 2),
        eqx.nn.Conv2d(3, 4, 2, use_bias=False, key=keys[1]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.AdaptiveAvgPool2d((2, 1)),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(8, 3, key=keys[2]),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.Linear(3, 2, key=keys[3]),
    ]
    arrays, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    growable = {"layers/0": 3, "layers/3": 4, "layers/7": 3}
    return Model(squares(apply), f64(arrays), data(5, 2, 6, 6), growable)


# Batch normalisation


class Normed(nn.Module):
    """Two normalised convolutions in a row, a dense layer normalised over samples alone, and a head."""

    train: bool

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.tanh(norm(name="norm1")(nn.Conv(3, (3, 3), name="first")(x)))
        x = nn.tanh(norm(name="norm2", epsilon=1e-3)(nn.Conv(4, (2, 2), strides=2, use_bias=False, name="second")(x)))
        x = nn.tanh(norm(name="norm3")(nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))))
        return nn.Dense(2, name="head")(x)


NORMED = {"first": 3, "second": 4, "dense": 3}


@normalised
def linen_training() -> Model:
    net, batch = Normed(True), data(6, 4, 4, 2)

    def loss(variables, batch):
        outputs, updates = net.apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean(outputs**2 + outputs), updates

    return Model(loss, variables_of(net, batch), batch, NORMED, has_aux=True, coupled="mean")


@normalised
def linen_evaluation() -> Model:
    net, batch = Normed(False), data(6, 4, 4, 2)
    variables = variables_of(net, batch)
    return Model(squares(net.apply), variables, batch, NORMED)


class NormedNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm1 = nnx.Conv(2, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.second, self.norm2 = nnx.Conv(3, 4, (2, 2), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.norm1(self.first(x)))
        return self.head(jnp.tanh(self.norm2(self.second(x))).mean((1, 2)))


def nnx_normed(evaluate: bool) -> Model:
    net = NormedNNX(nnx.Rngs(0))
    (net.eval if evaluate else net.train)()
    graph, state = nnx.split(net)

    def loss(state, batch):
        net = nnx.merge(graph, state)
        outputs = net(batch["x"])
        return jnp.mean(outputs**2 + outputs), nnx.state(net)

    return Model(loss, positive_variances(f64(state)), data(6, 4, 4, 2), {"first": 3, "second": 4}, has_aux=True)


@normalised
def nnx_training() -> Model:
    return nnx_normed(False)._replace(coupled="mean")


@normalised
def nnx_evaluation() -> Model:
    return nnx_normed(True)


class NormedEquinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Conv2d

    def __init__(self, mode):
        keys = jax.random.split(jax.random.key(0))
        self.conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(3, "batch", mode=mode)
        self.last = eqx.nn.Conv2d(3, 2, 2, use_bias=False, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.last(jnp.tanh(x)).mean((1, 2)), state


def equinox_normed(mode: str, evaluate: bool) -> Model:
    """One sample at a time: the statistics of the batch are means over a named axis."""
    arrays, static = eqx.partition(eqx.nn.make_with_state(NormedEquinox)(mode), eqx.is_inexact_array)
    static = eqx.nn.inference_mode(static, evaluate)

    def loss(arrays, batch):
        net, state = eqx.combine(arrays, static)
        run = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        outputs, state = run(batch["x"], state)
        return jnp.mean(outputs**2 + outputs), eqx.filter(state, eqx.is_inexact_array)

    return Model(loss, running_statistics(f64(arrays)), data(6, 2, 4, 4), {"0/conv": 3}, has_aux=True)


def running_statistics(arrays: Any) -> Any:
    """Running means and positive running variances of channels in Equinox's state, which has no names for them."""
    net, state = arrays
    leaves, structure = jax.tree.flatten(state)
    return net, jax.tree.unflatten(structure, [jnp.abs(leaf) + 0.5 for leaf in leaves])


@normalised
def equinox_training() -> Model:
    return equinox_normed("batch", False)._replace(coupled="mean")


@normalised
def equinox_by_running_averages() -> Model:
    """Mode "ema": even training normalises by the running average, into which the batch has entered."""
    return equinox_normed("ema", False)._replace(coupled="mean")


@normalised
def equinox_evaluation() -> Model:
    return equinox_normed("ema", True)


def haiku_normed(training: bool) -> Model:
    def net(x, training):
        norm = partial(hk.BatchNorm, create_scale=True, create_offset=True, decay_rate=0.9)
        x = jnp.tanh(norm(name="norm1")(hk.Conv2D(3, 3, name="first")(x), training))
        x = jnp.tanh(norm(name="norm2")(hk.Linear(4, name="second")(x.reshape(x.shape[0], -1)), training))
        return hk.Linear(2, name="head")(x)

    batch = data(6, 4, 4, 2)
    transformed = hk.without_apply_rng(hk.transform_with_state(net))
    params, state = jax.eval_shape(lambda: transformed.init(jax.random.key(0), batch["x"], True))
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)

    def loss(variables, batch):
        params, averages = variables
        whole = {name: averages.get(name, {}) | _counters(leaves) for name, leaves in state.items()}
        outputs, new = transformed.apply(params, whole, batch["x"], training)
        return jnp.mean(outputs**2 + outputs), (params, new)

    floats = {
        name: {key: leaf for key, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
        for name, leaves in state.items()
    }
    variables = f64(params), jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, f64(floats))
    return Model(loss, variables, batch, {"0/first": 3, "0/second": 4}, has_aux=True)


def _counters(leaves: Any) -> Any:
    return {key: leaf for key, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)}


@normalised
def haiku_training() -> Model:
    return haiku_normed(True)._replace(coupled="mean")


@normalised
def haiku_evaluation() -> Model:
    return haiku_normed(False)


@normalised
def channels_first_by_hand() -> Model:
    """Batch normalisation of NCHW images in plain JAX, no running statistics, between convolution and pooling."""

    def apply(p, x):
        h = lax.conv(x, p["k"], (1, 1), "SAME")
        mean, var = h.mean((0, 2, 3), keepdims=True), h.var((0, 2, 3), keepdims=True)
        h = (h - mean) / jnp.sqrt(var + 1e-4) * p["g"][:, None, None] + p["b"][:, None, None]
        h = lax.reduce_window(jnp.tanh(h), 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
        return h.reshape(x.shape[0], -1) @ p["u"]

    params = draw(k=(3, 2, 3, 3), g=(3,), b=(3,), u=(12, 2))
    return Model(squares(apply), params, data(6, 2, 4, 4), {"k": 3}, coupled="mean")


# Only silence and the gradient are exact: the slope is a mean slope


@kinked
def relu() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), name="first")(x))
            x = nn.relu(nn.Conv(4, (2, 2), name="second")(x))
            return nn.Dense(2, name="head")(x.mean((1, 2)))

    return linen(Net(), data(5, 4, 4, 2), {"first": 3, "second": 4})


@kinked
def max_pools() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.tanh(nn.Conv(3, (3, 3), name="first")(x)), (2, 2), strides=(2, 2))
            x = nn.max_pool(nn.relu(nn.Conv(4, (2, 2), name="second")(x)), (3, 3), strides=(2, 2), padding="SAME")
            x = nn.relu(nn.Conv(3, (2, 2), name="third")(x))
            return nn.Dense(2, name="head")(x.max((1, 2)))

    return linen(Net(), data(5, 6, 6, 2), {"first": 3, "second": 4, "third": 3})


@kinked
def global_max_by_equinox() -> Model:
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [
        eqx.nn.Conv1d(2, 3, 3, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool1d(2, 2),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(9, 2, key=keys[1]),
    ]
    arrays, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_array)
    return Model(squares(lambda p, x: jax.vmap(eqx.combine(p, static))(x)), f64(arrays), data(5, 2, 8), {"layers/0": 3})
