"""Recurrent networks with tanh units, one for each way of writing the loop and of reading the states."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.support.zoo.layers import Model, data, draw, f64, mse

WEIGHTS = dict(w=(3, 4), u=(4, 4), b=(4,), v=(4, 2), c=(2,))
RECURRENT: dict[str, Callable[[], Model]] = {}


def recurrent(build: Callable[[], Model]) -> Callable[[], Model]:
    RECURRENT[build.__name__] = build
    return build


def sequences(outputs: int = 2) -> dict[str, jax.Array]:
    """Five sequences of four steps, a target for each step."""
    return data(5, 4, 3, outputs=outputs)


def last_target(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda params, batch: jnp.mean((apply(params, batch["x"]) - batch["t"][:, -1]) ** 2)


def cell(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])


def zeros(p: Any, x: Any) -> Any:
    return jnp.zeros((len(x), len(p["u"])), p["u"].dtype)


def scanned(p: Any, x: Any, step: Callable[..., Any] = cell, **options: Any) -> tuple[Any, Any]:
    """The last state, and all of them, steps first."""
    return jax.lax.scan(lambda h, x: (step(p, h, x),) * 2, zeros(p, x), x.swapaxes(0, 1), **options)


def unrolled(p: Any, x: Any) -> list[Any]:
    states = [zeros(p, x)]
    for t in range(x.shape[1]):
        states.append(cell(p, states[-1], x[:, t]))
    return states[1:]


@recurrent
def unrolled_last() -> Model:
    return Model(last_target(lambda p, x: unrolled(p, x)[-1] @ p["v"] + p["c"]), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def unrolled_every_step() -> Model:
    apply = lambda p, x: jnp.stack([h @ p["v"] + p["c"] for h in unrolled(p, x)], 1)  # noqa: E731
    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def unrolled_stacked() -> Model:
    """The states are stacked before the readout; the first step has no state to read."""

    def apply(p, x):
        states = [jnp.tanh(x[:, 0] @ p["w"] + p["b"])]
        for t in range(1, x.shape[1]):
            states.append(cell(p, states[-1], x[:, t]))
        return jnp.stack(states, 1) @ p["v"] + p["c"]

    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_readout_inside() -> Model:
    def apply(p, x):
        step = lambda h, x: ((h := cell(p, h, x)), h @ p["v"] + p["c"])  # noqa: E731
        return jax.lax.scan(step, zeros(p, x), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_readout_of_the_state_before() -> Model:
    def apply(p, x):
        step = lambda h, x: (cell(p, h, x), h @ p["v"] + p["c"])  # noqa: E731
        return jax.lax.scan(step, zeros(p, x), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_readout_outside() -> Model:
    apply = lambda p, x: (scanned(p, x)[1] @ p["v"] + p["c"]).swapaxes(0, 1)  # noqa: E731
    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_last_carry() -> Model:
    return Model(last_target(lambda p, x: scanned(p, x)[0] @ p["v"] + p["c"]), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_some_states() -> Model:
    """Two of four states are read, by two products."""

    def loss_fn(p, b):
        states = scanned(p, b["x"])[1]
        return jnp.mean((states[-1] @ p["v"] - b["t"][:, 0]) ** 2) + jnp.mean((states[1] @ p["c"] - b["t"][:, 1]) ** 2)

    return Model(loss_fn, draw(**WEIGHTS | dict(c=(4, 2))), sequences(), {"w": 4})


@recurrent
def scan_backwards() -> Model:
    apply = lambda p, x: scanned(p, x, reverse=True)[1][::-1].swapaxes(0, 1) @ p["v"] + p["c"]  # noqa: E731
    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_input_projected_in_advance() -> Model:
    def apply(p, x):
        step = lambda p, h, z: jnp.tanh(z + h @ p["u"])  # noqa: E731
        return scanned(p, x @ p["w"] + p["b"], step)[1].swapaxes(0, 1) @ p["v"] + p["c"]

    return Model(mse(apply), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def scan_of_pre_activations() -> Model:
    """The state is carried before its activation, which the readout shares; the biases of both products."""

    def apply(p, x):
        def step(a, x):
            h = jnp.tanh(a)
            return x @ p["w"] + p["b"] + h @ p["u"] + p["d"], h @ p["v"] + p["c"]

        return jax.lax.scan(step, zeros(p, x), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Model(mse(apply), draw(**WEIGHTS, d=(4,)), sequences(), {"w": 4})


@recurrent
def two_layers_deep() -> Model:
    """Two recurrent layers, one scan each."""

    def apply(p, x):
        first = scanned(p["first"], x)[1].swapaxes(0, 1)
        return scanned(p["second"], first)[1].swapaxes(0, 1) @ p["v"] + p["c"]

    params = dict(first=draw(w=(3, 4), u=(4, 4), b=(4,)), second=draw(1, w=(4, 5), u=(5, 5), b=(5,)))
    return Model(mse(apply), params | draw(v=(5, 2), c=(2,)), sequences(), {"first/w": 4, "second/w": 5})


@recurrent
def two_layers_in_one_scan() -> Model:
    """Both begin with the same zeros, and are not one dimension for that."""

    def apply(p, x):
        def step(states, x):
            first, second = states
            first = cell(p["first"], first, x)
            second = cell(p["second"], second, first)
            return (first, second), second @ p["v"]

        zero = zeros(p["first"], x)
        return jax.lax.scan(step, (zero, zero), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    params = dict(first=draw(w=(3, 4), u=(4, 4), b=(4,)), second=draw(1, w=(4, 4), u=(4, 4), b=(4,)))
    return Model(mse(apply), params | draw(v=(4, 2)), sequences(), {"first/w": 4, "second/w": 4})


@recurrent
def one_sequence_at_a_time() -> Model:
    def apply(p, x):
        start = jnp.zeros(len(p["u"]))
        states = jax.lax.scan(lambda h, x: (cell(p, h, x),) * 2, start, x)[1]
        return states @ p["v"] + p["c"]

    return Model(mse(lambda p, x: jax.vmap(apply, (None, 0))(p, x)), draw(**WEIGHTS), sequences(), {"w": 4})


@recurrent
def linen_rnn() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(nn.SimpleCell(4, param_dtype=jnp.float64))(x)[:, -1])

    batch = sequences()
    params = f64(jax.eval_shape(Net().init, jax.random.key(0), batch["x"]))
    return Model(last_target(Net().apply), params, batch, {"SimpleCell_0/i": 4})


@recurrent
def nnx_rnn() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=rngs))
            self.out = nnx.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            zeros = jnp.zeros((len(x), self.rnn.cell.dense_h.kernel.shape[0]))
            return self.out(self.rnn(x, initial_carry=zeros))

    graph, state, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    apply = lambda p, x: nnx.merge(graph, p, rest)(x)  # noqa: E731
    return Model(mse(apply), f64(nnx.as_pure(state)), sequences(), {"rnn/cell/dense_i": 4})


# Refused


def refused(name: str, apply: Callable[[Any, Any], Any], reason: str, site: str = "w", **more: tuple[int, ...]) -> None:
    RECURRENT[name] = lambda: Model(last_target(apply), draw(**WEIGHTS | more), sequences(), {}, {site: reason})


def gru(p: Any, h: Any, x: Any) -> Any:
    gate = jax.nn.sigmoid(x @ p["wz"] + h @ p["uz"])
    return gate * h + (1 - gate) * jnp.tanh(x @ p["w"] + h @ p["u"])


def last(step: Callable[..., Any], **options: Any) -> Callable[[Any, Any], Any]:
    return lambda p, x: scanned(p, x, step, **options)[0] @ p["v"]


def masked(p: Any, h: Any, x: Any) -> Any:
    return jnp.where(x[:, :1] > 0, cell(p, h, x), 0)


def read_twice(p: Any, x: Any) -> Any:
    end, states = scanned(p, x)
    return end @ p["v"] + states[-1] @ p["v"]


def embedded(p: Any, x: Any) -> Any:
    step = lambda h, i: (jnp.tanh(p["w"][i] + h @ p["u"]), None)  # noqa: E731
    return jax.lax.scan(step, zeros(p, x), jnp.argmax(x, -1).swapaxes(0, 1))[0] @ p["v"]


def handed_on(p: Any, x: Any) -> Any:
    first = scanned(p, x)[0]
    return jax.lax.scan(lambda h, x: (cell(p, h, x), None), first, x.swapaxes(0, 1))[0] @ p["v"]


refused("gru", last(gru), "cells with several cannot grow", "wz", wz=(3, 4), uz=(4, 4))
refused("leaky", last(lambda p, h, x: 0.5 * h + 0.5 * cell(p, h, x)), "meet another tensor in `add`")
refused("residual", last(lambda p, h, x: h + cell(p, h, x)), "meet another tensor in `add`")
refused("masked", last(masked), "meet another tensor in `select_n`")
refused("sigmoid", last(lambda p, h, x: jax.nn.sigmoid(x @ p["w"] + h @ p["u"])), "maps 0 to 0.5")
refused("mean_over_time", lambda p, x: scanned(p, x)[1].mean(0) @ p["v"], "mixed by `reduce_sum`")
refused("flattened", lambda p, x: scanned(p, x)[1].swapaxes(0, 1).reshape(5, -1) @ p["v"], "another axis", v=(16, 2))
refused("read_twice", read_twice, "more than once")
refused("learned_start", lambda p, x: jax.lax.scan(lambda h, x: (cell(p, h, x), None), jnp.broadcast_to(
    p["h"], (5, 4)), x.swapaxes(0, 1))[0] @ p["v"], "initial state is not zero", h=(4,))  # fmt: skip
refused("handed_on", handed_on, "begin another loop")
refused("embedded", embedded, "something else than products", "u")
refused("two_activations", lambda p, x: jnp.sin(scanned(p, x)[0]) @ p["v"], "different tensors")
refused("layer_norm", last(lambda p, h, x: jax.nn.standardize(cell(p, h, x))), "mixed by `reduce_sum`")
