"""Collects the results of all experiments into RESULTS.md, with figures drawn from the result files alone.

    python -m experiments.report                        # a few seconds; runs nothing

Every item of the paper is listed: the command, what the paper says, what was measured, and whether it is reproduced. A
table gives the verdicts, the sections below it what was measured, script by script, with its figure. An item without a
result file is listed as not run.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.harness import FOLDER, Finding, Results, read, save_figure

PRESET = "cpu"


class Item(NamedTuple):
    """An item of the paper.

    Attributes:
        name: as in `Finding.item`.
        script: that measures it.
        paper: what the paper says.
    """

    name: str
    script: str
    paper: str


ITEMS = (
    Item(
        "Appendix A.4, Figure 9",
        "bottleneck",
        "2 sin x + x by a x + b: no update improves all four points; by hand, psi is 4.8 of 8",
    ),
    Item("Figure 2", "bottleneck", "the gradient's move is not the best one of the tangent space (a drawing)"),
    Item("Definition 3.1 over training", "bottleneck", "no number"),
    Item("Proposition 4.1", "convergence", "each neuron lowers the loss at least by 1 - (dm/dM)^2 / (n^3 d')"),
    Item("Appendix D.6", "convergence", "n neurons fit n points exactly, and each addition lowers the loss"),
    Item("Proposition 4.2", "convergence", "completed TINY reaches 0 after at most n additions, almost surely"),
    Item("Appendix D.3", "convergence", "a random direction gains about 1/d"),
    Item("Section 4, the stuck case", "convergence", "TINY can be stuck without correlations; completion is the cure"),
    Item("Figure 8", "pure_growth", "CIFAR-100, ResNet: TINY more than 17 %, Random about 1 % (chance)"),
    Item("Appendix E.1, variance", "estimation", "E|(A_n - A) Q^(1/2)|^2 = k sigma^2 / n for n well above k"),
    Item("Appendix E.1, batch size", "estimation", "n = c (SW)^2 / P 2^kappa, c = 0.001 (figure 5) or 0.01 (figure 8)"),
    Item("Appendix E.1, fresh samples", "estimation", "n below the number of inputs would overfit; no number"),
    Item("Appendix C.4", "estimation", "problems 7 and 8 differ in general, not for few or very many samples"),
    Item("Lemma C.2, equation 9 for convolutions", "estimation", "psi falls at least by the sum of lambda^2"),
    Item("Appendix E.5, dense", "cost", "matrices M' S / T M, SVD S^2 W / T M P of training; SVD negligible"),
    Item("Appendix E.5, convolutional", "cost", "the same"),
    Item("Table 5, time", "cost", "GPU days, TINY / GradMax: 0.13 / 0.12 and 0.28 / 0.26"),
    Item("Methods compared, digits", "compare", "no number"),
    Item("Methods compared, mnist5k", "compare", "no number"),
    Item("Methods compared, digits, thin ResNet-18", "compare_resnet", "no number; see figure 5"),
    Item("LoRA ranks grown", "lora", "beyond the paper"),
    Item("A transformer grown under a budget", "transformer", "beyond the paper"),
    Item("Figure 5", "growth_curves", "test accuracy against parameters while growing, TINY above GradMax"),
    Item("Figure 6", "growth_curves", "at s = 1/64, Delta t = 1 TINY has converged when the growth ends, GradMax not"),
    Item("Figure 7", "growth_curves", "extra training: GradMax needs twice as much as TINY"),
    Item(
        "Table 1",
        "growth_curves",
        "after growth / converged, s = 1/4: TINY 67.2 / 70.3 and 70.4 / 70.9, GradMax 65.1 / 67.0 and 68.6 / 69.0; "
        "s = 1/64: TINY 65.8 / 69.5 and 68.1 / 68.7, GradMax 45.0 / 57.0 and 56.8 / 58.4; reference 72.8",
    ),
    Item("Table 1, a control", "growth_curves", "no number"),
    Item("Figure 13", "growth_curves", "figure 6 for all settings"),
    Item("Figure 14", "growth_curves", "figure 7 for TINY, all settings"),
    Item("Figure 15", "growth_curves", "figure 7 for GradMax, all settings"),
    Item("Figure 16", "growth_curves", "GradMax with the norm sqrt(1e-3)"),
    Item("Table 4", "growth_curves", "s = 1/64, Delta t = 1, converged: TINY 68.7, GradMax 57.7"),
    Item("Table 5, accuracy", "growth_curves", "CIFAR-100: TINY 65.8 and 68.1, GradMax 45.0 and 56.8, NORTH 55.7"),
    Item("Where to grow, sites of six kinds", "ranking", "no number"),
)
NOT_RUN = "not run"


def collect(folder: Path) -> dict[str, Results]:
    """The newest results of every script that has a file, by the script's name."""
    found = {}
    for script in dict.fromkeys(item.script for item in ITEMS):
        path = folder / f"{script}-{PRESET}.jsonl"
        if path.is_file():
            found[script] = read(path)
    return found


