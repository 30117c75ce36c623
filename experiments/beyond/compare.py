"""Every growth method on the same starts, data, batches, steps and seeds, with the controls each has to beat.

    python -m experiments.beyond.compare --preset cpu  # digits and MNIST-5k, 5 seeds; a ResNet: `compare_resnet`

A multilayer perceptron with two hidden layers starts at width 2 and is grown to 64 in eight growths in the first
quarter of training (Adam 3e-3, batches of 128). A method's neurons come after the best update dW* of the existing
weights at an amplitude found by line search, unless it brings an update of its own (`tiny_joint`, `net2net`) or is
defined without one (`tiny_unprojected`); slots beyond its rank are filled by `random0`. Activations are ReLU with slope
1 at 0, without which GradMax's neurons never move.

Controls: `random0` (random directions, the same dW*), `fixed` (width 64 from the start), `fixed + dW*` (the same dW*
steps at the same times), `fixed, equal FLOPs` (the fixed network when it has done the FLOPs of the whole `tiny0` run).
FLOPs are those of a network as wide as the neurons in use, growths and their line searches included.

The paper compares TINY and GradMax on CIFAR-100 (Figure 5: a large gap from 1/64 of the widths, none from 1/4).
Measured: see RESULTS.md. Test splits are reported, never used to choose anything.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from experiments.activations import relu
from experiments.beyond.controls import no_neurons
from experiments.harness import Experiment, Finding, Row, column, distinct, run, select, spread
from tinyjax import data, methods
from tinyjax.core.site import resized
from tinyjax.models import MLP
from tinyjax.plot import style
from tinyjax.surgery import Trainable, all_params
from tinyjax.training.cost_model import flops
from tinyjax.training.schedules.costs import parameters

Widths = dict[str, int]
REFERENCE = "tiny0"
CONTROLS = ("fixed", "fixed + dW*")  # trained; `random0` is among the methods, and this one is read off `fixed`:
EQUAL_FLOPS = "fixed, equal FLOPs"
SMALL = 1e-3**0.5  # E.3.1's norm of new neurons


class Config(NamedTuple):
    """What is run.

    Attributes:
        datasets: by name.
        methods: names of `METHODS`.
        start: hidden widths at the start.
        final: hidden widths at the end.
        growths: number of growths, all in the first quarter.
        epochs: of training.
        seeds: of initialisation, batch order and growth.
        record_every: epochs between rows.
    """

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    start: int
    final: int
    growths: int
    epochs: int
    seeds: tuple[int, ...]
    batch_size: int = 128
    learning_rate: float = 3e-3
    record_every: int = 3


METHODS: dict[str, dict[str, Any]] = {
    "tiny0": dict(method=methods.tiny0),
    "tiny": dict(method=methods.tiny),
    "tiny, E.3.1": dict(
        method=tinyjax.growth.normalized(methods.tiny, alpha=SMALL, omega=SMALL), amplitude=tinyjax.growth.fixed(1.0)
    ),
    "tiny_joint": dict(method=methods.tiny_joint, update=None),
    "tiny_unprojected": dict(method=methods.tiny_unprojected, update=None),
    "fisher_tiny": dict(method=methods.fisher_tiny),
    "completed": dict(method=tinyjax.methods.completed(methods.tiny, methods.random), fill=None),
    "gradmax": dict(method=partial(methods.gradmax, scale=SMALL)),
    "gradmax_dual": dict(method=partial(methods.gradmax_dual, scale=1.0)),
    "north": dict(method=methods.north),
    "north_weight": dict(method=methods.north_weight),
    "net2net": dict(method=methods.net2net, update=None),
    "random": dict(method=methods.random, amplitude=tinyjax.growth.twin_search),
    "random0": dict(method=methods.random0),
}
PRESETS = {
    "smoke": Config(
        ("digits",), ("tiny0", "random0"), start=2, final=8, growths=2, epochs=4, seeds=(0,), record_every=1
    ),
    "cpu": Config(
        ("digits", "mnist5k"), tuple(METHODS), start=2, final=64, growths=8, epochs=30, seeds=(0, 1, 2, 3, 4)
    ),
}


class Task(NamedTuple):
    """A data set and the network that is trained on it, compiled once for all runs.

    Attributes:
        name: of the data set and the network.
        config: of the runs.
        train: training data.
        growing: what a growth looks at.
        measured: what accuracy is measured on, by name.
        sites: at the final widths.
        start: widths at the start, by site.
        final: widths at the end.
        init: (key, whether at the start's widths) -> parameters at the final capacities.
        optimizer: of all runs.
        step: `params, opt_state, ... = step(params, opt_state, batch)`.
        accuracy: (parameters, batch) -> fraction of correct answers.
        loss_fn: at the final capacities.
        options: of `make_grow_step`, for this network.
        training_flops: widths -> operations of a step.
        growth_flops: (method, widths) -> operations of a growth.
        trainable: the part of the parameters that the optimizer sees.
    """

    name: str
    config: Config
    train: data.Batch
    growing: data.Batch
    measured: dict[str, data.Batch]
    sites: tinyjax.Sites
    start: Widths
    final: Widths
    init: Callable[[jax.Array, bool], Any]
    optimizer: optax.GradientTransformation
    step: Callable[..., Any]
    accuracy: Callable[..., Any]
    loss_fn: Callable[..., Any]
    options: dict[str, Any]
    training_flops: Callable[[tuple[int, ...]], float]
    growth_flops: Callable[[str, tuple[int, ...]], float]
    trainable: Trainable = all_params


def make_task(name: str, config: Config) -> Task:
    dataset = data.load(name)
    mean, std = data.channel_moments(dataset.train)
    splits = {
        split: jax.tree.map(jnp.asarray, data.as_batch(getattr(dataset, split), mean=mean, std=std))
        for split in ("train", "validation", "test")
    }
    model = partial(MLP, num_classes=dataset.num_classes, activation=relu)
    full = (config.final, config.final)

    def loss_at(widths: tuple[int, ...]) -> Callable[..., jax.Array]:
        def loss_fn(params: Any, batch: data.Batch) -> jax.Array:
            logits: Any = model(widths=widths).apply(params, batch.image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

        return loss_fn

    def params_at(widths: tuple[int, ...], key: jax.Array) -> Any:
        return model(widths=widths).init(key, splits["train"].image[:1])

    def shapes_at(widths: tuple[int, ...]) -> Any:
        return jax.eval_shape(partial(params_at, widths), jax.random.key(0))

    def accuracy(params: Any, batch: data.Batch) -> jax.Array:
        logits: Any = model(widths=full).apply(params, batch.image)
        return jnp.mean(logits.argmax(-1) == batch.label)

    sites = tinyjax.find_sites(loss_at(full), shapes_at(full), splits["train"]).growable

    def init(key: jax.Array, small: bool) -> Any:
        if not small:
            return params_at(full, key)
        start = {site: config.start for site in sites.names}
        params = params_at((config.start, config.start), key)
        return tinyjax.resize(params, resized(sites, start), {site.name: site.capacity for site in sites})[0]

    batch = jax.tree.map(lambda x: x[: config.batch_size], splits["train"])

    @cache
    def training_flops(widths: tuple[int, ...]) -> float:
        return flops(jax.value_and_grad(loss_at(widths)), shapes_at(widths), batch)

    @cache
    def growth_flops(method: str, widths: tuple[int, ...]) -> float:
        shapes = shapes_at(widths)
        here = tinyjax.find_sites(loss_at(widths), shapes, splits["train"]).growable
        grow = tinyjax.make_grow_step(loss_at(widths), here, num_neurons=1, **recipe(method))
        return flops(grow, shapes, splits["train"], jax.random.key(0))

    optimizer = tinyjax.with_birth(optax.adam(config.learning_rate))
    return Task(
        name=name,
        config=config,
        train=splits["train"],
        growing=splits["train"],
        measured=splits,
        sites=sites,
        start=dict.fromkeys(sites.names, config.start),
        final=dict.fromkeys(sites.names, config.final),
        init=jax.jit(init, static_argnums=1),
        optimizer=optimizer,
        step=jax.jit(tinyjax.train_step(loss_at(full), optimizer), donate_argnums=(0, 1)),
        accuracy=jax.jit(accuracy),
        loss_fn=loss_at(full),
        options={},
        training_flops=training_flops,
        growth_flops=growth_flops,
    )


def recipe(name: str) -> dict[str, Any]:
    """Options of `make_grow_step`; the twin of `tiny0` gets its update and nothing else."""
    return dict(method=no_neurons, fill=None) if name == "fixed + dW*" else METHODS[name]


def measure(config: Config) -> Iterator[Row]:
    for name in config.datasets:
        task = make_task(name, config)
        for method in (*config.methods, *CONTROLS):
            yield from compared(task, method)


def compared(task: Task, method: str) -> Iterator[Row]:
    """A method or a control on a task: all seeds."""
    config, fixed, grow = task.config, method.startswith("fixed"), None
    steps = config.epochs * (len(task.train.label) // config.batch_size)
    schedule = tinyjax.early(steps, events=config.growths, final=task.final)
    if method != "fixed":
        most = {site: -(-(task.final[site] - task.start[site]) // config.growths) + 1 for site in task.final}
        most = {site: min(k, task.final[site]) for site, k in most.items()}
        options: dict[str, Any] = recipe(method) | task.options | dict(num_neurons=most, optimizer=task.optimizer)
        grow = jax.jit(tinyjax.make_grow_step(task.loss_fn, task.sites, **options))
        compile_first(task, grow)
    for seed in config.seeds:
        yield from train(task, method, grow, schedule, seed, fixed=fixed)


def compile_first(task: Task, grow: Callable[..., Any]) -> None:
    """Seconds of runs are without compilation: one call whose results are dropped."""
    params = task.init(jax.random.key(0), True)
    none = dict.fromkeys(task.sites.names, 0)
    grow(params, task.growing, task.optimizer.init(task.trainable(params)), jax.random.key(0), none)


def train(
    task: Task,
    name: str,
    grow: Callable[..., Any] | None,
    schedule: tinyjax.schedules.Schedule,
    seed: int,
    *,
    fixed: bool,
) -> Iterator[Row]:
    """One run: a row an epoch."""
    config, key = task.config, jax.random.key(seed)
    params = task.init(key, not fixed)
    opt_state = task.optimizer.init(task.trainable(params))
    used = dict(task.final if fixed else task.start)
    calendar = dict(task.start)  # the twin keeps the grown network's
    operations, seconds, step = 0.0, 0.0, 0
    for epoch in range(config.epochs):
        began = time.perf_counter()
        for batch in data.batches(task.train, batch_size=config.batch_size, seed=seed, epoch=epoch):
            added = schedule(step, calendar, ()) if grow is not None else {}
            if grow is not None and added:
                key, growth_key = jax.random.split(key)
                operations += task.growth_flops(name, tuple(used.values()))
                params, opt_state, info = grow(params, task.growing, opt_state, growth_key, added)
                calendar = {site: width + added.get(site, 0) for site, width in calendar.items()}
                used |= {} if fixed else {site: int(width) for site, width in info.width.items()}
            params, opt_state, *_ = task.step(params, opt_state, batch)
            operations += task.training_flops(tuple(used.values()))
            step += 1
        jax.block_until_ready(params)
        seconds += time.perf_counter() - began
        if (epoch + 1) % config.record_every and epoch + 1 < config.epochs:
            continue
        row: Row = {"part": "run", "task": task.name, "run": name, "seed": seed, "epoch": epoch + 1, "step": step}
        row |= {"parameters": parameters(task.sites, used), "gflop": operations / 1e9, "seconds": seconds}
        yield row | {split: float(task.accuracy(params, batch)) for split, batch in task.measured.items()}


def final_rows(rows: list[Row], task: str) -> dict[str, list[Row]]:
    """The last row of every run by method and seed; the fixed network also at the FLOPs of the grown one."""
    found: dict[str, list[Row]] = {}
    for name in distinct(select(rows, task=task), "run"):
        runs = select(rows, task=task, run=name)
        found[name] = [select(runs, seed=seed)[-1] for seed in distinct(runs, "seed")]
    if {"fixed", REFERENCE} <= found.keys():
        stopped = []
        for grown in found[REFERENCE]:
            fixed = select(rows, task=task, run="fixed", seed=grown["seed"])
            within = [row for row in fixed if row["gflop"] <= grown["gflop"]]
            stopped.append((within or fixed[:1])[-1])
        found[EQUAL_FLOPS] = stopped
    return found


def findings(rows: list[Row]) -> list[Finding]:
    lines = []
    for task in distinct(rows, "task"):
        found = final_rows(rows, task)
        cells = [
            f"{name} {spread(column(last, 'test'), 2, 100)} (minus fixed {paired(last, found['fixed'])}; "
            f"{np.mean(column(last, 'gflop')):.1f} GFLOP)"
            for name, last in found.items()
        ]
        ours = "test accuracy in % at the end, difference with its standard error: " + "; ".join(cells)
        controls = [name for name in ("random0", *CONTROLS, EQUAL_FLOPS) if name in found]
        if REFERENCE in found:
            against = (f"{REFERENCE} minus {name} {paired(found[REFERENCE], found[name])}" for name in controls)
            ours += "; " + "; ".join(against)
        lines.append(Finding(f"Methods compared, {task}", ours, verdict(found)))
    return lines


def paired(ours: list[Row], theirs: list[Row]) -> str:
    """The mean difference of test accuracy over seeds, in %, with its standard error."""
    difference = 100 * (column(ours, "test") - column(theirs, "test"))
    error = f" ± {np.std(difference, ddof=1) / np.sqrt(len(difference)):.2f}" if len(difference) > 1 else ""
    return f"{np.round(np.mean(difference), 2) + 0.0:+.2f}{error}"  # no -0.00


def verdict(found: dict[str, list[Row]]) -> str:
    """Which methods differ from the fixed network by more than two standard errors."""
    fixed = column(found["fixed"], "test")
    sides: dict[str, list[str]] = {"above": [], "below": []}
    for name, last in found.items():
        difference = column(last, "test") - fixed
        if len(difference) > 1 and abs(np.mean(difference)) > 2 * np.std(difference, ddof=1) / len(difference) ** 0.5:
            sides["above" if np.mean(difference) > 0 else "below"].append(name)
    said = [
        f"{side} fixed by more than two standard errors: {', '.join(names)}" for side, names in sides.items() if names
    ]
    return "; ".join(said) or "no method differs from fixed by more than two standard errors"


HIGHLIGHTED = ("tiny0", "tiny", "gradmax", "random0", "fixed", "fixed + dW*")
AXES = {"parameters": "parameters", "step": "steps", "gflop": "GFLOP", "seconds": "seconds"}


@style.styled
def draw(rows: list[Row]) -> Any:
    import matplotlib.pyplot as plt

    tasks = distinct(rows, "task")
    figure, panels = plt.subplots(len(tasks), len(AXES), figsize=(14, 3.4 * len(tasks)), squeeze=False)
    for task, line in zip(tasks, panels):
        names = distinct(select(rows, task=task), "run")
        colours = dict(zip([n for n in HIGHLIGHTED if n in names], plt.rcParams["axes.prop_cycle"].by_key()["color"]))
        for axes, (quantity, label) in zip(line, AXES.items()):
            for name in sorted(names, key=lambda name: name in colours):
                runs = [select(rows, task=task, run=name, seed=seed) for seed in distinct(rows, "seed")]
                runs = [run for run in runs if run]
                x = np.mean([column(run, quantity) for run in runs], axis=0)
                y = 100 * np.mean([column(run, "validation") for run in runs], axis=0)
                style = dict(color=colours[name], lw=1.8, label=name) if name in colours else dict(color="0.8", lw=0.8)
                axes.plot(x, y, **style)
            axes.set_xlabel(label)
            axes.set_ylim(np.percentile([100 * row["validation"] for row in select(rows, task=task)], 8), None)
        line[0].set_ylabel(f"{task}: validation accuracy (%)")
    panels[0][-1].plot([], [], color="0.8", label="other methods")
    panels[0][-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    return figure


EXPERIMENT = Experiment("compare", PRESETS, measure, draw, findings)

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
