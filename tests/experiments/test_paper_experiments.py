"""The experiments of the paper: every `smoke` preset end to end, their files, and pieces by independent formulas."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import harness, report
from experiments.beyond import lora, transformer
from experiments.paper import bottleneck, convergence, cost, estimation, pure_growth
from tinyjax.models.resnet import STREAM, inner_widths

SCRIPTS = ("bottleneck", "convergence", "estimation", "pure_growth", "cost", "lora", "transformer")
FOLDER = Path(harness.__file__).parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module", params=[*SCRIPTS, pytest.param("ranking", marks=pytest.mark.slow)])
def finished(request, out):
    module = importlib.import_module(report.module(request.param))
    return request.param, module, module.main(["--preset", "smoke", "--out", str(out)])


def test_a_smoke_run_writes_what_it_measured(finished, out):
    name, module, found = finished
    header, *rows = (json.loads(line) for line in (out / "results" / f"{name}-smoke.jsonl").read_text().splitlines())
    assert header["experiment"] == name and header["preset"] == "smoke"
    assert header["config"] == harness.plain(module.PRESETS["smoke"]._asdict())
    assert set(header["versions"]) == {"python", *harness.PACKAGES}
    assert rows == found.rows and len(rows) > 3
    assert all("part" in row for row in rows)
    picture = (out / "figures" / f"{name}-smoke.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(picture[16:20]) >= 700
    # Every line of the report belongs to an item of the paper.
    known = {item.name for item in report.ITEMS if item.script == name}
    measured = {finding.item for finding in module.findings(found.rows)}
    assert measured == known - {"Figure 16", "Table 1, a control"}  # the small preset has fewer methods


def test_what_smoke_runs_find_is_possible(finished):
    """Laws that hold for any sizes."""
    name, _, found = finished
    if name == "bottleneck":
        rows = harness.select(found.rows, part="training")
        assert [row["epoch"] for row in rows] == [0, 1, 2]
        for row in rows:
            # The gradient's move lies in the tangent space, so its cosine is at most that of the projection.
            assert 0 < row["cos_gradient"] <= row["cos_best"] + 1e-6 <= row["cos_grown"] + 2e-6 <= 1 + 2e-6
            np.testing.assert_allclose(row["psi"], row["share"] * row["asked"], rtol=1e-4)
    if name == "convergence":
        (greedy,) = harness.select(found.rows, part="greedy")
        for curve in greedy["losses"].values():
            assert np.all(np.diff(curve) <= 1e-12)
        assert greedy["slowest"]["construction"] <= greedy["bound"] < 1
        (points,) = harness.select(found.rows, part="points")
        assert points["losses"][-1] < 1e-20 and points["monotone"]
        stuck = {row["method"]: row for row in harness.select(found.rows, part="stuck")}
        assert stuck["TINY"]["last"] == 1 and stuck["TINY"]["gain"] < 1e-20 < stuck["TINY"]["psi"]
        assert stuck["completed on stall"]["last"] < 0.5
        by_order = stuck["second order on stall"]["losses"]
        assert by_order[1] < 0.8 and by_order[-1] < 1e-12  # eight neurons for eight points
    if name == "estimation":
        for row in harness.select(found.rows, part="joint"):
            assert row["gain"] <= row["gain_joint"] + 1e-5 and row["gain_joint"] <= row["psi"] + 1e-5
        for row in harness.select(found.rows, part="als"):
            assert 0 < row["predicted"] <= row["approximation"] <= row["als"] + 1e-6 <= row["bound"] + 2e-6
    if name == "pure_growth":
        for recipe in harness.distinct(found.rows, "recipe"):
            rows = harness.select(found.rows, recipe=recipe)
            assert [row["round"] for row in rows] == [0, 1, 2]
            assert rows[0]["widths"] == {"hidden_1": 2}
            assert all(
                row["parameters"] == (64 + 1 + 10) * row["widths"]["hidden_1"] for row in rows
            )  # not the logits' bias
    if name == "lora":
        limit = harness.select(found.rows, run="fixed")[0]["parameters"]
        for run in ("grown", "uniform", "random births"):
            parameters = harness.column(harness.select(found.rows, run=run), "parameters")
            assert parameters[0] == 0 and np.all(np.diff(parameters) >= 0) and 0 < parameters[-1] <= limit
    if name == "growth_curves":
        for row in harness.select(found.rows, part="end"):
            assert row["growths"] == 1 and row["rejected"] <= 2 and 0 <= row["converged"] <= 1
            curve = harness.select(found.rows, part="curve", method=row["method"])
            sizes = harness.column(curve, "parameters")
            assert np.all(np.diff(sizes) >= 0) and sizes[-1] == row["parameters"]
            assert ("reference" in row["method"]) == (len(set(sizes)) == 1)
    if name == "transformer":
        for seed in harness.distinct(found.rows, "seed"):
            runs = {run: harness.select(found.rows, run=run, seed=seed) for run in harness.distinct(found.rows, "run")}
            assert runs["scratch"][0]["width"] == [row for row in runs["grown"] if "width" in row][-1]["width"]
            assert all(run[-1]["parameters"] >= run[0]["parameters"] for run in runs.values())
    if name == "cost":
        assert all(row["ratio"] == 1 for row in harness.select(found.rows, what="training step"))
        assert {row["kind"] for row in harness.select(found.rows, part="part")} == {"dense", "conv"}


def test_the_report_lists_every_item(finished, out):
    """A script's findings come from its file; what has no file is not run."""
    name, module, found = finished
    text = report.report({name: found}, out / "drawn")
    table = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| paper")]
    assert len(table) == len(report.ITEMS)
    for line, item in zip(table, report.ITEMS):
        assert line.startswith(f"| {item.name} |")
        assert report.NOT_RUN not in line or item.script != name or item.name in ("Figure 16", "Table 1, a control")
        assert report.NOT_RUN in line or item.script == name
        assert (f"**{item.name}**" in text) == (report.NOT_RUN not in line)
    assert (out / "drawn" / f"{name}-cpu.png").is_file()


