"""Small models whose hidden dimensions are known by hand: one for each way of writing a network in JAX.

Activations are tanh (smooth, slope 1 at 0) so that the first-order effect of a new neuron can be checked to rounding.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx


class Model(NamedTuple):
    """A model and what discovery must say about it.

    Attributes:
        loss_fn: `loss_fn(params, batch)`.
        params: float64 parameters.
        batch: what `loss_fn` takes.
        growable: capacity of every site that can grow, by name.
        refused: a word of the reason of every site that cannot, by name.
        has_aux: whether the loss returns `(loss, aux)`.
        penalty: the part of the loss that reads parameters only.
        coupled: a word of what couples the samples; "" for a mean over samples.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    growable: Mapping[str, int]
    refused: Mapping[str, str] = {}
    has_aux: bool = False
    penalty: Callable[[Any], Any] = lambda params: 0.0
    coupled: str = ""


MODELS: dict[str, Callable[[], Model]] = {}


def model(build: Callable[[], Model]) -> Callable[[], Model]:
    MODELS[build.__name__] = build
    return build


def draw(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Gaussian arrays by name."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape) / max(shape[0], 1) ** 0.5) for name, shape in shapes.items()}


def data(*shape: int, outputs: int = 3, seed: int = 7) -> dict[str, jax.Array]:
    """Inputs `(*shape)` and targets `(*shape[:-1], outputs)`."""
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=shape)), "t": jnp.asarray(rng.normal(size=(*shape[:-1], outputs)))}


