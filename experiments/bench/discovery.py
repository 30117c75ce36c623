"""Seconds and memory of `find_sites` against the depth of a network.

    python -m experiments.bench.discovery                   # a minute on one CPU core

Parameters and batches are abstract: nothing is computed but the trace and what is read off it. Pre-norm transformers of
2 to 48 layers (attention that scales its queries, hidden layers of four times the width), ResNets in evaluation mode,
an MLP of 200 layers. Seconds of CPU of this process, the first and smallest network left out (it imports and warms up);
`exponent` is the slope between the logarithms of layers and of seconds, 48 layers against 12.
"""

import argparse
import json
import math
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import tinyjax
from experiments.bench.timing import where

Model = tuple[Callable[[Any, Any], Any], Any, Any]


class Transformer(nn.Module):
    """Words to logits."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        s = nn.Embed(64, self.width)(words)
        for _ in range(self.layers):
            s = s + nn.MultiHeadDotProductAttention(max(1, self.width // 64))(nn.LayerNorm()(s))
            s = s + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(s))))
        return nn.Dense(64)(nn.LayerNorm()(s))


class ResNet(nn.Module):
    """Residual convolutions with batch normalisation: two 3x3 a block, or a bottleneck of three."""

    blocks: tuple[int, ...]
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=True)
        s = nn.relu(norm()(nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)))
        for stage, blocks in enumerate(self.blocks):
            width = 64 * 2**stage
            kernels = [(width, 1), (width, 3), (4 * width, 1)] if self.bottleneck else [(width, 3), (width, 3)]
            for block in range(blocks):
                strides, y = (2, 2) if stage and not block else (1, 1), s
                for i, (features, size) in enumerate(kernels):
                    here = strides if i == (1 if self.bottleneck else 0) else (1, 1)
                    y = norm()(nn.Conv(features, (size, size), here, use_bias=False)(y))
                    y = nn.relu(y) if i < len(kernels) - 1 else y
                if s.shape != y.shape:
                    s = norm()(nn.Conv(kernels[-1][0], (1, 1), strides, use_bias=False)(s))
                s = nn.relu(s + y)
        return nn.Dense(1000)(s.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Hidden layers in a row."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def abstract(net: nn.Module, x: jax.ShapeDtypeStruct) -> Model:
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    return lambda params, x: jnp.mean(jnp.square(jnp.asarray(net.apply(params, x)))), params, x


def models() -> dict[str, Callable[[], Model]]:
    words, images = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    found = {
        f"transformer {layers} x {width}": partial(abstract, Transformer(layers, width), words)
        for width in (64, 768)
        for layers in (2, 6, 12, 24, 48)
    }
    resnets = {
        "ResNet-18": ((2, 2, 2, 2), False),
        "ResNet-50": ((3, 4, 6, 3), True),
        "ResNet-101": ((3, 4, 23, 3), True),
    }
    found |= {name: partial(abstract, ResNet(*shape), images) for name, shape in resnets.items()}
    row = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    return found | {"MLP of 200 layers": partial(abstract, MLP(200, 64), row)}


def measure(model: Model) -> dict[str, Any]:
    start = time.process_time()
    sites = tinyjax.find_sites(*model)
    seconds = time.process_time() - start
    tracemalloc.start()
    tinyjax.find_sites(*model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": seconds, "mib": peak / 2**20, "sites": len(sites), "growable": len(sites.growable)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of networks")
    config = parser.parse_args(arguments)
    named = models()
    names = config.only or list(named)
    tinyjax.find_sites(*named[names[0]]())
    lines = []
    for name in names:
        lines.append({"network": name} | measure(named[name]()) | where())
        print(json.dumps(lines[-1]), flush=True)
    seconds = {line["network"]: line["seconds"] for line in lines}
    for width in (64, 768):
        shallow, deep = (seconds.get(f"transformer {layers} x {width}") for layers in (12, 48))
        if shallow and deep:
            lines.append({"network": f"exponent x {width}", "exponent": math.log(deep / shallow, 4)})
            print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
