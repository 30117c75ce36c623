"""How long a run will take: its own first growth and first steps are the two calibration runs.

They are run twice, as the first time compiles; the run itself shares these programs and loses nothing but the seconds.
"""

import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

import tinyjax
from tinyjax.training.cost_model import calibrate, seconds, total
from tinyjax.training.forecast import Forecast, Rates

STEPS = 5  # whose median counts


def calibrated(forecast: Forecast, start: Callable[[], Iterator[tinyjax.Record]]) -> Rates:
    """The rates of this machine at the first programs of a run.

    Args:
        forecast: of the run; it grows.
        start: starts it; its programs are kept from one call to the next.
    """
    first_seconds(start())
    step, growth = first_seconds(start())
    return Rates(calibrate(forecast.training[0][0], step), calibrate(forecast.growth[0][0], growth))


def first_seconds(records: Iterator[tinyjax.Record]) -> tuple[float, float]:
    """What a gradient step of a run and its first growth take."""
    steps: list[float] = []
    grown = None
    began = time.perf_counter()
    for record in records:
        jax.block_until_ready((record.params, record.loss))
        now = time.perf_counter()
        if record.growth is None:
            steps.append(now - began)
        elif grown is None:
            grown = now - began  # the growth and a step
        if grown is not None and len(steps) >= STEPS:
            break
        began = now
    if grown is None or not steps:
        raise ValueError("a calibration run needs a growth and a gradient step without one")
    step = float(np.median(steps))
    return step, max(grown - step, grown / 100)


def estimate(forecast: Forecast, rates: Rates) -> str:
    """How long a run takes, once compiled, in words."""
    training, growth = (seconds(rate, total(parts)) for rate, parts in zip(rates, forecast))
    steps, growths = (sum(times for _, times in parts) for parts in forecast)
    return (
        f"{_span(training + growth)} once compiled: {steps} steps {_span(training)}, {growths} growths {_span(growth)} "
        f"(programs to compile: {len(forecast.training)} + {len(forecast.growth)})"
    )


def _span(taken: float) -> str:
    if taken < 100:
        return f"{taken:.1f} s"
    return f"{taken / 60:.0f} min" if taken < 6000 else f"{taken / 3600:.1f} h"