def labelled(*shape: int, classes: int = 3) -> dict[str, jax.Array]:
    """Inputs and integer labels."""
    batch = data(*shape)
    return {"x": batch["x"], "y": jnp.arange(shape[0]) * 7 // 2 % classes}


def mse(apply: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda params, batch: jnp.mean((apply(params, batch["x"]) - batch["t"]) ** 2)


def two_layers(seed: int = 0, d: int = 5, h: int = 4, m: int = 3) -> dict[str, jax.Array]:
    return draw(seed, w=(d, h), b=(h,), u=(h, m), c=(m,))


def dense2(p: Mapping[str, Any], x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["u"] + p["c"]


def f64(tree: Any) -> Any:
    """Parameters of a framework in float64, biases drawn so that nothing is zero by accident."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(structure, [jnp.asarray(0.4 * rng.normal(size=leaf.shape)) for leaf in leaves])


# Frameworks


@model
def linen() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(4)(x))
            x = nn.tanh(nn.Dense(6, use_bias=False)(x))
            return nn.Dense(3)(x)

    net, batch = Net(), data(7, 5)
    params = f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"]))
    return Model(mse(net.apply), params, batch, {"Dense_0": 4, "Dense_1": 6})


@model
def nnx_mlp() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return Model(mse(lambda p, x: nnx.merge(graph, p)(x)), f64(state), data(7, 5), {"first": 4})


@model
def equinox() -> Model:
    net = eqx.nn.MLP(5, 3, 4, 2, activation=jnp.tanh, key=jax.random.key(0))
    arrays, static = eqx.partition(net, eqx.is_array)
    apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    return Model(mse(apply), f64(arrays), data(4, 5), {"layers/0": 4, "layers/1": 4})


@model
def haiku() -> Model:
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 6, 3], activation=jnp.tanh)(x)))
    batch = data(7, 5)
    params = f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"]))
    return Model(mse(net.apply), params, batch, {"mlp/~/linear_0": 4, "mlp/~/linear_1": 6})


@model
def plain() -> Model:
    return Model(mse(dense2), two_layers(), data(7, 5), {"w": 4})


# Ways to write a product


@model
def no_biases() -> Model:
    return Model(mse(lambda p, x: jnp.tanh(x @ p["w"]) @ p["u"]), draw(w=(5, 4), u=(4, 3)), data(6, 5), {"w": 4})


@model
def square() -> Model:
    """Batch size, input, hidden and output all 4."""
    params = draw(w=(4, 4), b=(4,), v=(4, 4), u=(4, 4))
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) @ p["u"]  # noqa: E731
    return Model(mse(apply), params, data(4, 4, outputs=4), {"w": 4, "v": 4})


@model
def nested_jit() -> Model:
    layer = jax.jit(lambda x, w, b: jnp.tanh(x @ w + b))

    @jax.jit
    def apply(p, x):
        x = layer(layer(x, p["w"], p["b"]), p["v"], p["a"])
        return x @ p["u"]

    return Model(mse(apply), draw(w=(5, 5), b=(5,), v=(5, 5), a=(5,), u=(5, 3)), data(6, 5), {"w": 5, "v": 5})


@model
def einsum() -> Model:
    def apply(p, x):
        h = jnp.tanh(jnp.einsum("dh,ntd->nth", p["w"], x) + p["b"])
        return jnp.einsum("mh,nth->ntm", p["u"], h) + p["c"]

    return Model(mse(apply), draw(w=(5, 4), b=(4,), u=(3, 4), c=(3,)), data(6, 2, 5), {"w": 4})


@model
def transposed() -> Model:
    params = draw(w=(4, 5), b=(4,), u=(3, 4), c=(3,))
    apply = lambda p, x: jnp.dot(p["u"], jnp.tanh(p["w"] @ x.T + p["b"][:, None])).T + p["c"]  # noqa: E731
    return Model(mse(apply), params, data(6, 5), {"w": 4})


@model
def kernel_in_heads() -> Model:
    """The consumer's kernel is stored (hidden, heads, features) and reshaped; its bias is added after the reshape."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        y = (h @ p["u"].reshape(4, 6)).reshape(-1, 2, 3) + p["c"]
        return y.transpose(2, 0, 1)[0]

    return Model(mse(apply), draw(w=(5, 4), b=(4,), u=(4, 2, 3), c=(2, 3)), data(6, 5, outputs=2), {"w": 4})


@model
def dense_general() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(4)(x))
            return nn.DenseGeneral((2, 3))(h)

    net, batch = Net(), data(6, 5)
    batch["t"] = batch["t"][:, None]
    return Model(mse(net.apply), f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"])), batch, {"Dense_0": 4})


@model
def stored_in_factors() -> Model:
    """The hidden axis of the producer is stored as (2, 4) features and flattened: it is two axes of the leaf."""
    apply = lambda p, x: jnp.tanh(x @ p["w"].reshape(5, 8)) @ p["u"]  # noqa: E731
    return Model(mse(apply), draw(w=(5, 2, 4), u=(8, 3)), data(6, 5), {}, {"w": "another axis", "w[1]": "another axis"})


@model
def scalar_head() -> Model:
    """The consumer is a vector and its bias a number."""
    apply = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["u"] + p["c"]  # noqa: E731
    params = draw(w=(5, 4), b=(4,), u=(4,)) | {"c": jnp.asarray(0.3)}
    batch = data(6, 5)
    return Model(mse(apply), params, {"x": batch["x"], "t": batch["t"][:, 0]}, {"w": 4})


@model
def one_output() -> Model:
    params = two_layers(m=1)
    loss = lambda p, b: jnp.mean((dense2(p, b["x"])[:, 0] - b["t"][:, 0]) ** 2)  # noqa: E731
    return Model(loss, params, data(6, 5, outputs=1), {"w": 4})


# Leaves used twice


@model
def shared_layer() -> Model:
    """A block called twice in a row: its leaves are used twice, the rows add."""
    params = draw(e=(5, 6), w=(6, 4), b=(4,), u=(4, 6), o=(6, 3))

    def apply(p, x):
        x = x @ p["e"]
        for _ in range(2):
            x = x + jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]
        return x @ p["o"]

    return Model(mse(apply), params, data(7, 5), {"w": 4}, {"e": "2 producers"})


@model
def siamese() -> Model:
    """One encoder on a vector and on a sequence: as many rows as both have."""

    def loss(p, b):
        z = dense2(p, b["x"][:, 0])
        return jnp.mean((z[:, None] - dense2(p, b["x"])) ** 2) + jnp.mean((z - b["t"][:, 0]) ** 2)

    return Model(loss, two_layers(), data(6, 3, 5), {"w": 4})


@model
def remat() -> Model:
    params = draw(w=(5, 4), b=(4,), u=(4, 5), o=(5, 3))

    @jax.checkpoint
    def block(p, x):
        return x + jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]

    return Model(mse(lambda p, x: block(p, block(p, x)) @ p["o"]), params, data(6, 5), {"w": 4})


@model
def remat_between() -> Model:
    """Producer and consumer in different remats."""
    first = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), policy=jax.checkpoint_policies.dots_saveable)
    second = jax.checkpoint(lambda p, h: h @ p["u"] + p["c"])
    return Model(mse(lambda p, x: second(p, first(p, x))), two_layers(), data(6, 5), {"w": 4})


