"""`kill -9` and Ctrl-C at random moments of a real run: it ends in the same bits as a run that was left alone."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "killed_run.py"


def start(folder, steps, cache, *, fill_cache=False):
    """The run in a process of its own. Only the unbroken run writes to the cache of compiled programs: a process that
    is killed must not leave half a program to the next one."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1"),
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    command = [sys.executable, str(SCRIPT), str(folder), str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """What the process printed last on standard error; it must have ended by itself, and well."""
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    return errors


def follow(process, steps):
    """Reads until the process has done so many steps, or has ended."""
    done = [line for _, line in zip(range(steps), process.stdout)]
    return int(done[-1]) if done else None


def same(folder, other):
    with np.load(folder / "final.npz", allow_pickle=False) as a, np.load(other / "final.npz", allow_pickle=False) as b:
        assert a.files == b.files and len(a.files) > 10
        for name in a.files:
            assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (
                b[name].dtype,
                b[name].shape,
                b[name].tobytes(),
            )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    @functools.cache
    def run(steps):
        root = tmp_path_factory.mktemp(f"unbroken{steps}")
        finish(start(root / "run", steps, root / "cache", fill_cache=True))
        return root

    return run


def kill_and_resume(folder, steps, cache, kills, rng):
    """Kills the run so many times, each time some steps and some milliseconds (a save takes some) after it went on."""
    killed = 0
    reached = 0
    while killed < kills:
        left = kills - killed
        process = start(folder, steps, cache)
        step = follow(process, rng.randint(1, max(1, (steps - 2 - reached) // (2 * left))))
        assert step is not None, process.stderr.read()
        assert step > reached, "a step that had been saved was done again"
        reached = step
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed += 1
    finish(start(folder, steps, cache))


def test_ten_kills(unbroken, tmp_path):
    root = unbroken(30)
    kill_and_resume(tmp_path / "run", 30, root / "cache", 10, random.Random(0))
    same(tmp_path / "run", root / "run")


@pytest.mark.slow
def test_a_hundred_kills(unbroken, tmp_path):
    root = unbroken(420)
    kill_and_resume(tmp_path / "run", 420, root / "cache", 100, random.Random(1))
    same(tmp_path / "run", root / "run")


def test_an_interrupt_finishes_the_step_and_says_how_to_go_on(unbroken, tmp_path):
    root = unbroken(30)
    process = start(tmp_path / "run", 30, root / "cache")
    follow(process, 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 1 and "run the same command to go on" in errors and "Traceback" not in errors
    finish(start(tmp_path / "run", 30, root / "cache"))
    same(tmp_path / "run", root / "run")
