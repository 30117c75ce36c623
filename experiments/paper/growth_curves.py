"""Figures 5 to 7 and 13 to 16, tables 1, 4 and 5: a ResNet grown from a sliver by algorithm 1.

    python -m experiments.paper.growth_curves --preset cpu      # MNIST-5k as 7 x 7, 88 runs: 8 minutes on 2 free cores
    python -m experiments.paper.growth_curves --preset norms    # what the norm of a newborn does: 2 minutes
    python -m experiments.paper.growth_curves --preset gpu  # MNIST-5k, a quarter of the channels: half an hour on a GPU
    python -m experiments.paper.growth_curves --preset paper    # CIFAR-100, 4 runs of 12 settings: GPU days

The network of table 3 starts at s = 1/64 or 1/4 of its widths; one block after the other gets the neurons of table 2
until all have their final width, with Delta t epochs of training (SGD 1e-2, batches by E.2) after each growth, then
extra epochs. Methods: TINY's neurons as in E.3.1, GradMax with eq. 195's and figure 16's norm, this library's default
(`tiny0` after a line-searched best update), and `random0` as a control. References: the starting and the final network.
`cpu` has the first two stages of that network, 8 and 16 channels, starts from 1/4 and from 1 channel, and steps of SGD
0.1 (chosen on validation, seed 100: with 0.03 ten epochs train nothing).

The paper (CIFAR-100, test accuracy, after growth / converged; Delta t = 0.25 and 1): from 1/4 TINY 67.2 / 70.3 and
70.4 / 70.9, GradMax 65.1 / 67.0 and 68.6 / 69.0; from 1/64 TINY 65.8 / 69.5 and 68.1 / 68.7, GradMax 45.0 / 57.0 and
56.8 / 58.4; reference 72.8.

Measured (`cpu`, 4 seeds, 2 shared cores; after growth / after 3 more epochs): from 1/4 TINY 81.0 / 85.6 and 90.4 /
90.6, GradMax 79.7 / 85.7 and 90.0 / 90.8; from 1 channel TINY 73.4 / 85.8 and 87.8 / 88.5, GradMax 70.3 / 78.7 and
86.8 / 87.2; reference 92.1. So TINY is ahead where the paper's gap is largest, from the thinnest start with little
training (+7.1 +- 1.2 at the end), and nowhere else. The control `random0` is ahead of both (82.2 / 88.6 there). The
norms are a reason: fan-ins of norm 0.03, as in E.3.1, hardly move in so few steps. With fan-ins of norm 1 (`norms`)
TINY reaches 81.1 after growth, then 82.9, with one seed that falls to 71; a network that stays thin gets as far as
GradMax, 78.7.

Every run has a file of its own under `results/`; a command that was stopped goes on with the runs that are missing, and
`--only` picks some (for several processes).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import optax

import tinyjax
from experiments.demo import resnet
from experiments.demo.calibration import calibrated, estimate
from experiments.demo.runs import load
from experiments.harness import Experiment, Row, run
from experiments.paper import protocol as paper
from experiments.paper.growth_figures import REFERENCES, draw, findings
from tinyjax import data, methods

EVALUATED = 1024


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
        method=tinyjax.growth.normalized(TINY, alpha=paper.NEURON_NORM, omega=paper.NEURON_NORM),
        amplitude=tinyjax.growth.fixed(1.0),
        update=None,
    ),
    "TINY, fan-in 1": dict(
        method=tinyjax.growth.normalized(TINY, alpha=1.0, omega=paper.NEURON_NORM),
        amplitude=tinyjax.growth.fixed(1.0),
        update=None,
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
        policy = tinyjax.surgery.full if config.full else tinyjax.multiple_of(8)
        dataset, splits = load(config.dataset)
        small = {name: batch._replace(image=pooled(batch.image, config.pool)) for name, batch in splits.items()}
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
                    if method == config.methods[0] and seed == config.seeds[0]:
                        runs[name] = partial(_announced, network, method, start, between, runs[name])
    return runs


def _announced(
    network: Callable[[str, float], resnet.Network],
    method: str,
    start: str,
    between: float,
    run_it: Callable[[], list[Row]],
) -> list[Row]:
    """Says how long a run of this setting takes before it is run."""
    net, options = network(start, between), METHODS[method]
    forecast = resnet.forecast(net, **options)
    rates = calibrated(forecast, lambda: resnet.grow(net, 0, **options))
    print(f"{method} from {start}, {between:g} epochs apart: about {estimate(forecast, rates)}", flush=True)
    return run_it()


def pooled(images: Any, size: int) -> Any:
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


EXPERIMENT = Experiment("growth_curves", PRESETS, measure, draw, findings, parts)


def main(arguments: list[str] | None = None) -> Any:
    return run(EXPERIMENT, __doc__, arguments)


if __name__ == "__main__":
    main()