# Scans


@model
def scan_over_layers() -> Model:
    params = {"blocks": draw(w=(3, 5, 4), b=(3, 4), u=(3, 4, 5), c=(3, 5)), "o": draw(o=(5, 3))["o"]}

    def apply(p, x):
        block = lambda x, q: (x + dense2(q, x), None)  # noqa: E731
        return jax.lax.scan(block, x, p["blocks"])[0] @ p["o"]

    return Model(mse(apply), params, data(6, 5), {"blocks/w": 4})


@model
def scan_remat_reverse() -> Model:
    params = {"blocks": draw(w=(2, 5, 4), u=(2, 4, 5)), "o": draw(o=(5, 3))["o"]}

    def apply(p, x):
        block = jax.checkpoint(lambda x, q: (x + jnp.tanh(x @ q["w"]) @ q["u"], jnp.sum(x)))
        return jax.lax.scan(block, x, p["blocks"], reverse=True, unroll=2)[0] @ p["o"]

    return Model(mse(apply), params, data(6, 5), {"blocks/w": 4})


@model
def nested_scans() -> Model:
    params = {"blocks": draw(w=(2, 3, 5, 4), u=(2, 3, 4, 5)), "o": draw(o=(5, 3))["o"]}

    def apply(p, x):
        block = lambda x, q: (x + jnp.tanh(x @ q["w"]) @ q["u"], None)  # noqa: E731
        outer = lambda x, q: jax.lax.scan(block, x, q)  # noqa: E731
        return jax.lax.scan(outer, x, p["blocks"])[0] @ p["o"]

    return Model(mse(apply), params, data(6, 5), {"blocks/w": 4})


