"""A whole growing run of tinyjax against the same run of gromo 0.1.0, the library of the paper's authors.

    python -m venv .venv-gromo && .venv-gromo/bin/pip install torch==2.13.0 gromo==0.1.0
    python -m experiments.bench.versus_gromo --gromo .venv-gromo/bin/python --dataset mnist5k

A multilayer perceptron with two hidden ReLU layers grows from 2 to 64 neurons, eight at a time, one layer after the
other, an epoch of Adam between growths (3e-3, batches of 128 in the same order). Both libraries use TINY's neurons and
best update, statistics on three quarters of the training set and a line search on the last quarter. Each library runs
in processes of its own, turn by turn, so that a busy machine slows both; the persistent compilation cache is off, and
each library has the settings that suit it: threads that sleep while they wait, and for tinyjax a compiler told to
hurry (`COMPILER`).

The last line has, for each library, `cold_s` (first run of a process, compilation included, imports not), `warm_s`
(median of the later runs), accuracies and widths, and the ratios tinyjax / gromo.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tinyjax
from tinyjax import data
from tinyjax.models import MLP

METHODS = {"tiny": tinyjax.methods.tiny, "tiny0": tinyjax.methods.tiny0}
LIBRARIES = ("tinyjax", "gromo")
# A growing run is short: LLVM's last passes and XLA's newer emitters (which JAX 0.12 cannot switch off) cost more time
# than their code saves.
COMPILER: dict[str, bool | int | str] = {"xla_backend_optimization_level": 1}
if jax.__version_info__ < (0, 12):
    COMPILER["xla_cpu_use_fusion_emitters"] = False
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # by device: JAX's name, and PyTorch's
PEER = Path(__file__).with_name("peer_gromo.py")


class Programs(NamedTuple):
    """What a process compiles once; `traces` has an entry for every program of a growth."""

    sites: tinyjax.Sites
    init: Callable[..., Any]
    inputs: Callable[..., Any]
    epoch: Callable[..., Any]
    grow: Callable[..., Any]
    accuracy: Callable[..., jax.Array]
    traces: list[Any]


def build(train: data.Batch, config: dict[str, Any]) -> Programs:
    model = MLP(widths=(config["final"],) * 2, num_classes=10)

    def loss_fn(params: Any, batch: data.Batch) -> jax.Array:
        logits: Any = model.apply(params, batch.image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()

    shapes = jax.eval_shape(model.init, jax.random.key(0), train.image[:1])
    sites = tinyjax.find_sites(loss_fn, shapes, train).growable
    optimizer = tinyjax.with_birth(optax.adam(config["learning_rate"]))

    def init(key: jax.Array) -> Any:
        params = tinyjax.thin(model.init(key, train.image[:1]), sites, config["start"])
        return params, optimizer.init(params)

    grow = tinyjax.make_grow_step(
        loss_fn, sites, num_neurons=config["neurons"], method=METHODS[config["method"]], optimizer=optimizer
    )

    traces: list[Any] = []

    def traced_grow(*args: Any) -> Any:
        traces.append(sites.names)
        return grow(*args)

    def accuracy(params: Any, batch: data.Batch) -> jax.Array:
        logits: Any = model.apply(params, batch.image)
        return jnp.mean(logits.argmax(-1) == batch.label)

    options = COMPILER if config["device"] == "cpu" else None
    return Programs(
        sites,
        jax.jit(init, compiler_options=options),
        jax.jit(partial(tinyjax.growth.decompose_inputs, loss_fn, sites=sites), compiler_options=options),
        jax.jit(tinyjax.train_epoch(loss_fn, optimizer), donate_argnums=(0, 1), compiler_options=options),
        jax.jit(traced_grow, donate_argnums=(0, 2), compiler_options=options),
        jax.jit(accuracy),
        traces,
    )


def run(programs: Programs, splits: dict[str, data.Batch], order: jax.Array, config: dict[str, Any]) -> dict[str, Any]:
    sites, train, final = programs.sites, splits["train"], config["final"]
    seconds = {"train": 0.0, "growth": 0.0}
    began = time.perf_counter()
    params, opt_state = programs.init(jax.random.key(config["seed"]))
    inputs = programs.inputs(params, train)
    widths = dict.fromkeys(sites.names, config["start"])
    growths = 0
    for epoch in range(config["epochs"]):
        turns = [sites.names[i] for i in ((epoch - 1) % 2, epoch % 2) if widths[sites.names[i]] < final]
        if epoch and turns:
            start, name = time.perf_counter(), turns[0]
            added = {name: min(config["neurons"], final - widths[name])}
            wanted = {site: jnp.int32(added.get(site, 0)) for site in sites.names}
            params, opt_state, info = programs.grow(params, train, opt_state, jax.random.key(epoch), wanted, inputs)
            widths[name] = int(info.width[name])
            growths += 1
            seconds["growth"] += time.perf_counter() - start
        start = time.perf_counter()
        params, opt_state, losses = programs.epoch(params, opt_state, train, order[epoch])
        jax.block_until_ready(losses)
        seconds["train"] += time.perf_counter() - start
    total = time.perf_counter() - began
    accuracy = {name: float(programs.accuracy(params, split)) for name, split in splits.items()}
    return {
        "seconds": total,
        "parts": seconds,
        "accuracy": accuracy,
        "widths": list(widths.values()),
        "growths": growths,
        "programs": len(programs.traces),
    }


def tinyjax_process(path: str, config: dict[str, Any]) -> None:
    """What the child process does: prints one JSON line a repetition."""
    arrays = np.load(path)
    splits = {
        name: jax.tree.map(jnp.asarray, data.Batch(arrays[f"{name}_x"], arrays[f"{name}_y"]))
        for name in ("train", "test")
    }
    began = time.perf_counter()
    programs = build(splits["train"], config)
    building = time.perf_counter() - began
    for repetition in range(config["repetitions"]):
        line = run(programs, splits, jnp.asarray(arrays["order"]), config)
        line["seconds"] += 0 if repetition else building
        print(json.dumps({"library": "tinyjax", "repetition": repetition} | line), flush=True)


def prepare(path: Path, config: argparse.Namespace) -> None:
    """Writes standardised arrays and the order of the samples, the same for both libraries."""
    dataset = data.load(config.dataset)
    mean, std = data.channel_moments(dataset.train)
    arrays = {}
    for name in ("train", "test"):
        split = data.as_batch(getattr(dataset, name), mean=mean, std=std)
        arrays |= {f"{name}_x": split.image.reshape(len(split.label), -1), f"{name}_y": split.label}
    count, size = len(arrays["train_y"]), config.batch_size
    orders = [data.epoch_order(config.seed, epoch, count) for epoch in range(config.epochs)]
    arrays["order"] = np.stack([order[: count - count % size].reshape(-1, size) for order in orders]).astype(np.int32)
    np.savez(path, **arrays)


def measure(config: argparse.Namespace) -> dict[str, Any]:
    libraries = [config.only] if config.only else list(LIBRARIES)
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in libraries}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        prepare(arrays, config)
        settings = json.dumps({k: v for k, v in vars(config).items() if k not in ("gromo", "only", "json")})
        commands = {
            "tinyjax": [
                sys.executable,
                "-m",
                __spec__.name if __spec__ else __name__,
                "--child",
                str(arrays),
                settings,
            ],
            "gromo": [config.gromo, str(PEER), str(arrays), settings],
        }
        # PyTorch's threads and those of JAX's LAPACK spin while they wait unless told not to: gromo is then up to eight
        # times slower. PyTorch's own matrix products do not read the second variable.
        environment = os.environ | {
            "OMP_WAIT_POLICY": "passive",
            "OPENBLAS_NUM_THREADS": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "JAX_PLATFORMS": PLATFORMS[config.device],
        }
        for _ in range(config.processes):
            for name in libraries:
                out = subprocess.run(commands[name], env=environment, check=True, stdout=subprocess.PIPE, text=True)
                for text in out.stdout.splitlines():
                    lines[name].append(json.loads(text))
                    if not config.json:
                        print(text, flush=True)
    return summary(lines)


def summary(lines: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Cold and warm seconds, accuracies and widths by library, and the ratios of the two."""
    result: dict[str, Any] = {}
    for name, found in lines.items():
        parts = [line["parts"] for line in found if line["repetition"]] or [found[0]["parts"]]
        result[name] = {
            "cold_s": float(np.median([line["seconds"] for line in found if not line["repetition"]])),
            "warm_s": float(np.median([line["seconds"] for line in found if line["repetition"]] or [np.nan])),
            "warm_parts_s": {part: float(np.median([p[part] for p in parts])) for part in parts[0]},
            "train_accuracy": float(np.mean([line["accuracy"]["train"] for line in found])),
            "test_accuracy": float(np.mean([line["accuracy"]["test"] for line in found])),
            "widths": found[-1]["widths"],
            "growths": found[-1]["growths"],
            "programs": found[-1].get("programs"),
        }
    if len(result) == 2:
        ours, peer = result["tinyjax"], result["gromo"]
        result["ratio"] = {kind: ours[kind] / peer[kind] for kind in ("cold_s", "warm_s")}
    return result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gromo", default=".venv-gromo/bin/python", help="the Python that has torch and gromo")
    parser.add_argument("--only", choices=LIBRARIES)
    parser.add_argument("--dataset", choices=("digits", "mnist5k"), default="mnist5k")
    parser.add_argument("--device", choices=sorted(PLATFORMS), default="cpu", help="of both libraries")
    parser.add_argument("--method", choices=sorted(METHODS), default="tiny", help="tinyjax's; gromo's is its TINY")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--start", type=int, default=2)
    parser.add_argument("--final", type=int, default=64)
    parser.add_argument("--neurons", type=int, default=8, help="added at a time")
    parser.add_argument("--amplitudes", type=int, default=16, help="of gromo's line search; tinyjax extends its own")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3, help="runs a process; the first one is the cold one")
    parser.add_argument("--processes", type=int, default=2, help="of each library, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    config = parser.parse_args(arguments)
    if config.only != "tinyjax" and not Path(config.gromo).exists():
        parser.error(
            f"no Python at {config.gromo}. Give gromo an environment of its own: python -m venv .venv-gromo && "
            ".venv-gromo/bin/pip install torch==2.13.0 gromo==0.1.0, or compare nothing with --only tinyjax"
        )
    return config


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    result = measure(parse(arguments))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        tinyjax_process(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
