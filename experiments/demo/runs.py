"""What the runs of `experiments.grow` have in common: a task, its runs, and what is written down of each."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from tinyjax import data, methods
from tinyjax.training.forecast import Forecast

Start = Callable[[int, Any], Iterator[tinyjax.Record]]
Row = dict[str, Any]

SAVE_SECONDS = 20
METHODS = {name: getattr(methods, name) for name in ("tiny0", "random0", "tiny", "tiny_unprojected", "tiny_joint")}


class Refused(Exception):
    """Arguments that do not go with the data set; says which and what to do."""


class Task(NamedTuple):
    """A data set, a network, and the runs that are compared on it.

    Attributes:
        sites: what grows, at the capacity of the end.
        runs: by name, `start(seed, record)`: the records of `fit` from the beginning, or from after `record`.
        accuracy: `(params, sites, batch) -> accuracy`.
        splits: what accuracy is measured on, by name.
        optimizer: of all runs.
        trainable: the part of the parameters that it sees.
        steps: gradient steps of a run.
        evaluate_every: steps between measurements; growths are measured too.
        num_train: training samples.
        forecast: what a growing run will do, for runs that take long; None for others.
    """

    sites: tinyjax.Sites
    runs: Mapping[str, Start]
    accuracy: Callable[[Any, tinyjax.Sites, data.Batch], float]
    splits: Mapping[str, data.Batch]
    optimizer: optax.GradientTransformation
    trainable: Callable[[Any], Any]
    steps: int
    evaluate_every: int
    num_train: int
    forecast: Callable[[], Forecast] | None = None


class Run(NamedTuple):
    """The outcome of one run: what was written down of it, its parameters and their sites."""

    rows: list[Row]
    params: Any
    sites: tinyjax.Sites


class Compilations:
    """Counts what XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def own_update(method: str) -> dict[str, Any]:
    """Options of `make_grow_step` for a method that brings its own update of the consumer."""
    return {"update": None} if method == "tiny_joint" else {}


def load(name: str) -> tuple[data.Dataset, dict[str, data.Batch]]:
    """A data set and its splits, standardised by the training split, on the device."""
    dataset = data.load(name)
    mean, std = data.channel_moments(dataset.train)
    splits = {
        split: jax.tree.map(jnp.asarray, data.as_batch(getattr(dataset, split), mean=mean, std=std))
        for split in ("train", "validation", "test")
    }
    return dataset, splits


def follow(
    task: Task,
    name: str,
    seed: int,
    folder: Path,
    *,
    compilations: Compilations,
    tick: Callable[[int, Mapping[str, int]], None],
    note: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Run:
    """Runs to the end and writes down what the growths did and how well the network does.

    Goes on from the checkpoint in `folder` if there is one, and leaves one there every `SAVE_SECONDS`, at the end, and
    when it is stopped.

    Args:
        task: what is run.
        name: of the run.
        seed: of the run.
        folder: of its checkpoints.
        compilations: counts them.
        tick: is told the steps done since the last call and the widths.
        note: is given one line for every growth.
        stopped: whether to stop after this step.

    Raises:
        SystemExit: it was stopped.
    """
    saved = None
    with contextlib.suppress(FileNotFoundError):  # a run that was killed before its first checkpoint was complete
        saved = tinyjax.restore(folder, task.optimizer, trainable=task.trainable)
    rows: list[Row] = [] if saved is None else list(saved.extra)
    if saved is not None:
        tick(saved.step, {})
        if saved.step == task.steps:
            return Run(rows, saved.params, saved.sites)
    before = rows[-1] if rows else {"seconds": 0.0, "compiles": 0}
    began, compiled = time.perf_counter() - before["seconds"], compilations.count - before["compiles"]
    last_save = time.perf_counter()
    record = None
    for record in task.runs[name](seed, saved):
        if record.growth is not None or record.step % task.evaluate_every == 0 or record.step == task.steps:
            row: Row = {"run": name, "seed": seed, "step": record.step, "loss": float(record.loss)}
            row |= _accuracies(task, record) | {"width": dict(record.width)}
            if record.growth is not None:
                row |= _growth(record.growth)
                note(f'run="{name}" seed={seed} {tinyjax.training.log_line(record)}')
            rows.append(row | {"seconds": time.perf_counter() - began, "compiles": compilations.count - compiled})
        tick(1, record.width)
        if stopped() or record.step == task.steps or time.perf_counter() - last_save > SAVE_SECONDS:
            tinyjax.save(folder, record, extra=rows)
            last_save = time.perf_counter()
        if stopped():
            raise SystemExit(f"Stopped after step {record.step} of `{name}`; the same command with --resume goes on.")
    assert record is not None, "a run has at least one step"
    return Run(rows, record.params, record.sites)


def _accuracies(task: Task, record: tinyjax.Record) -> Row:
    return {
        f"{split}_accuracy": float(task.accuracy(record.params, record.sites, batch))
        for split, batch in task.splits.items()
    }


def _growth(info: tinyjax.GrowthInfo) -> Row:
    """What a growth did, by field and site; sites that were skipped are left out."""
    values = jax.device_get(info)._asdict()
    values["psi"] = values.pop("psi_before")
    grown = [name for name, status in values.pop("status").items() if status != tinyjax.Status.SKIPPED]
    del values["born"], values["width"]
    return {field: {site: float(np.sum(by_site[site])) for site in grown} for field, by_site in values.items()}
