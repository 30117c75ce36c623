"""Runs under a budget of parameters that is spent site by site, where a rule says.

What `experiments.beyond.lora` and `experiments.beyond.transformer` have in common: the next neurons go to one site, the
network is measured again, until no site fits into the budget of the growth. Rules are plain functions.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import tinyjax
from experiments.harness import Row, column, distinct, select, spread
from tinyjax import data

Widths = Mapping[str, int]


class State(NamedTuple):
    """A network while it grows."""

    params: Any
    opt_state: Any
    widths: dict[str, int]


Choose = Callable[[State, Sequence[str]], str]


class Room(NamedTuple):
    """What may be added.

    Attributes:
        neurons: added at once, by site.
        final: largest widths, by site.
        total: parameters at given widths.
    """

    neurons: Widths
    final: Widths
    total: Callable[[Widths], int]

    def open_sites(self, widths: Widths, limit: float) -> list[str]:
        """The sites that have room for the next neurons, and whose next neurons fit into the budget."""
        after = {name: {**widths, name: widths[name] + k} for name, k in self.neurons.items()}
        return [n for n in after if after[n][n] <= self.final[n] and self.total(after[n]) <= limit]

    def price(self, name: str, widths: Widths) -> int:
        """Parameters of the next neurons at a site."""
        return self.total({**widths, name: widths[name] + self.neurons[name]}) - self.total(widths)


def spend(
    state: State, limit: float, room: Room, choose: Choose, grow_step: Callable[..., Any], batch: Any, key: jax.Array
) -> State:
    """Grows one site after the other until `limit` parameters; a site where nothing lowers the loss is passed over."""
    refused: set[str] = set()
    while names := [name for name in room.open_sites(state.widths, limit) if name not in refused]:
        name = choose(state, names)
        key, one = jax.random.split(key)
        wanted = dict.fromkeys(state.widths, 0) | {name: room.neurons[name]}
        params, opt_state, info = grow_step(state.params, batch, state.opt_state, one, wanted)
        width = int(info.width[name])
        if width == state.widths[name]:
            refused.add(name)
        state = State(params, opt_state, state.widths | {name: width})
    return state


def by_score(score: Callable[[Any], dict[str, tinyjax.analysis.Score]], room: Room) -> Choose:
    """Where the loss at the output falls most for the parameters it costs."""

    def choose(state: State, names: Sequence[str]) -> str:
        scores = jax.device_get(score(state.params))
        return max(names, key=lambda name: float(scores[name].gain) / room.price(name, state.widths))

    return choose


def in_proportion(room: Room) -> Choose:
    """The site that has the smallest part of its final width."""
    return lambda state, names: min(names, key=lambda name: state.widths[name] / room.final[name])


class Task(NamedTuple):
    """Data, a network and its programs, compiled once for all runs.

    Attributes:
        splits: of the data.
        sites: what grows.
        room: what is added at once, and how far.
        train: a gradient step.
        grow: by kind of birth, a growth.
        score: what the next neurons are worth, by site.
        measure: (parameters, batch) -> loss, accuracy.
    """

    splits: dict[str, data.Batch]
    sites: tinyjax.Sites
    room: Room
    train: Callable[..., Any]
    grow: Mapping[str, Callable[..., Any]]
    score: Callable[[Any], dict[str, tinyjax.analysis.Score]]
    measure: Callable[[Any, data.Batch], tuple[jax.Array, jax.Array]]


class Plan(NamedTuple):
    """A run: where it starts, when and where it grows, how neurons are born.

    Attributes:
        start: parameters, optimizer state, widths.
        limits: by gradient step, the parameters that a growth may come to.
        choose: where the next neurons go.
        births: key of `Task.grow`.
    """

    start: State
    limits: Mapping[int, float]
    choose: Choose
    births: str = "tiny"


def limits(first: float, last: float, growths: int, span: int) -> dict[int, float]:
    """Evenly from `first` parameters to `last` in the first `span` steps."""
    return {i * span // growths: first + (i + 1) / growths * (last - first) for i in range(growths)}


def objective(logits: jax.Array, batch: data.Batch) -> jax.Array:
    """Cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def follow(task: Task, name: str, plan: Plan, *, seed: int, epochs: int, batch_size: int) -> Iterator[Row]:
    """Trains and grows; a row an epoch, with the widths where they have changed."""
    state, train, step, seconds = plan.start, task.splits["train"], 0, 0.0
    yield _row(task, name, seed, step, state, seconds) | {"width": state.widths}
    for epoch in range(epochs):
        began, widths = time.perf_counter(), state.widths
        for batch in data.batches(train, batch_size=batch_size, seed=seed, epoch=epoch):
            if step in plan.limits:
                key = jax.random.fold_in(jax.random.key(seed), step)
                state = spend(state, plan.limits[step], task.room, plan.choose, task.grow[plan.births], train, key)
            params, opt_state, _, _ = task.train(state.params, state.opt_state, batch)
            state = state._replace(params=params, opt_state=opt_state)
            step += 1
        jax.block_until_ready(state.params)
        seconds += time.perf_counter() - began
        row = _row(task, name, seed, step, state, seconds)
        yield row if state.widths == widths else row | {"width": state.widths}


