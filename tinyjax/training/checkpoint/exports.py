"""A grown network in one file that NumPy reads."""

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.core.params import Params, named_leaves
from tinyjax.core.site import Site, Sites
from tinyjax.surgery import compact
from tinyjax.training.checkpoint.packing import on_host

HEADER = "__tinyjax__"


def export(path: str | os.PathLike, params: Params, sites: Sites | Sequence[Site] | Site) -> dict[str, int]:
    """Writes the network at its exact widths as one `.npz`, which needs no tinyjax and no pickle to be read.

    The file holds every leaf under its path, and under `__tinyjax__` a JSON text: `format`, `widths` by site name, from
    which a model that checks shapes is rebuilt, and `dtypes` of the leaves. What NumPy has no type for is stored in one
    that holds it exactly: bfloat16 and 8-bit floats as float32, 4-bit integers as int8, typed PRNG keys as their data.

    Args:
        path: the file, ending in `.npz`; replaced in one go if it exists.
        params: the parameters the sites were found in, concrete.
        sites: the sites of the network.

    Returns:
        The widths.

    Raises:
        ValueError: another ending; and as `compact`.

    Example:
        >>> widths = tinyjax.export("net.npz", params, sites)
        >>> file = np.load("net.npz", allow_pickle=False)
        >>> file["params/hidden_1/kernel"].shape
        (4, 4)
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz, got {path.name}")
    small, widths = compact(params, sites)
    leaves = named_leaves(small)
    dtypes = {name: str(leaf.dtype) for name, leaf in leaves.items()}
    header = json.dumps({"format": 1, "widths": widths, "dtypes": dtypes})
    arrays = {HEADER: np.array(header)} | {name: _plain(leaf) for name, leaf in leaves.items()}
    content = io.BytesIO()  # a ZIP file that runs out of room would fail again while it is closed
    np.savez(content, allow_pickle=False, **arrays)
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content.getbuffer())
    except OSError as error:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
        raise OSError(f"could not export {path}: {error}; what was there before is as it was") from None
    return widths


def _replace(path: Path, content: memoryview) -> None:
    """Writes a file in one go: all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _plain(leaf: jax.Array) -> np.ndarray:
    """The leaf in a dtype of NumPy's own."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = on_host(leaf)
    if array.dtype.isbuiltin == 1:
        return array
    return array.astype(np.float32 if jnp.issubdtype(array.dtype, jnp.floating) else np.int8)
