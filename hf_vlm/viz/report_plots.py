"""Plots of a report as SVG for a page that is light or dark: ink is the page's colour of text."""

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vlm.tasks.reports.parts import Curves, Histogram, Matrix
from hf_vlm.viz.confusion import confusion_figure, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_svg"]

INK = "#010203"  # in the plots, replaced by the page's
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "font.size": 9,
    "svg.fonttype": "none",  # text, which can be found and is a tenth of the size
    "legend.frameon": False,
}
SIZE = (5.2, 3.7)  # inches
# What matplotlib writes around a plot, which names addresses.
PREAMBLE = re.compile(r"^.*?(?=<svg )", re.DOTALL)
ADDRESSES = re.compile(r' xmlns(:\w+)?="[^"]*"')


def plot_svg(part: Curves | Histogram | Matrix, number: int) -> str:
    """The element <svg> of a part.

    Args:
        number: Of the plot, which makes its identifiers unique on the page.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a font that the page's reader need not have
        if isinstance(part, Matrix):
            figure = confusion_figure(part.counts, part.names)
        else:
            figure = _curves(part) if isinstance(part, Curves) else _histogram(part)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = ADDRESSES.sub("", PREAMBLE.sub("", file.getvalue(), count=1))
    svg = re.sub(r'(?<=<svg )width="[^"]*" |(?<=" )height="[^"]*" (?=viewBox)', "", svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>p{number}-", svg).replace(INK, "currentColor")
    return svg.strip()


def _axes(part: Curves | Histogram) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.add_subplot()
    axis.set(xlabel=part.xlabel, ylabel=part.ylabel, xlim=(0, 1))
    axis.grid(alpha=0.2)
    if part.at is not None:
        axis.axvline(part.at, color=INK, linestyle=":", linewidth=1.2)
    return figure, axis


def _add_legend(figure: "Figure", num_entries: int) -> None:
    if num_entries > 1:
        figure.legend(loc="outside lower center", ncols=min(num_entries, 4), fontsize=8)


def _curves(part: Curves) -> "Figure":
    figure, axis = _axes(part)
    axis.set_ylim(0, 1.02)
    if part.diagonal:
        axis.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, alpha=0.5)
    for name, (x, y) in part.lines.items():
        is_main = name == "all classes"
        marker = "o" if part.diagonal else None
        color = {"color": INK} if is_main else {}
        axis.plot(x, y, label=plain_text(name), linewidth=2.2 if is_main else 1.4, marker=marker, **color)
    _add_legend(figure, len(part.lines))
    return figure


def _histogram(part: Histogram) -> "Figure":
    figure, axis = _axes(part)
    highest = max(int(counts.max(initial=0)) for counts in part.counts.values())
    edges = np.linspace(0, 1, len(next(iter(part.counts.values()))) + 1)
    for name, counts in part.counts.items():
        axis.stairs(counts, edges, fill=True, alpha=0.5, label=plain_text(name))
    if highest > 100:  # detectors have many more wrong detections of low scores than others
        axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(0)
    _add_legend(figure, len(part.counts))
    return figure
