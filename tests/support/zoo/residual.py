"""Residual networks as they are written, knowing nothing of growth. Float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn

SAMPLES, TOKENS, FEATURES, OUTPUTS, WORDS = 20, 3, 4, 3, 5
WIDTH, HIDDEN = 6, 4
PRECISE: Any = dict(param_dtype=jnp.float64)


class Case(NamedTuple):
    """A loss, its parameters and a batch; `make` gives both for another width of the stream."""

    make: Callable[[int], tuple[Callable[[Any, Any], Any], Any]]
    batch: Any
    name: str
    writers: int
    readers: tuple[int, ...]
    normed: bool
    has_aux: bool = False

    @property
    def loss_fn(self) -> Callable[[Any, Any], Any]:
        """At `WIDTH`."""
        return self.make(WIDTH)[0]

    @property
    def params(self) -> Any:
        """At `WIDTH`, none at zero."""
        leaves, structure = jax.tree.flatten(self.make(WIDTH)[1])
        keys = jax.random.split(jax.random.key(7), len(leaves))
        moved = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
        return jax.tree.unflatten(structure, moved)

    def penalty(self, params: Any) -> float:
        """None."""
        return 0.0


def data(samples: int = SAMPLES, seed: int = 0) -> dict[str, jax.Array]:
    """Tokens with features, the same as words, and targets."""
    x, w = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(seed)), [
        (samples, TOKENS, FEATURES), (FEATURES, OUTPUTS)]))  # fmt: skip
    words = jax.random.randint(jax.random.key(seed + 1), (samples, TOKENS), 0, WORDS)
    return {"x": x, "y": jnp.sin(2 * jnp.cumsum(x, axis=1) @ w), "words": words}


def squared(outputs: Any, batch: Any) -> Any:
    """Mean over samples of the squared distance to the target."""
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=(1, 2)))


def rms(x: Any, scale: Any = 1.0, epsilon: float = 1e-2) -> Any:
    """A root-mean-square norm by hand, with an epsilon that is felt."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def blocks(width: int, scale: bool) -> Any:
    """Parameters of a residual net with two blocks."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5  # noqa: E731
    block = lambda i: {"up": draw(i, width, HIDDEN), "b": jnp.zeros(HIDDEN), "down": draw(i + 1, HIDDEN, width),  # noqa: E731
                       "c": jnp.zeros(width)} | ({"g": jnp.ones(width)} if scale else {})  # fmt: skip
    return {"in": draw(0, FEATURES, width), "blocks": [block(1), block(3)], "out": draw(5, width, OUTPUTS)}


def plain() -> Case:
    """No norm; the read-out sees the mean over tokens."""

    def loss_fn(p: Any, batch: Any) -> Any:
        s = batch["x"] @ p["in"]
        for q in p["blocks"]:
            s = s + jnp.tanh(s @ q["up"] + q["b"]) @ q["down"] + q["c"]
        return jnp.mean(jnp.sum((s.mean(axis=1) @ p["out"] - batch["y"][:, 0]) ** 2, axis=-1))

    return Case(lambda width: (loss_fn, blocks(width, False)), data(), "in", 5, (1, 1, 1), False)


def by_hand() -> Case:
    """A norm with a scale before every block, none before the read-out."""

    def loss_fn(p: Any, batch: Any) -> Any:
        s = batch["x"] @ p["in"]
        for q in p["blocks"]:
            s = s + jnp.tanh(rms(s, q["g"]) @ q["up"] + q["b"]) @ q["down"] + q["c"]
        return squared(s @ p["out"], batch)

    return Case(lambda width: (loss_fn, blocks(width, True)), data(), "in", 5, (1, 1, 1), True)


def unscaled() -> Case:
    """Norms without a scale, dividing by a norm of length instead of a mean."""

    def unit(s: Any) -> Any:
        return s * jax.lax.rsqrt(jnp.sum(s * s, axis=-1, keepdims=True) + 1e-2)

    def loss_fn(p: Any, batch: Any) -> Any:
        s = batch["x"] @ p["in"]
        for q in p["blocks"]:
            s = s + jnp.tanh(unit(s) @ q["up"] + q["b"]) @ q["down"] + q["c"]
        return squared(unit(s)[:, ::-1] @ p["out"], batch)

    return Case(lambda width: (loss_fn, blocks(width, False)), data(), "in", 5, (1, 1, 1), True)


class Transformer(nn.Module):
    """Pre-norm, words and positions embedded, two blocks of attention and a hidden layer."""

    width: int
    layers: int = 1

    @nn.compact
    def __call__(self, words: Any) -> Any:
        s = nn.Embed(WORDS, self.width, name="words", **PRECISE)(words)
        s = s + self.param("place", nn.initializers.normal(0.5), (TOKENS, self.width), jnp.float64)
        for i in range(self.layers):
            y = nn.RMSNorm(epsilon=1e-2, name=f"norm{i}", **PRECISE)(s)
            attend = nn.MultiHeadDotProductAttention(
                2, qkv_features=4, out_features=self.width, name=f"attend{i}", **PRECISE
            )
            s = s + attend(y)
            y = nn.RMSNorm(epsilon=1e-2, name=f"again{i}", **PRECISE)(s)
            gated = nn.silu(nn.Dense(HIDDEN, name=f"gate{i}", **PRECISE)(y)) * nn.Dense(
                HIDDEN, use_bias=False, name=f"up{i}", **PRECISE
            )(y)
            s = s + nn.Dense(self.width, name=f"down{i}", **PRECISE)(gated)
        return nn.Dense(OUTPUTS, name="head", **PRECISE)(nn.RMSNorm(epsilon=1e-2, name="last", **PRECISE)(s))


def linen() -> Case:
    """`Transformer`."""

    def make(width: int) -> Any:
        net = Transformer(width)
        params = jax.jit(net.init)(jax.random.key(1), data()["words"])
        return lambda p, b: squared(net.apply(p, b["words"]), b), params

    return Case(make, data(), "words", 4, (3, 2, 1), True)


def equinox() -> Case:
    """`eqx.nn.RMSNorm`, no bias, behind an embedding by `eqx.nn.Embedding` and one of positions, under `vmap`."""

    def make(width: int) -> Any:
        keys = jax.random.split(jax.random.key(2), 5)
        options: Any = dict(dtype=jnp.float64)
        net = {
            "words": eqx.nn.Embedding(WORDS, width, key=keys[0], **options),
            "places": eqx.nn.Embedding(TOKENS, width, key=keys[1], **options),
            "norm": eqx.nn.RMSNorm(width, use_bias=False, eps=1e-2, **options),
            "up": eqx.nn.Linear(width, HIDDEN, key=keys[2], **options),
            "down": eqx.nn.Linear(HIDDEN, width, key=keys[3], **options),
            "out": eqx.nn.Linear(width, OUTPUTS, key=keys[4], **options),
        }
        arrays, static = eqx.partition(net, eqx.is_inexact_array)

        def loss_fn(params: Any, batch: Any) -> Any:
            net = eqx.combine(params, static)

            def one(words: Any) -> Any:
                s = jax.vmap(net["words"])(words) + jax.vmap(net["places"])(jnp.arange(TOKENS))
                s = s + jax.vmap(net["down"])(jnp.tanh(jax.vmap(net["up"])(jax.vmap(net["norm"])(s))))
                return jax.vmap(net["out"])(s)

            return squared(jax.vmap(one)(batch["words"]), batch)

        return loss_fn, arrays

    return Case(make, data(), "words", 3, (1, 1), True)


CASES: dict[str, Callable[[], Case]] = {
    "plain": plain, "by_hand": by_hand, "unscaled": unscaled, "linen": linen, "equinox": equinox,
}  # fmt: skip