def _row(task: Task, name: str, seed: int, step: int, state: State, seconds: float) -> Row:
    row: Row = {"part": "run", "run": name, "seed": seed, "step": step, "seconds": seconds}
    row["parameters"] = task.room.total(state.widths)
    for split, batch in task.splits.items():
        loss, accuracy = task.measure(state.params, batch)
        row |= {f"{split}_loss": float(loss), split: float(accuracy)}
    return row


def last_rows(rows: list[Row], name: str) -> list[Row]:
    """The last row of a run for every seed."""
    runs = select(rows, run=name)
    return [select(runs, seed=seed)[-1] for seed in distinct(runs, "seed")]


def compared(rows: list[Row], reference: str, step: int | None = None) -> tuple[str, str]:
    """Test accuracy and loss of every run at the end or after a step; what the reference is ahead by."""
    rows = [row for row in rows if step is None or row["step"] <= step]
    last = {name: last_rows(rows, name) for name in distinct(rows, "run")}
    cells = [
        f"{name} {spread(column(found, 'test'), 1, 100)} (loss {spread(column(found, 'test_loss'), 3)}, "
        f"{np.mean(column(found, 'parameters')):.0f} parameters)"
        for name, found in last.items()
    ]
    said = []
    for other in (name for name in last if name != reference):
        difference = 100 * (column(last[reference], "test") - column(last[other], "test"))
        error = f" ± {np.std(difference, ddof=1) / len(difference) ** 0.5:.1f}" if len(difference) > 1 else ""
        said.append(f"{reference} - {other} {np.mean(difference):+.1f}{error}")
    return ", ".join(cells), ", ".join(said) + " points (standard error)"


def draw_curves(rows: list[Row], panels: Mapping[str, Any]) -> None:
    """Validation loss of every run against a quantity, mean and range over seeds; one axes a quantity."""
    for name in distinct(rows, "run"):
        runs = [select(rows, run=name, seed=seed) for seed in distinct(rows, "seed")]
        losses = np.array([column(run, "validation_loss") for run in runs])
        for quantity, axes in panels.items():
            x = np.mean([column(run, quantity) for run in runs], axis=0)
            (line,) = axes.plot(x, losses.mean(axis=0), label=name)
            axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.15, lw=0)
    for quantity, axes in panels.items():
        axes.set(xlabel={"step": "steps"}.get(quantity, quantity), ylabel="validation loss", yscale="log")


def draw_widths(rows: list[Row], names: Sequence[str], axes: Any, label: Callable[[str], str]) -> None:
    """Widths at the end by site, mean and deviation over seeds; `label` names a site."""
    for place, name in enumerate(names):
        ends = [row["width"] for row in last_rows([row for row in rows if "width" in row], name)]
        sites = list(ends[0])
        widths = np.array([[end[site] for site in sites] for end in ends])
        at = np.arange(len(sites)) + 0.8 * ((place + 0.5) / len(names) - 0.5)
        axes.barh(at, widths.mean(axis=0), 0.7 / len(names), xerr=widths.std(axis=0), capsize=2, label=name)
        axes.set_yticks(range(len(sites)), [label(site) for site in sites])
    axes.invert_yaxis()
    axes.legend(fontsize=8)
