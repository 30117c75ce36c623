"""The main job of the thin ResNet: presets, batches, a small run, and the paper's preset on a cache of CIFAR."""

import itertools

import jax
import numpy as np
import pytest
from tensorflow_datasets.core.download import resource

from experiments import grow
from experiments.demo import resnet
from experiments.demo.runs import load
from experiments.paper import protocol as paper
from tests.data.test_data import SETS, offline, register, synthetic_archive  # noqa: F401


@pytest.fixture(scope="module")
def network():
    return resnet.build(resnet.PRESETS["smoke"], *load("mnist5k"))


def test_the_calendar_of_the_paper(network):
    """Algorithm 1 and E.2 in steps."""
    protocol = paper.figure_5(1 / 64)
    parameters = {widths: 10_000 * (1 + index) for index, widths in enumerate(paper.planned_widths(protocol))}
    parameters[protocol.start] = 10_000
    found = paper.calendar(protocol, parameters.__getitem__, training_set=45_000)
    assert np.all(found.sizes % protocol.micro_batch == 0)
    np.testing.assert_array_equal(found.starts, np.cumsum(found.sizes) - found.sizes)
    growths = np.flatnonzero(np.diff(found.due, prepend=0))
    assert found.due[0] == 1 and len(growths) >= protocol.growths == 168
    between = np.diff(found.starts[growths[:168]]) / 45_000
    np.testing.assert_allclose(between, 0.25, atol=0.04)  # whole batches, up to 13 times larger at the end
    wanted = 32 * np.sqrt([1 + index for index in range(168)])
    assert np.all(np.abs(found.sizes[growths[:168]] - wanted) <= 17)
    np.testing.assert_allclose((found.starts[-1] + found.sizes[-1]) / 45_000, protocol.epochs, rtol=0.01)


def test_batches_depend_on_seed_and_step_alone_and_visit_every_image_once_an_epoch(network):
    whole = list(itertools.islice(resnet.stream(network, 3, 0), 12))
    assert [len(batch.label) for batch in whole] == list(network.calendar.sizes[:12])
    for found, expected in zip(resnet.stream(network, 3, 5), whole[5:]):
        np.testing.assert_array_equal(found.image, expected.image)
    assert not np.array_equal(next(resnet.stream(network, 4, 0)).image, whole[0].image)
    images = np.concatenate([batch.image for batch in whole]).reshape(sum(len(b.label) for b in whole), -1)
    assert len(images) < len(network.splits["train"].label)
    assert len(np.unique(images, axis=0)) == len(images)


def test_parameters_are_counted_without_the_free_slots(network):
    counted = network.parameters(network.protocol.start)
    variables = network.init(jax.random.key(0), dict(zip(network.sites.names, network.protocol.start)))
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_a_growth_of_the_small_preset(network):
    """One growth and a step: the first block gets its neurons, the loss of the growth's batch does not rise."""
    record = next(resnet.grow(network, 0))
    (name,) = record.growth.width
    assert name == "conv_2/in/conv" and record.width[name] == 4
    assert record.growth.loss_after[name] <= record.growth.loss_before[name]
    assert {n: w for n, w in record.width.items() if n != name} == {
        "conv_3/in/conv": 4, "conv_5/in/conv": 2, "conv_6/in/conv": 8,
    }  # fmt: skip
    before = network.init(jax.random.key(0), {site.name: site.capacity for site in network.sites})
    statistics = jax.tree.leaves(record.params["batch_stats"])
    assert any(np.any(a != b) for a, b in zip(statistics, jax.tree.leaves(before["batch_stats"])))
    assert 0 <= network.correct(record.params, record.sites, network.splits["validation"]) <= 1


@pytest.mark.slow
def test_the_small_preset_from_the_command_line(tmp_path):
    arguments = f"--model resnet18 --dataset mnist5k --preset smoke --out {tmp_path}".split()
    results = grow.main(arguments)
    assert set(results) == {"grown", "random0 + dW*", "fixed"}
    rows = [row for row in results["grown"][0].rows if "psi" in row]
    assert [list(row["width"].values()) for row in rows] == [[4, 4, 2, 8], [4, 4, 8, 8]]
    for row in rows:
        (site,) = row["psi"]
        assert row["loss_after"][site] <= row["loss_before"][site]
    assert (tmp_path / "final.npz").is_file() and (tmp_path / "figure.png").is_file()


def test_the_paper_preset_starts_from_a_seeded_download_cache(tmp_path, monkeypatch):
    archive = tmp_path / "archive.tar.gz"
    written = synthetic_archive("cifar100", archive)
    register("cifar100", archive, monkeypatch)
    ((url, info),) = SETS["cifar100"][0].url_infos.items()
    cached = tmp_path / "data" / "downloads" / "cifar100" / resource.get_dl_fname(url, info.checksum)
    cached.parent.mkdir(parents=True)
    archive.rename(cached)
    resource.get_info_path(cached).write_text("{}")
    monkeypatch.setenv("TINYJAX_DATA_DIR", str(tmp_path / "data"))
    arguments = "--model resnet18 --dataset cifar100 --preset paper".split()
    task = resnet.prepare(grow.parse(arguments))
    assert task.num_train == 9 * len(written["train"][0]) // 10
    assert [site.capacity for site in task.sites] == [64, 64, 128, 128, 256, 256, 512, 512]
    network = resnet.build(resnet.PRESETS["paper"], *load("cifar100"))
    batch = next(resnet.stream(network, 0, 0))
    assert batch.image.shape == (32, 32, 32, 3)
    assert not np.isin(batch.image[:4, 16, 16], network.splits["train"].image[:, 16, 16]).all()  # cropped at random


@pytest.mark.usefixtures("offline")
def test_without_the_archive_the_job_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYJAX_DATA_DIR", str(tmp_path / "data"))
    arguments = f"--model resnet18 --dataset cifar100 --preset paper --out {tmp_path / 'out'}".split()
    with pytest.raises(SystemExit, match=r"could not download https://.*cifar-100-binary\.tar\.gz"):
        grow.main(arguments)
    assert not (tmp_path / "out").exists()
