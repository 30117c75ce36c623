"""Checkpoints as Orbax writes them: a folder a step, renamed into place when it is complete, the oldest removed.

`record` is JSON and says what the bytes in `arrays` are. Orbax restores trees by a template, and where it finds damage
in one of many arrays the reads of the others end in tracebacks: so all arrays are stored as one, of bytes, whose parts
the record describes. No name of a parameter ever becomes the name of a file.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tinyjax.training.checkpoint.packing import Leaf, digest

FORMAT = 1
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def steps(directory: str | os.PathLike) -> list[int]:
    """The complete checkpoints of a folder, oldest first."""
    import orbax.checkpoint as ocp  # here: `import tinyjax` must not pay for Orbax

    path = Path(directory)
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def write(
    directory: str | os.PathLike, step: int, record: dict[str, Any], arrays: Sequence[np.ndarray], keep: int
) -> None:
    """Stores a checkpoint; in a run of several processes all of them call this, and the first one writes.

    Raises:
        OSError: it could not be written; the checkpoints that were there still are.
    """
    import orbax.checkpoint as ocp

    # What a killed or failed save left behind goes first: it may be what fills the disk.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    # Orbax stores no empty array: one byte closes the buffer.
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays if array.size]
    buffer = np.concatenate([*flat, np.zeros(1, np.uint8)])
    sealed = {"format": FORMAT, "digest": _digest(record), "record": record}
    content = ocp.args.Composite(record=ocp.args.JsonSave(sealed), arrays=ocp.args.PyTreeSave({"bytes": buffer}))
    before = _entries(Path(directory))
    try:
        with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
            manager.save(step, args=content)
    except (OSError, ValueError) as error:  # TensorStore says with a ValueError that a disk is full
        _clear(Path(directory), before)
        raise OSError(
            f"could not save {_folder(directory, step)}: {error}; the checkpoints before it are as they were"
        ) from None


def _entries(directory: Path) -> frozenset[str] | None:
    """What a folder holds, None where there is none."""
    return frozenset(path.name for path in directory.iterdir()) if directory.is_dir() else None


def _clear(directory: Path, before: frozenset[str] | None) -> None:
    """Removes what a failed save has written, and the folder if it was not there before."""
    complete = {str(step) for step in steps(directory)}  # the save may have failed behind its own checkpoint
    for name in (_entries(directory) or frozenset()) - (before or frozenset()) - complete:
        left = directory / name
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    if before is None and directory.is_dir() and not _entries(directory):
        directory.rmdir()


def read_record(directory: str | os.PathLike, step: int) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        ValueError: it is damaged, or of a newer format.
    """
    import orbax.checkpoint as ocp

    with _says_where(directory, step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        sealed = checkpointer.restore(_folder(directory, step) / "record")
        if sealed["format"] > FORMAT:
            raise _Newer(
                f"{_folder(directory, step)} has format {sealed['format']}, this tinyjax reads up to {FORMAT}: "
                "upgrade tinyjax"
            )
        if sealed["digest"] != _digest(sealed["record"]):
            raise ValueError("its record is not what was saved")
        return sealed["record"]


def read_arrays(directory: str | os.PathLike, step: int, leaves: Sequence[Leaf]) -> list[np.ndarray]:
    """The arrays of a checkpoint, given what its record says of them.

    Raises:
        ValueError: they are damaged.
    """
    import orbax.checkpoint as ocp

    with _says_where(directory, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        buffer = checkpointer.restore(
            _folder(directory, step) / "arrays",
            item={"bytes": 0},
            restore_args={"bytes": ocp.RestoreArgs(restore_type=np.ndarray)},
        )["bytes"]
        arrays, start = [], 0
        for leaf in leaves:
            array = np.frombuffer(buffer, jnp.dtype(leaf.dtype), math.prod(leaf.shape), start).reshape(leaf.shape)
            if digest(array) != leaf.digest:
                raise ValueError(f"the array `{leaf.name}` is not what was saved")
            arrays.append(array)
            start += array.nbytes
        return arrays


class _Newer(Exception):
    """Kept apart from damage while a record is read."""


@contextmanager
def _says_where(directory: str | os.PathLike, step: int) -> Iterator[None]:
    try:
        yield
    except _Newer as error:
        raise ValueError(str(error)) from None
    except _UNREADABLE as error:
        others = [str(other) for other in steps(directory) if other != step]
        cure = f"remove it, or pass `step={others[-1]}`, to go on from there" if others else "there is no other one"
        raise ValueError(f"the checkpoint {_folder(directory, step)} is damaged ({error}); {cure}") from error


def _folder(directory: str | os.PathLike, step: int) -> Path:
    return Path(directory).absolute() / str(step)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