def test_the_committed_results_are_those_of_the_report():
    """RESULTS.md is up to date with the scripts and the files next to it."""
    found = report.collect(FOLDER / "results")
    assert set(found) >= set(SCRIPTS)
    text = (FOLDER / "RESULTS.md").read_text()
    for script in SCRIPTS:
        module = importlib.import_module(report.module(script))
        header = found[script].header
        assert set(header["config"]) == set(module.PRESETS["cpu"]._fields)
        for finding in module.findings(found[script].rows):
            (item,) = (item for item in report.ITEMS if item.name == finding.item)
            for line in (report.row(item, finding), report.entry(item, finding)):
                assert line in text, f"run python -m experiments.report ({finding.item})"


def test_the_example_of_the_paper_by_hand():
    """Appendix A.4: V_goal = 4 sin x; its projection on a line through four points."""
    row = bottleneck.example()
    x, goal = np.arange(4) * np.pi / 2, np.array([0, 4, 0, -4])
    np.testing.assert_allclose(row["goal"], goal, atol=1e-12)
    slope = -16 / (5 * np.pi)
    np.testing.assert_allclose(row["best"], slope * (x - x.mean()), atol=1e-6)
    np.testing.assert_allclose([row["asked"], row["psi"]], [8, 4.8], rtol=1e-10)
    assert row["first_gain"] < 1e-20


def test_the_construction_is_that_of_the_appendix():
    """D.5: lower triangular, diagonal dm; entries below dM; dm no larger than the smallest distance."""
    x, target = convergence.problem(6, seed=3)
    built = convergence.construction(x)
    np.testing.assert_allclose(np.diag(built.activities), built.gap)
    assert np.all(np.triu(built.activities, 1) == 0)
    assert np.all(built.activities[np.tril_indices(6)] >= built.gap - 1e-12) and built.activities.max() < built.reach
    distances = [np.linalg.norm(p - q) for i, p in enumerate(x) for q in x[:i]]
    assert built.gap <= min(distances) and built.reach == max(distances) + built.gap


