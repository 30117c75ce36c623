"""What compiling a growth costs, against a training step of the same network.

    python -m experiments.bench.compile_growth                     # all networks, three minutes on 2 CPU cores
    python -m experiments.bench.compile_growth mlp lora --sites 1 2

CPU seconds of the process (all threads) to trace, lower and compile, each program once and without a cache: other work
on the machine counts for little in the ratio. `kernels` counts the fusions of the compiled program. Nothing is run.
Prints JSON lines.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import tinyjax
from experiments.bench.growth import example
from experiments.bench.networks import random_batch, residual
from experiments.bench.timing import where
from experiments.beyond import lora, transformer
from experiments.demo.resnet import trained
from tinyjax import data, methods


class Program(NamedTuple):
    """What is grown: shapes suffice.

    Attributes:
        loss_fn: of the network.
        params: its parameters.
        batch: a batch.
        sites: growable ones.
        options: of the training step and of the growth.
        growth: of the growth alone.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    sites: tinyjax.Sites
    options: dict[str, Any] = {}
    growth: dict[str, Any] = {}


def mlp() -> Program:
    """Two hidden layers of 64 on 784 inputs."""
    found = example()
    return Program(found.loss_fn, found.params, found.batch, found.sites)


def resnet() -> Program:
    """ResNet-18 of an eighth on images of 28 x 28, batch normalisation in training mode: eight sites."""
    batch = random_batch(64, 28)
    network = residual((8, 16, 32, 64), (8, 8, 16, 16, 32, 32, 64, 64), batch.image[:2])
    return Program(
        network.loss_fn, network.variables, batch, network.sites(batch), dict(has_aux=True, trainable=trained)
    )


def of_digits(model: nn.Module, names: Callable[[tinyjax.Sites], tinyjax.Sites], **options: Any) -> Program:
    """A model on images in the shape of digits."""
    batch = random_batch(128, 8, 1)
    params = jax.eval_shape(model.init, jax.random.key(0), batch.image[:1])

    def loss_fn(params: Any, batch: data.Batch) -> jax.Array:
        logits: Any = model.apply(params, batch.image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

    sites = names(tinyjax.find_sites(loss_fn, params, batch).growable)
    return Program(loss_fn, params, batch, sites, **options)


def attention() -> Program:
    """A transformer of two blocks: heads, queries with keys, values, hidden neurons."""
    config = transformer.Config()
    names = [f"block{i}/{name}" for i in range(config.layers) for name in transformer.KINDS]
    model = transformer.Transformer(config, (config.most,) * config.layers)
    return of_digits(model, lambda sites: tinyjax.Sites(sites[name] for name in names))


def adapters() -> Program:
    """Twelve adapters of two shapes."""
    config = lora.Config()

    def names(sites: tinyjax.Sites) -> tinyjax.Sites:
        return tinyjax.Sites(site for site in sites if site.producers[0].leaf.startswith("adapters/"))

    model = lora.Transformer(config, config.most)
    growth = dict(method=methods.tiny_linear, update=None, fill=None)
    return of_digits(model, names, options=dict(trainable=lora.adapters), growth=growth)


PROGRAMS = {"mlp": mlp, "resnet": resnet, "transformer": attention, "lora": adapters}


def costs(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """CPU seconds to trace, lower and compile, lines of StableHLO, and kernels of the compiled program."""
    jax.clear_caches()
    marks = [time.process_time()]
    traced = jax.jit(function).trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    compiled = lowered.compile()
    marks.append(time.process_time())
    seconds = dict(zip(("trace_s", "lower_s", "compile_s"), np.diff(marks).round(3).tolist()))
    lines = lowered.as_text().count("\n")
    return seconds | {
        "seconds": round(marks[-1] - marks[0], 3),
        "lines": lines,
        "kernels": (compiled.as_text() or "").count(" fusion("),
    }


def measure(name: str, num_sites: int | None) -> dict[str, Any]:
    """A line: the growth of the first sites of a program, and its training step."""
    program = PROGRAMS[name]()
    sites = program.sites[:num_sites]
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (program.params, program.batch))]
    params, batch = shapes[0]
    optimizer = tinyjax.with_birth(optax.sgd(1e-2) if name == "resnet" else optax.adam(1e-3))
    trainable = program.options.get("trainable", lambda params: params)
    opt_state = jax.eval_shape(lambda params: optimizer.init(trainable(params)), params)
    train = tinyjax.train_step(program.loss_fn, optimizer, **program.options)
    step = costs(train, params, opt_state, batch)
    grow = tinyjax.make_grow_step(
        program.loss_fn, sites, num_neurons=1, optimizer=optimizer, **program.options, **program.growth
    )
    growth = costs(lambda *given: grow(*given), params, batch, opt_state, jax.random.key(0))
    return {
        "network": name,
        "sites": len(sites),
        "ratio": round(growth["seconds"] / step["seconds"], 2),
        "growth": growth,
        "train_step": step,
    } | where()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=list(PROGRAMS))
    parser.add_argument("--sites", type=int, nargs="+", default=[None], help="how many of them; default all")
    config = parser.parse_args(arguments)
    lines = []
    for name in config.networks:
        for num_sites in config.sites:
            lines.append(measure(name, num_sites))
            print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
