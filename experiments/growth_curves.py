"""Figures 5 to 7 and 13 to 16, tables 1, 4 and 5: a ResNet-18 grown from a sliver by algorithm 1.

    python -m experiments.growth_curves --preset cpu      # MNIST-5k, a quarter of the channels: half an hour on 2 cores
    python -m experiments.growth_curves --preset gpu      # the same with 4 seeds: half an hour on a GPU
    python -m experiments.growth_curves --preset paper    # CIFAR-100, 4 runs of 12 settings: GPU days

The network of table 3 starts at s = 1/64 or 1/4 of its widths; one block after the other gets the neurons of table 2
until all have their final width, with Delta t epochs of training (SGD 1e-2, batches by E.2) after each growth, then
extra epochs. Methods: TINY's neurons as in E.3.1, GradMax with eq. 195's and figure 16's norm, and this library's
default (`tiny0` after a line-searched best update). References: the starting and the final network, trained as long.

The paper (CIFAR-100, test accuracy, after growth / converged; Delta t = 0.25 and 1): from 1/4 TINY 67.2 / 70.3 and
70.4 / 70.9, GradMax 65.1 / 67.0 and 68.6 / 69.0; from 1/64 TINY 65.8 / 69.5 and 68.1 / 68.7, GradMax 45.0 / 57.0 and
56.8 / 58.4; reference 72.8. Measured: see RESULTS.md. Every run has a file of its own under `results/`; a command that
was stopped goes on with the runs that are missing, and `--only` picks some (for several processes).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import optax

import tinyjax
from experiments import paper, resnet
from experiments.results import Experiment, Finding, Row, column, distinct, run, select, spread
from experiments.tasks import load
from tinyjax import data, methods
from tinyjax.plot.style import styled

EVALUATED = 1024
REFERENCES = ("small reference", "reference")


class Config(NamedTuple):
    """What is run.

    Attributes:
        dataset: its name.
        pool: images are averaged over squares of so many pixels.
        stream: channels of the residual stream, by stage.
        starts: widths inside the blocks at the start, by the name of the fraction.
        neurons: added to each block by a growth.
        between: epochs between growths.
        extra: epochs after the last growth.
        methods: names of `METHODS`.
        seeds: of initialisation, order and growth.
        augment: whether training images are cropped and mirrored.
        learning_rate: of SGD.
        full: whether all slots are allocated from the start; else in multiples of 8.
    """

    dataset: str
    pool: int
    stream: tuple[int, ...]
    starts: dict[str, tuple[int, ...]]
    neurons: tuple[int, ...]
    between: tuple[float, ...]
    extra: float
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    augment: bool = False
    learning_rate: float = 1e-2
    full: bool = True


TINY = methods.tiny
METHODS: dict[str, dict[str, Any]] = {
    "TINY": dict(
        method=tinyjax.normalized(TINY, alpha=paper.NEURON_NORM, omega=paper.NEURON_NORM),
        amplitude=tinyjax.fixed(1.0),
        update=None,
    ),
    "TINY, fan-in 1": dict(
        method=tinyjax.normalized(TINY, alpha=1.0, omega=paper.NEURON_NORM), amplitude=tinyjax.fixed(1.0), update=None
    ),
    "GradMax": dict(method=partial(methods.gradmax, scale=paper.GRADMAX_NORM), update=None),
    "GradMax, figure 16": dict(method=partial(methods.gradmax, scale=paper.NEURON_NORM), update=None),
    "tiny0 + dW*": dict(method=methods.tiny0),
    "random0": dict(method=methods.random0, update=None),
}
PAPER_STARTS = {"1/4": paper.inner_widths(1 / 4), "1/64": paper.inner_widths(1 / 64)}
COMPARED = ("TINY", "GradMax", "GradMax, figure 16")
SEEDS = (0, 1, 2, 3)
PRESETS = {
    # Two stages, 8 and 16 channels, images of 7 x 7, ten times the step size: what 64 runs on two cores allow.
    "smoke": Config("mnist5k", 4, (4,), {"1/2": (2, 4)}, (2, 2), (0.05,), 0.05, ("TINY", "GradMax"), (0,)),
    "cpu": Config(
        dataset="mnist5k",
        pool=4,
        stream=(8, 16),
        starts={"1/4": (2, 2, 4, 4), "1 channel": (1, 1, 1, 1)},
        neurons=(2, 2, 4, 4),
        between=paper.BETWEEN,
        extra=3,
        methods=(*COMPARED, "tiny0 + dW*", "random0"),
        seeds=SEEDS,
        learning_rate=0.1,
    ),
    # What the size of a newborn's fan-in does: 0.03 as in E.3.1, 1, and that of an ordinary initialisation.
    "norms": Config(
        dataset="mnist5k",
        pool=4,
        stream=(8, 16),
        starts={"1 channel": (1, 1, 1, 1)},
        neurons=(2, 2, 4, 4),
        between=(0.25,),
        extra=3,
        methods=("TINY", "TINY, fan-in 1", "GradMax", "random0"),
        seeds=SEEDS,
        learning_rate=0.1,
    ),
    # A quarter of the paper's channels; 1/16 of those is 1/64 of the paper's.
    "gpu": Config(
        dataset="mnist5k",
        pool=1,
        stream=(16, 32, 64, 128),
        starts={"1/4": (4, 4, 8, 8, 16, 16, 32, 32), "1/64": PAPER_STARTS["1/64"]},
        neurons=paper.NEURONS,
        between=(0.25,),
        extra=5,
        methods=("TINY", "GradMax", "random0"),
        seeds=SEEDS,
    ),
    "paper": Config(
        dataset="cifar100",
        pool=1,
        stream=paper.STREAM,
        starts=PAPER_STARTS,
        neurons=paper.NEURONS,
        between=paper.BETWEEN,
        extra=250,
        methods=COMPARED,
        seeds=SEEDS,
        augment=True,
        full=False,
    ),
}


def protocol(config: Config, start: str, between: float) -> paper.Protocol:
    """Algorithm 1 at one setting of a config."""
    return paper.Protocol(
        stream=config.stream,
        start=config.starts[start],
        neurons=config.neurons,
        between=between,
        extra=config.extra,
        optimizer=partial(optax.sgd, config.learning_rate),
        augment=config.augment,
    )


def parts(config: Config) -> Mapping[str, Callable[[], list[Row]]]:
    """Every run by its name. All share their programs, which depend on the widths at the end alone."""

    @cache
    def base() -> resnet.Network:
        policy = tinyjax.full if config.full else tinyjax.multiple_of(8)
        dataset, splits = load(config.dataset)
        small = {name: batch._replace(image=_pooled(batch.image, config.pool)) for name, batch in splits.items()}
        first = protocol(config, next(iter(config.starts)), config.between[0])
        return resnet.build(resnet.Preset(first, policy), dataset, small)

    def network(start: str, between: float) -> resnet.Network:
        return resnet.on_schedule(base(), protocol(config, start, between))

    runs: dict[str, Callable[[], list[Row]]] = {}
    for method in (*config.methods, *REFERENCES):
        run_of = _reference if method in REFERENCES else _grown
        for start in config.starts:
            # References do not grow: one, trained as long as the slowest growth, serves all.
            for between in config.between[-1:] if method in REFERENCES else config.between:
                for seed in config.seeds:
                    name = f"{method} {start} {between} {seed}"
                    runs[name] = partial(run_of, network, config.dataset, method, start, between, seed)
    return runs


def _pooled(images: Any, size: int) -> Any:
    """Means over squares of `size` pixels: (n, height, width, channels) -> (n, height / size, width / size, ...)."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // size, size, width // size, size, channels).mean((2, 4))


