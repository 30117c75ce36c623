"""Attention in the frameworks' own modules and in plain JAX, knowing nothing of growth. Float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

SAMPLES, TOKENS, FEATURES, OUTPUTS = 24, 4, 5, 3


class Case(NamedTuple):
    """A loss, its parameters and a batch.

    Attributes:
        values: site of the value dimension.
        capacity: of it, per head.
        keys: site of the query and key dimension.
    """

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    values: str
    capacity: int
    keys: str
    has_aux: bool = False

    def penalty(self, params: Any) -> float:
        """None."""
        return 0.0


def data(seed: int = 0, samples: int = SAMPLES) -> dict[str, jax.Array]:
    """Tokens, and a target that mixes them."""
    x, w = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(seed)), [
        (samples, TOKENS, FEATURES), (FEATURES, OUTPUTS)]))  # fmt: skip
    return {"x": x, "y": jnp.sin(2 * jnp.cumsum(x, axis=1) @ w)}


def squared(outputs: Any, batch: Any) -> Any:
    """Mean over samples of the squared distance to the target."""
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=(1, 2)))


def jitter(params: Any, seed: int = 7) -> Any:
    """Parameters with none at zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    )


def linen(heads: int = 2, mask: bool = True) -> Case:
    """`MultiHeadDotProductAttention` between a dense layer and the output, with a causal mask."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(FEATURES, param_dtype=jnp.float64, name="embed")(x)
            causal = nn.make_causal_mask(x[..., 0]) if mask else None
            attend = nn.MultiHeadDotProductAttention(
                num_heads=heads, qkv_features=3 * heads, out_features=OUTPUTS, param_dtype=jnp.float64, name="attend"
            )
            return attend(x, mask=causal)

    batch = data()
    params = jitter(jax.jit(Net().init)(jax.random.key(1), batch["x"]))
    return Case(lambda p, b: squared(Net().apply(p, b["x"]), b), params, batch, "attend/value", 3, "attend/query")


def nnx_module() -> Case:
    """`nnx.MultiHeadAttention`."""
    model = nnx.MultiHeadAttention(2, FEATURES, 6, OUTPUTS, decode=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = jitter(nnx.as_pure(state))
    return Case(lambda p, b: squared(nnx.merge(graph, p)(b["x"]), b), params, data(), "value", 3, "query")


def equinox() -> Case:
    """`eqx.nn.MultiheadAttention` in a residual block, query and key dimension 4, value dimension 3."""
    keys = jax.random.split(jax.random.key(2))
    attend = eqx.nn.MultiheadAttention(
        2, FEATURES, qk_size=4, vo_size=3, use_value_bias=True, use_output_bias=True, dtype=jnp.float64, key=keys[0]
    )
    out = eqx.nn.Linear(FEATURES, OUTPUTS, dtype=jnp.float64, key=keys[1])
    arrays, static = eqx.partition({"attend": attend, "out": out}, eqx.is_inexact_array)

    def loss_fn(params: Any, batch: Any) -> Any:
        net = eqx.combine(params, static)
        one = lambda x: jax.vmap(net["out"])(x + net["attend"](x, x, x))  # noqa: E731
        return squared(jax.vmap(one)(batch["x"]), batch)

    return Case(loss_fn, jitter(arrays), data(), "attend/value_proj", 3, "attend/query_proj")


def by_hand(q: Any, k: Any, v: Any) -> Any:
    """Causal grouped-query attention over (samples, tokens, heads, features), the keys repeated for their queries."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("nthk,nshk->nhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)


def library(q: Any, k: Any, v: Any) -> Any:
    """The same by JAX, which rounds scores to float32."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def grouped(queries: int = 4, groups: int = 2, attend: Callable[..., Any] = by_hand) -> Case:
    """Grouped-query attention in plain JAX, causal."""
    shapes = {"q": (FEATURES, queries, 3), "k": (FEATURES, groups, 3), "v": (FEATURES, groups, 3),
              "o": (queries, 3, OUTPUTS)}  # fmt: skip
    params = jitter({name: np.zeros(shape) for name, shape in shapes.items()})

    def loss_fn(p: Any, batch: Any) -> Any:
        q, k, v = (jnp.einsum("ntd,dhk->nthk", batch["x"], p[name]) for name in "qkv")
        return squared(jnp.einsum("nthk,hkd->ntd", attend(q, k, v), p["o"]), batch)

    return Case(loss_fn, params, data(), "v", 3, "q")


def shared() -> Case:
    """Multi-query attention by hand: one key and value for all queries; `v` has no head axis."""
    shapes = {"q": (FEATURES, 3, 4), "k": (FEATURES, 4), "v": (FEATURES, 3), "c": (3,), "o": (3, 3, OUTPUTS)}
    params = jitter({name: np.zeros(shape) for name, shape in shapes.items()})

    def loss_fn(p: Any, batch: Any) -> Any:
        x = batch["x"]
        scores = jnp.einsum("ntd,dhk,nsk->nhts", x, p["q"], x @ p["k"])
        attended = jnp.einsum("nhts,nsk->nthk", jax.nn.softmax(scores / 2), x @ p["v"] + p["c"])
        return squared(jnp.einsum("nthk,hkd->ntd", attended, p["o"]), batch)

    return Case(loss_fn, params, data(), "v", 3, "q")


def layers() -> Case:
    """Three blocks of two heads in a `scan` over layers, with remat."""
    shapes = {"q": (3, FEATURES, 2, 3), "k": (3, FEATURES, 2, 3), "v": (3, FEATURES, 2, 3), "c": (3, 2, 3),
              "o": (3, 2, 3, FEATURES)}  # fmt: skip
    params = jitter({name: np.zeros(shape) for name, shape in shapes.items()})
    params = {"blocks": params, "out": jitter(np.zeros((FEATURES, OUTPUTS)), 3)}

    @jax.checkpoint
    def block(x: Any, p: Any) -> Any:
        q, k, v = (jnp.einsum("ntd,dhk->nthk", x, p[name]) for name in "qkv")
        scores = jnp.einsum("nthk,nshk->nhts", q, k)
        attended = jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(scores), v + p["c"])
        return x + jnp.einsum("nthk,hkd->ntd", attended, p["o"]), None

    def loss_fn(p: Any, batch: Any) -> Any:
        return squared(jax.lax.scan(block, batch["x"], p["blocks"])[0] @ p["out"], batch)

    return Case(loss_fn, params, data(), "blocks/v", 3, "blocks/q")


CASES = {
    "linen": linen,
    "nnx": nnx_module,
    "equinox": equinox,
    "grouped": grouped,
    "shared": shared,
    "layers": layers,
}
