"""Grow a small network while it trains, next to the controls it has to beat.

    python -m experiments.grow                                 # digits, about a minute on 2 CPU cores
    python -m experiments.grow --dataset mnist5k --seeds 5     # the table in the README
    python -m experiments.grow --model resnet18 --dataset mnist5k --preset cpu
    python -m experiments.grow --model resnet18 --dataset cifar100 --preset paper     # a GPU, hours

`--model mlp`: two hidden layers start at width 2 and are grown to 64 in the first quarter of training (Adam, 3e-3).
`--model resnet18`: the ResNet-18 of the paper, thin inside its eight blocks (1, 1, 2, 2, 4, 4, 8, 8 channels), grown
one block at a time by algorithm 1; `--preset cpu` has an eighth of the paper's channels, `paper` is figure 5's.
A growth: best update of the existing weights at an amplitude found by line search, new neurons in TINY's directions
with zero fan-out (`tiny0`), random filler beyond the rank. All runs share data, batches, steps and optimizer:

    grown           the recipe
    random0 + dW*   the same with random instead of TINY's directions
    fixed           the final width from the start
    fixed + dW*     the same, with the best-update steps of the growing network at the same times (mlp)

A ResNet says first how long its growing run will take, once compiled, from what its first growth and its first steps
take. A bar shows the time left, every growth leaves a line. Ctrl-C finishes the step and saves; the same command with
`--resume` goes on, also after a crash, and ends with the same network as if it had never been stopped; where nothing
was saved yet it starts from the beginning and says so.

Writes log.jsonl, figure.png and final.npz (the compact parameters of the grown network) to `--out`. The test split is
reported, never used to choose anything. In the table of growths, psi is mean |V_goal|^2 before the growth, gain is
what the new neurons can take away from it after the best update (in the linear model; held out: on samples they were
not computed from), gamma is the amplitude of the neurons and of the update; accuracies are those after the next step.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import rich.progress as bars

import tinyjax
from experiments.demo import mlp, resnet
from experiments.demo.calibration import calibrated, estimate
from experiments.demo.runs import METHODS, Compilations, Refused, Run, follow
from experiments.demo.tables import CONSOLE, growth_table, result_table, verdict, write_results

MODELS = {"mlp": mlp.prepare, "resnet18": resnet.prepare}
DATASETS = ("digits", "mnist5k", "cifar10", "cifar100")
OF_MLP = {"widths": [64, 64], "start": 2, "growths": 8, "epochs": None, "batch_size": 128, "learning_rate": 3e-3}
"""Options of the multilayer perceptron and their defaults; a preset sets those of the ResNet."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp")
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--method", choices=sorted(METHODS), default="tiny0")
    parser.add_argument("--preset", choices=sorted(resnet.PRESETS), help="of --model resnet18; default: cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from --seed on")
    parser.add_argument("--out", default="results")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was stopped in --out")
    dense = parser.add_argument_group("--model mlp")
    dense.add_argument("--widths", type=int, nargs="+", help="final hidden widths; default: 64 64")
    dense.add_argument("--start", type=int, help="hidden widths at the start; default: 2")
    dense.add_argument("--growths", type=int, help="default: 8")
    dense.add_argument("--epochs", type=int, help=f"default: {mlp.EPOCHS}")
    dense.add_argument("--batch-size", type=int, help="default: 128")
    dense.add_argument("--learning-rate", type=float, help="default: 3e-3")
    config = parser.parse_args(arguments)
    if config.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {config.seeds}")
    (_complete_mlp if config.model == "mlp" else _complete_resnet)(parser, config)
    return config


def _complete_mlp(parser: argparse.ArgumentParser, config: argparse.Namespace) -> None:
    if config.preset is not None:
        parser.error("--preset is of --model resnet18; the options of --model mlp say it all")
    for name, value in OF_MLP.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.epochs is None:
        config.epochs = mlp.EPOCHS.get(config.dataset, 20)
    if min(config.widths) < config.start or config.start < 1:
        parser.error(f"--start {config.start} must be between 1 and the smallest of --widths {config.widths}")
    for name in ("growths", "epochs", "batch_size"):
        if getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.learning_rate <= 0:
        parser.error(f"--learning-rate must be positive, got {config.learning_rate}")


