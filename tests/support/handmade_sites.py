"""Small networks in plain JAX, hidden dimensions described by hand: one for each way a slot can lie in a leaf.

Tests of surgery and optimizers use these so that they do not depend on discovery.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.core.layout import Layout
from tinyjax.core.site import Kernel, Member, Site, Sites


class Example(NamedTuple):
    """A network: parameters, `apply(params, x) -> outputs`, its sites, and inputs."""

    params: Any
    apply: Callable[[Any, Any], Any]
    sites: Sites
    x: Any


class Neurons(NamedTuple):
    """New neurons as a method returns them."""

    alpha: Any
    omega: Any
    delta: Any = None
    gate: Any = None


def kernel(leaf: str, d_in: int, d_out: int, slot: int) -> Layout:
    """A dense kernel stored (in, out)."""
    return Layout(leaf, (d_in, d_out), (0, 1), slot=slot, rows=(0,), cols=(1,))


def transposed(leaf: str, d_in: int, d_out: int, slot: int) -> Layout:
    """A dense kernel stored (out, in); `slot` is 0 for the outputs."""
    return Layout(leaf, (d_out, d_in), (0, 1), slot=slot, rows=(1,), cols=(0,))


def vector(leaf: str, size: int) -> Layout:
    """A vector over the slots."""
    return Layout(leaf, (size,), (0,), slot=0, cols=(0,))


def values(seed: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Gaussian arrays."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def _site(name, capacity, producers, consumers, others=(), stack=()):
    members = [Member(k.layout, "fan_in") for k in producers]
    members += [Member(k.bias, "shift") for k in producers if k.bias is not None]
    members += [Member(layout, role) for layout, role in others]
    members += [Member(k.layout, "fan_out") for k in consumers]
    return Site(name, capacity, True, "", tuple(members), tuple(producers), tuple(consumers), stack)


def mlp(h1: int = 6, h2: int = 4) -> Example:
    """5 -> h1 -> h2 -> 3 with biases: the middle kernel lies between two sites."""
    p = values(0, w1=(5, h1), b1=(h1,), w2=(h1, h2), b2=(h2,), w3=(h2, 3), b3=(3,))
    params = {f"fc{i}": {"kernel": p[f"w{i}"], "bias": p[f"b{i}"]} for i in (1, 2, 3)}

    def apply(params, x):
        for name in ("fc1", "fc2"):
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["fc3"]["kernel"] + params["fc3"]["bias"]

    def dense(name, d_in, d_out, slot):
        return Kernel(kernel(f"{name}/kernel", d_in, d_out, slot), vector(f"{name}/bias", d_out))

    sites = Sites(
        [
            _site("fc1", h1, [dense("fc1", 5, h1, 1)], [dense("fc2", h1, h2, 0)]),
            _site("fc2", h2, [dense("fc2", h1, h2, 1)], [dense("fc3", h2, 3, 0)]),
        ]
    )
    return Example(params, jax.jit(apply), sites, values(1, x=(7, 5))["x"])


def torch_like(h: int = 6) -> Example:
    """5 -> h -> two heads (2 and 3 outputs) that read one tensor; kernels stored (out, in), one head has no bias."""
    params = values(2, w=(h, 5), u=(2, h), c=(2,), v=(3, h))

    def apply(params, x):
        x = jnp.tanh(x @ params["w"].T)
        return jnp.concatenate([x @ params["u"].T + params["c"], x @ params["v"].T], axis=-1)

    heads = [Kernel(transposed("u", h, 2, 1), vector("c", 2)), Kernel(transposed("v", h, 3, 1))]
    site = _site("w", h, [Kernel(transposed("w", 5, h, 0))], heads)
    return Example(params, jax.jit(apply), Sites([site]), values(3, x=(7, 5))["x"])


def flat(h: int = 4) -> Example:
    """Positions (6) x features (5) -> h channels, normalised with running statistics, flattened, -> 3."""
    p = values(4, kernel=(5, h), bias=(h,), scale=(h,), shift=(h,), mean=(h,), out=(6 * h, 3), out_bias=(3,))
    p["var"] = values(5, var=(h,))["var"] ** 2 + 0.5
    params = {"params": {k: p[k] for k in p if k not in ("mean", "var")}, "stats": {k: p[k] for k in ("mean", "var")}}

    def apply(variables, x):
        p, stats = variables["params"], variables["stats"]
        x = x @ p["kernel"] + p["bias"]
        x = jnp.tanh((x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * p["scale"] + p["shift"])
        return x.reshape(x.shape[0], -1) @ p["out"] + p["out_bias"]

    producer = Kernel(kernel("params/kernel", 5, h, 1), vector("params/bias", h))
    out = Layout("params/out", (6, h, 3), (0, 0, 1), slot=1, rows=(0, 1), cols=(2,))
    consumer = Kernel(out, vector("params/out_bias", 3))
    names = [("params/scale", "scale"), ("params/shift", "shift"), ("stats/mean", "mean"), ("stats/var", "var")]
    others = [(vector(leaf, h), role) for leaf, role in names]
    site = _site("kernel", h, [producer], [consumer], others)
    return Example(params, jax.jit(apply), Sites([site]), values(6, x=(7, 6, 5))["x"])


def conv(h: int = 4) -> Example:
    """8x8x2 -> 3x3 convolution to h channels -> 3x3 convolution to 3 channels, no biases, kernels HWIO."""
    params = values(7, first=(3, 3, 2, h), second=(3, 3, h, 3))

    def apply(params, x):
        for name in ("first", "second"):
            x = jnp.tanh(x)
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    def layout(leaf, d_in, d_out, slot):
        return Layout(leaf, (3, 3, d_in, d_out), (0, 1, 2, 3), slot=slot, rows=(0, 1, 2), cols=(3,))

    site = _site("first", h, [Kernel(layout("first", 2, h, 3))], [Kernel(layout("second", h, 3, 2))])
    return Example(params, jax.jit(apply), Sites([site]), values(8, x=(2, 8, 8, 2))["x"])


def stacked(h: int = 4) -> Example:
    """Three residual layers 5 -> h -> 5 under `scan`, parameters stacked along a leading axis."""
    params = values(9, w=(3, 5, h), b=(3, h), u=(3, h, 5))

    def apply(params, x):
        def layer(x, p):
            return x + jnp.tanh(x @ p["w"] + p["b"]) @ p["u"], None

        return jax.lax.scan(layer, x, params)[0]

    w = Layout("w", (3, 5, h), (0, 1, 2), slot=2, stack=(0,), rows=(1,), cols=(2,))
    b = Layout("b", (3, h), (0, 1), slot=1, stack=(0,), cols=(1,))
    u = Layout("u", (3, h, 5), (0, 1, 2), slot=1, stack=(0,), rows=(1,), cols=(2,))
    site = _site("w", h, [Kernel(w, b)], [Kernel(u)], stack=(3,))
    return Example(params, jax.jit(apply), Sites([site]), values(10, x=(7, 5))["x"])


EXAMPLES = {f.__name__: f for f in (mlp, torch_like, flat, conv, stacked)}


def fill(example: Example, site: Site, k: int, seed: int = 0) -> Neurons:
    """Random neurons of the shapes `site` needs, with a delta."""
    rng = np.random.default_rng(seed)
    producer = site.producers[0]
    inputs = int(np.prod([producer.layout.factors[f] for f in producer.layout.rows])) + (producer.bias is not None)
    hidden = outputs = fan_out = 0
    for consumer in site.consumers:
        hidden = int(np.prod([consumer.layout.factors[f] for f in consumer.layout.rows]))
        width = int(np.prod([consumer.layout.factors[f] for f in consumer.layout.cols]))
        outputs += width
        fan_out += width * hidden // site.capacity
    hidden += all(consumer.bias is not None for consumer in site.consumers)
    shapes = [(inputs, k), (k, fan_out), (hidden, outputs)]
    return Neurons(*(jnp.asarray(rng.normal(size=(*site.stack, *shape))) for shape in shapes))


def newborn_entries(example: Example, born) -> Any:
    """By hand: which entries of the parameters of `mlp` belong to newborn slots of fc1."""
    masks = jax.tree.map(lambda x: np.zeros(x.shape, bool), example.params)
    masks["fc1"]["kernel"][:, born] = True
    masks["fc1"]["bias"][born] = True
    masks["fc2"]["kernel"][born] = True
    return masks


def age(state: Any, steps) -> Any:
    """The state with all step counts set."""
    return jax.tree.map(lambda x: jnp.full_like(x, steps) if x.dtype == jnp.int32 and x.ndim == 0 else x, state)
