"""All benchmarks, each against its target.

    python -m experiments.bench --gromo .venv-gromo/bin/python     # ten minutes on 2 free CPU cores
    python -m experiments.bench --only sites growth                # some of them
    python -m experiments.bench --device gpu                       # the same table on the first GPU

Benchmarks are scripts of this package that print JSON lines; each runs in a process of its own, which decides nothing
but the device: `JAX_PLATFORMS` says which, LAPACK keeps to one thread. Those against gromo need its Python:

    python -m venv .venv-gromo && .venv-gromo/bin/pip install torch==2.13.0 gromo==0.1.0

and are left out with `--no-gromo`. Prints one JSON line a row of the table (name, target, measured, met) as soon as it
is known, and the table at the end; `--json` leaves the table out. The exit status is 1 only where a script failed: a
target that is missed is a result.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Line = dict[str, Any]
LARGEST_MIB = 100
RATIOS = {"mlp": 3, "resnet": 5, "transformer": 4, "lora": 5}  # targets of `growth_compiling`


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is measured against what.
        target: the bound of `measured`, as text.
        measured: nearly always a ratio.
        met: whether it is within the bound.
    """

    name: str
    target: str
    measured: float
    met: bool


class Benchmark(NamedTuple):
    """A script of this package.

    Attributes:
        module: its name.
        arguments: its command line.
        rows: from the JSON lines that it prints to rows of the table.
        peer: whether it runs gromo too, with `--gromo` and `--device`.
    """

    module: str
    arguments: tuple[str, ...]
    rows: Callable[[list[Line]], Iterator[Row]]
    peer: bool = False


def at_most(name: str, measured: float, bound: float) -> Row:
    return Row(name, f"<= {bound:g}", measured, measured <= bound)


def at_least(name: str, measured: float, bound: float) -> Row:
    return Row(name, f">= {bound:g}", measured, measured >= bound)


def mnist5k(lines: list[Line]) -> Iterator[Row]:
    (line,) = lines
    yield at_most("MNIST-5k, growing run, warm, of gromo's", line["ratio"]["warm_s"], 0.2)
    yield at_most("MNIST-5k, growing run, cold, of gromo's", line["ratio"]["cold_s"], 0.8)
    yield at_most("programs of all growths of this run", line["tinyjax"]["programs"], 1)


def digits(lines: list[Line]) -> Iterator[Row]:
    (line,) = lines
    yield at_most("digits, growing run, warm, of gromo's", line["ratio"]["warm_s"], 0.3)


def conv_statistics(lines: list[Line]) -> Iterator[Row]:
    (line,) = lines
    for kind, bound in (("restricted", 1 / 20), ("full", 1 / 100)):
        yield at_most(f"statistics of a conv growth, an image, of gromo's {kind}", line["ratio"][kind], bound)


def conv_sums(lines: list[Line]) -> Iterator[Row]:
    for line in lines:
        if "speed" in line:
            channels = line["shape"][-1]
            yield at_least(f"sums of two convs, C = {channels}, speed of a product", line["speed"], 1.0)
            yield at_most(f"temporary memory of it, C = {channels}, MiB", line["temporary_mib"], LARGEST_MIB)
        elif line["unit"] == "sums against samples":
            *_, before, last = line["temporary_mib"]
            yield at_most("exponent of their time in the number of samples", line["exponent"], 1.1)
            yield at_most("temporary memory at three times the samples", last / before, 1.1)
        else:
            yield at_most("exponent of their time in the width", line["exponent"], 2.1)


def sites(lines: list[Line]) -> Iterator[Row]:
    (line,) = lines
    yield at_most("statistics of 8 sites of ResNet-18, of forward + backward", line["ratio"], 4.0)


def growth(lines: list[Line]) -> Iterator[Row]:
    ratios = {line["what"]: line["ratio"] for line in lines}
    (solve,) = (ratio for what, ratio in ratios.items() if what.startswith("solve, S 2304"))
    yield at_most("solve for 2304 inputs, of eigh + SVD", solve, 0.2)
    yield at_most("line search of 16 amplitudes, forward passes", ratios["the same, mean over sites"], 6.0)
    (known,) = (ratio for what, ratio in ratios.items() if what.startswith("growth of the first layer"))
    yield at_most("growth of the first layer again, of its first growth", known, 0.5)


def compiling(lines: list[Line]) -> Iterator[Row]:
    yield at_most("network shapes of the paper's 168 growths", lines[-1]["shapes"], 8)


def growth_compiling(lines: list[Line]) -> Iterator[Row]:
    for line in lines:
        name = f"compiling a growth of `{line['network']}`, {line['sites']} sites, of a training step"
        yield at_most(name, line["ratio"], RATIOS[line["network"]])


