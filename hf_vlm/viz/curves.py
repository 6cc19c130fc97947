"""Plots of a log's metrics over the steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_vlm.training.callbacks import LogFile, read_log

__all__ = ["Panel", "plot_panels", "plot_probes", "series"]

PICTURE = "probes.png"

Series = tuple[list[float], list[float]]
Limits = tuple[float | None, float | None]

# Title, metrics and limits of each panel; panels without entries in the log are left out.
PROBE_PANELS: tuple[tuple[str, tuple[str, ...], Limits], ...] = (
    ("Loss", ("loss",), (None, None)),
    ("Effective rank of the features", ("probe_effective_rank",), (0, None)),
    ("Spread of the features (1: in all directions)", ("probe_feature_std", "feature_std"), (0, 1)),
    ("Accuracy on the features", ("probe_knn", "probe_linear"), (0, 1)),
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves over the steps, by label; points are marked where there are few.

    A curve may have a band around it: the lowest and the highest value at each of its steps.
    """

    title: str
    curves: Mapping[str, Series]
    bands: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    ylabel: str = ""
    ylim: Limits = (None, None)


def series(entries: Sequence[Mapping[str, float]], metric: str) -> Series:
    """Steps and values of the entries that hold a metric."""
    found = [entry for entry in entries if metric in entry]
    return [entry["step"] for entry in found], [entry[metric] for entry in found]


def plot_panels(path: Path, panels: Sequence[Panel], *, columns: int = 2) -> None:
    """Plots panels in a grid into a picture."""
    from matplotlib.figure import Figure  # takes a second

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, index + 1)
        for label, (steps, values) in panel.curves.items():
            (line,) = axis.plot(steps, values, marker="o" if len(steps) <= 20 else None, label=label)
            if label in panel.bands:
                axis.fill_between(steps, *panel.bands[label], color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=panel.title, xlabel="step", ylabel=panel.ylabel, ylim=panel.ylim)
        axis.grid(alpha=0.3)
        if len(panel.curves) > 1:
            axis.legend()
    figure.savefig(path, dpi=120)


def plot_probes(folder: Path) -> None:
    """Plots loss and probe metrics of a run's log into its folder, as `probes.png`; nothing without probes."""
    entries = read_log(folder / LogFile.name)
    if not any("probe_effective_rank" in entry for entry in entries):
        return
    panels = []
    for title, metrics, ylim in PROBE_PANELS:
        curves = {metric: series(entries, metric) for metric in metrics}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if curves:
            panels.append(Panel(title=title, curves=curves, ylim=ylim))
    plot_panels(folder / PICTURE, panels)
