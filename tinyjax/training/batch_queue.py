"""Batches in order, of which the next can be looked at first."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tinyjax.core.batch import batch_size, has_samples, take_samples

_END = object()


class BatchQueue:
    """Batches that can be looked at before they are taken."""

    def __init__(self, batches: Iterable[Any]):
        self._batches = iter(batches)
        self._ahead: list[Any] = []

    def has_next(self) -> bool:
        """Whether there is another batch; reads it if need be."""
        return bool(self._ahead) or self._read()

    def holds(self, num_samples: int) -> bool:
        """Whether so many samples are left; reads them."""
        while sum(map(batch_size, self._ahead)) < num_samples:
            if not self._read():
                return False
        return True

    def take(self) -> Any:
        """The next batch."""
        return self._ahead.pop(0)

    def peek(self, num_samples: int | None = None) -> Any:
        """The next so many samples (fewer at the end), or the next batch, as one batch."""
        self.holds(num_samples or 1)
        if not self._ahead:
            raise ValueError("`batches` is empty")
        if num_samples is None:
            return self._ahead[0]
        sizes = list(itertools.accumulate(map(batch_size, self._ahead)))
        count = next((i + 1 for i, size in enumerate(sizes) if size >= num_samples), len(sizes))
        return take_samples(_joined(self._ahead[:count]), 0, num_samples)

    def _read(self) -> bool:
        batch = next(self._batches, _END)
        if batch is _END:
            return False
        self._ahead.append(batch)
        return True


def _joined(batches: Sequence[Any]) -> Any:
    """Batches as one; of leaves without samples the first."""
    num_samples = batch_size(batches[0])

    def join(*leaves: Any) -> Any:
        return jnp.concatenate([jnp.asarray(x) for x in leaves]) if has_samples(leaves[0], num_samples) else leaves[0]

    return jax.tree.map(join, *batches)
