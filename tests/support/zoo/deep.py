"""Models of any depth, abstract: nothing of them is computed, only traced.

In the frameworks' own modules and in plain JAX; the widths are small, since discovery does not see them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Deep(NamedTuple):
    """A loss with abstract parameters and an abstract batch."""

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def linen(net: nn.Module, *inputs: jax.ShapeDtypeStruct, **kwargs: Any) -> Deep:
    """A Linen module under a mean square; with `mutable`, its updates are thrown away."""
    params = jax.eval_shape(net.init, jax.random.key(0), *inputs)

    def loss_fn(params: Any, batch: Any) -> Any:
        outs = net.apply(params, *batch, **kwargs)
        return jnp.mean((outs[0] if kwargs else outs) ** 2)

    return Deep(loss_fn, params, inputs)


class Block(nn.Module):
    """Residual attention and hidden layer, normalised before (`pre`) or after; with `memory`, cross-attention."""

    norm: Callable[..., nn.Module]
    pre: bool
    width: int
    heads: int

    @nn.compact
    def __call__(self, s: Any, memory: Any = None) -> Any:
        parts: list[Callable[[Any], Any]] = [self.attention("self", None)]
        parts += [] if memory is None else [self.attention("cross", memory)]
        for part in (*parts, self.hidden):
            s = s + part(self.norm()(s)) if self.pre else self.norm()(s + part(s))
        return s

    def attention(self, name: str, keys: Any) -> Callable[[Any], Any]:
        attend = nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.width, name=name)  # scales its queries
        return lambda y: attend(y, y if keys is None else keys)

    def hidden(self, y: Any) -> Any:
        return nn.Dense(self.width, name="down")(nn.gelu(nn.Dense(4 * self.width, name="up")(y)))


class Transformer(nn.Module):
    """Words to logits, blocks in a row; with `encoder`, as many blocks before whose result all others attend to."""

    layers: int
    norm: Callable[..., nn.Module] = nn.LayerNorm
    pre: bool = True
    encoder: bool = False
    width: int = 8
    heads: int = 2

    @nn.compact
    def __call__(self, words: Any) -> Any:
        embed, memory = nn.Embed(11, self.width, name="words"), None
        positions = self.param("positions", nn.initializers.normal(), (words.shape[1], self.width))
        block = partial(Block, self.norm, self.pre, self.width, self.heads)
        if self.encoder:
            memory = embed(words) + positions
            for i in range(self.layers):
                memory = block(name=f"encoder{i}")(memory)
            memory = self.norm(name="encoded")(memory)
        s = embed(words) + positions
        for i in range(self.layers):
            s = block(name=f"block{i}")(s, memory)
        return nn.Dense(11, name="logits")(self.norm(name="last")(s))


def transformer(layers: int, **options: Any) -> Deep:
    return linen(Transformer(layers, **options), array(2, 6, dtype=jnp.int32))


def encoder_decoder(layers: int) -> Deep:
    """Half of the layers in each."""
    return transformer(layers // 2, encoder=True)


class Residual(nn.Module):
    """Blocks of a hidden layer behind a norm."""

    layers: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        s = nn.Dense(8)(x)
        for _ in range(self.layers):
            s = s + nn.Dense(8)(nn.gelu(nn.Dense(6)(self.norm()(s))))
        return nn.Dense(3)(self.norm()(s))


def residual(layers: int, norm: Callable[..., nn.Module]) -> Deep:
    return linen(Residual(layers, norm), array(3, 5))


class Convolutions(nn.Module):
    """Residual blocks of two normalised convolutions, in training mode."""

    layers: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = partial(nn.BatchNorm, use_running_average=False)
        s = nn.Conv(4, (3, 3))(x)
        for _ in range(self.layers):
            y = nn.relu(norm()(nn.Conv(5, (3, 3), use_bias=False)(s)))
            s = nn.relu(s + norm()(nn.Conv(4, (3, 3), use_bias=False)(y)))
        return nn.Dense(3)(s.mean(axis=(1, 2)))


def convolutions(layers: int) -> Deep:
    return linen(Convolutions(layers), array(3, 6, 6, 2), mutable=["batch_stats"])


def mlp(layers: int) -> Deep:
    """Hidden layers in a row."""
    params = [{"w": array(4, 4), "b": array(4)} for _ in range(layers + 1)]

    def loss_fn(params: Any, batch: Any) -> Any:
        h = batch
        for layer in params[:-1]:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        return jnp.mean((h @ params[-1]["w"]) ** 2)

    return Deep(loss_fn, params, array(3, 4))


def recurrent(layers: int, steps: int = 5) -> Deep:
    """Layers of recurrent units, each a scan over all steps."""
    params = {"cells": [{"w": array(4, 4), "u": array(4, 4), "b": array(4)} for _ in range(layers)], "v": array(4, 2)}

    def loss_fn(params: Any, batch: Any) -> Any:
        states = batch.swapaxes(0, 1)
        for cell in params["cells"]:

            def step(h: Any, x: Any, cell: Any = cell) -> tuple[Any, Any]:
                h = jnp.tanh(x @ cell["w"] + h @ cell["u"] + cell["b"])
                return h, h

            _, states = jax.lax.scan(step, jnp.zeros(states.shape[1:]), states)
        return jnp.mean((states[-1] @ params["v"]) ** 2)

    return Deep(loss_fn, params, array(3, steps, 4))


def written_out(steps: int) -> Deep:
    """One layer of recurrent units, the loop over steps written out."""
    params = {"w": array(4, 5), "u": array(5, 5), "b": array(5), "v": array(5, 2)}

    def loss_fn(params: Any, batch: Any) -> Any:
        h = jnp.zeros((3, 5))
        for t in range(steps):
            h = jnp.tanh(batch[:, t] @ params["w"] + h @ params["u"] + params["b"])
        return jnp.mean((h @ params["v"]) ** 2)

    return Deep(loss_fn, params, array(3, steps, 4))


def scans(layers: int) -> Deep:
    """Scans over two residual layers each, one after the other."""
    params = [{"w": array(2, 4, 6), "v": array(2, 6, 4)} for _ in range(layers)]

    def loss_fn(params: Any, batch: Any) -> Any:
        s = batch
        for stacked in params:
            s, _ = jax.lax.scan(lambda s, layer: (s + jnp.tanh(s @ layer["w"]) @ layer["v"], None), s, stacked)
        return jnp.mean(s**2)

    return Deep(loss_fn, params, array(3, 4))


def gated(layers: int) -> Deep:
    """SwiGLU blocks whose result is scaled by a gate of the stream, and by 1 / sqrt(layers)."""
    params = [{"up": array(4, 6), "gate": array(4, 6), "down": array(6, 4), "by": array(4, 1)} for _ in range(layers)]

    def loss_fn(params: Any, batch: Any) -> Any:
        s = batch
        for p in params:
            y = (jax.nn.silu(s @ p["gate"]) * (s @ p["up"])) @ p["down"]
            s = s + y * jax.nn.sigmoid(s @ p["by"]) / jnp.sqrt(layers)
        return jnp.mean(s**2)

    return Deep(loss_fn, params, array(3, 4))


def narrow(layers: int) -> Deep:
    """Hidden layers of one unit each: nothing tells their axes from those that broadcasting makes."""
    params = [{"w": array(5, 1), "v": array(1, 5)} for _ in range(layers)]

    def loss_fn(params: Any, batch: Any) -> Any:
        h = batch
        for layer in params:
            h = jnp.tanh(jnp.tanh(h @ layer["w"]) @ layer["v"])
        return jnp.mean(h**2)

    return Deep(loss_fn, params, array(3, 5))


def products(layers: int) -> Deep:
    """Scales that double from layer to layer, made of one another: twice as many ways to each as to the one before."""
    params = {"w": [array(4, 4) for _ in range(layers + 1)], "g": array(4)}

    def loss_fn(params: Any, batch: Any) -> Any:
        h, scale, number = batch, params["g"], jnp.float32(1.5)
        for w in params["w"]:
            scale, number = scale * scale + 1, number * number / (1 + number)
            h = jnp.tanh(h @ w) * number
        return jnp.mean((h * scale) ** 2)

    return Deep(loss_fn, params, array(3, 4))


MODELS: dict[str, Callable[[int], Deep]] = {
    "pre_norm": transformer,
    "post_norm": partial(transformer, pre=False),
    "rms_norm": partial(transformer, norm=nn.RMSNorm),
    "encoder_decoder": encoder_decoder,
    "layer_norm_mlp": partial(residual, norm=nn.LayerNorm),
    "rms_norm_mlp": partial(residual, norm=nn.RMSNorm),
    "convolutions": convolutions,
    "mlp": mlp,
    "recurrent": recurrent,
    "written_out": written_out,
    "scans": scans,
    "gated": gated,
    "narrow": narrow,
    "products": products,
}


class Public(nn.Module):
    """Blocks as the public examples write them: masks, dropout, a key for every call, attention with its own scale."""

    width: int = 8
    heads: int = 2
    hidden: int = 12
    dropout: float = 0.1

    @nn.compact
    def __call__(self, s: Any, mask: Any = None, memory: Any = None, memory_mask: Any = None) -> Any:
        drop = nn.Dropout(self.dropout, deterministic=False)
        attend = partial(nn.MultiHeadDotProductAttention, self.heads, qkv_features=self.width, use_bias=False)
        y = nn.LayerNorm()(s)
        s = s + drop(attend(name="self")(y, y, mask=mask))
        if memory is not None:
            s = s + drop(attend(name="cross")(nn.LayerNorm()(s), memory, mask=memory_mask))
        y = nn.relu(nn.Dense(self.hidden, name="up")(nn.LayerNorm()(s)))
        return s + drop(nn.Dense(self.width, name="down")(y))


def sinusoid(length: int, width: int) -> Any:
    angles = jnp.arange(length)[:, None] / 10_000 ** (jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def token_loss(logits: Any, words: Any) -> Any:
    """Cross-entropy of the words with smoothed labels, those that are padding left out."""
    targets, counted = 0.9 * jax.nn.one_hot(words, logits.shape[-1]) + 0.1 / logits.shape[-1], words > 0
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(losses * counted) / jnp.sum(counted)


class LanguageModel(nn.Module):
    """Like lm1b: shifted words, sinusoidal positions, causal and padding masks, pre-norm blocks."""

    layers: int

    @nn.compact
    def __call__(self, words: Any) -> Any:
        mask = nn.combine_masks(nn.make_causal_mask(words), nn.make_attention_mask(words > 0, words > 0))
        shifted = jnp.pad(words, ((0, 0), (1, 0)))[:, :-1]
        s = nn.Embed(11, 8)(shifted) + sinusoid(words.shape[1], 8)
        for i in range(self.layers):
            s = Public(name=f"block{i}")(s, mask)
        return nn.Dense(11, name="logits")(nn.LayerNorm(name="last")(s))


class Translator(nn.Module):
    """Like wmt: an encoder of the source, a decoder of the target that attends to it, tables of their own."""

    layers: int

    @nn.compact
    def __call__(self, source: Any, target: Any) -> Any:
        s = nn.Embed(11, 8, name="source")(source) + sinusoid(source.shape[1], 8)
        for i in range(self.layers):
            s = Public(name=f"encoder{i}")(s, nn.make_attention_mask(source > 0, source > 0))
        memory = nn.LayerNorm(name="encoded")(s)
        s = nn.Embed(11, 8, name="target")(jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]) + sinusoid(target.shape[1], 8)
        mask = nn.combine_masks(nn.make_causal_mask(target), nn.make_attention_mask(target > 0, target > 0))
        for i in range(self.layers):
            s = Public(name=f"decoder{i}")(s, mask, memory, nn.make_attention_mask(target > 0, source > 0))
        return nn.Dense(11, name="logits")(nn.LayerNorm(name="last")(s))


class VisionTransformer(nn.Module):
    """Like ViT: patches by a strided convolution, a token for the class, learned positions."""

    layers: int

    @nn.compact
    def __call__(self, images: Any) -> Any:
        s = nn.Conv(8, (2, 2), strides=(2, 2), name="patches")(images)
        s = s.reshape(len(s), -1, 8)
        token = self.param("token", nn.initializers.zeros, (1, 1, 8))
        s = jnp.concatenate([jnp.tile(token, (len(s), 1, 1)), s], axis=1)
        s = s + self.param("positions", nn.initializers.normal(), (1, s.shape[1], 8))
        for i in range(self.layers):
            s = Public(name=f"block{i}")(s)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="last")(s)[:, 0])


def public(net: nn.Module, *inputs: jax.ShapeDtypeStruct, labels: jax.ShapeDtypeStruct | None = None) -> Deep:
    """One of them in training mode, under the cross-entropy of labels, by default its last input."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key, *x: net.init({"params": key, "dropout": key}, *x), key, *inputs)

    def loss_fn(params: Any, batch: Any) -> Any:
        inputs, labels, key = batch
        return token_loss(net.apply(params, *inputs, rngs={"dropout": key}), labels)

    return Deep(loss_fn, params, (inputs, inputs[-1] if labels is None else labels, key))


def words(length: int) -> jax.ShapeDtypeStruct:
    return array(3, length, dtype=jnp.int32)


def language_model(layers: int) -> Deep:
    return public(LanguageModel(layers), words(6))


def translator(layers: int) -> Deep:
    return public(Translator(layers), words(5), words(6))


def vision_transformer(layers: int) -> Deep:
    return public(VisionTransformer(layers), array(3, 4, 6, 3), labels=array(3, dtype=jnp.int32))
