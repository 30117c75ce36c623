"""The comparison of `experiments.beyond.compare` in a thin ResNet-18: convolutions, batch normalisation, residual sums.

    python -m experiments.beyond.compare_resnet --preset cpu  # digits, 4 seeds: minutes on 2 cores
    python -m experiments.beyond.compare_resnet --preset mnist5k  # hours there: larger images and network
    python -m experiments.beyond.compare_resnet --preset mnist5k --only '* gradmax'   # one method of it

The paper's network with two stages of 4 and 8 channels (8 and 16 on MNIST-5k). The blocks start at an inner width of 1
and are grown to that of their stream in four growths in the first quarter of training, all four at once (Adam 3e-3,
batches of 128). Methods, controls and rows are those of `experiments.beyond.compare`; a growth looks at the first 512
images.

The paper compares TINY and GradMax on CIFAR-100: `experiments.paper.growth_curves`. Measured: see RESULTS.md. Test
splits are reported, never used to choose anything.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import optax

import tinyjax
from experiments.beyond import compare
from experiments.demo import resnet
from experiments.demo.runs import load
from experiments.harness import Experiment, Row, run
from experiments.paper import protocol as paper
from tinyjax import data
from tinyjax.core.site import resized
from tinyjax.training.cost_model import flops


class Config(NamedTuple):
    """What is run; fields that `compare.Config` has too mean the same.

    Attributes:
        stream: channels of the residual stream, by stage.
        start: inner width of every block at the start.
        looked_at: images that a growth looks at.
        evaluated: training images that accuracy is measured on.
    """

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    stream: tuple[int, ...]
    start: int
    growths: int
    epochs: int
    seeds: tuple[int, ...]
    batch_size: int = 128
    learning_rate: float = 3e-3
    record_every: int = 1
    looked_at: int = 512
    evaluated: int = 1024


METHODS = ("tiny0", "tiny", "gradmax", "random0")
PRESETS = {
    "smoke": Config(("digits",), ("gradmax",), (2,), start=1, growths=1, epochs=1, seeds=(0,), looked_at=64),
    "cpu": Config(("digits",), METHODS, (4, 8), start=1, growths=4, epochs=40, seeds=(0, 1, 2, 3), record_every=4),
    "mnist5k": Config(("mnist5k",), METHODS, (8, 16), start=1, growths=4, epochs=20, seeds=(0, 1, 2, 3)),
}


def make_task(name: str, config: Config) -> compare.Task:
    """A data set and a ResNet that is trained on it."""
    dataset, splits = load(name)
    blocks = 2 * len(config.stream)
    protocol = paper.Protocol(
        stream=config.stream,
        start=(config.start,) * blocks,
        neurons=(1,) * blocks,
        between=1.0,
        extra=1.0,
        optimizer=lambda: optax.adam(config.learning_rate),
    )
    network = resnet.build(resnet.Preset(protocol, tinyjax.surgery.full), dataset, splits)
    sites = network.sites
    options: dict[str, Any] = dict(has_aux=True, trainable=resnet.trained)
    start, final = ({s.name: w for s, w in zip(sites, widths)} for widths in (protocol.start, protocol.final))
    optimizer = tinyjax.with_birth(protocol.optimizer())
    looked_at = data.Batch(*(x[: config.looked_at] for x in splits["train"]))
    batch = data.Batch(*(x[: config.batch_size] for x in splits["train"]))
    loss_fn = network.make_loss(final)
    shapes = jax.eval_shape(lambda key: network.init(key, final), jax.random.key(0))

    def init(key: jax.Array, small: bool) -> Any:
        if not small:
            return network.init(key, final)
        return tinyjax.resize(network.init(key, start), resized(sites, start), final)[0]

    def step(variables: Any, opt_state: Any, batch: data.Batch) -> tuple[Any, Any]:
        one = tinyjax.train_step(loss_fn, optimizer, **options)
        variables, opt_state, _, statistics = one(variables, opt_state, batch)
        return resnet.with_running_statistics(variables, statistics), opt_state

    @cache
    def training_flops(widths: tuple[int, ...]) -> float:
        at = dict(zip(sites.names, widths))
        here = jax.eval_shape(lambda key: network.init(key, at), jax.random.key(0))
        return flops(jax.value_and_grad(network.make_loss(at), has_aux=True), here, batch)

    @cache
    def at_the_end(method: str) -> float:
        grow = tinyjax.make_grow_step(loss_fn, sites, num_neurons=1, has_aux=True, **compare.recipe(method))
        return flops(grow, shapes, looked_at, jax.random.key(0))

    return compare.Task(
        name=f"{name}, thin ResNet-18",
        config=compare.Config(**{f: getattr(config, f) for f in compare.Config._fields if hasattr(config, f)}, final=0),
        train=splits["train"],
        growing=looked_at,
        measured={**splits, "train": data.Batch(*(x[: config.evaluated] for x in splits["train"]))},
        sites=sites,
        start=start,
        final=final,
        init=init,
        optimizer=optimizer,
        step=jax.jit(step, donate_argnums=(0, 1)),
        accuracy=lambda variables, batch: network.correct(variables, sites, batch),
        loss_fn=loss_fn,
        options=options,
        training_flops=training_flops,
        growth_flops=lambda method, widths: at_the_end(method),
        trainable=resnet.trained,
    )


def parts(config: Config) -> Mapping[str, Callable[[], list[Row]]]:
    """Every method and control on every data set, all seeds of it, by name."""
    task = cache(partial(make_task, config=config))

    def rows(name: str, method: str) -> list[Row]:
        return list(compare.compared(task(name), method))

    runs = (*config.methods, *compare.CONTROLS)
    return {f"{name} {method}": partial(rows, name, method) for name in config.datasets for method in runs}


def measure(config: Config) -> Iterator[Row]:
    for rows in parts(config).values():
        yield from rows()


EXPERIMENT = Experiment("compare_resnet", PRESETS, measure, compare.draw, compare.findings, parts)

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