def _grown(
    network: Callable[[str, float], resnet.Network], dataset: str, method: str, start: str, between: float, seed: int
) -> list[Row]:
    of_run = dict(dataset=dataset, method=method, start=start, between=between, seed=seed)
    return list(_follow(network(start, between), of_run, partial(resnet.grow, **METHODS[method])))


def _reference(
    network: Callable[[str, float], resnet.Network], dataset: str, reference: str, start: str, between: float, seed: int
) -> list[Row]:
    net = network(start, between)
    widths = net.protocol.start if reference == "small reference" else net.protocol.final
    of_run = dict(dataset=dataset, method=reference, start=start, between=between, seed=seed)
    return list(_follow(net, of_run, partial(resnet.full_from_start, widths=widths)))


def _follow(network: resnet.Network, of_run: Row, start: Callable[..., Any]) -> Iterator[Row]:
    """The curve of a run, a row before every growth, then one an epoch; its accuracies after growth and at the end."""
    calendar, protocol = network.calendar, network.protocol
    num_train = len(network.splits["train"].label)
    train = data.Batch(*(x[:EVALUATED] for x in network.splits["train"]))
    steps = len(calendar.sizes)
    grown_at = int(np.searchsorted(calendar.starts, (protocol.growths * protocol.between) * num_train))
    epoch_ends = np.searchsorted(calendar.starts, np.arange(1, 1 + int(protocol.epochs)) * num_train)
    growths_end = np.flatnonzero(np.diff(calendar.due[:grown_at])) + 1
    due = {steps, grown_at, *map(int, growths_end), *(int(e) for e in epoch_ends if e >= grown_at)}
    rejected, seen = 0, 0
    row: Row = {}
    after_growth: Row = {}
    train_accuracies: list[float] = []
    for record in start(network, of_run["seed"]):
        if record.growth is not None:
            (written,) = (int(record.growth.written[name]) for name in record.growth.written)
            rejected += written == 0
        seen += int(calendar.sizes[record.step - 1])
        if record.step in due:
            widths = tuple(record.width.values())
            row = dict(
                **of_run,
                part="curve",
                step=record.step,
                epoch=seen / num_train,
                parameters=network.parameters(widths),
                growing=record.step <= grown_at,
                loss=float(record.loss),
                test=network.correct(record.params, record.sites, network.splits["test"]),
            )
            yield row
        if record.step in (grown_at, steps):
            train_accuracies.append(network.correct(record.params, record.sites, train))
        if record.step == grown_at:
            after_growth = row
    yield dict(
        **of_run,
        part="end",
        after_growth=after_growth["test"],
        after_growth_train=train_accuracies[0],
        converged=row["test"],
        converged_train=train_accuracies[-1],
        growths=protocol.growths,
        rejected=rejected,
        parameters=row["parameters"],
        steps=steps,
    )


