"""Statistics of one convolutional growth, tinyjax against gromo 0.1.0, the library of the paper's authors.

    python -m venv .venv-gromo && .venv-gromo/bin/pip install torch==2.13.0 gromo==0.1.0
    python -m experiments.bench.conv_versus_gromo --gromo .venv-gromo/bin/python

A thin ResNet (two stages of two blocks, 8 and 16 channels, BatchNorm) on images of MNIST; the first block is measured.
Both run forward, backward and the sums from which a growth is computed; gromo in its restricted mode, and in the
paper's full mode on fewer images. Images pass in batches of the same size, as one sweep over all at once would not fit
gromo's memory. Turn by turn in processes of their own, as the two cannot share one.

The last line has milliseconds per image and the ratios tinyjax / gromo; targets 1/20 (restricted), 1/100 (full). With
the time of the loss and its gradient alone (`gradient`), which no statistics can do without.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tinyjax
from experiments.bench.networks import residual
from experiments.bench.timing import medians
from tinyjax import data

PEER = Path(__file__).with_name("peer_gromo_conv.py")


def ours(images: np.ndarray, labels: np.ndarray, config: argparse.Namespace) -> dict[str, float]:
    """Milliseconds per image of whole sweeps, and of sweeps with the loss and its gradient alone; medians."""
    network = residual((config.channels, 2 * config.channels), (config.hidden,) * 4, images[:2])
    batches = [
        data.Batch(images[i : i + config.batch], labels[i : i + config.batch])
        for i in range(0, len(images), config.batch)
    ]
    site = network.sites(batches[0])[0]

    @jax.jit
    def estimate(variables: Any, batch: data.Batch) -> tinyjax.Statistics:
        return tinyjax.estimate(network.loss_fn, variables, batch, site, has_aux=True)

    merge = jax.jit(tinyjax.statistics.merge, donate_argnums=1)

    def sweep() -> tinyjax.Statistics:
        total = estimate(network.variables, batches[0])
        for batch in batches[1:]:
            total = merge(estimate(network.variables, batch), total)
        return total

    gradient = jax.jit(jax.value_and_grad(network.loss_fn, has_aux=True))

    def gradients() -> list[Any]:
        return [gradient(network.variables, batch) for batch in batches]

    ms = medians({"tinyjax": (sweep, ()), "gradient": (gradients, ())}, config.repetitions)
    return {name: value / len(images) for name, value in ms.items()}


def measure(config: argparse.Namespace) -> dict[str, Any]:
    dataset = data.load("mnist5k")
    mean, std = data.channel_moments(dataset.train)
    train = data.as_batch(dataset.train, mean=mean, std=std)
    images, labels = (np.asarray(x[: config.restricted]) for x in train)
    settings = {name: value for name, value in vars(config).items() if name not in ("gromo", "rounds")}
    found: dict[str, list[float]] = {"tinyjax": [], "gradient": [], "restricted": [], "full": []}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, x=images, y=labels)
        command = [config.gromo, str(PEER), str(arrays), json.dumps(settings)]
        for _ in range(config.rounds):
            for name, value in ours(images, labels, config).items():
                found[name].append(value)
            # gromo's threads spin while they wait unless told not to, which makes it up to eight times slower.
            environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            for line in map(json.loads, out.stdout.splitlines()):
                found[line["kind"]].append(line["ms_per_image"])
    ms = {name: float(np.median(values)) for name, values in found.items()}
    return {
        "unit": "statistics of one conv growth",
        "images": len(images),
        "ms_per_image": ms,
        "ratio": {kind: ms["tinyjax"] / ms[kind] for kind in ("restricted", "full")},
        "target": {"restricted": 1 / 20, "full": 1 / 100},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gromo", default=".venv-gromo/bin/python", help="the Python that has torch and gromo")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of gromo; JAX takes the best it has")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4, help="width of the blocks before the growth")
    parser.add_argument("--restricted", type=int, default=2000, help="images of tinyjax and of gromo's restricted mode")
    parser.add_argument("--full", type=int, default=50, help="images of gromo's full mode")
    parser.add_argument("--batch", type=int, default=250, help="images of one pass")
    parser.add_argument("--repetitions", type=int, default=1, help="sweeps a process")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the two libraries")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    config = parser.parse_args(arguments)
    if not Path(config.gromo).exists():
        parser.error(f"no Python at {config.gromo}; see --help for the two commands that make one")
    return config


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    result = measure(parse(arguments))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
