"""The main job, small: what it writes, that what it writes is the grown network, and how it refuses bad arguments."""

import contextlib
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grow
from experiments.demo import tables
from tinyjax import data
from tinyjax.models import MLP

ARGUMENTS = "--epochs 2 --growths 2 --widths 8 8 --batch-size 128 --seed 3".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return out, grow.main([*ARGUMENTS, "--out", str(out)])


def lines_of(out):
    config, *lines = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    return config, lines


def test_it_writes_a_log_of_every_run(finished):
    out, results = finished
    config, lines = lines_of(out)
    assert config["config"]["widths"] == [8, 8] and config["config"]["seed"] == 3
    assert set(results) == {"grown", "random0 + dW*", "fixed", "fixed + dW*"} == {line["run"] for line in lines}
    for name in results:
        steps = [line["step"] for line in lines if line["run"] == name]
        assert 8 in steps and steps[-1] == 16 and steps == sorted(steps)  # 2 epochs of 1078 // 128 batches
        assert all(0 <= line[f"{s}_accuracy"] <= 1 for line in lines for s in ("train", "validation", "test"))


def test_growths_lead_from_the_start_to_the_final_width(finished):
    _, lines = lines_of(finished[0])
    for name in ("grown", "random0 + dW*"):
        growths = [line for line in lines if line["run"] == name and "psi" in line]
        assert [line["width"] for line in growths] == [
            {"hidden_1": 5, "hidden_2": 5},
            {"hidden_1": 8, "hidden_2": 8},
        ]
        assert len(growths) == 2
        for line in growths:
            for site in ("hidden_1", "hidden_2"):
                assert line["loss_after"][site] <= line["loss_before"][site]
                assert line["psi"][site] > 0
    fixed = [line for line in lines if line["run"].startswith("fixed")]
    assert all(line["width"] == {"hidden_1": 8, "hidden_2": 8} for line in fixed)


def test_each_growing_run_compiles_its_growth_once(finished):
    _, lines = lines_of(finished[0])
    counts = [line["compiles"] for line in lines if line["run"] == "grown" and "psi" in line]
    assert len(counts) == 2 and counts[1] - counts[0] <= 1  # the training step, seen first after the first growth


def test_the_saved_parameters_are_the_grown_network(finished):
    """Rebuilt from the file alone."""
    out, results = finished
    with np.load(out / "final.npz") as file:
        leaves = dict(file)
    header = json.loads(str(leaves.pop("__tinyjax__")))
    widths = tuple(header["widths"][f"hidden_{i}"] for i in (1, 2))
    params = {}
    for name, leaf in leaves.items():
        collection, layer, kind = name.split("/")
        params.setdefault(collection, {}).setdefault(layer, {})[kind] = leaf
    assert widths == (8, 8) and params["params"]["hidden_2"]["kernel"].shape == (8, 8)
    digits = data.load("digits")
    mean, std = data.channel_moments(digits.train)
    test = data.as_batch(digits.test, mean=mean, std=std)
    logits = MLP(widths=widths, num_classes=10).apply(params, jnp.asarray(test.image))
    grown = results["grown"][0]
    want = MLP(widths=(8, 8), num_classes=10).apply(grown.params, jnp.asarray(test.image))
    np.testing.assert_allclose(logits, want, atol=1e-5)
    accuracy = np.mean(np.argmax(logits, axis=-1) == test.label)
    np.testing.assert_allclose(accuracy, grown.rows[-1]["test_accuracy"], atol=1e-6)
    assert accuracy > 0.2  # two epochs of a narrow network: better than one in ten


def test_it_draws_a_figure(finished):
    header = (finished[0] / "figure.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20]) > 800  # pixels wide


def test_the_tables_name_every_run_and_the_winner(finished):
    _, results = finished
    table = tables.result_table(results)
    assert list(table.columns[0].cells) == list(results)
    test = {name: runs[0].rows[-1]["test_accuracy"] for name, runs in results.items()}
    verdict = tables.verdict(results).splitlines()
    assert verdict[0] == f"Best on the test split: {max(test, key=test.get)}."
    assert len(verdict) == 4
    difference = 100 * (test["grown"] - test["fixed"])
    assert f"grown - fixed: {difference:+.2f} points" in verdict
    assert len(tables.growth_table(results["grown"][0].rows).rows) == 4  # 2 growths of 2 sites


@contextlib.contextmanager
def interrupted_after(steps):
    """Stands for `stop_on_interrupt`: Ctrl-C in the midst of that step."""
    count = itertools.count(1)
    yield lambda: next(count) >= 2 * steps - 1  # it is asked twice a step


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    arguments = [*ARGUMENTS, "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr("tinyjax.stop_on_interrupt", lambda: interrupted_after(3))
        with pytest.raises(SystemExit, match="Stopped after step 3 of `grown`; the same command with --resume"):
            grow.main([*arguments, "--resume"])  # as a job does that may have been killed in its first seconds
    assert "There is nothing to resume in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a run that was stopped: go on with --resume"):
        grow.main(arguments)
    with pytest.raises(SystemExit, match="was started with --seed 3: --resume needs the same"):
        grow.main([*arguments, "--seed", "4", "--resume"])
    assert not (out / "log.jsonl").exists()
    (out / "checkpoints" / "1-seed-3").mkdir()  # as of a process that was killed before its first checkpoint
    grow.main([*arguments, "--resume"])
    assert 'run="random0 + dW*" seed=3 step=3 ' in capsys.readouterr().out
    with np.load(out / "final.npz") as resumed, np.load(finished[0] / "final.npz") as unbroken:
        assert set(resumed) == set(unbroken)
        for name in resumed:
            np.testing.assert_array_equal(resumed[name], unbroken[name])
    lines = [{key: line[key] for key in line if key not in ("seconds", "compiles")} for line in lines_of(out)[1]]
    expected = lines_of(finished[0])[1]
    assert lines == [{key: line[key] for key in line if key not in ("seconds", "compiles")} for line in expected]
    assert not (out / "checkpoints").exists()
    with pytest.raises(SystemExit, match="there is nothing to resume"):
        grow.main([*arguments, "--resume"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset cifar", "argument --dataset: invalid choice: 'cifar'"),
        ("--method best", "argument --method: invalid choice: 'best'"),
        ("--widths wide", "argument --widths: invalid int value: 'wide'"),
        ("--widths 8 1", "--start 2 must be between 1 and the smallest of --widths [8, 1]"),
        ("--start 0", "--start 0 must be between 1"),
        ("--seeds 0", "--seeds must be at least 1, got 0"),
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--growths 0", "--growths must be at least 1, got 0"),
        ("--learning-rate -1", "--learning-rate must be positive, got -1.0"),
        ("--preset cpu", "--preset is of --model resnet18"),
        ("--model resnet18 --dataset mnist5k --epochs 3", "--epochs is of --model mlp"),
        ("--model resnet18", "the 8x8 images of digits are too small for --model resnet18"),
        ("--model vgg", "argument --model: invalid choice: 'vgg'"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        grow.main([*arguments.split(), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--growths 5 --epochs 2", "--growths 5 do not fit into the first quarter of training, 4 steps"),
        ("--batch-size 5000", "--batch-size 5000 is more than the 1078 training samples"),
    ],
)
def test_arguments_that_do_not_go_with_the_data_are_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        grow.main([*arguments.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
