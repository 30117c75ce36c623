"""Models with a hidden dimension that must not be grown, and a word of the reason that must be given."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.support.zoo.layers import data, dense2, draw, labelled, two_layers


class Refusal(NamedTuple):
    """A loss, its inputs, a word of the reason by site name, and what may grow beside it."""

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    reasons: Mapping[str, str]
    growable: tuple[str, ...] = ()


REFUSALS: dict[str, Refusal] = {}
x3 = data(6, 4, 5)
x4 = data(4, 4, 5)
keyed = x3 | {"m": (x3["x"][..., 0] > 0).astype(float), "k": jax.random.key(0)}


def hidden(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"] + p["b"])


def head(p: Any, h: Any) -> Any:
    return h @ p["u"] + p["c"]


def refuse(name: str, apply: Callable[[Any, Any], Any], reasons: Any, params: Any = None, batch: Any = x3) -> None:
    """Registers a model given by its outputs; a single word is the reason of the site `w`."""
    reasons = reasons if isinstance(reasons, dict) else {"w": reasons}
    loss = lambda p, b: jnp.mean(apply(p, b) ** 2)  # noqa: E731
    REFUSALS[name] = Refusal(loss, {**two_layers(), **(params or {})}, batch, reasons)


def on_hidden(name: str, between: Callable[..., Any], reason: str, params: Any = None, batch: Any = x3) -> None:
    """Registers a two-layer network with something between its layers: `between(h, params, batch)`."""
    refuse(name, lambda p, b: head(p, between(hidden(p, b["x"]), p, b)), reason, params, batch)


def penalised(name: str, penalty: Callable[[Any], Any]) -> None:
    refuse(name, lambda p, b: jnp.sqrt(1 + penalty(p)) + 0 * dense2(p, b["x"]).sum(), "")
    REFUSALS[name] = Refusal(
        lambda p, b: jnp.mean(dense2(p, b["x"]) ** 2) + penalty(p), two_layers(), x3, {"w": "empty slots"}
    )


def centred(h: Any) -> Any:
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def batch_norm(h: Any) -> Any:
    return (h - h.mean((0, 1))) / jnp.sqrt(h.var((0, 1)) + 1e-5)


def over_time(step: Callable[[Any], Any], x: Any, reverse: bool = False) -> Any:
    return jax.lax.scan(lambda _, s: (_, step(s)), 0.0, x.swapaxes(0, 1), reverse=reverse)[1].swapaxes(0, 1)


def over_two(step: Callable[[Any], Any], x: Any) -> Any:
    return jax.lax.map(lambda s: jax.lax.map(step, s), x)


# Mixed along the hidden axis, or not silent when empty
on_hidden("softmax", lambda h, p, b: jax.nn.softmax(h), "softmax")
on_hidden("layer_norm", lambda h, p, b: jnp.tanh(centred(h)), "layer norm")
on_hidden("rms_norm", lambda h, p, b: h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True)), "mixed by `reduce_sum`")
on_hidden("group_norm", lambda h, p, b: centred(h.reshape(6, 4, 2, 2)).reshape(6, 4, 4), "summary of themselves")
on_hidden("max", lambda h, p, b: h - h.max(-1, keepdims=True), "reduce_max")
on_hidden("sorted_units", lambda h, p, b: jnp.sort(h, -1), "sort")
on_hidden("sigmoid", lambda h, p, b: jax.nn.sigmoid(h), "`logistic` maps 0 to 0.5")
on_hidden("softplus", lambda h, p, b: jax.nn.softplus(h), "maps 0 to 0.693")
on_hidden("cos", lambda h, p, b: jnp.cos(h), "`cos` maps 0 to 1")
on_hidden("dropout", lambda h, p, b: h * jax.random.bernoulli(b["k"], 0.5, h.shape), "random", batch=keyed)
on_hidden("dropout_fixed", lambda h, p, b: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), "random")
on_hidden("zeroed_unit", lambda h, p, b: h.at[..., 0].set(0.0), "scatter")
on_hidden("slices_of_units", lambda h, p, b: jnp.concatenate([h[..., 2:], h[..., :2]], -1), "slice")
on_hidden(
    "steps_over_units", lambda h, p, b: jnp.moveaxis(jax.lax.map(jnp.tanh, jnp.moveaxis(h, -1, 0)), 0, -1), "scan"
)

# Rows that are no longer the producer's
on_hidden("batch_norm", lambda h, p, b: jnp.tanh(batch_norm(h)), "summary of themselves")
on_hidden("rolled", lambda h, p, b: jnp.roll(h, 1, 1), "rows are mixed")
on_hidden("sorted_rows", lambda h, p, b: jnp.sort(h, 1), "rows are mixed by `sort`")
on_hidden("causal_shift", lambda h, p, b: jnp.pad(h[:, :-1], ((0, 0), (1, 0), (0, 0))), "rows are mixed")
on_hidden("residual_shift", lambda h, p, b: h + jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1], "rows are mixed")
on_hidden("permuted", lambda h, p, b: h[jnp.array([1, 0, 2, 4, 3, 5])], "rows are mixed by `gather`")
on_hidden("swapped", lambda h, p, b: h + h.swapaxes(0, 1), "told apart", batch=x4)
on_hidden("pairs", lambda h, p, b: h[:, :1] + h[None, :, 0], "rows")
on_hidden("new_rows", lambda h, p, b: jnp.broadcast_to(h[:, :, None], (6, 4, 3, 4)), "other rows")
on_hidden("while_loop", lambda h, p, b: jax.lax.while_loop(jnp.any, jnp.zeros_like, h), "while")
on_hidden("loop", lambda h, p, b: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h), h), "scan")
on_hidden("cond", lambda h, p, b: jax.lax.cond(b["x"].sum() > 0, jnp.tanh, jnp.sin, h), "cond_out")
on_hidden("stacked_pair", lambda h, p, b: jnp.stack([h, jnp.sin(h)], 1), "stack")

# Rows weighted unit by unit
on_hidden("embedding_gate", lambda h, p, b: h * p["u"].T[b["y"]], "weighted", batch=labelled(6, 5))

# Scans
refuse("another_scan", lambda p, b: over_time(lambda h: head(p, h), over_time(lambda x: hidden(p, x), b["x"])), "scan")
refuse(
    "scan_reverse",
    lambda p, b: over_time(lambda h: head(p, h), over_time(lambda x: hidden(p, x), b["x"]), True),
    "scan",
)
refuse("scans_swapped", lambda p, b: over_two(lambda h: head(p, h), over_two(
    lambda x: hidden(p, x), jnp.stack([b["x"]] * 4).transpose(0, 2, 1, 3)).swapaxes(0, 1)), "scan")  # fmt: skip
refuse("closed_into_scan", lambda p, b: (lambda h: jax.lax.map(lambda s: s * head(p, h), jnp.arange(3.0)))(
    hidden(p, b["x"])), "scan")  # fmt: skip
refuse("previous_step", lambda p, b: jax.lax.scan(
    lambda h, s: (hidden(p, s), head(p, h)), jnp.zeros((6, 4)), b["x"].swapaxes(0, 1))[1], "consumers")  # fmt: skip

# Several writers or readers
refuse("residual", lambda p, b: head(p, b["x"] @ p["w"] + jnp.tanh(b["x"] @ p["r"])), "2 producers", draw(r=(5, 4)))
refuse("highway", lambda p, b: (lambda h, g: head(p, h * g + g))(hidden(p, b["x"]), b["x"] @ p["r"]),
       "meet again in `add`", draw(r=(5, 4)))  # fmt: skip
refuse("two_sigmoids", lambda p, b: (lambda s: head(p, s(b["x"] @ p["w"]) * s(b["x"] @ p["r"])))(jax.nn.sigmoid),
       "neither factor", draw(r=(5, 4)))  # fmt: skip
refuse("scaled_gate", lambda p, b: head(p, (b["x"] @ p["w"]) * jnp.tanh((b["x"] @ p["r"]) * p["s"])),
       "parameters of its own", draw(r=(5, 4), s=(4,)))  # fmt: skip
refuse("pooled_gate", lambda p, b: head(p, (b["x"] @ p["w"]) * jnp.tanh(b["x"] @ p["r"]).mean(1, keepdims=True)),
       "more than an activation", draw(r=(5, 4)))  # fmt: skip
refuse("other_gate", lambda p, b: head(p, (b["x"] @ p["w"]) * (b["x"][:, 0] @ p["r"])[:, None]), "rows", draw(r=(5, 4)))
refuse("three_factors", lambda p, b: head(p, (b["x"] @ p["w"]) * (b["x"] @ p["r"]) * (b["x"] @ p["t"])), "3 producers",
       draw(r=(5, 4), t=(5, 4)))  # fmt: skip
refuse(
    "glu_split", lambda p, b: (lambda a, g: head(p, a * g))(*jnp.split(b["x"] @ p["w"], 2, -1)), "split", draw(w=(5, 8))
)
refuse("glu_pair", lambda p, b: (lambda a: head(p, a[..., 0, :] * a[..., 1, :]))((b["x"] @ p["w"]).reshape(6, 4, 2, 4)),
       "another axis", draw(w=(5, 8)))  # fmt: skip
refuse("concatenated", lambda p, b: jnp.concatenate([hidden(p, b["x"]), b["x"] @ p["v"]], -1) @ p["u"],
       {"w": "concatenated", "v": "concatenated"}, draw(v=(5, 2), u=(6, 3)))  # fmt: skip
refuse("two_tensors", lambda p, b: (lambda a: jnp.tanh(a) @ p["u"] + jnp.sin(a) @ p["v"])(b["x"] @ p["w"]),
       "different tensors", draw(v=(4, 3)))  # fmt: skip
refuse("two_row_orders", lambda p, b: (lambda h: h @ p["u"] + h.swapaxes(0, 1) @ p["v"])(hidden(p, b["x"])),
       "told apart", draw(v=(4, 3)), x4)  # fmt: skip
refuse("tied", lambda p, b: hidden(p, b["x"]) @ p["w"].T, "`w` both writes and reads it")
refuse("recurrence", lambda p, b: jax.lax.scan(
    lambda s, x: ((h := s / 2 + jnp.tanh(x @ p["w"] + s @ p["r"])), h @ p["u"]), jnp.zeros((6, 4)),
    b["x"].swapaxes(0, 1))[1], "meet another tensor in `add`", draw(r=(4, 4)))  # fmt: skip
refuse("gated_recurrence", lambda p, b: jax.lax.scan(
    lambda s, x: ((h := jnp.tanh(x @ p["w"] + s @ p["r"]) * jnp.tanh(x @ p["w"] + s @ p["t"])), h @ p["u"]),
    jnp.zeros((6, 4)), b["x"].swapaxes(0, 1))[1], "2 kernels write and read", draw(r=(4, 4), t=(4, 4)))  # fmt: skip
refuse("embedding", lambda p, b: jnp.tanh(p["w"][b["y"]]) @ p["u"], {"u": "embedding"}, draw(w=(7, 4)), labelled(6, 5))
refuse("experts", lambda p, b: jax.vmap(lambda w, u: jnp.tanh(b["x"] @ w) @ u, out_axes=2)(p["w"], p["u"]),
       {"w[1]": "batch of kernels"}, draw(w=(2, 5, 4), u=(2, 4, 3)))  # fmt: skip


# Residual streams
def block(p: Any, s: Any) -> Any:
    return jnp.tanh(s @ p["r"]) @ p["t"]


def rms(s: Any, width: int = 4) -> Any:
    return s * jax.lax.rsqrt(jnp.sum(s**2, -1, keepdims=True) / width + 1e-5)


def on_stream(name: str, apply: Callable[..., Any], reason: Any, params: Any = None, batch: Any = x3) -> None:
    """Registers a residual network: `apply(s, params, batch)` gives the outputs from what is first on the stream."""
    weights = draw(r=(4, 3), t=(3, 4)) | (params or {})
    refuse(name, lambda p, b: apply(b["x"] @ p["w"], p, b), reason, weights, batch)
    REFUSALS[name] = REFUSALS[name]._replace(growable=("r",))


on_stream("stream_layer_norm", lambda s, p, b: head(p, s + block(p, centred(s))), "layer norm")
on_stream("stream_last_layer_norm", lambda s, p, b: head(p, centred(s + block(p, rms(s)))), "use an RMS norm")
on_stream("stream_dropout", lambda s, p, b: head(p, s + block(p, s) * jax.random.bernoulli(b["k"], 0.5, s.shape)),
          "random numbers", batch=keyed)  # fmt: skip
on_stream("stream_relu", lambda s, p, b: head(p, jax.nn.relu(s + block(p, s))), "lies on it")
on_stream("stream_norm_on_it", lambda s, p, b: head(p, rms(s) + block(p, s)), "a norm on the stream itself")
on_stream(
    "stream_flatten", lambda s, p, b: (s + block(p, s)).reshape(6, -1) @ p["u"], "more than once", draw(u=(16, 3))
)
on_stream("stream_scan", lambda s, p, b: head(p, jax.lax.scan(
    lambda s, q: (s + jnp.tanh(s @ q[0]) @ q[1], None), s, (p["r"], p["t"]))[0]), "is used in a scan",
    draw(r=(2, 4, 3), t=(2, 3, 4)))  # fmt: skip
on_stream("stream_shared_block", lambda s, p, b: head(p, (s := s + block(p, s)) + block(p, s)), "used more than once")
on_stream(
    "stream_linear_block",
    lambda s, p, b: head(p, s + s @ p["q"]),
    "`q` both reads and writes it, and its states meet another tensor in `add`",
    draw(q=(4, 4)),
)
on_stream("stream_tied", lambda s, p, b: (e := p["e"][b["y"]]) @ p["q"] + block(p, e) @ p["e"].T,
          {"t": "tied embeddings"}, draw(e=(7, 4), q=(4, 7)), labelled(6, 5))  # fmt: skip
on_stream("stream_other_divisor", lambda s, p, b: head(p, s + block(p, rms(s, 3))), "another number than its width")
on_stream("stream_max_norm", lambda s, p, b: head(p, s + block(p, s / jnp.max(s**2, -1, keepdims=True))), "reduce_max")
on_stream("stream_shift", lambda s, p, b: head(p, s + block(p, rms(s) + p["q"])), "added behind a norm", draw(q=(4,)))
on_stream("stream_cut_positions", lambda s, p, b: head(p, s + p["q"][:4] + block(p, s)), "neither a plain shift",
          draw(q=(6, 4)))  # fmt: skip
on_stream("stream_tokens_mixed", lambda s, p, b: head(p, s + block(p, s) + jnp.einsum(
    "ntd,tu->nud", jnp.tanh(jnp.einsum("ntd,tu->nud", s, p["q"])), p["q"])), "`dot_general` lies on it",
    draw(q=(4, 4)))  # fmt: skip
on_stream("stream_in_the_loss", lambda s, p, b: head(p, s + block(p, s)) + jnp.sum(s, -1, keepdims=True), "reduce_sum")

# Leaves that act elsewhere too
refuse(
    "weight_norm",
    lambda p, b: jnp.tanh(b["x"] @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))) @ p["u"],
    {"u": "`w` reaches the matrix product through `div`"},
)
refuse("norm_after", lambda p, b: jnp.tanh(b["x"] @ p["w"] / jnp.linalg.norm(p["w"], axis=0)) @ p["u"], "")
refuse("spectral", lambda p, b: jnp.tanh(b["x"] @ p["w"] / jnp.linalg.norm(p["w"])) @ p["u"], "also enters")
refuse("bias_norm", lambda p, b: dense2(p, b["x"]) / jnp.sqrt(1 + jnp.sum(p["b"] ** 2)), "`b` also enters")
refuse("bias_twice", lambda p, b: (hidden(p, b["x"]) + p["b"]) @ p["u"], "more than once")
refuse("bias_as_scale", lambda p, b: jnp.tanh(b["x"] @ p["w"] * p["b"] + p["b"]) @ p["u"], "more than once")
refuse("one_plus_scale", lambda p, b: jnp.tanh(b["x"] @ p["w"] * (1 + p["b"])) @ p["u"], "plain")
refuse("running", lambda p, b: head(p, (b["x"] @ p["w"] - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5)), "normalised",
       draw(mean=(4,)) | {"var": jnp.ones(4)})  # fmt: skip
refuse("rows_of_consumer", lambda p, b: head(p, hidden(p, b["x"])) + p["u"].mean(0), "")

# Out of sight
refuse("indexed", lambda p, b: jnp.tanh(b["x"] @ p["w"][0]) @ p["u"][0], {"u": "`w`"}, draw(w=(2, 5, 4), u=(2, 4, 3)))
refuse("in_cond", lambda p, b: jax.lax.cond(b["x"].sum() > 0, dense2, lambda p, x: x[..., :3], p, b["x"]), "`cond`")
refuse("in_while", lambda p, b: jax.lax.while_loop(jnp.any, lambda x: x + jax.lax.stop_gradient(
    jnp.tanh(x @ p["w"]) @ p["u"]), b["x"]), {"w": "`while`", "u": "`while`"}, draw(u=(4, 5)))  # fmt: skip
refuse("in_shard_map", lambda p, b: jax.shard_map(
    dense2, mesh=jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)), in_specs=(P(), P()), out_specs=P())(
    p, b["x"]), {"w": "`shard_map`", "u": "`shard_map`"})  # fmt: skip
refuse("by_hand", lambda p, b: (hidden(p, b["x"])[..., None] * p["u"]).sum(-2), "`reduce_sum` is taken over it")
refuse("single_slot", lambda p, b: dense2(p, b["x"]), "single slot", two_layers(h=1))


@jax.custom_vjp
def rule_of_its_own(p, x):
    return dense2(p, x)


rule_of_its_own.defvjp(lambda p, x: (dense2(p, x), (p, x)), lambda saved, g: jax.vjp(dense2, *saved)[1](g))
refuse("in_custom_vjp", lambda p, b: rule_of_its_own(p, b["x"]), "`custom_vjp_call`")

# Penalties that pull at an empty slot
penalised("l1", lambda p: jnp.sum(jnp.abs(p["w"])))
penalised("distance", lambda p: jnp.sum((p["w"] - 1) ** 2))
penalised("sum_squared", lambda p: jnp.sum(p["w"]) ** 2)
