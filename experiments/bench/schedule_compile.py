"""What the paper's 168 growths cost in compiling: eight network shapes against one shape for every growth.

    python -m experiments.bench.schedule_compile       # 3 shapes compiled, 2 to 5 minutes on 2 CPU cores

The schedule of figure 5 from s = 1/64 (thin ResNet-18, 32 x 32 images). With capacities in multiples of 8, all sites in
lock-step, the network has few shapes; a shape needs one training step and one growth for each site that is visited
while it lasts. With exact widths every growth makes a new shape: a training step and a growth each. Both are compiled
for the first, the middle and the last shape of the capacities (a site of the first, the middle, the last block); the
whole schedule is extrapolated from them, linearly between these shapes. Nothing is run. Seconds are those of the
process (all threads), so that other work on the machine counts for little. Prints JSON lines.

Measured (shared 2-core CPU, jax 0.10.2): a training step 2.7 to 4.0 s, a growth 15.6 to 19.6 s; 8 shapes with 72
programs 1185 s, one shape a growth with 336 programs 3693 s, 3.1 times as much (both extrapolated).
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import tinyjax
from experiments.activations import relu
from experiments.bench.timing import where
from experiments.demo.resnet import trained
from experiments.paper import protocol
from experiments.paper import protocol as paper
from tinyjax import data
from tinyjax.models import ResNet18

CLASSES, BATCH, SAMPLES = 100, 32, 256
NAMES = tuple(f"conv_{i}/in/conv" for i in (2, 3, 5, 6, 8, 9, 11, 12))


def growths(protocol: protocol.Protocol) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The site and the widths afterwards of every growth."""
    before = protocol.start
    for widths in paper.planned_widths(protocol):
        (index,) = [i for i, (a, b) in enumerate(zip(before, widths)) if a != b]
        yield NAMES[index], widths
        before = widths


def rungs(protocol: protocol.Protocol) -> list[tuple[tuple[int, ...], list[str]]]:
    """The capacities of a run with multiples of 8, each with the sites that are visited while it lasts."""
    policy, final = tinyjax.multiple_of(8), dict(zip(NAMES, protocol.final))
    found: list[tuple[tuple[int, ...], list[str]]] = []
    for name, widths in growths(protocol):
        if not found or any(w > c for w, c in zip(widths, found[-1][0])):
            found.append((tuple(policy(dict(zip(NAMES, widths)), final).values()), []))
        found[-1][1].append(name)
    return found


def compile_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Process seconds to trace, lower and compile for the shapes of the arguments."""
    began = time.process_time()
    jax.jit(function).lower(*arguments).compile()
    return time.process_time() - began


def of_shape(widths: tuple[int, ...], site: str, growing: int) -> dict[str, float]:
    """Seconds for a training step and for one growth at a site, at these widths."""
    model = ResNet18(widths, CLASSES, relu)

    def loss_fn(variables: Any, batch: data.Batch) -> tuple[jax.Array, Any]:
        logits, updates = model.apply(variables, batch.image, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean(), updates

    def batch_of(size: int) -> Any:
        image, label = np.empty((size, 32, 32, 3), np.float32), np.empty(size, np.int32)
        return jax.eval_shape(data.Batch, image, label)

    image = batch_of(BATCH).image
    variables = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), image)
    optimizer = tinyjax.with_birth(optax.sgd(1e-2))
    opt_state = jax.eval_shape(lambda v: optimizer.init(trained(v)), variables)
    sites = tinyjax.find_sites(loss_fn, variables, batch_of(16), has_aux=True).growable
    options: dict[str, Any] = dict(trainable=trained, has_aux=True)
    train = tinyjax.train_step(loss_fn, optimizer, **options)
    grow = tinyjax.make_grow_step(loss_fn, sites[site], num_neurons=growing, optimizer=optimizer, **options)
    return {
        "train": compile_seconds(train, variables, opt_state, batch_of(BATCH)),
        "growth": compile_seconds(grow, variables, batch_of(SAMPLES), opt_state, jax.random.key(0)),
    }


def main() -> dict[str, Any]:
    protocol = paper.figure_5(1 / 64)
    shapes, schedule = rungs(protocol), list(growths(protocol))
    neurons = dict(zip(NAMES, protocol.neurons))
    at = (0, len(shapes) // 2, len(shapes) - 1)
    measured = []
    for index, site in zip(at, (NAMES[0], NAMES[4], NAMES[7])):
        found = of_shape(shapes[index][0], site, neurons[site])
        measured.append(found)
        print(json.dumps({"shape": shapes[index][0], "site": site, **found}), flush=True)
    position = np.array([sum(shapes[index][0]) for index in at], float)

    def seconds(kind: str, widths: tuple[int, ...]) -> float:
        return float(np.interp(sum(widths), position, [found[kind] for found in measured]))

    capacity = sum(seconds("train", w) + len(set(names)) * seconds("growth", w) for w, names in shapes)
    exact = sum(seconds("train", w) + seconds("growth", w) for _, w in schedule)
    line = {
        "growths": len(schedule),
        "shapes": len(shapes),
        "programs": len(shapes) + sum(len(set(names)) for _, names in shapes),
        "seconds_extrapolated": round(capacity),
        "one_shape_a_growth": {"programs": 2 * len(schedule), "seconds_extrapolated": round(exact)},
        "ratio": round(exact / capacity, 2),
    } | where()
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    main()
