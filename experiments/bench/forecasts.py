"""The cost model: predicted against measured seconds of steps, growths and whole runs.

    python -m experiments.bench.forecasts            # two minutes on 2 CPU cores

Dense and convolutional networks of `experiments.paper.cost` on digits; two of their layers grow from half of their
width in turns, eight neurons at a time. A gradient step and a growth of the narrowest network of a kind are the two
calibration runs; the forecasts of its whole run and of everything at the other widths use these rates. Each growing run
is done twice: the first one compiles and is not counted. One JSON line a forecast, `ratio` is predicted / measured.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax

import tinyjax
from experiments.bench.timing import where
from experiments.demo.calibration import first_seconds
from experiments.demo.runs import load
from experiments.paper import cost
from tinyjax import data
from tinyjax.training.cost_model import calibrate, seconds
from tinyjax.training.forecast import Forecast, Rates, of_fit

STEPS, PERIOD, NEURONS = 60, 10, 8
KINDS = {"dense": cost.dense, "conv": cost.convolutional}


def predicted_and_run(network: cost.Network) -> tuple[Forecast, dict[str, float]]:
    """What a growing run should do, and seconds of a step, of its first growth and of the whole."""
    config = cost.PRESETS["cpu"]
    batch = data.Batch(network.images[: config.training], network.labels[: config.training])
    found = tinyjax.find_sites(network.loss_fn, network.params, batch).growable
    sites = tinyjax.Sites(found[name] for name in ("a", "b"))
    start = {site.name: site.capacity // 2 for site in sites}
    params = tinyjax.thin(network.params, sites, start)
    optimizer = tinyjax.with_birth(optax.adam(1e-3))
    final = {site.name: site.capacity for site in sites}
    options: dict[str, Any] = dict(
        sites=sites, num_neurons=min(NEURONS, *start.values()), growth_samples=config.estimation
    )
    schedule = tinyjax.schedules.round_robin(PERIOD, options["num_neurons"], final=final, start=PERIOD)
    programs: dict[Any, Any] = {}

    def records() -> Iterator[tinyjax.Record]:
        batches, key = [batch] * STEPS, jax.random.key(0)
        return tinyjax.fit(network.loss_fn, params, batches, optimizer, schedule, key, programs=programs, **options)

    forecast = of_fit(
        network.loss_fn, params, batch, optimizer, schedule, [config.training] * STEPS, widths=start, **options
    )
    for record in records():  # noqa: B007 - compiles
        pass
    step, growth = first_seconds(records())
    began = time.perf_counter()
    for record in records():  # noqa: B007
        pass
    jax.block_until_ready(record.params)
    return forecast, {"step": step, "growth": growth, "run": time.perf_counter() - began}


def lines(kind: str, widths: list[int], train: data.Batch) -> Iterator[dict[str, Any]]:
    rates: Rates | None = None
    for width in widths:
        forecast, measured = predicted_and_run(KINDS[kind](train, width, cost.PRESETS["cpu"]))
        (step, _), (growth, _) = forecast.training[0], forecast.growth[0]
        first = rates is None
        rates = rates or Rates(calibrate(step, measured["step"]), calibrate(growth, measured["growth"]))
        predicted = {
            "step": seconds(rates.training, step),
            "growth": seconds(rates.growth, growth),
            "run": forecast.seconds(rates),
        }
        for name in ("run",) if first else predicted:
            yield {
                "what": name,
                "network": f"{kind} {width}",
                "calibrated": f"{kind} {widths[0]}",
                "predicted_ms": 1e3 * predicted[name],
                "measured_ms": 1e3 * measured[name],
                "ratio": predicted[name] / measured[name],
            } | where()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=int, nargs="*", default=[64, 128, 256], help="widths")
    parser.add_argument("--conv", type=int, nargs="*", default=[8, 16, 32], help="channels")
    config = parser.parse_args(arguments)
    _, splits = load("digits")
    found = []
    for kind in KINDS:
        for line in lines(kind, getattr(config, kind), splits["train"]):
            print(json.dumps(line), flush=True)
            found.append(line)
    return found


if __name__ == "__main__":
    main()
