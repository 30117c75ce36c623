"""A batch of samples: which of its leaves count samples, how many there are, parts of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def has_samples(leaf: Any, num_samples: int) -> bool:
    """Whether the leading axis of a leaf of a batch counts its samples.

    It does in every array; typed PRNG keys have one for each sample or are passed whole, like 0-d leaves.
    """
    return np.ndim(leaf) > 0 and (not _is_key(leaf) or np.shape(leaf)[0] == num_samples)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def map_samples(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with a function applied to every leaf that has samples; the others are kept."""
    num_samples = batch_size(batch)
    return jax.tree.map(lambda leaf: function(jnp.asarray(leaf)) if has_samples(leaf, num_samples) else leaf, batch)


def take_samples(batch: Any, start: int, stop: int) -> Any:
    """The samples `start` to `stop` of a batch; leaves without samples are kept whole.

    Raises:
        ValueError: there are as many keys that are kept whole as samples are taken, so that each would get one.
    """
    num_samples = batch_size(batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if _is_key(leaf) and not has_samples(leaf, num_samples) and has_samples(leaf, stop - start):
            raise ValueError(
                f"`batch`{jax.tree_util.keystr(path)} holds {stop - start} PRNG keys for {num_samples} samples, of "
                f"which {stop - start} are looked at alone: pass one key a sample, or one and split it in the loss"
            )
    return map_samples(lambda x: x[start:stop], batch)


def batch_size(batch: Any) -> int:
    """Number of samples of a batch.

    Raises:
        ValueError: no leaf has a leading axis, the leading axes differ, the batch is empty, or a leaf is a raw key.
    """
    sizes, keys = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        where = f"`batch`{jax.tree_util.keystr(path)}"
        if np.shape(leaf) == (2,) and getattr(leaf, "dtype", None) == np.uint32:
            raise ValueError(f"{where} looks like a raw uint32 PRNG key; pass a typed key, `jax.random.key(seed)`")
        if np.ndim(leaf) > 0:
            (keys if _is_key(leaf) else sizes)[where] = np.shape(leaf)[0]
    sizes = sizes or keys
    if not sizes:
        raise ValueError("`batch` has no array with a leading sample axis")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {n}" for where, n in sizes.items())
        raise ValueError(f"every leaf of `batch` must have the samples as its leading axis, but {listed}")
    (num_samples,) = set(sizes.values())
    if num_samples == 0:
        raise ValueError("`batch` is empty: it holds 0 samples")
    return num_samples