def _complete_resnet(parser: argparse.ArgumentParser, config: argparse.Namespace) -> None:
    for name in OF_MLP:
        if getattr(config, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of --model mlp; --preset sets it for --model resnet18")
    if config.dataset == "digits":
        parser.error("the 8x8 images of digits are too small for --model resnet18: use --dataset mnist5k")
    config.preset = config.preset or "cpu"


def checkpoints(config: argparse.Namespace) -> Path:
    """The folder for the checkpoints of a command, which holds those of this command or none.

    Raises:
        SystemExit: it holds a run that nobody asked to go on with, or that of another command.
    """
    folder = Path(config.out) / "checkpoints"
    asked = {name: value for name, value in vars(config).items() if name not in ("out", "resume")}
    note = folder / "command.json"
    if note.is_file():
        if not config.resume:
            raise SystemExit(
                f"{folder} holds a run that was stopped: go on with --resume, choose another --out, or remove it"
            )
        started = json.loads(note.read_text())
        changed = [
            f"--{name.replace('_', '-')} {started.get(name)}" for name in asked if started.get(name) != asked[name]
        ]
        if changed:
            raise SystemExit(f"the run in {folder} was started with {', '.join(changed)}: --resume needs the same")
    elif config.resume:
        if (Path(config.out) / "log.jsonl").is_file():
            raise SystemExit(f"the run in {config.out} is finished: there is nothing to resume")
        CONSOLE.print(f"There is nothing to resume in {folder} yet: the run starts from the beginning", highlight=False)
        config.resume = False
    folder.mkdir(parents=True, exist_ok=True)
    staged = note.with_suffix(".part")
    staged.write_text(json.dumps(asked))
    staged.replace(note)
    return folder


def main(arguments: list[str] | None = None) -> dict[str, list[Run]]:
    config = parse(arguments)
    compilations = Compilations()
    try:
        task = MODELS[config.model](config)
    except (OSError, Refused) as error:  # OSError: a data set that cannot be downloaded; it says where to put it
        raise SystemExit(str(error)) from error
    saved = checkpoints(config)
    CONSOLE.print(f"{config.dataset}: {task.num_train} training samples, seed {config.seed}")
    CONSOLE.print(str(task.sites), highlight=False)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[now]}"),
    )
    note = partial(CONSOLE.print, highlight=False, soft_wrap=True)
    if task.forecast is not None and not config.resume:
        found = task.forecast()
        rates = calibrated(found, lambda: task.runs["grown"](config.seed, None))
        note(f"A growing run will take about {estimate(found, rates)}")
    results: dict[str, list[Run]] = {name: [] for name in task.runs}
    with tinyjax.stop_on_interrupt() as stopped, bars.Progress(*columns, console=CONSOLE) as progress:
        for number, name in enumerate(task.runs):
            bar = progress.add_task(name.ljust(14), total=config.seeds * task.steps, now="")

            def tick(steps: int, width: Mapping[str, int], bar: bars.TaskID = bar) -> None:
                progress.update(bar, advance=steps, now=f"widths {' '.join(map(str, width.values()))}")

            for seed in range(config.seed, config.seed + config.seeds):
                folder = saved / f"{number}-seed-{seed}"
                run = follow(task, name, seed, folder, compilations=compilations, tick=tick, note=note, stopped=stopped)
                results[name].append(run)
    CONSOLE.print(growth_table(results["grown"][0].rows))
    CONSOLE.print(result_table(results))
    CONSOLE.print(verdict(results), highlight=False)
    write_results({name: value for name, value in vars(config).items() if name != "resume"}, results)
    _remove(saved)
    return results


def _remove(saved: Path) -> None:
    """Takes the checkpoints away in one go: a part of them must never be taken for a run that was stopped."""
    finished = saved.with_name("finished")
    if finished.is_dir():  # of a process that was killed right here
        shutil.rmtree(finished)
    shutil.rmtree(saved.rename(finished))


if __name__ == "__main__":
    main()
