"""A whole run: accuracy, widths and bottlenecks over its steps.

A *record* is a mapping with a `step` and any of: `<split>_accuracy` (a number), `width` and `psi` (numbers by site
name). Sites are coloured by depth, from the input (dark) to the output (light), and labelled where their line ends.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinyjax.plot.style import (
    DASHED,
    HEAT_COLOURS,
    INK,
    SPLIT_COLOURS,
    depth_colours,
    label_ends,
    new_figure,
    steps_below,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]


class Line(NamedTuple):
    """A quantity over the records that have it.

    Attributes:
        steps: (n,).
        values: (n,).
    """

    steps: np.ndarray
    values: np.ndarray


@styled
def growth_curves(records: Sequence[Record], *, references: Mapping[str, float] | None = None) -> "Figure":
    """Accuracy, width of every site and psi of every site against the step, one above the other.

    Example:
        >>> records = [
        ...     {"step": 0, "test_accuracy": 0.2, "width": {"hidden_1": 2}, "psi": {"hidden_1": 0.7}},
        ...     {"step": 9, "test_accuracy": 0.8, "width": {"hidden_1": 8}, "psi": {"hidden_1": 0.2}},
        ... ]
        >>> plot.growth_curves(records, references={"fixed, width 64": 0.96}).savefig("growth.png")

    Args:
        records: in the order of their steps; each quantity is drawn through the records that have it.
        references: accuracies to compare with, drawn as dashed lines, by label.

    Raises:
        ValueError: no record has anything to draw.
    """
    accuracies, widths, psi = _accuracies(records), _by_site(records, "width"), _by_site(records, "psi")
    panels: list[Callable[[Axes], None]] = []
    if accuracies:
        panels.append(lambda axes: _draw_accuracies(axes, accuracies, references or {}))
    if widths:
        panels.append(lambda axes: _draw_widths(axes, widths))
    if psi:
        panels.append(lambda axes: _draw_psi(axes, psi))
    if not panels:
        raise ValueError("`records` have none of `<split>_accuracy`, `width`, `psi`; there is nothing to draw")
    figure, all_axes = new_figure(len(panels), size=(7.2, 0.6 + 2.1 * len(panels)))
    for axes, draw in zip(all_axes, panels):
        draw(axes)
    last = max(line.steps[-1] for lines in (accuracies, widths, psi) for line in lines.values())
    all_axes[0].set_xlim(right=last)
    steps_below(all_axes)
    return figure


@styled
def bottleneck_map(records: Sequence[Record]) -> "Figure":
    """Psi of every site (rows, input on top) over the steps of a run (columns), colour on a logarithmic scale.

    Example:
        >>> records = [{"step": 0, "psi": {"first": 0.7, "second": 0.1}}, {"step": 9, "psi": {"first": 0.2}}]
        >>> plot.bottleneck_map(records).savefig("psi.png")

    Args:
        records: in the order of their steps; those without `psi` are passed over, a site without a value stays blank.

    Raises:
        ValueError: no record has a `psi` above zero.
    """
    from matplotlib.colors import LogNorm

    lines = _by_site(records, "psi")
    if not lines:
        raise ValueError("none of the `records` has a `psi` above zero; there is nothing to draw")
    sites, steps = list(lines), np.unique(np.concatenate([line.steps for line in lines.values()]))
    psi = np.full((len(sites), len(steps)), np.nan)
    for row, line in zip(psi, lines.values()):
        row[np.searchsorted(steps, line.steps)] = line.values
    figure, (axes,) = new_figure(1, size=(7.2, 1.3 + 0.32 * len(sites)))
    rows = np.arange(len(sites) + 1) - 0.5
    mesh = axes.pcolormesh(_edges(steps), rows, np.ma.masked_invalid(psi), cmap=HEAT_COLOURS, norm=LogNorm())
    axes.set_title("Expressivity bottleneck ψ")
    axes.set_yticks(range(len(sites)), sites)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=30 if len(sites) > 6 else 15)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    steps_below([axes])
    return figure


def _draw_accuracies(axes: "Axes", lines: Mapping[str, Line], references: Mapping[str, float]) -> None:
    axes.set_title("Accuracy")
    ends = []
    for label, value in references.items():
        axes.axhline(value, **DASHED)
        ends.append((value, f"{label}  {value:.3f}", INK))
    for split, line in lines.items():
        colour = SPLIT_COLOURS.get(split, INK)
        axes.plot(*line, color=colour)
        ends.append((line.values[-1], f"{split}  {line.values[-1]:.3f}", colour))
    label_ends(axes, ends)


def _draw_widths(axes: "Axes", lines: Mapping[str, Line]) -> None:
    axes.set_title("Width")
    ends = []
    for (site, line), colour in zip(lines.items(), depth_colours(len(lines))):
        axes.plot(*line, color=colour, drawstyle="steps-post")
        ends.append((line.values[-1], f"{site}  {line.values[-1]:.0f}", colour))
    axes.set_ylim(bottom=0)
    label_ends(axes, ends)


def _draw_psi(axes: "Axes", lines: Mapping[str, Line]) -> None:
    axes.set_title("Expressivity bottleneck ψ")
    axes.set_yscale("log")
    ends = []
    for (site, line), colour in zip(lines.items(), depth_colours(len(lines))):
        axes.plot(*line, color=colour)
        ends.append((line.values[-1], f"{site}  {line.values[-1]:.2g}", colour))
    label_ends(axes, ends)


def _accuracies(records: Sequence[Record]) -> dict[str, Line]:
    names = dict.fromkeys(key for record in records for key in record if key.endswith("_accuracy"))
    lines = {name.removesuffix("_accuracy"): _line(records, [record.get(name) for record in records]) for name in names}
    return {split: line for split, line in lines.items() if line.steps.size}


def _by_site(records: Sequence[Record], quantity: str) -> dict[str, Line]:
    """A positive quantity of every site; what is zero has no place on a logarithmic axis."""
    sites = dict.fromkeys(site for record in records for site in record.get(quantity, ()))
    lines = {}
    for site in sites:
        values = [record.get(quantity, {}).get(site) for record in records]
        line = _line(records, [value if value is not None and value > 0 else None for value in values])
        if line.steps.size:
            lines[site] = line
    return lines


def _line(records: Sequence[Record], values: Sequence[Any]) -> Line:
    points = [
        (float(record["step"]), float(value))
        for record, value in zip(records, values)
        if value is not None and np.isfinite(value)
    ]
    return Line(*np.array(points).reshape(-1, 2).T)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the cells around steps: half-way between neighbours."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
