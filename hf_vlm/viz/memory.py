"""The memory of plans as stacked bars."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["plot_memory"]


def plot_memory(path: Path, bars: Mapping[str, Mapping[str, float]], limit: float) -> None:
    """Plots the memory of a GPU into a picture.

    Args:
        path: The picture.
        bars: Bytes by what they hold, by the label of the bar.
        limit: Bytes of the GPU, drawn as a line.
    """
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(9, 1.2 + 0.5 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    parts = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    labels = list(bars)
    left = [0.0] * len(bars)
    for part in parts:
        widths = [bar.get(part, 0.0) / 1e9 for bar in bars.values()]
        axis.barh(labels, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths)]
    axis.axvline(limit / 1e9, color="black", linestyle="--", label="memory of a GPU")
    axis.set(xlabel="GB per GPU")
    axis.invert_yaxis()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