def test_equation_188_does_not_hold():
    """Triangular with diagonal dm does not bound the inverse by 1 / dm: two points, by hand."""
    built = convergence.construction(convergence.problem(2, seed=0)[0])
    np.testing.assert_allclose(built.activities / built.gap, [[1, 0], [2, 1]], rtol=1e-6, atol=1e-12)
    row = convergence.bound_of(2, 3)
    np.testing.assert_allclose(row["inverse_least"], 3 + 2 * np.sqrt(2), rtol=1e-6)  # of [[1, 0], [-2, 1]]


def test_pursuit_by_loops():
    """Greedy additions against a search over amplitudes."""
    rng = np.random.default_rng(0)
    residual, features = rng.normal(size=5), rng.normal(size=(5, 7))
    start = np.sum(residual**2)
    curve = convergence.pursue(residual, lambda t: features, 3)
    grid = np.linspace(-3, 3, 20001)
    for step in range(3):
        losses = [((residual[:, None] - np.outer(h, grid)) ** 2).sum(0) for h in features.T]
        best = min(range(7), key=lambda j: losses[j].min())
        residual = residual - features[:, best] * grid[losses[best].argmin()]
        np.testing.assert_allclose(curve[step + 1], np.sum(residual**2) / start, rtol=1e-3)


def test_the_polynomial_vanishes_at_zero():
    coefficients = np.array([2.0, -1.0, 0.5])
    a = np.linspace(-1, 1, 5)
    np.testing.assert_allclose(convergence.polynomial(coefficients)(a), 2 * a - a**2 + 0.5 * a**3, atol=1e-12)


def test_the_paper_preset_is_that_of_the_paper():
    """Tables 2 and 3: neurons a growth, starting and final widths, 21 extensions; four runs."""
    config = pure_growth.PRESETS["paper"]
    assert config.dataset == "cifar100" and len(config.seeds) == 4
    assert config.add == (3, 3, 6, 6, 12, 12, 24, 24)
    assert config.start == inner_widths(1 / 64) == (1, 1, 2, 2, 4, 4, 8, 8)
    assert config.final == tuple(width for width in STREAM for _ in range(2))
    extensions = {(last - first) / k for first, last, k in zip(config.start, config.final, config.add)}
    assert extensions == {21}
    assert config.samples is not None and config.samples // 4 == 1000  # the search of E.3.2
    assert {"TINY exact", "Random"} <= set(config.recipes) <= set(pure_growth.RECIPES)


def test_numbers_as_json_has_them():
    assert harness.plain({1: np.float32(1 / 3), "a": [math.nan, np.arange(2)]}) == {"1": 0.333333, "a": [None, [0, 1]]}
    assert harness.spread([1.0, 2.0], 2) == "1.50 ± 0.71" and harness.spread([1.0], 1) == "1.0"
    rows = [{"a": 1, "b": 2}, {"a": 2, "b": None}]
    assert harness.select(rows, a=2) == rows[1:] and harness.distinct(rows, "a") == [1, 2]
    np.testing.assert_array_equal(harness.column(rows, "b"), [2, np.nan])


def test_lists_are_cut_at_semicolons_outside_of_brackets():
    assert report.pieces("a; b (c; d), e; f") == ["a", "b (c; d), e", "f"]


@pytest.mark.parametrize("module", [bottleneck, convergence, estimation, pure_growth, cost, lora, transformer])
def test_an_unknown_preset_ends_with_a_message(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--preset", "tpu"])
    assert stopped.value.code == 2 and "invalid choice: 'tpu'" in capsys.readouterr().err
