"""The table of the benchmarks: what counts as met, which rows there are, and how it refuses."""

import json
import subprocess
import sys

import pytest

from experiments.bench import __main__ as bench


def test_a_row_is_met_up_to_its_bound():
    assert bench.at_most("a", 0.2, 0.2).met and not bench.at_most("a", 0.21, 0.2).met
    assert bench.at_least("a", 1.0, 1.0).met and not bench.at_least("a", 0.99, 1.0).met
    assert not bench.at_most("a", float("nan"), 1.0).met and not bench.at_least("a", float("nan"), 1.0).met


def test_lines_of_the_scripts_become_rows():
    growth = [
        {"what": "the same, mean over sites", "ratio": 2.4},
        {"what": "growth of the first layer, S known, against S summed and factored", "ratio": 0.3},
        {"what": "solve, S 785 x 785, 64 outputs, against eigh + svd", "ratio": 0.9},
        {"what": "solve, S 2304 x 2304, 256 outputs, against eigh + svd", "ratio": 0.1},
    ]
    assert [(row.measured, row.met) for row in bench.growth(growth)] == [(0.1, True), (2.4, True), (0.3, True)]
    sums = [
        {"unit": "sums of a pair of convolutions", "shape": [8, 4, 4, 64], "speed": 2.0, "temporary_mib": 120.0},
        {"unit": "sums against samples", "exponent": 1.0, "temporary_mib": [10.0, 20.0, 20.0]},
        {"unit": "sums against width", "exponent": 1.5, "temporary_mib": [1.0, 2.0, 3.0]},
    ]
    assert [row.met for row in bench.conv_sums(sums)] == [True, False, True, True, True]
    too_long = {"what": "run", "network": "dense 64", "ratio": 0.5}
    ((row),) = bench.forecasts([too_long])
    assert row.measured == 2.0 and not row.met


@pytest.mark.slow
def test_the_lines_of_a_script_are_what_its_rows_read(monkeypatch, capsys):
    """One small script from end to end; the others take minutes."""
    small = bench.Benchmark("sites", ("--stream", "4", "4", "--size", "8", "--samples", "8"), bench.sites)
    monkeypatch.setattr(bench, "BENCHMARKS", {"sites": small})
    (row,) = bench.main(["--only", "sites", "--json"])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["benchmark"] == "sites" and line["measured"] == row.measured > 0 and line["device"] == "cpu"


def test_a_script_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    def run(module, arguments, device):
        if module == "sites":
            raise subprocess.CalledProcessError(1, module)
        return [{"shapes": 8}]

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(SystemExit, match="failed: sites"):
        bench.main(["--only", "sites", "compiling"])
    assert '"measured": 8, "met": true' in capsys.readouterr().out


def test_an_unknown_benchmark_and_a_missing_peer_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no Python at nowhere/python: --help has the two commands"):
        bench.main(["--only", "digits", "--gromo", "nowhere/python"])


def test_without_gromo_its_rows_are_left_out():
    names = bench.parse(["--no-gromo"]).names
    assert names == [name for name, benchmark in bench.BENCHMARKS.items() if not benchmark.peer]
    assert bench.parse(["--gromo", sys.executable]).names == list(bench.BENCHMARKS)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="JAX finds no gpu here .*pip install"):
        bench.main(["--device", "gpu", "--only", "sites"])