@model
def linen_scan() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(5)(nn.tanh(nn.Dense(4)(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return nn.Dense(3)(blocks()(x, None)[0])

    net, batch = Net(), data(6, 5)
    params = f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"]))
    return Model(mse(net.apply), params, batch, {"ScanBlock_0/Dense_1": 4})


@model
def scan_over_time() -> Model:
    """An unstacked block inside a scan over time: the steps are rows."""

    def apply(p, x):
        return jax.lax.scan(lambda _, step: (_, dense2(p, step)), 0.0, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Model(mse(apply), two_layers(), data(6, 4, 5), {"w": 4})


@model
def recurrent_head() -> Model:
    """A recurrence, and beside it an inner layer of the cell."""
    params = draw(w=(5, 4), b=(4,), u=(4, 3), r=(3, 3), o=(3, 2))

    def apply(p, x):
        def cell(s, step):
            s = jnp.tanh(jnp.tanh(step @ p["w"] + p["b"]) @ p["u"] + s @ p["r"])
            return s, s @ p["o"]

        zero = jnp.zeros((x.shape[0], 3), x.dtype)
        return jax.lax.scan(cell, zero, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Model(mse(apply), params, data(6, 4, 5, outputs=2), {"w": 4, "u": 3})


# Gated units


def gated(act: Callable[[Any], Any], **more: tuple[int, ...]) -> tuple[Callable[[Any, Any], Any], Any]:
    """A layer act(x g + bg) (x w + b) with the biases that `more` has, and its parameters."""
    params = draw(w=(5, 4), g=(5, 4), u=(4, 3), **more)
    apply = lambda p, x: (act(x @ p["g"] + p.get("bg", 0)) * (x @ p["w"] + p.get("b", 0))) @ p["u"] + p.get("c", 0)  # noqa: E731
    return apply, params


@model
def swiglu() -> Model:
    apply, params = gated(jax.nn.silu)
    return Model(mse(apply), params, data(6, 4, 5), {"w": 4})


@model
def glu_with_biases() -> Model:
    apply, params = gated(jax.nn.sigmoid, b=(4,), bg=(4,), c=(3,))
    return Model(mse(apply), params, data(6, 5), {"w": 4})


@model
def gate_of_another_tensor() -> Model:
    """The gate reads a hidden layer, the other factor the input; both can grow."""
    params = draw(w=(5, 4), g=(3, 4), v=(5, 3), u=(4, 3))
    apply = lambda p, x: (jax.nn.gelu(jnp.tanh(x @ p["v"]) @ p["g"]) * (x @ p["w"])) @ p["u"]  # noqa: E731
    return Model(mse(apply), params, data(6, 4, 5), {"w": 4, "v": 3})


@model
def gated_blocks_under_a_scan() -> Model:
    params = draw(w=(3, 5, 4), g=(3, 5, 4), u=(3, 4, 5))

    def apply(p, x):
        def block(x, layer):
            return x + (jax.nn.silu(x @ layer["g"]) * (x @ layer["w"])) @ layer["u"], None

        return jax.lax.scan(block, x, p)[0]

    return Model(mse(apply), params, data(6, 5, outputs=5), {"w": 4})


# Rows


@model
def vmapped() -> Model:
    apply = lambda p, x: jax.vmap(partial(dense2, p))(x)  # noqa: E731
    return Model(mse(apply), two_layers(), data(6, 5), {"w": 4})


@model
def vmapped_in_axis_1() -> Model:
    """Samples along axis 1 inside the model, positions along axis 0."""
    apply = lambda p, x: jax.vmap(partial(dense2, p), in_axes=1, out_axes=1)(x.swapaxes(0, 1)).swapaxes(0, 1)  # noqa: E731
    return Model(mse(apply), two_layers(), data(6, 4, 5), {"w": 4})


@model
def rows_in_another_order() -> Model:
    """The consumer reads (positions, samples) where the producer wrote (samples, positions); both are 4 long."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return (h.swapaxes(0, 1) @ p["u"] + p["c"]).swapaxes(0, 1)

    return Model(mse(apply), two_layers(), data(4, 4, 5), {"w": 4})


@model
def flat_rows() -> Model:
    """Positions are folded into rows for the producer and split in another way for the consumer."""

    def apply(p, x):
        h = jnp.tanh(x.reshape(-1, 5) @ p["w"] + p["b"])
        return (h.reshape(6, 2, 2, 4) @ p["u"] + p["c"]).reshape(6, 4, 3)

    return Model(mse(apply), two_layers(), data(6, 4, 5), {"w": 4})


@model
def mean_over_time() -> Model:
    """A mean over positions after the consumer."""
    loss = lambda p, b: jnp.mean((dense2(p, b["x"]).mean(1) - b["t"][:, 0]) ** 2)  # noqa: E731
    return Model(loss, two_layers(), data(6, 4, 5), {"w": 4})


@model
def token_mixing() -> Model:
    """MLP-Mixer: the hidden dimension lies along the positions, the channels are rows."""

    def apply(p, x):
        h = jnp.tanh(jnp.einsum("ntd,th->nhd", x, p["w"]) + p["b"][:, None])
        return jnp.einsum("nhd,hs->nsd", h, p["u"]) + p["c"][:, None]

    return Model(mse(apply), draw(w=(4, 6), b=(6,), u=(6, 4), c=(4,)), data(5, 4, 3), {"w": 6})


# Heads


@model
def two_heads() -> Model:
    """Policy and value read one hidden tensor; one of them has a bias."""

    def loss(p, b):
        h = jnp.tanh(b["x"] @ p["w"] + p["b"])
        value = (h @ p["u"])[:, 0]
        policy = optax.softmax_cross_entropy(h @ p["v"] + p["c"], jax.nn.softmax(b["t"]))
        return jnp.mean(policy + (value - b["t"][:, 0]) ** 2)

    return Model(loss, draw(w=(5, 4), b=(4,), u=(4, 1), v=(4, 3), c=(3,)), data(6, 5), {"w": 4})


@model
def two_deep_heads() -> Model:
    params = {"trunk": draw(w=(5, 4), b=(4,)), "a": two_layers(1, 4, 5, 3), "z": two_layers(2, 4, 6, 3)}

    def loss(p, b):
        h = jnp.tanh(b["x"] @ p["trunk"]["w"] + p["trunk"]["b"])
        return jnp.mean((dense2(p["a"], h) - b["t"]) ** 2 + dense2(p["z"], h) ** 4)

    return Model(loss, params, data(6, 5), {"trunk": 4, "a/w": 5, "z/w": 6})


# Vectors along the hidden axis


@model
def scale_and_shift() -> Model:
    """A scale and a second shift for each neuron."""
    apply = lambda p, x: (jnp.tanh(p["g"] * (x @ p["w"]) + p["b"]) - p["a"]) @ p["u"]  # noqa: E731
    return Model(mse(apply), draw(w=(5, 4), g=(4,), b=(4,), a=(4,), u=(4, 3)), data(6, 5), {"w": 4})


@model
def position_bias() -> Model:
    """A learned shift for each position and neuron."""
    apply = lambda p, x: jnp.tanh(x @ p["w"] + p["pos"]) @ p["u"]  # noqa: E731
    return Model(mse(apply), draw(w=(5, 4), pos=(3, 4), u=(4, 3)), data(6, 3, 5), {"w": 4})


# Losses


def classifier(name: str, loss: Callable[[Any, Any], Any]) -> None:
    def build() -> Model:
        return Model(lambda p, b: loss(dense2(p, b["x"]), b["y"]), two_layers(), labelled(6, 5), {"w": 4})

    MODELS[f"loss_{name}"] = build


def gathered(z: Any, y: Any) -> Any:
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(z.shape[0]), y])


classifier("optax", lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean())
classifier("take_along", lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean())
classifier("one_hot", lambda z, y: -jnp.mean(jnp.sum(jax.nn.one_hot(y, 3) * jax.nn.log_softmax(z), -1)))
classifier("arange", gathered)
classifier("vmap_index", lambda z, y: jnp.mean(jax.vmap(lambda a, i: jax.nn.logsumexp(a) - a[i])(z, y)))
classifier("logsumexp", lambda z, y: jnp.sum(jax.nn.logsumexp(z, -1) - z[jnp.arange(len(y)), y]) / z.shape[0])
classifier("huber", lambda z, y: optax.huber_loss(z[:, 0], y.astype(z.dtype)).mean())
classifier("sigmoid", lambda z, y: optax.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 3)).sum(-1).mean())


@model
def l2_penalty() -> Model:
    penalty = lambda p: 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))  # noqa: E731
    return Model(lambda p, b: mse(dense2)(p, b) + penalty(p), two_layers(), data(6, 5), {"w": 4}, penalty=penalty)


@model
def aux_and_key() -> Model:
    """Auxiliary outputs, a typed key and a number in the batch; noise on the inputs couples the samples."""

    def loss(p, b):
        x = b["x"] + b["level"] * jax.random.normal(b["key"], b["x"].shape)
        y = dense2(p, x)
        return jnp.mean((y - b["t"]) ** 2), {"outputs": y, "norm": jnp.linalg.norm(p["w"])}

    batch = data(6, 5) | {"key": jax.random.key(1), "level": jnp.asarray(0.1)}
    return Model(loss, two_layers(), batch, {"w": 4}, has_aux=True, coupled="random")


@model
def transformer_block() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            h = nn.Dense(6, name="up")(nn.LayerNorm()(x))
            x = x + nn.Dense(8, name="down")(nn.tanh(h))
            return nn.Dense(3, name="head")(nn.LayerNorm()(x))

    net, batch = Block(), data(5, 4, 5)
    params = f64(jax.eval_shape(net.init, jax.random.key(0), batch["x"]))
    attention = "MultiHeadDotProductAttention_0"
    refused = {"Dense_0": "producers"}
    growable = {"up": 6, f"{attention}/value": 4, f"{attention}/query": 4, f"{attention}/heads": 2}
    return Model(mse(net.apply), params, batch, growable, refused)


@model
def stop_gradient() -> Model:
    """The trunk is frozen by `stop_gradient`: the consumer is asked all the same."""
    apply = lambda p, x: jax.lax.stop_gradient(jnp.tanh(x @ p["w"] + p["b"])) @ p["u"] + p["c"]  # noqa: E731
    return Model(mse(apply), two_layers(), data(6, 5), {"w": 4})
