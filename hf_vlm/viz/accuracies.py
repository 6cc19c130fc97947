"""Accuracies as bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["plot_accuracies"]


def plot_accuracies(path: Path, accuracies: Mapping[str, Sequence[float]]) -> None:
    """Plots the mean of accuracies from 0 to 1 as a bar for each name, in percent, with a dot for each of several.

    The names are from top to bottom in their order.
    """
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6, 1 + 0.4 * len(accuracies)), layout="constrained")
    axis = figure.add_subplot()
    means = [100 * float(np.mean(values)) for values in accuracies.values()]
    bars = axis.barh(range(len(means)), means, color="tab:blue", alpha=0.7)
    axis.bar_label(bars, fmt="%.1f", padding=6)
    for row, values in enumerate(accuracies.values()):
        if len(values) > 1:
            axis.plot(100 * np.array(values), [row] * len(values), "o", color="black", markersize=3)
    axis.set_yticks(range(len(means)), list(accuracies))
    axis.invert_yaxis()
    axis.set(xlabel="accuracy on held-out images, %", xlim=(0, min(1.15 * max(means, default=0) + 1, 115)))
    figure.savefig(path, dpi=120)
