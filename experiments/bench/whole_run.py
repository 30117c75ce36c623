"""A whole growing run against training the final architecture on the same batches for the same epochs.

    python -m experiments.bench.whole_run                      # two stages, images of 7 x 7: 5 minutes on 2 CPU cores
    python -m experiments.bench.whole_run --preset resnet      # `experiments.grow --model resnet18 --preset cpu`

The ResNet-18 of the paper, its blocks grown from a sliver by algorithm 1 (`tiny0`). Every kind of run is done twice in
turns in one process: the first one compiles (`cold`), the second one has another seed and the same programs (`warm`).
Capacities are allocated at once (`full`), or in multiples of 8 with `--rungs`: then the first steps are of a narrower
network, and there is more to compile. Initialisation is not timed. Prints a JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax

import tinyjax
from experiments.bench.timing import where
from experiments.demo import resnet
from experiments.demo.runs import load
from experiments.paper import growth_curves
from tinyjax import methods


def small() -> tuple[str, int, resnet.Preset]:
    """The thinnest start of `growth_curves --preset cpu`: data set, pooling, preset."""
    config = growth_curves.PRESETS["cpu"]
    return (
        config.dataset,
        config.pool,
        resnet.Preset(growth_curves.protocol(config, "1 channel", 0.25), tinyjax.surgery.full),
    )


SIZES: Mapping[str, Callable[[], tuple[str, int, resnet.Preset]]] = {
    "small": small,
    "resnet": lambda: ("mnist5k", 1, resnet.PRESETS["cpu"]),
}


def seconds(records: Iterator[tinyjax.Record]) -> float:
    """What a run takes from its first step to its last."""
    began = time.perf_counter()
    for record in records:  # noqa: B007
        pass
    jax.block_until_ready(record.params)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(SIZES), default="small")
    parser.add_argument("--rungs", action="store_true", help="capacities in multiples of 8 instead of all at once")
    config = parser.parse_args(arguments)
    name, pool, preset = SIZES[config.preset]()
    if config.rungs:
        preset = preset._replace(policy=tinyjax.multiple_of(8))
    dataset, splits = load(name)
    pooled = {split: batch._replace(image=growth_curves.pooled(batch.image, pool)) for split, batch in splits.items()}
    network = resnet.build(preset, dataset, pooled)
    kinds = {"grown": partial(resnet.grow, method=methods.tiny0), "final": resnet.full_from_start}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for seed in range(2):
        for kind, start in kinds.items():
            taken[kind].append(seconds(start(network, seed)))
    (cold, warm), (cold_final, warm_final) = taken.values()
    line = {
        "unit": "whole growing run against the final architecture",
        "stream": preset.protocol.stream,
        "start": preset.protocol.start,
        "rungs": config.rungs,
        "growths": preset.protocol.growths,
        "epochs": preset.protocol.epochs,
        "steps": len(network.calendar.sizes),
        "seconds": {"cold": cold, "warm": warm, "final_cold": cold_final, "final_warm": warm_final},
        "ratio": {"cold": cold / cold_final, "warm": warm / warm_final},
    } | where()
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    main()