def whole_run(lines: list[Line]) -> Iterator[Row]:
    (line,) = lines
    yield at_most("growing run, warm, of training the final network", line["ratio"]["warm"], 1.0)


def forecasts(lines: list[Line]) -> Iterator[Row]:
    for line in lines:
        error = max(line["ratio"], 1 / line["ratio"])
        yield at_most(f"forecast of the {line['what']} at {line['network']}, factor", error, 1.3)


def discovery(lines: list[Line]) -> Iterator[Row]:
    seconds = {line["network"]: line["seconds"] for line in lines if "seconds" in line}
    yield at_most("find_sites of 24 layers of 768, seconds of CPU", seconds["transformer 24 x 768"], 1.5)
    yield at_most("find_sites of 48 layers of 768, seconds of CPU", seconds["transformer 48 x 768"], 3.0)
    for line in lines:
        if "exponent" in line:
            yield at_most(f"{line['network']} of find_sites in the number of layers", line["exponent"], 1.2)


BENCHMARKS: Mapping[str, Benchmark] = {
    "mnist5k": Benchmark("versus_gromo", ("--dataset", "mnist5k", "--json"), mnist5k, peer=True),
    "digits": Benchmark("versus_gromo", ("--dataset", "digits", "--json"), digits, peer=True),
    "conv_statistics": Benchmark("conv_versus_gromo", (), conv_statistics, peer=True),
    "conv_sums": Benchmark("convolutions", (), conv_sums),
    "sites": Benchmark("sites", (), sites),
    "growth": Benchmark("growth", (), growth),
    "compiling": Benchmark("schedule_compile", (), compiling),
    "growth_compiling": Benchmark("compile_growth", (), growth_compiling),
    "whole_run": Benchmark("whole_run", (), whole_run),
    "forecasts": Benchmark("forecasts", (), forecasts),
    "discovery": Benchmark("discovery", (), discovery),
}


def environment(device: str) -> dict[str, str]:
    """What the scripts run under: that device, threads of LAPACK that do not spin."""
    return os.environ | {"JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[device], "OPENBLAS_NUM_THREADS": "1"}


def run(module: str, arguments: tuple[str, ...], device: str) -> list[Line]:
    """The JSON lines that a script prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", f"experiments.bench.{module}", *arguments]
    out = subprocess.run(command, env=environment(device), check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def require(device: str) -> str:
    """The name of the device.

    Raises:
        SystemExit: JAX finds none of that kind.
    """
    # In a process of its own: JAX would keep most of a GPU's memory in this one.
    code = f"import jax; print(jax.devices({device!r})[0].device_kind)"
    plain = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    found = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        raise SystemExit(f'JAX finds no {device} here ({reason}); for a GPU of Nvidia: pip install "jax[cuda12]"')
    return found.stdout.strip()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--gromo", default=".venv-gromo/bin/python", help="the Python that has torch and gromo")
    parser.add_argument("--no-gromo", action="store_true", help="leave out what is measured against gromo")
    parser.add_argument("--json", action="store_true", help="no table at the end")
    config = parser.parse_args(arguments)
    names = config.only or list(BENCHMARKS)
    config.names = [name for name in names if not (config.no_gromo and BENCHMARKS[name].peer)]
    return config


def main(arguments: list[str] | None = None) -> list[Row]:
    config = parse(arguments)
    kind = require(config.device)
    if any(BENCHMARKS[name].peer for name in config.names) and not Path(config.gromo).exists():
        raise SystemExit(
            f"no Python at {config.gromo}: --help has the two commands that make one, --no-gromo does without"
        )
    rows: list[Row] = []
    failed: list[str] = []
    for name in config.names:
        benchmark = BENCHMARKS[name]
        peer = ("--gromo", config.gromo, "--device", config.device) if benchmark.peer else ()
        try:
            lines = run(benchmark.module, (*benchmark.arguments, *peer), config.device)
        except subprocess.CalledProcessError:  # its own message is on the terminal
            failed.append(name)
            continue
        for row in benchmark.rows(lines):
            print(json.dumps({"benchmark": name} | row._asdict() | {"device": kind}), flush=True)
            rows.append(row)
    if not config.json:
        Console().print(table(rows, kind))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    return rows


def table(rows: list[Row], kind: str) -> Table:
    found = Table("work", "target", "measured", "", title=f"Benchmarks on {kind}")
    for row in rows:
        found.add_row(row.name, row.target, f"{row.measured:.3g}", "met" if row.met else "missed")
    return found


if __name__ == "__main__":
    main()
