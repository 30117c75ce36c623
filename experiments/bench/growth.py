"""Ratios inside one growth: the solver, the line search, the layer that reads the data, against what they are made of.

    python -m experiments.bench.growth

Prints one JSON line a measurement with medians in milliseconds and their ratio. About a minute on two cores. Everything
is measured in one process; `OPENBLAS_NUM_THREADS=1` keeps LAPACK's threads from spinning.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.bench.timing import where
from tinyjax.core.linalg import root_of
from tinyjax.core.params import named_leaves
from tinyjax.discovery.graph.tracing import trace
from tinyjax.growth.line_loss import loss_along
from tinyjax.methods.solvers.low_rank import best
from tinyjax.models import MLP

WIDTHS, INPUTS, SAMPLES, AMPLITUDES = (64, 64), 784, 750, 16


def milliseconds(function: Callable[..., Any], *arguments: Any, repetitions: int = 7) -> float:
    """Median time of a jitted call."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        taken.append(1e3 * (time.perf_counter() - began))
    return float(np.median(taken))


def report(what: str, ours: float, theirs: float) -> dict[str, Any]:
    line = {"what": what, "ms": round(ours, 3), "against_ms": round(theirs, 3), "ratio": ours / theirs} | where()
    print(json.dumps(line), flush=True)
    return line


def solver(dimension: int, outputs: int, num_neurons: int) -> dict[str, Any]:
    """Neurons at one ridge against an eigendecomposition of S and a singular value decomposition of the whitened N."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2 * dimension, dimension)), jnp.float32)
    gram, cross = x.T @ x / len(x), jnp.asarray(rng.normal(size=(dimension, outputs)), jnp.float32)

    def ours(gram: jax.Array, cross: jax.Array) -> Any:
        return best(root_of(gram, 1.0), cross, num_neurons=num_neurons)

    def textbook(gram: jax.Array, cross: jax.Array) -> Any:
        values, vectors = jnp.linalg.eigh(gram)
        root = vectors / jnp.sqrt(values)
        u, s, vt = jnp.linalg.svd(root.T @ cross, full_matrices=False)
        return root @ u[:, :num_neurons], s[:num_neurons], vt[:num_neurons]

    times = [milliseconds(f, gram, cross, repetitions=3) for f in (ours, textbook)]
    return report(f"solve, S {dimension} x {dimension}, {outputs} outputs, against eigh + svd", *times)


class Example(NamedTuple):
    """A multilayer perceptron at half of its capacity, and noise to grow it on."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: Any
    sites: tinyjax.Sites


def example() -> Example:
    model = MLP(widths=WIDTHS, num_classes=10)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(SAMPLES, INPUTS)), jnp.float32)
    batch = {"image": images, "label": jnp.asarray(rng.integers(10, size=SAMPLES))}

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits: Any = model.apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    params = jax.jit(model.init)(jax.random.key(0), images[:1])
    sites = tinyjax.find_sites(loss_fn, params, batch)
    return Example(loss_fn, tinyjax.thin(params, sites, 32), batch, sites)


def repeated() -> dict[str, Any]:
    """A growth of the layer that reads the data, its S decomposed before, against one that sums and factors it."""
    loss_fn, params, batch, sites = example()
    first = sites[:1]
    grow_step = tinyjax.make_grow_step(loss_fn, first, num_neurons=8, method=tinyjax.methods.tiny)
    inputs = jax.jit(partial(tinyjax.growth.decompose_inputs, loss_fn, sites=first))(params, batch)
    key = jax.random.key(0)
    known = milliseconds(
        lambda params, batch, inputs: grow_step(params, batch, key, inputs=inputs), params, batch, inputs
    )
    anew = milliseconds(lambda params, batch: grow_step(params, batch, key), params, batch)
    return report("growth of the first layer, S known, against S summed and factored", known, anew)


def searches() -> list[dict[str, Any]]:
    """The loss at 16 amplitudes of new neurons, site by site, against one forward pass of the same samples."""
    loss_fn, params, batch, sites = example()
    forward = milliseconds(loss_fn, params, batch)
    gammas = jnp.geomspace(1e-3, 1e1, AMPLITUDES)
    passes, lines = [], []
    for site in sites:
        neurons = tinyjax.methods.tiny(tinyjax.estimate(loss_fn, params, batch, site), num_neurons=8, ridge=1.0)
        kernels = (*site.producers, *site.consumers)
        moving = {layout.leaf for k in kernels for layout in (k.layout, k.bias) if layout is not None}

        def path(params: Any, root: jax.Array, *, site: Any = site, neurons: Any = neurons) -> Any:
            return tinyjax.surgery.write(params, site, neurons, amplitude=root**2)[0]

        def search(params: Any, batch: Any, *, path: Any = path, moving: Any = moving) -> jax.Array:
            names = named_leaves(params)
            straight = {i for i, name in enumerate(names) if name in moving}
            traced = trace(loss_fn, params, batch)
            loss_at = loss_along(traced, params, batch, partial(path, params), straight)
            return jax.vmap(loss_at)(jnp.sqrt(gammas))

        passes.append(milliseconds(search, params, batch))
        what = f"line search of {AMPLITUDES} amplitudes at `{site.name}`, against one forward pass"
        lines.append(report(what, passes[-1], forward))
    return [*lines, report("the same, mean over sites", float(np.mean(passes)), forward)]


def main() -> list[dict[str, Any]]:
    return [*searches(), repeated(), solver(785, 64, 8), solver(2304, 256, 8)]


if __name__ == "__main__":
    main()
