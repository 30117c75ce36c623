import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from tinyjax import plot
from tinyjax.plot.style import spread

SITES = [f"conv_{i}" for i in (2, 3, 5, 6, 8, 9, 11, 12)]


def run_records(sites: list[str], num_records: int = 30) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": 10 * i,
            "train_accuracy": 1 - 0.8 * np.exp(-i / 6),
            "test_accuracy": 0.95 - 0.8 * np.exp(-i / 6),
            "width": {site: 2 + i * (j + 1) for j, site in enumerate(sites)},
            "psi": {site: float(np.exp(-i / 9 + rng.normal() / 5)) for site in sites},
        }
        for i in range(num_records)
    ]


FIGURES = {
    "growth of two sites": lambda: plot.growth_curves(
        run_records(["hidden_1", "hidden_2"]), references={"fixed, width 64": 0.951, "random0 + dW*": 0.949}
    ),
    "growth of eight sites": lambda: plot.growth_curves(run_records(SITES)),
    "map": lambda: plot.bottleneck_map(run_records(SITES)),
    "spectrum": lambda: plot.spectrum(np.linspace(2, 0.1, 40), edge=1.2),
    "spectrum without edge": lambda: plot.spectrum([3.0]),
    "widths": lambda: plot.widths({site: 64 for site in SITES}, start={site: 1 for site in SITES}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width
    assert 0 <= drawn.y0 < drawn.y1 <= height


@pytest.mark.parametrize("name", ["growth of two sites", "growth of eight sites"])
def test_labels_do_not_overlap(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert len(labels) >= 2
        for lower, upper in zip(labels, labels[1:]):
            assert upper.y0 > lower.y0 + 0.75 * lower.height


def curves(axes) -> list[np.ndarray]:
    """Data of the lines drawn in data coordinates: not the references, not the leaders of the labels."""
    return [line.get_xydata() for line in axes.lines if line.get_transform() == axes.transData]


def test_growth_curves_draw_the_records():
    records = run_records(["a", "b"])
    accuracy, width, psi = plot.growth_curves(records).axes
    steps = [record["step"] for record in records]
    for axes, expected in (
        (accuracy, [[r["train_accuracy"] for r in records], [r["test_accuracy"] for r in records]]),
        (width, [[r["width"][site] for r in records] for site in "ab"]),
        (psi, [[r["psi"][site] for r in records] for site in "ab"]),
    ):
        drawn = curves(axes)
        assert len(drawn) == 2
        for line, values in zip(drawn, expected):
            np.testing.assert_allclose(line, np.stack([steps, values], 1))
    assert psi.get_yscale() == "log"
    assert [text.get_text().split()[0] for text in accuracy.texts] == ["test", "train"]


def test_growth_curves_draw_each_quantity_through_the_records_that_have_it():
    records = [
        {"step": 0, "test_accuracy": 0.1},
        {"step": 5, "psi": {"a": 0.5, "b": 0.0, "c": float("nan")}},
        {"step": 9, "test_accuracy": 0.3, "psi": {"a": 0.2, "b": 0.4}},
    ]
    accuracy, psi = plot.growth_curves(records).axes
    np.testing.assert_allclose(curves(accuracy)[0], [[0, 0.1], [9, 0.3]])
    a, b = curves(psi)
    np.testing.assert_allclose(a, [[5, 0.5], [9, 0.2]])
    np.testing.assert_allclose(b, [[9, 0.4]])


def test_bottleneck_map_holds_psi_by_site_and_step():
    records = [{"step": 0, "psi": {"a": 2.0}}, {"step": 4}, {"step": 6, "psi": {"a": 1.0, "b": 0.5}}]
    figure = plot.bottleneck_map(records)
    (mesh,) = figure.axes[0].collections
    values = mesh.get_array()
    np.testing.assert_allclose(values.filled(-1), [[2, 1], [-1, 0.5]])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-3, 3, 9])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_bottleneck_map_of_one_step():
    (mesh,) = plot.bottleneck_map([{"step": 3, "psi": {"a": 2.0}}]).axes[0].collections
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [2.5, 3.5])


def test_spectrum_marks_what_is_above_the_edge():
    figure = plot.spectrum([0.5, 3.0, 1.1], edge=1.0)
    above, below = curves(figure.axes[0])[:2]
    np.testing.assert_allclose(above, [[1, 3], [2, 1.1]])
    np.testing.assert_allclose(below, [[3, 0.5]])
    assert "2 of 3 above" in figure.axes[0].texts[0].get_text()


def test_widths_are_bars_with_their_start():
    figure = plot.widths({"a": 12, "b": 7}, start={"a": 2})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [12, 7]
    assert [text.get_text() for text in axes.texts] == ["2 → 12", "7"]
    first, second = (to_rgba(bar.get_facecolor()) for bar in axes.patches)
    assert first != second


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.growth_curves([{"step": 1}]),
        lambda: plot.bottleneck_map([]),
        lambda: plot.spectrum([]),
        lambda: plot.widths({}),
    ],
)
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw()


def test_plots_leave_pyplot_and_its_settings_alone():
    program = "import sys, matplotlib; from tinyjax import plot; plot.widths({'a': 1}); "
    program += "assert matplotlib.rcParams['axes.grid'] is False; assert 'matplotlib.pyplot' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_spread_moves_labels_apart_inside_the_panel():
    places = spread([0.5, 0.5, 0.52, 0.99, 1.0], gap=0.1)
    assert np.all(np.diff(places) > 0.1 - 1e-6)
    assert places[0] >= -1e-9 and places[-1] <= 1 + 0.06
    assert spread([0.1, 0.4, 0.9], gap=0.1) == [0.1, 0.4, 0.9]
