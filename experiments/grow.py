"""Grow a small network while it trains, next to the controls it has to beat.

    python -m experiments.grow                                 # digits, about a minute on 2 CPU cores
    python -m experiments.grow --dataset mnist5k --seeds 5     # the table in the README

A multilayer perceptron with two hidden layers starts at width 2 and is grown to 64 in the first quarter of training:
best update of the existing weights at an amplitude found by line search, new neurons in TINY's directions with zero
fan-out (`tiny0`), random filler beyond the rank. All runs share data, batches, steps and optimizer (Adam, 3e-3):

    grown           the recipe
    random0 + dW*   the same with random instead of TINY's directions
    fixed           width 64 from the start
    fixed + dW*     width 64 from the start, with the same best-update steps at the same times

Writes log.jsonl, figure.png and final.npz (the compact parameters of the grown network) to `--out`. The test split is
reported, never used to choose anything. In the table of growths, psi is mean |V_goal|^2 before the growth, gain is
what the new neurons can take away from it after the best update (in the linear model; held out: on samples they were
not computed from), gamma is the amplitude of the neurons and of the update.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import tinyjax
from tinyjax import data, methods, plot
from tinyjax.layout import named_leaves
from tinyjax.models import MLP
from tinyjax.site import resized

METHODS = {name: getattr(methods, name) for name in ("tiny0", "random0", "tiny", "tiny_unprojected", "tiny_joint")}
EPOCHS = {"digits": 40, "mnist5k": 20}
CONTROLS = ("random0 + dW*", "fixed", "fixed + dW*")
CONSOLE = Console(width=max(Console().width, 132))  # the growth table needs that much


class Setup(NamedTuple):
    """What all runs share."""

    config: argparse.Namespace
    splits: dict[str, data.Batch]
    loss_fn: Callable[..., jax.Array]
    sites: tinyjax.Sites
    init: Callable[[jax.Array], Any]
    init_small: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    train: Callable[..., Any]
    accuracy: Callable[[Any, data.Batch], jax.Array]
    schedule: tinyjax.Schedule
    steps: int


class Run(NamedTuple):
    """The outcome of one run."""

    params: Any
    records: list[dict[str, Any]]


@methods.traits(function_preserving=True, stochastic=False)
def no_neurons(statistics: tinyjax.Statistics, *, num_neurons: int, key: jax.Array | None = None) -> tinyjax.Neurons:
    """Adds nothing: what remains of a growth is the best update."""
    inputs, outputs = statistics.cross_prev.shape[-2:]
    dtype = statistics.cross_prev.dtype
    return tinyjax.Neurons(
        jnp.zeros((inputs, num_neurons), dtype), jnp.zeros((num_neurons, outputs), dtype), jnp.zeros(num_neurons, dtype)
    )


def prepare(config: argparse.Namespace) -> Setup:
    dataset = data.load(config.dataset)
    mean, std = data.channel_moments(dataset.train)
    splits = {
        name: jax.tree.map(jnp.asarray, data.as_batch(getattr(dataset, name), mean=mean, std=std))
        for name in ("train", "validation", "test")
    }
    model = MLP(widths=tuple(config.widths), num_classes=dataset.num_classes)

    def logits(params: Any, batch: data.Batch) -> Any:
        return model.apply(params, batch.image)

    def loss_fn(params: Any, batch: data.Batch) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch.label).mean()

    def accuracy(params: Any, batch: data.Batch) -> jax.Array:
        return jnp.mean(logits(params, batch).argmax(-1) == batch.label)

    def init(key: jax.Array) -> Any:
        return model.init(key, splits["train"].image[:1])

    def init_small(key: jax.Array) -> Any:
        """A network of the starting widths, initialised as such, then given room."""
        small = MLP(widths=(config.start,) * len(config.widths), num_classes=dataset.num_classes)
        params = small.init(key, splits["train"].image[:1])
        own_sites = resized(sites, {name: config.start for name in sites.names})
        return tinyjax.resize(params, own_sites, {site.name: site.capacity for site in sites})[0]

    params = jax.eval_shape(init, jax.random.key(0))
    sites = tinyjax.find_sites(loss_fn, params, splits["train"]).growable
    optimizer = tinyjax.with_birth(optax.adam(config.learning_rate))
    steps = config.epochs * (len(splits["train"].label) // config.batch_size)
    final = {site.name: site.capacity for site in sites}
    schedule = tinyjax.early(steps, events=config.growths, final=final)
    train = jax.jit(tinyjax.train_step(loss_fn, optimizer), donate_argnums=(0, 1))
    return Setup(
        config,
        splits,
        loss_fn,
        sites,
        jax.jit(init),
        jax.jit(init_small),
        optimizer,
        train,
        jax.jit(accuracy),
        schedule,
        steps,
    )


def largest_growth(setup: Setup) -> int:
    """The most neurons the schedule asks for at once."""
    widths = {site.name: setup.config.start for site in setup.sites}
    most = 1
    for step in range(setup.steps):
        added = setup.schedule(step, widths, ())
        most = max([most, *added.values()])
        widths = {name: w + added.get(name, 0) for name, w in widths.items()}
    return most


def make_growth(setup: Setup, method: methods.Method, **options: Any) -> Callable[..., Any]:
    return jax.jit(
        tinyjax.make_grow_step(
            setup.loss_fn,
            setup.sites,
            num_neurons=largest_growth(setup),
            method=method,
            optimizer=setup.optimizer,
            **options,
        )
    )


def train_batches(setup: Setup, seed: int) -> Iterator[data.Batch]:
    for epoch in range(setup.config.epochs):
        yield from data.batches(setup.splits["train"], batch_size=setup.config.batch_size, seed=seed, epoch=epoch)


def run(setup: Setup, name: str, grow: Callable[..., Any] | None, seed: int, *, fixed: bool, tick: Any) -> Run:
    """Trains once; `grow` is called when the schedule of the growing network says so."""
    began, compiles = time.perf_counter(), COMPILES[0]
    config, key = setup.config, jax.random.key(seed)
    params = setup.init(key) if fixed else setup.init_small(key)
    widths = {site.name: config.start for site in setup.sites}
    opt_state = setup.optimizer.init(params)
    records = [record(setup, name, seed, 0, params)]
    for step, batch in enumerate(train_batches(setup, seed)):
        added = setup.schedule(step, widths, ()) if grow is not None else {}
        if grow is not None and added:
            key, growth_key = jax.random.split(key)
            params, opt_state, info = grow(params, setup.splits["train"], opt_state, growth_key, added)
            if not fixed:
                tinyjax.check(info)
                widths = {name: int(w) for name, w in info.width.items()}
            else:  # the twin keeps the grown network's calendar
                widths = {name: w + added.get(name, 0) for name, w in widths.items()}
            seconds, compiled = time.perf_counter() - began, COMPILES[0] - compiles
            grown = record(setup, name, seed, step, params, info=info)
            records.append(grown | {"seconds": seconds, "compiles": compiled})
        params, opt_state, _, _ = setup.train(params, opt_state, batch)
        tick()
        if (step + 1) % max(1, setup.steps // config.epochs) == 0:
            records.append(record(setup, name, seed, step + 1, params))
    records[-1]["seconds"] = time.perf_counter() - began
    return Run(params, records)


def record(setup: Setup, name: str, seed: int, step: int, params: Any, info: Any = None) -> dict[str, Any]:
    """Accuracies now and, after a growth, what it did: one line of log.jsonl."""
    line: dict[str, Any] = {"run": name, "seed": seed, "step": step}
    for split, batch in setup.splits.items():
        line[f"{split}_accuracy"] = float(setup.accuracy(params, batch))
    line["width"] = {site.name: int(tinyjax.width(params, site)) for site in setup.sites}
    if info is not None:
        values = jax.device_get(
            {field: value for field, value in info._asdict().items() if field not in ("born", "width")}
        )
        line["psi"] = {site: float(value) for site, value in values.pop("psi_before").items()}
        line |= {field: {site: float(value) for site, value in by_site.items()} for field, by_site in values.items()}
    return line


def growth_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="Growths", box=box.SIMPLE_HEAD, padding=(0, 1))
    columns = ("#", "site", "width", "psi", "gain", "held out", "γ", "γ dW", "loss", "train", "test", "s", "compiles")
    for column in columns:
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    for number, line in enumerate((r for r in records if "psi" in r), start=1):
        for site in line["psi"]:
            table.add_row(
                str(number),
                site,
                str(line["width"][site]),
                *(f"{line[f][site]:.3g}" for f in ("psi", "gain_predicted", "gain_held_out", "amplitude")),
                f"{line['amplitude_update'][site]:.3g}",
                f"{line['loss_before'][site]:.4f} → {line['loss_after'][site]:.4f}",
                f"{line['train_accuracy']:.3f}",
                f"{line['test_accuracy']:.3f}",
                f"{line['seconds']:.1f}",
                str(line["compiles"]),
            )
    return table


def result_table(results: dict[str, list[Run]]) -> Table:
    several = len(next(iter(results.values()))) > 1
    table = Table(
        box=box.SIMPLE_HEAD, title="After training" + (", mean (standard deviation) over seeds" if several else "")
    )
    for column in ("run", "train", "validation", "test", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, runs in results.items():
        last = [run.records[-1] for run in runs]
        cells = []
        for field in ("train_accuracy", "validation_accuracy", "test_accuracy"):
            values = [line[field] for line in last]
            cells.append(f"{np.mean(values):.4f}" + (f" ({np.std(values, ddof=1):.4f})" if several else ""))
        table.add_row(name, *cells, f"{np.mean([line['seconds'] for line in last]):.1f}")
    return table


def verdict(results: dict[str, list[Run]]) -> str:
    """Who won on the test split, with the paired difference to the grown network."""
    test = {name: np.array([run.records[-1]["test_accuracy"] for run in runs]) for name, runs in results.items()}
    best = max(test, key=lambda name: test[name].mean())
    grown = test.pop("grown")
    lines = [f"Best on the test split: {best}."]
    for name, values in test.items():
        difference = 100 * (grown - values)
        spread = f" ± {difference.std(ddof=1) / np.sqrt(len(difference)):.2f}" if len(difference) > 1 else ""
        lines.append(f"grown - {name}: {difference.mean():+.2f}{spread} points")
    return "\n".join(lines)


def write_results(setup: Setup, results: dict[str, list[Run]]) -> None:
    out = Path(setup.config.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("w") as file:
        file.write(json.dumps({"config": vars(setup.config), "jax": jax.__version__}) + "\n")
        for runs in results.values():
            for line in (line for run in runs for line in run.records):
                file.write(json.dumps(line) + "\n")
    grown = results["grown"][0]
    compact, widths = tinyjax.compact(grown.params, setup.sites)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(compact).items()}
    arrays: dict[str, Any] = leaves | {f"width/{name}": np.asarray(w) for name, w in widths.items()}
    np.savez(out / "final.npz", **arrays)
    references = {name: results[name][0].records[-1]["test_accuracy"] for name in CONTROLS}
    plot.growth_curves(grown.records, references=references).savefig(out / "figure.png", dpi=150)
    CONSOLE.print(f"Wrote log.jsonl, figure.png and final.npz to {out}/", highlight=False)


COMPILES = [0]


def count_compiles() -> None:
    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        COMPILES[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(EPOCHS), default="digits")
    parser.add_argument("--method", choices=sorted(METHODS), default="tiny0")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 64], help="final hidden widths")
    parser.add_argument("--start", type=int, default=2, help="hidden widths at the start")
    parser.add_argument("--growths", type=int, default=8)
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from --seed on")
    parser.add_argument("--out", default="results")
    config = parser.parse_args(arguments)
    config.epochs = EPOCHS[config.dataset] if config.epochs is None else config.epochs
    if min(config.widths) < config.start or config.start < 1:
        parser.error(f"--start {config.start} must be between 1 and the smallest of --widths {config.widths}")
    if config.seeds < 1 or config.epochs < 1 or config.batch_size < 1:
        parser.error("--seeds, --epochs and --batch-size must be at least 1")
    return config


def main(arguments: list[str] | None = None) -> dict[str, list[Run]]:
    config = parse(arguments)
    count_compiles()
    setup = prepare(config)
    CONSOLE.print(f"{config.dataset}: {len(setup.splits['train'].label)} training samples, seed {config.seed}")
    CONSOLE.print(str(setup.sites), highlight=False)
    own_update = {"update": None} if config.method == "tiny_joint" else {}
    runs: dict[str, tuple[Callable[..., Any] | None, bool]] = {
        "grown": (make_growth(setup, METHODS[config.method], **own_update), False),
        "random0 + dW*": (make_growth(setup, methods.random0), False),
        "fixed": (None, True),
        "fixed + dW*": (make_growth(setup, no_neurons, fill=None), True),
    }
    results: dict[str, list[Run]] = {name: [] for name in runs}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE) as progress:
        for name, (grow, fixed) in runs.items():
            task = progress.add_task(name.ljust(14), total=config.seeds * setup.steps)
            for seed in range(config.seed, config.seed + config.seeds):
                one = run(setup, name, grow, seed, fixed=fixed, tick=lambda task=task: progress.advance(task))
                results[name].append(one)
    CONSOLE.print(growth_table(results["grown"][0].records))
    CONSOLE.print(result_table(results))
    CONSOLE.print(verdict(results), highlight=False)
    write_results(setup, results)
    return results


if __name__ == "__main__":
    main()
