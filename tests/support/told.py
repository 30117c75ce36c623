"""Models with the name of every pattern that a reason may speak of; whatever is not said here must not be said."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.support.zoo.layers import draw, f64

WORDS = (
    "rotary", "tied", "quer", "keys", "attention", "residual stream", "softmax", "layer norm", "a norm", "a mean",
    "centring", "embedding", "gated unit", "recurs", "differentiates", "heads", "dropout", "penalty", "GRU", "LSTM",
    "random", "split", "concatenat", "scan", "convolution",
)  # fmt: skip


class Told(NamedTuple):
    """A loss, its inputs, and which of `WORDS` its reasons contain."""

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    words: frozenset[str]


TOLD: dict[str, Callable[[], Told]] = {}
BATCH = draw(0, x=(6, 4, 5), z=(6, 5), s=(6,), t=(6, 3), r=(6,), i=(6, 4, 4, 8)) | {
    "k": jnp.arange(6) % 2, "y": jnp.arange(24).reshape(6, 4) % 7, "key": jax.random.key(0),
}  # fmt: skip
HALVES = np.linspace(0.1, 1, 4 * 2).reshape(4, 2)


def tell(name: str, loss: Callable[[Any, Any], Any], params: Any, *words: str) -> None:
    """Registers a model whose outputs are compared with `t`, or whose loss is a scalar already."""

    def loss_fn(p: Any, b: Any) -> Any:
        out = loss(p, b)
        return out if out.ndim == 0 else jnp.mean((out - b["t"][..., : out.shape[-1]].reshape(out.shape)) ** 2)

    TOLD[name] = lambda: Told(loss_fn, params() if callable(params) else params, BATCH, frozenset(words))


# Derivatives of the network in the loss
def unit(p: Any, x: Any) -> Any:
    return (jnp.tanh(x @ p["w"]) @ p["u"])[0]


SCALAR = draw(1, w=(5, 6), u=(6, 1))


def derivative(of: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda p, b: jnp.mean((jax.vmap(lambda x: of(lambda y: unit(p, y))(x))(b["z"]).reshape(6, -1) - 1) ** 2)


tell("grad", derivative(jax.grad), SCALAR, "differentiates")
tell("hessian", derivative(jax.hessian), SCALAR, "differentiates")
tell("jvp", derivative(lambda u: lambda x: jax.jvp(u, (x,), (jnp.ones(5),))[1]), SCALAR, "differentiates")
tell("jitted_grad", derivative(lambda u: jax.jit(jax.grad(jax.jit(u)))), SCALAR, "differentiates")
tell("energy", lambda p, b: jnp.mean((-jax.vmap(jax.grad(lambda x: unit(p, jnp.sin(x))))(b["z"])[:, :3] - b["t"]) ** 2),
     SCALAR, "differentiates")  # fmt: skip


# Branches
def branch(p: Any, x: Any, k: int) -> Any:
    return jnp.tanh(x @ p[f"w{k}"]) @ p[f"u{k}"]


BRANCHES = draw(2, w0=(5, 6), u0=(6, 3), w1=(5, 4), u1=(4, 3))
tell("switch", lambda p, b: jax.vmap(lambda x, k: jax.lax.switch(k, [lambda x: branch(p, x, 0),
     lambda x: branch(p, x, 1)], x))(b["z"], b["k"]), BRANCHES)  # fmt: skip
tell("cond", lambda p, b: jax.lax.cond(b["s"].sum() > 0, lambda: branch(p, b["z"], 0), lambda: branch(p, b["z"], 1)),
     BRANCHES)  # fmt: skip


# Attention
def attend(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v


def turn(x: Any) -> Any:
    a, c = jnp.split(x, 2, -1)
    return jnp.concatenate([a * np.cos(HALVES) - c * np.sin(HALVES), a * np.sin(HALVES) + c * np.cos(HALVES)], -1)


def unturned(x: Any) -> Any:
    return x


def rms(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def attention(between: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(p: Any, b: Any) -> Any:
        q, k, v = (b["x"] @ p[name] for name in ("wq", "wk", "wv"))
        return attend(between(q), between(k), v).mean(1) @ p["o"]

    return apply


QKV = draw(3, wq=(5, 4), wk=(5, 4), wv=(5, 6), o=(6, 3))
tell("attention", attention(unturned), QKV)
tell("rotary", attention(turn), QKV, "rotary", "embedding", "quer", "keys", "split")
tell("normed_queries", attention(rms), QKV, "a norm", "quer", "keys")
tell("fused_split", lambda p, b: attend(*jnp.split(b["x"] @ p["qkv"], 3, -1)).mean(1) @ p["o"],
     draw(4, qkv=(5, 12), o=(4, 3)), "split")  # fmt: skip
tell("fused_slices", lambda p, b: (lambda h: attend(h[..., :4], h[..., 4:8], h[..., 8:]))(b["x"] @ p["qkv"]).mean(1)
     @ p["o"], draw(4, qkv=(5, 12), o=(4, 3)))  # fmt: skip
tell("memory_keys", lambda p, b: attend(b["x"] @ p["wq"], jnp.concatenate([b["x"], b["x"]], 1) @ p["wk"],
     jnp.concatenate([b["x"], b["x"]], 1) @ p["wv"]).mean(1) @ p["o"], QKV)  # fmt: skip

# Towers
TOWERS = draw(5, w=(5, 6), v=(5, 6))
tell("dot", lambda p, b: jnp.mean((jnp.sum(jnp.tanh(b["z"] @ p["w"]) * (b["z"] @ p["v"]), -1) - b["r"]) ** 2), TOWERS)
tell("cosine", lambda p, b: jnp.mean((jnp.sum(*[(lambda a, c: a * c / jnp.linalg.norm(a, axis=-1, keepdims=True))(
     jnp.tanh(b["z"] @ p["w"]), b["z"] @ p["v"])], -1) - b["r"]) ** 2), TOWERS)  # fmt: skip
tell("all_pairs", lambda p, b: -jnp.mean(jnp.diagonal(jax.nn.log_softmax(
     jnp.exp(b["z"] @ p["w"]) @ jnp.cos(b["z"] @ p["v"]).T))), TOWERS)  # fmt: skip

# Something between two layers
TWO = draw(6, w=(5, 6), u=(6, 3))


def between(name: str, function: Callable[..., Any], *words: str, params: Any = TWO) -> None:
    tell(name, lambda p, b: function(jnp.tanh(b["z"] @ p["w"]), p, b) @ p["u"], params, *words)


def centred(h: Any) -> Any:
    return h - h.mean(-1, keepdims=True)


between("softmax", lambda h, p, b: jax.nn.softmax(h), "softmax")
between("maximum", lambda h, p, b: h - h.max(-1, keepdims=True))
between("share", lambda h, p, b: h / (1 + jnp.abs(h).sum(-1, keepdims=True)))
between("mean", lambda h, p, b: h * h.mean(-1, keepdims=True), "a mean")
between("layer_norm", lambda h, p, b: centred(h) / jnp.sqrt(h.var(-1, keepdims=True) + 1), "layer norm")
between("rms_norm", lambda h, p, b: rms(h), "a norm")
between("group_norm", lambda h, p, b: (lambda g: (g - g.mean(-1, keepdims=True)) / jnp.sqrt(g.var(-1, keepdims=True)
        + 1))(h.reshape(6, 3, 2)).reshape(6, 6), "layer norm", "centring")  # fmt: skip
between("batch_centring", lambda h, p, b: h - h.mean(0), "centring")
between("dropout", lambda h, p, b: h * jax.random.bernoulli(b["key"], 0.5, h.shape), "random")
between("noise", lambda h, p, b: h + jax.random.normal(b["key"], h.shape), "random")
between("crelu", lambda h, p, b: jnp.concatenate([jax.nn.relu(h), jax.nn.relu(-h)], -1), "concatenat",
        params=draw(7, w=(5, 6), u=(12, 3)))  # fmt: skip
between("maxout", lambda h, p, b: h.reshape(6, 3, 2).max(-1), params=draw(7, w=(5, 6), u=(3, 3)))
between("beside_inputs", lambda h, p, b: jnp.concatenate([b["z"], h], -1), "concatenat",
        params=draw(7, w=(5, 6), u=(11, 3)))  # fmt: skip
between("gate_and_units", lambda h, p, b: (lambda a, g: a * jax.nn.silu(g))(*jnp.split(h, 2, -1)), "split",
        params=draw(7, w=(5, 12), u=(6, 3)))  # fmt: skip
between("itself_gated", lambda h, p, b: h + jax.nn.relu(h * p["m"]), params=TWO | draw(8, m=(6,)))

# Made of parameters
tell("number", lambda p, b: jnp.tanh(b["z"] @ (0.5 * p["w"])) @ p["u"], TWO)
tell("weight_norm", lambda p, b: jnp.tanh(b["z"] @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))) @ p["u"], TWO)
tell("low_rank", lambda p, b: jnp.tanh(b["z"] @ (p["w"] + p["a"] @ p["c"])) @ p["u"], TWO | draw(9, a=(5, 2), c=(2, 6)))
tell("hypernetwork", lambda p, b: jnp.tanh(b["z"] @ (p["h"] @ p["e"]).reshape(5, 6)) @ p["u"],
     draw(9, h=(30, 2), e=(2,), u=(6, 3)))  # fmt: skip
tell("tied_layers", lambda p, b: jnp.tanh(b["z"] @ p["w"]) @ p["w"].T @ p["o"], draw(9, w=(5, 6), o=(5, 3)))
tell("penalty", lambda p, b: jnp.mean((jnp.tanh(b["z"] @ p["w"]) @ p["u"] - b["t"]) ** 2) + jnp.abs(p["w"]).sum(), TWO)
tell("highway", lambda p, b: (lambda h, g: h * g + g)(jnp.tanh(b["z"] @ p["w"]), jnp.tanh(b["z"] @ p["v"])) @ p["u"],
     TWO | draw(9, v=(5, 6)))  # fmt: skip
tell("three", lambda p, b: (b["z"] @ p["w"]) * (b["z"] @ p["v"]) * (b["z"] @ p["m"]) @ p["u"],
     TWO | draw(9, v=(5, 6), m=(5, 6)))  # fmt: skip
tell("half_silent", lambda p, b: (b["z"] @ p["w"]) * jax.nn.relu((b["z"] @ p["v"]) * p["m"]) @ p["u"],
     TWO | draw(9, v=(5, 6), m=(6,)), "gated unit")  # fmt: skip

# Streams and embeddings
STREAM = draw(10, e=(7, 4), w=(4, 6), u=(6, 4), o=(4, 3))


def stream(p: Any, b: Any) -> Any:
    s = p["e"][b["y"]]
    return s + jnp.tanh(s @ p["w"]) @ p["u"]


tell("stream", lambda p, b: jax.nn.relu(stream(p, b)).mean(1) @ p["o"], STREAM, "residual stream")
tell("normed_stream", lambda p, b: centred(stream(p, b)).mean(1) @ p["o"], STREAM, "residual stream", "layer norm")
tell(
    "tied_embeddings",
    lambda p, b: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(stream(p, b) @ p["e"].T), b["y"][..., None], -1)),
    STREAM,
    "tied",
    "embedding",
)
tell("embedding", lambda p, b: jax.nn.sigmoid(p["e"][b["y"]]).mean(1) @ p["o"], STREAM, "embedding")  # fmt: skip
tell("square_block", lambda p, b: (lambda s: jnp.tanh(s + jnp.tanh(s @ p["m"])))(b["z"] @ p["w"]) @ p["u"],
     TWO | draw(11, m=(6, 6)))  # fmt: skip


tell("film", lambda p, b: (jnp.tanh(b["z"] @ p["w"]) * (1 + b["z"] @ p["v"]) + b["z"] @ p["m"]) @ p["u"],
     TWO | draw(9, v=(5, 6), m=(5, 6)))  # fmt: skip
tell("two_added", lambda p, b: jax.nn.relu(jnp.tanh(b["z"] @ p["w"]) + b["z"] @ p["v"]) @ p["u"],
     TWO | draw(9, v=(5, 6)))  # fmt: skip


# Recurrences
def of_flax(cell: nn.Module) -> Callable[[], tuple[Any, Any]]:
    net = nn.RNN(cell)
    return lambda: f64(jax.eval_shape(net.init, jax.random.key(0), BATCH["x"])), lambda p, b: net.apply(p, b["x"])[
        :, -1
    ]


def of_equinox(cell: Any) -> Callable[[], tuple[Any, Any]]:
    arrays, static = eqx.partition(cell, eqx.is_inexact_array)

    def last(p: Any, x: Any) -> Any:
        step = eqx.combine(p["cell"], static)
        start = (jnp.zeros(4), jnp.zeros(4)) if isinstance(step, eqx.nn.LSTMCell) else jnp.zeros(4)
        state, _ = jax.lax.scan(lambda s, x: (step(x, s), None), start, x)
        return (state[0] if isinstance(state, tuple) else state) @ p["o"]

    return lambda: {"cell": f64(arrays), **draw(12, o=(4, 3))}, lambda p, b: jax.vmap(lambda x: last(p, x))(b["x"])


def of_haiku(build: Callable[[], Any]) -> Any:
    def apply(x: Any) -> Any:
        cell = build()
        out, _ = hk.dynamic_unroll(cell, x, cell.initial_state(len(x)), time_major=False)
        return hk.Linear(3)(out[:, -1])

    net = hk.without_apply_rng(hk.transform(apply))
    return lambda: f64(jax.eval_shape(net.init, jax.random.key(0), BATCH["x"])), lambda p, b: net.apply(p, b["x"])


class Images(nnx.Module):
    """An inverted bottleneck and a shuffle of its pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.wide, self.depth = (
            nnx.Conv(8, 6, (1, 1), rngs=rngs),
            nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs),
        )
        self.narrow, self.last = nnx.Conv(6, 16, (1, 1), rngs=rngs), nnx.Conv(4, 3, (1, 1), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.narrow(nnx.relu(self.depth(nnx.relu(self.wide(x)))))
        x = x.reshape(6, 4, 4, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(6, 8, 8, 4)
        return self.last(nnx.relu(x)).mean((1, 2))


def of_nnx() -> Any:
    graph, state = nnx.split(Images(nnx.Rngs(0)))
    return lambda: f64(nnx.as_pure(state)), lambda p, b: nnx.merge(graph, p)(b["i"])


def framework(name: str, made: Any, *words: str) -> None:
    params, apply = made
    head = lambda p, b: apply(p, b)[..., :3]  # noqa: E731
    tell(name, head, params, *words)


framework("flax_gru", of_flax(nn.GRUCell(4, param_dtype=float)), "recurs")
framework("flax_lstm", of_flax(nn.OptimizedLSTMCell(4, param_dtype=float)), "concatenat")
framework("equinox_gru", of_equinox(eqx.nn.GRUCell(5, 4, key=jax.random.key(0))), "split")
framework("equinox_lstm", of_equinox(eqx.nn.LSTMCell(5, 4, key=jax.random.key(0))), "split")
framework("haiku_gru", of_haiku(lambda: hk.GRU(4)), "split")
framework("haiku_lstm", of_haiku(lambda: hk.LSTM(4)), "split")
framework("images", of_nnx(), "convolution")
