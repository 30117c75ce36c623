"""Tables, figure and files of `experiments.grow`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tinyjax
from experiments.demo.runs import Row, Run
from tinyjax import plot

CONSOLE = Console(width=max(Console().width, 132))  # the growth table needs that much


def growth_table(rows: list[Row]) -> Table:
    table = Table(title="Growths", box=box.SIMPLE_HEAD, padding=(0, 1))
    columns = ("#", "site", "width", "psi", "gain", "held out", "γ", "γ dW", "loss", "train", "test", "s", "compiles")
    for column in columns:
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    for number, line in enumerate((r for r in rows if "psi" in r), start=1):
        for site in line["psi"]:
            table.add_row(
                str(number),
                site,
                str(line["width"][site]),
                *(f"{line[f][site]:.3g}" for f in ("psi", "gain_predicted", "gain_held_out", "amplitude")),
                f"{line['amplitude_update'][site]:.3g}",
                f"{line['loss_before'][site]:.4f} → {line['loss_after'][site]:.4f}",
                f"{line['train_accuracy']:.3f}",
                f"{line['test_accuracy']:.3f}",
                f"{line['seconds']:.1f}",
                str(line["compiles"]),
            )
    return table


def result_table(results: dict[str, list[Run]]) -> Table:
    several = len(next(iter(results.values()))) > 1
    table = Table(
        box=box.SIMPLE_HEAD, title="After training" + (", mean (standard deviation) over seeds" if several else "")
    )
    for column in ("run", "train", "validation", "test", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, runs in results.items():
        last = [run.rows[-1] for run in runs]
        cells = []
        for field in ("train_accuracy", "validation_accuracy", "test_accuracy"):
            values = [line[field] for line in last]
            cells.append(f"{np.mean(values):.4f}" + (f" ({np.std(values, ddof=1):.4f})" if several else ""))
        table.add_row(name, *cells, f"{np.mean([line['seconds'] for line in last]):.1f}")
    return table


def verdict(results: dict[str, list[Run]]) -> str:
    """Who won on the test split, with the paired difference to the grown network."""
    test = {name: np.array([run.rows[-1]["test_accuracy"] for run in runs]) for name, runs in results.items()}
    best = max(test, key=lambda name: test[name].mean())
    grown = test.pop("grown")
    lines = [f"Best on the test split: {best}."]
    for name, values in test.items():
        difference = 100 * (grown - values)
        spread = f" ± {difference.std(ddof=1) / np.sqrt(len(difference)):.2f}" if len(difference) > 1 else ""
        lines.append(f"grown - {name}: {difference.mean():+.2f}{spread} points")
    return "\n".join(lines)


def write_results(config: Mapping[str, Any], results: dict[str, list[Run]]) -> None:
    """Everything that was written down, the figure of the first seed and the parameters of its grown network."""
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("w") as file:
        file.write(json.dumps({"config": dict(config), "jax": jax.__version__}) + "\n")
        for runs in results.values():
            for row in (row for run in runs for row in run.rows):
                file.write(json.dumps(row) + "\n")
    grown = results["grown"][0]
    tinyjax.export(out / "final.npz", grown.params, grown.sites)
    references = {name: runs[0].rows[-1]["test_accuracy"] for name, runs in results.items() if name != "grown"}
    plot.growth_curves(grown.rows, references=references).savefig(out / "figure.png", dpi=150)
    CONSOLE.print(f"Wrote log.jsonl, figure.png and final.npz to {out}/", highlight=False)
