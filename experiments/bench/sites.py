"""The statistics of all eight sites of a thin ResNet-18 in one call against one forward and backward pass.

    python -m experiments.bench.sites                   # two minutes on 2 CPU cores

ResNet-18 of the paper at half width (32, 64, 128, 256 channels, inner widths likewise), 32x32 images, BatchNorm in
training mode, one batch, N summed against the residual of the best update as growths do (at a given
ridge: choosing it is the growth's). `ratio` is the time of `estimate` over that of the loss with its gradient.
"""

import argparse
import json
from typing import Any

import jax

import tinyjax
from experiments.bench.networks import random_batch, residual
from experiments.bench.timing import medians, temporary_mib, where


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--inner", type=float, default=1.0, help="inner widths as a fraction of the stream")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    config = parser.parse_args(arguments)
    batch = random_batch(config.samples, config.size)
    widths = tuple(int(config.inner * channels) for channels in config.stream for _ in range(2))
    network = residual(tuple(config.stream), widths, batch.image[:2])
    sites = network.sites(batch)

    @jax.jit
    def estimate(variables: Any, batch: Any) -> dict[str, tinyjax.Statistics]:
        return tinyjax.estimate(network.loss_fn, variables, batch, sites, has_aux=True, project=0.1)

    given = (network.variables, batch)
    programs = {
        "estimate": estimate.lower(*given).compile(),
        "gradient": jax.jit(jax.value_and_grad(network.loss_fn, has_aux=True)).lower(*given).compile(),
    }
    ms = medians({name: (program, given) for name, program in programs.items()}, config.repeats)
    line = {
        "unit": f"statistics of {len(sites)} sites",
        "shape": [config.samples, config.size, config.size, 3],
        "stream": config.stream,
        "widths": widths,
        "median_ms": ms,
        "ratio": ms["estimate"] / ms["gradient"],
        "temporary_mib": {name: temporary_mib(program) for name, program in programs.items()},
    } | where()
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    main()