def report(results: dict[str, Results], figures: Path) -> str:
    """The text of RESULTS.md; draws a figure for every script."""
    findings: dict[str, Finding] = {}
    sections = []
    for script, found in results.items():
        experiment = importlib.import_module(module(script)).EXPERIMENT
        of_script = {finding.item: finding for finding in experiment.findings(found.rows)}
        save_figure(figures / f"{script}-{PRESET}.png", experiment.draw(found.rows))
        sections += [
            f"## {script}",
            f"`{command(script)}`: {about(found)}",
            f"![{script}](figures/{script}-{PRESET}.png)",
            *(entry(item, of_script[item.name]) for item in ITEMS if item.name in of_script),
        ]
        findings |= of_script
    rows = [row(item, findings.get(item.name)) for item in ITEMS]
    lines = [
        "# Results",
        "Written by `python -m experiments.report` from `results/*.jsonl`, where config, seeds and versions of every "
        "run are. ± is one standard deviation over seeds, behind a signed difference its standard error. The machine "
        "was shared: times are an order of magnitude. `--preset paper` of a script is the paper's own setting on "
        "CIFAR-100, which needs a GPU and was not run.",
        "\n".join(["| paper | script | verdict at `cpu` scale |", "|---|---|---|", *rows]),
        *sections,
    ]
    return "\n\n".join(lines) + "\n"


def module(script: str) -> str:
    """The module of a script, in whichever folder it lies."""
    (path,) = FOLDER.glob(f"*/{script}.py")
    return f"experiments.{path.parent.name}.{script}"


def command(script: str) -> str:
    return f"python -m {module(script)} --preset {PRESET}"


def about(found: Results) -> str:
    """Time, device, versions and seeds of a run."""
    header = found.header
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    seeds = header["config"].get("seeds")
    return f"{header['seconds']:.0f} s, {header['device']}; {versions}" + (f"; seeds {seeds}" if seeds else "")


def row(item: Item, finding: Finding | None) -> str:
    """A line of the table."""
    script = f"[{item.script}](#{item.script})" if finding else f"`{item.script}`"
    cells = (item.name, script, finding.verdict if finding else NOT_RUN)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def entry(item: Item, finding: Finding) -> str:
    """An item below its script's figure: the paper's number, ours, the verdict."""
    first, *others = pieces(finding.ours)
    lines = [f"**{item.name}**", "", f"- Paper: {item.paper}", f"- Measured: {first}"]
    return "\n".join([*lines, *(f"  - {other}" for other in others), f"- Verdict: {finding.verdict}"])


def pieces(text: str) -> list[str]:
    """A list that is written with semicolons, one entry each; those in brackets separate nothing."""
    depth, found = 0, [""]
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == ";" and not depth:
            found.append("")
        else:
            found[-1] += character
    return [piece.strip() for piece in found]


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of `results`, `figures` and RESULTS.md")
    options = parser.parse_args(arguments)
    text = report(collect(options.out / "results"), options.out / "figures")
    (options.out / "RESULTS.md").write_text(text)
    print(f"Wrote {options.out / 'RESULTS.md'}")
    return text


if __name__ == "__main__":
    main()
