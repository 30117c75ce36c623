"""The growing schedule of the paper and its numbers, each with its place there (Verbockhaven et al., TMLR 2024)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from tinyjax.models.resnet import STREAM, inner_widths
from tinyjax.training.schedules.basic import Additions, Schedule, Widths
from tinyjax.training.schedules.costs import estimation_batch, learning_batch

NEURONS = (3, 3, 6, 6, 12, 12, 24, 24)
"""Neurons a growth at conv 2, 3, 5, 6, 8, 9, 11, 12: table 2."""
STARTS = (1 / 4, 1 / 64)
"""Starting widths as fractions of ResNet-18's: table 3."""
BETWEEN = (0.25, 1.0)
"""Epochs between growths: figure 5."""
NEURON_NORM = 1e-3**0.5
"""Root mean square norm of TINY's new fan-ins and fan-outs: equations 197 and 198."""
GRADMAX_NORM = 1e-3
"""The same of GradMax's fan-outs in figure 5: equation 195."""
KERNEL_AREA = 9


class Protocol(NamedTuple):
    """One run of algorithm 1 on a ResNet-18.

    Attributes:
        stream: channels of the residual stream, by stage; blocks end at that width inside.
        start: widths inside the eight blocks at the start.
        neurons: added to each of them by a growth.
        between: epochs between growths.
        extra: epochs after the last growth.
        optimizer: makes the optimizer.
        initial_batch: training batch at the start; it grows as the square root of the number of parameters (E.2).
        micro_batch: what batches are multiples of, and what BatchNorm sees at once.
        constant: of E.1, the batch that neurons are estimated from.
        estimation_limit: largest such batch; E.1 asks for up to the whole training set.
        estimation_micro_batch: what is captured of it at a time, and what BatchNorm sees then; None: all of it.
        augment: whether training images are cropped and mirrored.
    """

    stream: tuple[int, ...]
    start: tuple[int, ...]
    neurons: tuple[int, ...]
    between: float
    extra: float
    optimizer: Callable[[], optax.GradientTransformation]
    initial_batch: int = 32
    micro_batch: int = 32
    constant: float = 1e-3
    estimation_limit: int = 2048
    estimation_micro_batch: int | None = None
    augment: bool = True

    @property
    def final(self) -> tuple[int, ...]:
        """Widths inside the blocks at the end."""
        return tuple(width for width in self.stream for _ in range(2))

    @property
    def growths(self) -> int:
        """Number of growths until every block is as wide as its stream."""
        return sum(-(-(f - s) // k) for s, f, k in zip(self.start, self.final, self.neurons))

    @property
    def epochs(self) -> float:
        """Length of the whole run."""
        return self.growths * self.between + self.extra


def figure_5(s: float = 1 / 64, between: float = 0.25) -> Protocol:
    """The protocol of figure 5: ResNet-18 from a fraction `s` of its widths; appendices E and F.1."""
    return Protocol(
        stream=STREAM,
        start=inner_widths(s),
        neurons=NEURONS,
        between=between,
        extra=250,
        optimizer=lambda: optax.sgd(1e-2),
        # Of the training set that E.1 asks for in the last stage, what the forward pass of a growth has room for.
        estimation_limit=16_384,
        estimation_micro_batch=384,
    )


def algorithm_1(neurons: Mapping[str, int], final: Mapping[str, int], due: Callable[[int], int]) -> Schedule:
    """One site a growth, in order, again and again until all have their final width.

    Args:
        neurons: added by a growth, by site in the order of the visits.
        final: final widths.
        due: step -> number of growths that should have been done before it.
    """
    names = list(neurons)

    def schedule(step: int, widths: Widths, history: Sequence[Any] = ()) -> Additions:
        if len(history) >= due(step):
            return {}
        turn = len(history) % len(names)
        for name in names[turn:] + names[:turn]:
            if missing := max(0, final[name] - widths[name]):
                return {name: min(neurons[name], missing)}
        return {}

    return schedule


class Calendar(NamedTuple):
    """When a run grows and how large its batches are: functions of the step, so that a resumed run needs no more.

    Attributes:
        starts: (steps,) images seen before each step.
        sizes: (steps,) images of each step.
        due: (steps,) growths that should have been done before each step.
    """

    starts: np.ndarray
    sizes: np.ndarray
    due: np.ndarray


def calendar(protocol: Protocol, complexity: Callable[[tuple[int, ...]], int], training_set: int) -> Calendar:
    """Algorithm 1 in steps: a growth, then `between` epochs, and so on; the batch follows E.2.

    Args:
        protocol: of the run.
        complexity: inner widths -> number of parameters.
        training_set: number of training images.
    """
    initial = complexity(protocol.start)
    sizes: list[int] = []
    due: list[int] = []
    for growths, widths in enumerate(planned_widths(protocol), start=1):
        batch = learning_batch(complexity(widths), initial_complexity=initial, initial_batch=protocol.initial_batch)
        batch = max(1, round(batch / protocol.micro_batch)) * protocol.micro_batch
        epochs = protocol.between if growths < protocol.growths else protocol.between + protocol.extra
        steps = max(1, round(epochs * training_set / batch))
        sizes += [batch] * steps
        due += [growths] * steps
    # Growths that were not kept are made up for after the last one that was planned, at the same pace.
    tail = steps - max(1, round(protocol.between * training_set / batch))
    pace = max(1, round(protocol.between * training_set / batch))
    due[len(due) - tail :] = [protocol.growths + 1 + i // pace for i in range(tail)]
    return Calendar(np.cumsum([0, *sizes[:-1]]), np.array(sizes), np.array(due))


def planned_widths(protocol: Protocol) -> Iterator[tuple[int, ...]]:
    """Inner widths after each growth of a run in which every growth adds what it should."""
    names = [str(i) for i in range(len(protocol.start))]
    schedule = algorithm_1(
        dict(zip(names, protocol.neurons)), dict(zip(names, protocol.final)), lambda step: protocol.growths
    )
    widths, history = dict(zip(names, protocol.start)), []
    while added := schedule(0, widths, history):
        widths = {name: width + added.get(name, 0) for name, width in widths.items()}
        history.append(added)
        yield tuple(widths.values())


def estimation_samples(protocol: Protocol, *, size: int, training_set: int) -> tuple[int, ...]:
    """Samples a growth looks at, for each block: three quarters of them are E.1's batch, the rest is for line searches.

    Args:
        protocol: of the run.
        size: height and width of the images.
        training_set: number of training images.
    """
    samples = []
    for stage, channels in enumerate(protocol.stream):
        positions = (-(-size // 2**stage)) ** 2
        limit = min(protocol.estimation_limit, training_set)
        estimated = estimation_batch(
            channels, kernel_area=KERNEL_AREA, positions=positions, training_set=limit, constant=protocol.constant
        )
        # BatchNorm and line searches need more than the handful of images that E.1 asks for at full resolution.
        wanted = min(max(-(-4 * estimated // 3), 256), limit)
        if protocol.estimation_micro_batch is not None and 3 * wanted > 4 * protocol.estimation_micro_batch:
            unit = (
                4 * protocol.estimation_micro_batch // 3
            )  # three quarters of it are one micro-batch: no remainder to compile
            wanted = -(-wanted // unit) * unit if wanted < limit else limit // unit * unit
        samples += 2 * [wanted]
    return tuple(samples)
