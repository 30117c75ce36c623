"""From uint8 arrays to float batches: standardise, order, cut.

The order of an epoch depends on (seed, epoch) alone, so a resumed run needs nothing but the number of its step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from tinyjax.data.loading import Split


class Batch(NamedTuple):
    """What a loss function gets.

    Attributes:
        image: (n, height, width, channels), float32, standardised.
        label: (n,), int32.
    """

    image: Float32[np.ndarray, "n height width channels"]
    label: Int32[np.ndarray, " n"]


def channel_moments(train: Split) -> tuple[Float32[np.ndarray, " channels"], Float32[np.ndarray, " channels"]]:
    """Mean and standard deviation of every channel over the images and pixels of the training split.

    Returns:
        `(mean, std)`, each (channels,), on the scale of the uint8 values.

    Raises:
        ValueError: the split is empty or one channel is constant.

    Example:
        >>> mean, std = data.channel_moments(data.load("digits").train)
    """
    if len(train.image) == 0:
        raise ValueError("`train` is empty: it holds 0 images")
    # Sums over the 256 values are exact, whatever the number of pixels, and need no float copy of the images.
    values = np.arange(256, dtype=np.float64)
    channels = train.image.reshape(-1, train.image.shape[-1]).T
    counts = np.stack([np.bincount(channel, minlength=256) for channel in channels])
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(1))
    if not np.all(std > 0):
        raise ValueError(f"channels {np.flatnonzero(std <= 0).tolist()} of `train` are constant; they cannot be scaled")
    return mean.astype(np.float32), std.astype(np.float32)


def as_batch(split: Split, *, mean: Float32[np.ndarray, " channels"], std: Float32[np.ndarray, " channels"]) -> Batch:
    """A whole split as one standardised float32 batch.

    Example:
        >>> digits = data.load("digits")
        >>> mean, std = data.channel_moments(digits.train)
        >>> test = data.as_batch(digits.test, mean=mean, std=std)

    Args:
        split: uint8 images and labels.
        mean: of the training split, whatever split this is; (channels,).
        std: likewise.
    """
    return Batch((split.image.astype(np.float32) - mean) / std, split.label)


def epoch_order(seed: int, epoch: int, num_examples: int) -> Integer[np.ndarray, " n"]:
    """The order in which one epoch of the run `seed` visits the examples: a permutation of `range(num_examples)`.

    Example:
        >>> data.epoch_order(seed=0, epoch=1, num_examples=4).tolist()
        [1, 2, 0, 3]
    """
    # RandomState's stream is frozen by NumPy's policy: a run resumed under another version goes on as it would have.
    return np.random.RandomState([seed, epoch]).permutation(num_examples)


def batches(data: Batch, *, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """The batches of one epoch, all of the same size; what the last full one leaves over waits for another epoch.

    Example:
        >>> step = jax.jit(tinyjax.train_step(loss_fn, optimizer))
        >>> train = data.Batch(np.asarray(images), np.asarray(batch.label, np.int32))
        >>> for epoch in range(2):
        ...     for batch in data.batches(train, batch_size=32, seed=0, epoch=epoch):
        ...         params, opt_state, loss, _ = step(params, opt_state, batch)

    Args:
        data: all examples.
        batch_size: examples a batch, at most the number there are.
        seed: of the run.
        epoch: its number; the same (seed, epoch) gives the same batches.

    Raises:
        ValueError: the batch size is not between 1 and the number of examples.
    """
    num_examples = len(data.label)
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"`batch_size` must be between 1 and {num_examples}, the number of examples; got {batch_size}")
    order = epoch_order(seed, epoch, num_examples)
    return (
        Batch(*(array[order[start : start + batch_size]] for array in data))
        for start in range(0, num_examples - batch_size + 1, batch_size)
    )
