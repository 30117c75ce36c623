"""What `growth_curves` found: the figure, and a line for each item of the paper. Reads rows, runs nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.harness import Finding, Row, column, distinct, select, spread
from tinyjax.plot.style import styled

REFERENCES = ("small reference", "reference")
COLOURS = {
    "TINY": "#c8553d",
    "TINY, fan-in 1": "#e8a08f",
    "GradMax": "#3d6c8f",
    "GradMax, figure 16": "#8fb3cc",
    "tiny0 + dW*": "#7a9e7e",
    "random0": "#d8a048",
    "small reference": "#b4b5c4",
    "reference": "#22223b",
}
BANDS = ("TINY", "GradMax")
Setting = tuple[str, float]


@styled
def draw(rows: list[Row]) -> Any:
    """For every start and Delta t: test accuracy against parameters while growing, and against epochs."""
    from matplotlib.figure import Figure

    curves = select(rows, part="curve")
    methods = distinct(curves, "method")
    settings = settings_of(curves)
    figure = Figure(figsize=(10, 0.8 + 2.7 * len(settings)), layout="constrained")
    panels = figure.subplots(len(settings), 2, sharey="row", squeeze=False)
    for setting, (growing, epochs) in zip(settings, panels):
        of_setting = [curve for method in methods if (curve := _of(curves, method, setting))]
        last = max(row["epoch"] for row in select(of_setting[0], growing=True))  # methods come before references
        for curve in of_setting:
            _draw_curve(growing, epochs, curve, setting)
        growing.set_title(f"start {setting[0]}, $\\Delta t$ = {setting[1]:g}")
        growing.set_ylabel("test accuracy (%)")
        growing.set_xlabel("parameters (thousands), while growing")
        epochs.set_xlabel("epochs (dotted: the end of growth)")
        epochs.axvline(last, color="#9a9ab0", linestyle=":", linewidth=1)
        values = 100 * np.concatenate([column(curve, "test") for curve in of_setting])
        growing.set_ylim(float(np.percentile(values, 12)), values.max() + 1)
    lines = {line.get_label(): line for pair in panels for line in pair[1].lines}
    shown = {method: lines[method] for method in methods if method in lines}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), fontsize=8, frameon=False)
    return figure


def _draw_curve(growing: Any, epochs: Any, curve: list[Row], setting: Setting) -> None:
    """One method's mean over seeds in both panels; a band of one standard deviation for the two that are compared."""
    method, colour = curve[0]["method"], COLOURS[curve[0]["method"]]
    by_step = [select(curve, step=step) for step in sorted(distinct(curve, "step"))]
    mean, deviation = (np.array([f(100 * column(rows, "test")) for rows in by_step]) for f in (np.mean, np.std))
    parameters = np.array([column(rows, "parameters").mean() for rows in by_step]) / 1e3
    epoch = np.array([rows[0]["epoch"] for rows in by_step])
    if curve[0]["between"] == setting[1]:  # a reference is trained as long as the slowest growth
        epochs.plot(epoch, mean, color=colour, label=method, linewidth=1.8 if method in BANDS else 1.1)
    if method in REFERENCES:
        growing.plot(parameters[-1:], mean[-1:], "o", color=colour, markersize=5)
        return
    while_growing = np.array([rows[0]["growing"] for rows in by_step])
    growing.plot(
        parameters[while_growing], mean[while_growing], color=colour, linewidth=1.8 if method in BANDS else 1.1
    )
    if method in BANDS:
        for axes, x, shown in ((growing, parameters, while_growing), (epochs, epoch, slice(None))):
            low, high = (mean - deviation)[shown], (mean + deviation)[shown]
            axes.fill_between(x[shown], low, high, color=colour, alpha=0.15, linewidth=0)


def settings_of(rows: list[Row]) -> list[Setting]:
    """Every start with every time between growths."""
    grown = [row for row in rows if row["method"] not in REFERENCES]
    return [(start, between) for start in distinct(grown, "start") for between in distinct(grown, "between")]


def _of(rows: list[Row], method: str, setting: Setting) -> list[Row]:
    start, between = setting
    if method in REFERENCES:
        return select(rows, method=method, start=start)
    return select(rows, method=method, start=start, between=between)


