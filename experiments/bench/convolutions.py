"""The sums of one pair of convolutions against a plain matrix product of the same dense operations.

    python -m experiments.bench.convolutions            # two minutes on 2 CPU cores

Two 3x3 SAME convolutions with biases, C channels throughout, 16x16 images, n = 128, float32. The dense operations are
those of products of patches: D^2 for S, D M O for N, H^2 for G, H M for M and for the residual, each times n and the
number of pixels. `speed` is the time of one product of that many operations over the time of all sums: 1 is the speed
of the product. N is summed against the residual, as growths do; `--link` sums P instead (O D H operations more): only
records with P can be merged.

A second part shows growth of cost: time against n and against the width, temporary memory against n.
"""

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import medians, temporary_mib, where
from tinyjax.core.linalg import solve
from tinyjax.core.windows import Window
from tinyjax.statistics.convolution.image_sums import LINK_LIMIT, Projection, conv_sums
from tinyjax.statistics.sums import Sums

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
OFFSETS = 9


def residual(gram: jax.Array, cross: jax.Array) -> Projection:
    """What N is summed against: the residual at a given ridge."""
    return Projection(solve(gram.sum(0), cross.sum(0), jnp.full((), 0.1, gram.dtype)))


@partial(jax.jit, static_argnames=("chunk", "link"))
def sums(x: jax.Array, h: jax.Array, v: jax.Array, chunk: int | None = None, link: bool = False) -> Sums:
    """The sums that a growth takes, or those that can be merged."""
    limit = LINK_LIMIT if link else 0
    options: dict[str, Any] = dict(chunk=chunk, link_limit=limit, project=residual, asked=False)
    return conv_sums(x, h, v, SAME, SAME, bias_prev=True, bias=True, **options)


@jax.jit
def product(rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows.T, rows, precision="highest")


def images(samples: int, size: int, channels: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (samples, size, size, channels)) for key in keys)


def dense_operations(channels: int, link: bool) -> int:
    """Multiply-adds a pixel."""
    inputs = OFFSETS * channels + 1
    linked = OFFSETS * inputs * inputs
    rest = 2 * inputs**2 + OFFSETS * inputs * channels + inputs * channels
    return rest + (linked if link and linked <= LINK_LIMIT else inputs * channels)


def speed(channels: int, samples: int, repeats: int, link: bool, size: int = 16) -> dict[str, Any]:
    arrays = images(samples, size, channels)
    rows = jax.random.normal(jax.random.key(1), (samples * size**2, OFFSETS * channels + 1))
    compiled = sums.lower(*arrays, link=link).compile()
    ms = medians({"sums": (compiled, arrays), "product": (product, (rows,))}, repeats)
    same = ms["product"] * dense_operations(channels, link) / rows.shape[1] ** 2
    return {
        "unit": "sums of a pair of convolutions",
        "shape": [samples, size, size, channels],
        "dtype": "float32",
        "link": link,
        "median_ms": ms["sums"],
        "product_ms": same,
        "speed": same / ms["sums"],
        "temporary_mib": temporary_mib(compiled),
    } | where()


def growth(repeats: int) -> list[dict[str, Any]]:
    """A decade of samples and of widths: exponents of the time, and the memory beside the arrays given."""
    by_samples = {n: images(n, 16, 16) for n in (32, 100, 320)}
    by_width = {c: images(64, 8, c) for c in (16, 50, 160)}
    lines = []
    for name, cases in (("samples", by_samples), ("width", by_width)):
        compiled = {case: sums.lower(*arrays, chunk=8).compile() for case, arrays in cases.items()}
        ms = medians({str(case): (compiled[case], arrays) for case, arrays in cases.items()}, repeats)
        first, *_, last = cases
        lines.append(
            {
                "unit": f"sums against {name}",
                "cases": list(cases),
                "median_ms": list(ms.values()),
                "exponent": float(np.log(ms[str(last)] / ms[str(first)]) / np.log(last / first)),
                "temporary_mib": [temporary_mib(program) for program in compiled.values()],
            }
            | where()
        )
    return lines


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--link", action="store_true", help="sum P too, where it is not too large")
    config = parser.parse_args(arguments)
    lines = []
    for line in (
        *(speed(c, config.samples, config.repeats, config.link) for c in config.channels),
        *growth(config.repeats),
    ):
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
