"""CIFAR-10 and CIFAR-100 through tensorflow-datasets, prepared without TensorFlow.

The official builders read the archive with `tf.io`. These subclasses keep their name, version, features, address and
checksum and replace only the reading, so what they prepare is what the official `tfds.data_source("cifar10")` reads.
The archive's members are read in memory, never extracted to disk.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.image_classification import cifar as official

PIXELS = (3, 32, 32)


class _WithoutTensorFlow:
    """The reading of the archive, mixed into the official builders."""

    def _split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        spec = self._cifar_info
        archive = fetch(dl_manager, spec.url, self.url_infos[spec.url])
        train, test = ([spec.prefix + f for f in files] for files in (spec.train_files, spec.test_files))
        names = [spec.prefix + f for f in spec.label_files]
        members = read_members(archive, {*train, *test, *names})
        for key, name in zip(spec.label_keys, names):
            self.info.features[key].names = members[name].decode().split()
        return {
            "train": self._generate_examples("train_", [members[name] for name in train]),
            "test": self._generate_examples("test_", [members[name] for name in test]),
        }

    def _generate_examples(self: Any, split_prefix: str, filepaths: list[bytes]) -> Iterator[tuple[int, dict]]:
        label_keys = self._cifar_info.label_keys
        record_size = len(label_keys) + int(np.prod(PIXELS))
        rows = np.frombuffer(b"".join(filepaths), np.uint8).reshape(-1, record_size)
        for i, row in enumerate(rows):
            labels, pixels = np.split(row, [len(label_keys)])
            image = pixels.reshape(PIXELS).transpose(1, 2, 0)
            yield i, {**dict(zip(label_keys, labels.tolist())), "id": f"{split_prefix}{i:05d}", "image": _png(image)}


# The official classes stay the registered ones; a builder finds its metadata by the name of its module.
with registered.skip_registration():
    Cifar10 = type("Cifar10", (_WithoutTensorFlow, official.Cifar10), {"__module__": official.__name__})
    Cifar100 = type("Cifar100", (_WithoutTensorFlow, official.Cifar100), {"__module__": official.__name__})


def fetch(dl_manager: Any, url: str, expected: Any) -> Any:
    """The path of the archive behind `url`: put there by hand, downloaded before, or downloaded now.

    Args:
        dl_manager: the download manager of tensorflow-datasets.
        url: address of the archive.
        expected: its size, checksum and file name.

    Raises:
        OSError: it is not there and cannot be downloaded, or it is another file than expected.
    """
    by_hand = dl_manager.download_dir / "manual" / expected.filename
    cure = f"put {expected.filename} (sha256 {expected.checksum}), from {url} or a copy of it, at {by_hand}"
    try:
        archive = dl_manager.download(url)
    except NonMatchingChecksumError as error:
        raise OSError(f"the file for {url} is damaged or another one; {cure}") from error
    except (OSError, DownloadError) as error:
        raise OSError(f"could not download {url}: {error}; {cure}") from error
    with archive.open("rb") as file:  # a file found in the cache was not looked into
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.checksum:
            raise OSError(f"{archive} is damaged: its sha256 is not the expected one; remove it, or {cure}")
    return archive


def read_members(archive: Any, names: set[str]) -> dict[str, bytes]:
    """Contents of the named members of a tar archive; links and devices are no members.

    Raises:
        OSError: a member is missing.
    """
    with tarfile.open(archive) as tar:
        found = ((member.name, tar.extractfile(member)) for member in tar if member.isreg() and member.name in names)
        members = {name: file.read() for name, file in found if file is not None}
    if missing := sorted(names - set(members)):
        raise OSError(f"{archive} holds no {', '.join(missing)}")
    return members


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