def findings(rows: list[Row]) -> list[Finding]:
    """What figures and tables of the paper say, on this data set; nothing is claimed beyond it."""
    ends, curves = select(rows, part="end"), select(rows, part="curve")
    settings = settings_of(ends)
    starts, methods = distinct(ends, "start"), [m for m in distinct(ends, "method") if m not in REFERENCES]

    def each(cell: Callable[[Setting], str], only: str | None = None) -> str:
        chosen = [setting for setting in settings if only in (None, setting[0])]
        return "; ".join(f"from {start}, Delta t = {between:g}: {cell((start, between))}" for start, between in chosen)

    def table(setting: Setting, names: list[str] = methods) -> str:
        cells = []
        for method in names:
            after, last = (spread(column(_of(ends, method, setting), f), 1, 100) for f in ("after_growth", "converged"))
            cells.append(f"{method} {after} / {last}")
        return ", ".join(cells)

    def references() -> str:
        thin = [f"from {start} {_percent(ends, 'small reference', (start, 0))}" for start in starts]
        full = 100 * column(select(ends, method="reference"), "converged")
        return f"never grown: {', '.join(thin)}, full width {spread(full, 1)}"

    def gap(setting: Setting, field: str, other: str = "GradMax") -> str:
        return f"TINY - {other} {_signed(_paired(ends, setting, field, other))}"

    def leads(setting: Setting) -> np.ndarray:
        """TINY - GradMax by seed, the mean of the measurements while growing."""
        means = []
        for method in ("TINY", "GradMax"):
            by_seed = [select(_of(curves, method, setting), seed=seed, growing=True) for seed in distinct(ends, "seed")]
            means.append(np.array([column(rows, "test").mean() for rows in by_seed]))
        return 100 * (means[0] - means[1])

    def extra(setting: Setting, names: tuple[str, ...] = ("TINY", "GradMax")) -> str:
        cells = []
        for method in names:
            of_method = _of(ends, method, setting)
            gained = 100 * (column(of_method, "converged") - column(of_method, "after_growth"))
            cells.append(f"{method} {_signed(gained)}")
        return ", ".join(cells)

    thinnest, last = settings[-1][0], settings[-1]
    after, converged = (
        [_paired(ends, setting, field, "GradMax") for setting in settings] for field in ("after_growth", "converged")
    )
    leading = [leads(setting) for setting in settings]
    lead = dict(zip(settings, leading))
    gained = "gained by the extra epochs, "
    short = "not decided: 3 extra epochs are too few to time convergence"
    found = [
        Finding(
            "Table 1",
            f"% after growth / after the extra epochs, {each(table)}; {references()}",
            f"after growth: {_verdict(settings, after)}; after the extra epochs: {_verdict(settings, converged)}",
        ),
        Finding(
            "Figure 5",
            f"mean over the growing epochs, {each(lambda s: f'TINY - GradMax {_signed(lead[s])}')}",
            _verdict(settings, leading),
        ),
        Finding("Figure 6", gained + each(extra, thinnest), _gains(ends, settings, thinnest)),
        Finding("Figure 13", gained + each(extra), _gains(ends, settings, None)),
        Finding("Figure 7", gained + each(extra, thinnest), short),
        Finding("Figure 14", gained + each(lambda s: extra(s, ("TINY",))), short),
        Finding("Figure 15", gained + each(lambda s: extra(s, ("GradMax",))), short),
        Finding("Table 4", f"after the extra epochs, {gap(last, 'converged')}", _verdict([last], converged[-1:])),
        Finding(
            "Table 5, accuracy",
            f"% after growth / after the extra epochs: {table(last)}",
            _verdict([last], after[-1:]),
        ),
    ]
    if "GradMax, figure 16" in methods:
        other = "GradMax, figure 16"
        gaps = [_paired(ends, setting, "converged", other) for setting in settings]
        ours = f"after the extra epochs, {each(lambda s: gap(s, 'converged', other))}"
        found.append(Finding("Figure 16", ours, _verdict(settings, gaps, other)))
    if "random0" in methods:
        gaps = [_paired(ends, setting, "converged", "random0") for setting in settings]
        ours = f"after the extra epochs, {each(lambda s: gap(s, 'converged', 'random0'))}"
        found.append(Finding("Table 1, a control", ours, _verdict(settings, gaps, "random0")))
    return found


def _percent(ends: list[Row], method: str, setting: Setting) -> str:
    return spread(100 * column(_of(ends, method, setting), "converged"), 1)


def _paired(ends: list[Row], setting: Setting, field: str, other: str) -> np.ndarray:
    """TINY - other in points, by seed."""
    return 100 * (column(_of(ends, "TINY", setting), field) - column(_of(ends, other, setting), field))


def _signed(values: np.ndarray) -> str:
    """Mean with its standard error, in points."""
    error = f" ± {_error(values):.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{error}"


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def _verdict(settings: list[Setting], gaps: list[np.ndarray], other: str = "GradMax") -> str:
    """Who is ahead by more than two standard errors of the paired difference."""
    parts: dict[str, list[str]] = {}
    for (start, between), values in zip(settings, gaps):
        clear = len(values) > 1 and abs(values.mean()) > 2 * _error(values)
        who = ("TINY ahead" if values.mean() > 0 else f"{other} ahead") if clear else "no clear gap"
        parts.setdefault(who, []).append(f"from {start} at Delta t = {between:g}")
    return _listed(parts)


def _gains(ends: list[Row], settings: list[Setting], only: str | None) -> str:
    """Whether GradMax has more left to gain at the end of the growth than TINY."""
    chosen = [setting for setting in settings if only in (None, setting[0])]
    gained = [_paired(ends, s, "converged", "GradMax") - _paired(ends, s, "after_growth", "GradMax") for s in chosen]
    parts: dict[str, list[str]] = {}
    for (start, between), values in zip(chosen, gained):
        clear = len(values) > 1 and abs(values.mean()) > 2 * _error(values)
        who = ("TINY gains more" if values.mean() > 0 else "GradMax gains more") if clear else "no clear difference"
        parts.setdefault(who, []).append(f"from {start} at Delta t = {between:g}")
    return _listed(parts)


def _listed(parts: dict[str, list[str]]) -> str:
    """What is clear comes first."""
    clear = sorted(parts, key=lambda who: who.startswith("no clear"))
    return "; ".join(f"{who} {', '.join(parts[who])}" for who in clear)