def measure(config: Config) -> Iterator[Row]:
    for rows in parts(config).values():
        yield from rows()


COLOURS = {
    "TINY": "#c8553d",
    "TINY, fan-in 1": "#e8a08f",
    "GradMax": "#3d6c8f",
    "GradMax, figure 16": "#8fb3cc",
    "tiny0 + dW*": "#7a9e7e",
    "random0": "#d8a048",
    "small reference": "#c9cad6",
    "reference": "#22223b",
}


@styled
def draw(rows: list[Row]) -> Any:
    """For every start and Delta t: test accuracy against parameters while growing, and against epochs."""
    from matplotlib.figure import Figure

    curves = select(rows, part="curve")
    settings = [(start, between) for start in distinct(curves, "start") for between in distinct(curves, "between")]
    figure = Figure(figsize=(10, 0.4 + 3.2 * len(settings)), layout="constrained")
    for (start, between), panels in zip(settings, figure.subplots(len(settings), 2, sharey="row", squeeze=False)):
        of_setting = select(curves, start=start, between=between)
        growing = max(row["epoch"] for row in select(of_setting, growing=True))
        for method in distinct(of_setting, "method"):
            parameters, epochs, mean, deviation = _mean_curve(select(of_setting, method=method))
            colour = COLOURS[method]
            for axes, x in zip(panels, (parameters / 1e6, epochs)):
                if axes is panels[0] and method in REFERENCES:
                    axes.plot(x[-1:], mean[-1:], "o", color=colour)
                    continue
                axes.plot(x, mean, color=colour, label=method)
                axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        panels[0].set_title(f"start {start}, $\\Delta t$ = {between}")
        panels[0].set_ylabel("test accuracy (%)")
        panels[0].set_xlabel("parameters (millions)")
        panels[1].set_xlabel("epochs (dotted: the last growth)")
        panels[1].axvline(growing, color="#9a9ab0", linestyle=":", linewidth=1)
        highest = max(100 * row["test"] for row in of_setting)
        panels[0].set_ylim(min(highest - 10, 100 * float(np.percentile(column(of_setting, "test"), 15))), highest + 0.5)
        panels[1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _mean_curve(rows: list[Row]) -> tuple[np.ndarray, ...]:
    """Parameters, epochs, mean and standard deviation of the test accuracy in % over seeds, by step."""
    by_step = [select(rows, step=step) for step in sorted(distinct(rows, "step"))]
    values = [100 * column(of_step, "test") for of_step in by_step]
    return (
        np.array([column(of_step, "parameters").mean() for of_step in by_step]),
        np.array([of_step[0]["epoch"] for of_step in by_step]),
        np.array([value.mean() for value in values]),
        np.array([value.std() for value in values]),
    )


def findings(rows: list[Row]) -> list[Finding]:
    """What figures and tables of the paper say, on this data set; nothing is claimed beyond it."""
    ends, curves = select(rows, part="end"), select(rows, part="curve")
    data_set = ends[0]["dataset"]
    settings = [(start, between) for start in distinct(ends, "start") for between in distinct(ends, "between")]

    def by_setting(cell: Callable[[str, float], str], only: Any = None) -> str:
        chosen = [setting for setting in settings if only in (None, setting[0])]
        return f"{data_set}: " + "; ".join(
            f"{start}, Delta t {between}: {cell(start, between)}" for start, between in chosen
        )

    def table(start: str, between: float) -> str:
        some = select(ends, start=start, between=between)
        cells = []
        for method in distinct(some, "method"):
            of_method = select(some, method=method)
            after, last = (spread(column(of_method, field), 1, 100) for field in ("after_growth", "converged"))
            cells.append(f"{method} {last}" if method in REFERENCES else f"{method} {after} / {last}")
        return ", ".join(cells)

    def ahead(field: str, other: str = "GradMax") -> Callable[[str, float], str]:
        def cell(start: str, between: float) -> str:
            return f"TINY - {other} {_difference(ends, start, between, field, other)}"

        return cell

    def lead(start: str, between: float) -> str:
        values = []
        for seed in distinct(ends, "seed"):
            pair = [
                select(curves, start=start, between=between, method=method, seed=seed) for method in ("TINY", "GradMax")
            ]
            tiny, gradmax = (column(select(one, growing=True), "test") for one in pair)
            values.append(np.mean(tiny - gradmax))
        return f"TINY - GradMax, mean over the growths {spread(values, 2, 100)} points"

    def gained(start: str, between: float) -> str:
        cells = []
        for method in ("TINY", "GradMax"):
            some = select(ends, start=start, between=between, method=method)
            cells.append(f"{method} {spread(column(some, 'converged') - column(some, 'after_growth'), 2, 100)}")
        return ", ".join(cells) + " points"

    def patience(method: str) -> Callable[[str, float], str]:
        def cell(start: str, between: float) -> str:
            epochs = [
                _epochs_to_converge(select(curves, start=start, between=between, method=method, seed=seed))
                for seed in distinct(ends, "seed")
            ]
            return f"{method} {spread(epochs, 1)} epochs"

        return cell

    thinnest, longest = settings[-1]
    verdict = _verdict(ends, settings)
    return [
        Finding("Table 1", "after growth / converged, in %. " + by_setting(table), verdict),
        Finding("Figure 5", by_setting(lead), verdict),
        Finding("Figure 6", "gained by the extra epochs, " + by_setting(gained, thinnest), verdict),
        Finding("Figure 13", "gained by the extra epochs, " + by_setting(gained), verdict),
        Finding(
            "Figure 7",
            "extra epochs until within half a point of the end, "
            + by_setting(lambda s, b: patience("TINY")(s, b) + ", " + patience("GradMax")(s, b), thinnest),
            verdict,
        ),
        Finding("Figure 14", "extra epochs until within half a point, " + by_setting(patience("TINY")), verdict),
        Finding("Figure 15", "extra epochs until within half a point, " + by_setting(patience("GradMax")), verdict),
        *(
            [Finding("Figure 16", "converged, " + by_setting(ahead("converged", "GradMax, figure 16")), verdict)]
            if select(ends, method="GradMax, figure 16")
            else []
        ),
        Finding("Table 4", f"converged, {data_set}, {thinnest}: {ahead('converged')(thinnest, longest)}", verdict),
        Finding("Table 5, accuracy", f"after growth, {data_set}, {thinnest}: {table(thinnest, longest)}", verdict),
    ]


def _paired(ends: list[Row], start: str, between: float, field: str, other: str) -> np.ndarray:
    """TINY - other in points, by seed."""
    first, second = (select(ends, start=start, between=between, method=method) for method in ("TINY", other))
    return 100 * (column(first, field) - column(second, field))


def _difference(ends: list[Row], start: str, between: float, field: str, other: str) -> str:
    return f"{spread(_paired(ends, start, between, field, other), 2)} points"


def _verdict(ends: list[Row], settings: list[tuple[str, float]]) -> str:
    """Whether the gap that the paper sees from 1/64, and not from 1/4, is seen."""
    parts = []
    for start, between in settings:
        gaps = _paired(ends, start, between, "after_growth", "GradMax")
        error = float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")
        seen = "TINY ahead" if gaps.mean() > 2 * error else "GradMax ahead" if gaps.mean() < -2 * error else "no gap"
        parts.append(f"from {start} {seen} ({gaps.mean():+.2f} points, standard error {error:.2f})")
    return "after growth " + ", ".join(parts) + "; not the paper's data set"


def _epochs_to_converge(curve: list[Row]) -> float:
    """Epochs after the last growth until the test accuracy stays within half a point of its last value."""
    after = [*select(curve, growing=True)[-1:], *select(curve, growing=False)]
    last = after[-1]["test"]
    far = [index for index, row in enumerate(after) if abs(row["test"] - last) > 0.005]
    first = min(far[-1] + 1 if far else 0, len(after) - 1)
    return after[first]["epoch"] - after[0]["epoch"]


EXPERIMENT = Experiment("growth_curves", PRESETS, measure, draw, findings, parts)


def main(arguments: list[str] | None = None) -> Any:
    return run(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    main()
