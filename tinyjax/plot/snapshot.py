"""One moment of a run: the spectrum of one site, the widths of all."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyjax.plot.style import ACCENT, DASHED, FAINT, INK, SECOND, depth_colours, label_ends, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def spectrum(singular_values: Any, *, edge: float | None = None, title: str = "Singular values") -> "Figure":
    """Singular values of S^(-1/2) N in descending order; those above the edge of the noise stand out.

    Example:
        >>> gains = tinyjax.methods.bottleneck(statistics).gains
        >>> plot.spectrum(gains**0.5, edge=0.01).savefig("spectrum.png")

    Args:
        singular_values: (k,), the lambda_k of proposition 3.2, in any order.
        edge: the largest value that noise alone explains.
        title: above the figure.

    Raises:
        ValueError: there is no singular value.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.sort(np.asarray(singular_values, float).ravel())[::-1]
    if not values.size:
        raise ValueError("`singular_values` is empty; there is nothing to draw")
    figure, (axes,) = new_figure(1, size=(7.2, 2.8))
    ranks = np.arange(1, values.size + 1)
    above = values > (-np.inf if edge is None else edge)
    markers: dict[str, Any] = {"markersize": 4.5, "linestyle": "none", "marker": "o"}
    axes.vlines(ranks, 0, values, color=FAINT, linewidth=1.2)
    axes.plot(ranks[above], values[above], color=ACCENT, **markers)
    axes.plot(ranks[~above], values[~above], color=SECOND, alpha=0.6, **markers)
    axes.set_title(title)
    axes.set_xlabel("rank k")
    axes.set_ylabel("λₖ")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0.3, values.size + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(axis="x", visible=False)
    if edge is not None:
        axes.axhline(edge, **DASHED)
        label_ends(axes, [(edge, f"noise edge\n{above.sum()} of {values.size} above", INK)])
    return figure


@styled
def widths(widths: Mapping[str, int], *, start: Mapping[str, int] | None = None) -> "Figure":
    """Width of every site as a bar (input on top), and where it started.

    Example:
        >>> plot.widths({"first": 24, "second": 12}, start={"first": 2, "second": 2}).savefig("widths.png")

    Args:
        widths: used slots by site name.
        start: the same before growing.

    Raises:
        ValueError: there is no site.
    """
    if not widths:
        raise ValueError("`widths` is empty; there is nothing to draw")
    start = start or {}
    figure, (axes,) = new_figure(1, size=(7.2, 0.9 + 0.32 * len(widths)))
    axes.barh(range(len(widths)), list(widths.values()), height=0.62, color=depth_colours(len(widths)))
    for row, (site, width) in enumerate(widths.items()):
        grown = f"{start[site]} → {width}" if site in start else str(width)
        axes.annotate(grown, (width, row), xytext=(5, 0), textcoords="offset points", va="center", color=INK)
        if site in start:
            axes.plot([start[site]] * 2, [row - 0.31, row + 0.31], color="white", linewidth=1)
    axes.set_title("Width")
    axes.set_yticks(range(len(widths)), list(widths))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return figure
