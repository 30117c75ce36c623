"""`load`: a data set as NumPy arrays, through tensorflow-datasets and without TensorFlow.

A set is prepared once, under a cache folder, and then read in one go. Several processes may do this at the same time:
each prepares in a folder of its own and renames it into place, and the first one wins.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HELD_OUT = 10  # CIFAR ships no validation split: one training image in ten becomes it


class Split(NamedTuple):
    """Images and labels.

    Attributes:
        image: (n, height, width, channels), uint8.
        label: (n,), int32.
    """

    image: np.ndarray
    label: np.ndarray


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
        train: what parameters are fitted on.
        validation: what choices are made on.
        test: what is reported, once.
        num_classes: number of classes.
        name: its name.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    name: str


def load(name: str, *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads a data set by name.

    `digits` (8x8x1) and `mnist5k` (28x28x1) ship in packages of the `demo` extra and work offline; train, validation
    and test are 60/20/20 % by the permutation of seed 0. `cifar10` and `cifar100` (32x32x3) are downloaded once,
    160 MiB; their official test split is kept, a tenth of their training images is the validation split (`join` undoes
    that).

    Example:
        >>> dataset = data.load("digits")
        >>> dataset.train.image.shape
        (1078, 8, 8, 1)

    Args:
        name: `digits`, `mnist5k`, `cifar10` or `cifar100`.
        data_dir: folder to prepare under and to read from; by default `$TINYJAX_DATA_DIR`, else `~/.cache/tinyjax`.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the set is not prepared yet and the package that ships it is missing.
        OSError: the archive of CIFAR is neither there nor can be downloaded; says where to put it by hand.
    """
    builder_class = _builder_class(name)
    root = _root(data_dir)
    builder = builder_class(data_dir=str(root), file_format="array_record")
    if not builder.is_prepared():
        _prepare(builder_class, root)
        builder = builder_class(data_dir=str(root), file_format="array_record")
    splits = {split: _read(builder, split) for split in builder.info.splits}
    if "validation" not in splits:
        splits["train"], splits["validation"] = _hold_out(splits["train"])
    num_classes = builder.info.features["label"].num_classes
    return Dataset(splits["train"], splits["validation"], splits["test"], num_classes, name)


def join(*splits: Split) -> Split:
    """One split of several, for a last run after all choices are made.

    Example:
        >>> digits = data.load("digits")
        >>> len(data.join(digits.train, digits.validation).label)
        1437
    """
    return Split(*(np.concatenate(arrays) for arrays in zip(*splits)))


def _builder_class(name: str) -> Any:
    # Imported here: `import tinyjax` must not pay for tensorflow-datasets.
    from tinyjax.data import cifar, packaged

    builders = {
        "digits": packaged.Digits,
        "mnist5k": packaged.Mnist5k,
        "cifar10": cifar.Cifar10,
        "cifar100": cifar.Cifar100,
    }
    if name not in builders:
        raise ValueError(f"unknown data set `{name}`; known are {', '.join(f'`{known}`' for known in builders)}")
    return builders[name]


def _root(data_dir: str | os.PathLike | None) -> Path:
    chosen = data_dir or os.environ.get("TINYJAX_DATA_DIR") or "~/.cache/tinyjax"
    return Path(chosen).expanduser().absolute()


def _prepare(builder_class: Any, root: Path) -> None:
    """Prepares in a folder nobody else uses, then renames it into place."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="preparing-") as staging:
        builder = builder_class(data_dir=staging, file_format="array_record")
        # It announces itself on standard output; the progress bars on standard error say enough.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=str(root / "downloads"))
        final = root / Path(builder.data_dir).relative_to(staging)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same contents
                raise


def _read(builder: Any, split: str) -> Split:
    source = builder.as_data_source(split)
    # Filled in place: a list of 50,000 decoded images would hold everything twice.
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i, example in enumerate(source):
        images[i], labels[i] = example["image"], example["label"]
    return Split(images, labels)


def _hold_out(train: Split) -> tuple[Split, Split]:
    # RandomState's stream is frozen by NumPy's policy, so the splits are the same under every version.
    order = np.random.RandomState(0).permutation(len(train.label))
    held = len(order) // HELD_OUT
    return _take(train, np.sort(order[held:])), _take(train, np.sort(order[:held]))


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.image[indices], split.label[indices])
