"""A growing run on digits that saves after every step and goes on from what it finds; `test_killed.py` kills it.

python tests/support/killed_run.py FOLDER STEPS
"""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import tinyjax
from tinyjax import data


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch.image.reshape(-1, 64) @ params["w"] + params["b"])
    logits = hidden @ params["u"] + params["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def init(width):
    rng = np.random.default_rng(0)
    shapes = {"w": (64, width), "b": (width,), "u": (width, 10), "c": (10,)}
    return {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}


def digits():
    """Those of scikit-learn, read from its file: importing the package takes longer than all else here."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    rows = np.loadtxt(Path(package) / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.float32)
    return data.Batch(rows[:, :64].reshape(-1, 8, 8, 1) / 16, rows[:, 64].astype(np.int32))


def batches(first, last):
    """From the position of a step alone: an epoch has 14 batches of 128."""
    samples = digits()
    for epoch in range(first // 14, -(-last // 14)):
        for index, batch in enumerate(data.batches(samples, batch_size=128, seed=0, epoch=epoch)):
            if first <= 14 * epoch + index < last:
                yield batch


def main(folder, steps):
    key, start, progress = jax.random.key(0), 0, {}
    optimizer, params = tinyjax.with_birth(optax.adam(3e-3)), init(4)
    if any(path.name.isdecimal() for path in folder.glob("*")):
        saved = tinyjax.restore(folder, optimizer, like=params)
        params, start, key, progress = saved.params, saved.step, saved.key, saved.progress()
        assert saved.position == divmod(start, 14)
    # 4 -> 12 neurons on the way, and from 8 to 16 slots; drawn, so that they depend on the key that was saved.
    records = tinyjax.fit(
        loss_fn,
        params,
        batches(start, steps),
        optimizer,
        tinyjax.every(steps // 5, 2, final=12),
        key,
        num_neurons=2,
        growth_samples=256,
        method=tinyjax.methods.random0,
        update=None,
        fill=None,
        policy=tinyjax.multiple_of(8),
        **progress,
    )
    with tinyjax.stop_on_interrupt() as stopped:
        for record in records:
            tinyjax.save(folder, record, key=key, position=divmod(record.step, 14))
            print(record.step, flush=True)
            if stopped():
                raise SystemExit(f"stopped after step {record.step}; run the same command to go on")
    last = tinyjax.restore(folder, optimizer)
    assert last.step == steps
    np.savez(folder / "final.npz", *jax.tree.leaves((last.params, last.opt_state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
