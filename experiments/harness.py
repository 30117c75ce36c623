"""Results of an experiment: JSON lines with config, seed and versions, and figures drawn from nothing else.

The first line of a file says what was run (config, versions, device, seconds), every further line is one measurement.
`run` is the command line that all experiments of the paper share: it measures, writes, draws, prints.
"""

import argparse
import fnmatch
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
FOLDER = Path(__file__).parent
PACKAGES = ("tinyjax-growth", "jax", "jaxlib", "flax", "optax", "numpy")
DIGITS = 6


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        item: of the paper, as in `report.ITEMS`.
        ours: what was measured.
        verdict: "reproduced", "differs: ..." or another short judgement.
    """

    item: str
    ours: str
    verdict: str


class Results(NamedTuple):
    """A file of results.

    Attributes:
        header: `experiment`, `preset`, `config`, `versions`, `device`, `seconds`.
        rows: the measurements.
    """

    header: Row
    rows: list[Row]


class Experiment(NamedTuple):
    """An experiment of the paper.

    Attributes:
        name: of the script and of its files.
        presets: configs by name, NamedTuples.
        measure: from a config to rows; each row has a `part`, and a `seed` where there are several.
        draw: from rows to a figure.
        findings: from rows to lines of the report.
        parts: from a config to what can be measured on its own, by name; `measure` then is all of them in order. Parts
            have files of their own, so that a command that was stopped goes on with those that are missing.
    """

    name: str
    presets: Mapping[str, Any]
    measure: Callable[[Any], Iterator[Row]]
    draw: Callable[[list[Row]], "Figure"]
    findings: Callable[[list[Row]], list[Finding]]
    parts: Callable[[Any], Mapping[str, Callable[[], list[Row]]]] | None = None


def run(experiment: Experiment, doc: str | None, arguments: Sequence[str] | None = None) -> Results:
    """The command line of an experiment.

    Writes `<out>/results/<name>-<preset>.jsonl` once all is measured, then `<out>/figures/<name>-<preset>.png`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(experiment.presets), default="cpu")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of `results` and `figures`")
    if experiment.parts is not None:
        parser.add_argument(
            "--only", metavar="PATTERN", help="measure only the parts that match, such as 'TINY 1/64 *'"
        )
    options = parser.parse_args(arguments)
    config = experiment.presets[options.preset]
    path = options.out / "results" / f"{experiment.name}-{options.preset}.jsonl"
    began = time.perf_counter()
    header = {
        "experiment": experiment.name,
        "preset": options.preset,
        "config": config._asdict(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": device(),
    }
    rows: list[Row] = []
    if experiment.parts is None:
        for row in experiment.measure(config):
            rows.append(row)
            print(brief(row), flush=True)
        header["seconds"] = time.perf_counter() - began
    else:
        folder = path.with_suffix(".parts")
        found = measure_parts(experiment.parts(config), folder, header, options.only)
        if found is None:
            print(f"Some parts are still missing in {folder}; run again without --only, or with another one")
            return Results(header, [])
        rows = [row for part in found for row in part.rows]
        header["seconds"] = sum(part.header["seconds"] for part in found)
        header["device"] = found[0].header["device"]
    write(path, Results(header, rows))
    results = read(path)  # the figure shows what the file holds
    figure = options.out / "figures" / f"{path.stem}.png"
    save_figure(figure, experiment.draw(results.rows))
    for finding in experiment.findings(results.rows):
        print(f"{finding.item}: {finding.ours} -> {finding.verdict}")
    print(f"Wrote {path} and {figure} in {header['seconds']:.0f} s")
    return results


def device() -> str:
    """What this process computes on."""
    first = jax.devices()[0]
    return f"{os.cpu_count()} cores, " + (first.platform if first.platform == "cpu" else first.device_kind)


def measure_parts(
    parts: Mapping[str, Callable[[], list[Row]]], folder: Path, header: Row, only: str | None
) -> list[Results] | None:
    """The results of all parts, in order: read back where they are there, else measured; None if some are left out."""
    known: list[Results] = []
    for name, part in parts.items():
        path = folder / (re.sub(r"[^\w.]+", "-", name) + ".jsonl")
        if not path.is_file():
            if only is not None and not fnmatch.fnmatchcase(name, only):
                continue
            began = time.perf_counter()
            rows = part()
            write(path, Results(header | {"seconds": time.perf_counter() - began}, rows))
            print(f"{name}: {brief(rows[-1])}", flush=True)
        results = read(path)
        if results.header["config"] != plain(header["config"]):
            raise SystemExit(f"{path} was measured with another config: move it away")
        known.append(results)
    return known if len(known) == len(parts) else None


def write(path: Path, results: Results) -> None:
    """Writes a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(plain(line), allow_nan=False) for line in (results.header, *results.rows)]
    staged = path.with_suffix(".part")
    staged.write_text("\n".join(lines) + "\n")
    staged.replace(path)


def read(path: Path) -> Results:
    """A file of results."""
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return Results(header, rows)


def save_figure(path: Path, figure: "Figure") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def plain(value: Any) -> Any:
    """Numbers, arrays and containers as JSON has them: six digits, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def column(rows: Iterable[Row], field: str) -> np.ndarray:
    """The values of a field, NaN where it is missing."""
    return np.array([np.nan if row.get(field) is None else row[field] for row in rows], float)


def distinct(rows: Iterable[Row], field: str) -> list[Any]:
    """The values that occur in a field, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows if field in row))


def spread(values: Any, digits: int = 3, scale: float = 1.0) -> str:
    """Mean and standard deviation of several seeds, such as `0.952 ± 0.004`."""
    values = scale * np.asarray(values, float)
    mean = f"{np.mean(values):.{digits}f}"
    return mean if values.size < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def brief(row: Row) -> str:
    """A row on one line of the terminal; what is long is left to the file."""
    cells = ((name, plain(value)) for name, value in row.items())
    return "  ".join(f"{name} {value}" for name, value in cells if not isinstance(value, list | dict))
