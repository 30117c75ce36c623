"""How every figure looks: quiet axes, few colours, labels where the lines end."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

INK = "#22223b"
FAINT = "#c9cad6"
ACCENT = "#c8553d"
SECOND = "#3d6c8f"
SPLIT_COLOURS = {"train": "#9a9ab0", "validation": SECOND, "test": ACCENT}
DEPTH_COLOURS = "viridis"
HEAT_COLOURS = "OrRd"
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "alpha": 0.55}
LINE_INCHES = 0.155  # height of a line of labels
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eeeef3",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.dpi": 140,
}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a plotting function under the house style and leaves matplotlib's global settings alone."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


def new_figure(rows: int, *, size: tuple[float, float]) -> tuple["Figure", list["Axes"]]:
    """A figure (inches) of panels one above the other, outside pyplot's registry of windows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def depth_colours(count: int) -> list[Any]:
    """One colour a site, by depth."""
    import matplotlib

    # The palest end of the map cannot be read on white.
    return list(matplotlib.colormaps[DEPTH_COLOURS](np.linspace(0, 0.8, max(count, 2))[:count]))


def label_ends(axes: "Axes", ends: Sequence[tuple[float, str, Any]]) -> None:
    """Writes every `(value, label, colour)` right of its panel at the value's height, apart where labels would overlap.

    Comes last: the limits of the panel must be final.
    """
    to_panel = axes.transData + axes.transAxes.inverted()
    axes.get_ylim()  # settles the limits before they are used
    right = axes.get_xlim()[1]
    labels = [(to_panel.transform((right, value))[1], label, colour) for value, label, colour in ends]
    labels.sort(key=lambda entry: entry[:2])
    figure = axes.get_figure(root=True)
    assert figure is not None
    panel_inches = figure.get_size_inches()[1] / len(figure.axes) * 0.72
    places = spread([height for height, _, _ in labels], gap=LINE_INCHES / panel_inches)
    for place, (height, label, colour) in zip(places, labels):
        leader = {"color": colour, "linewidth": 0.7, "alpha": 0.7, "clip_on": False}
        axes.plot([1.003, 1.022], [height, place], transform=axes.transAxes, **leader)
        axes.text(1.028, place, label, transform=axes.transAxes, color=colour, va="center", fontsize=8.5)


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Moves ascending heights in [0, 1] as little as it takes to be `gap` apart, inside the panel where they fit."""
    places = list(heights)
    for _ in range(100):  # neighbours push each other apart until all fit
        if (len(places) - 1) * gap < 1:
            places[0], places[-1] = max(places[0], 0.0), min(places[-1], 1.0)
        for i in range(len(places) - 1):
            push = max(gap - (places[i + 1] - places[i]), 0) / 2
            places[i], places[i + 1] = places[i] - push, places[i + 1] + push
    return places


def steps_below(panels: Sequence["Axes"]) -> None:
    """Names the shared axis under the lowest panel."""
    from matplotlib.ticker import MaxNLocator

    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
