"""The results of `label_efficiency.py`: read from their file, as a table, a picture and a JSON object."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from label_efficiency_data import LABELS, SETS
from label_efficiency_runs import ARMS, Run

__all__ = ["plot", "read_results", "summary", "table", "verdict"]

Results = Mapping[Run, Mapping[str, Any]]


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    """The lines of a file of results by their run, none where there is no file; ValueError for a line that is none."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
        try:
            result = json.loads(line)
            found[Run(result["set"], result["labels"], result["arm"], result["seed"])] = result
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no result ({error!r}): delete it to run it again.") from error
    return found


def metric_of(data: str) -> str:
    """The metric of a set's task that is reported."""
    return SETS[data].task.metric


def values(results: Results, data: str, labels: str, arm: str) -> list[float]:
    """The metric of the seeds of a point, by seed."""
    wanted = {run.seed: result for run, result in results.items() if run[:3] == (data, labels, arm)}
    return [result["metrics"][metric_of(data)] for _, result in sorted(wanted.items())]


def points(results: Results) -> list[tuple[str, str]]:
    """Sets and numbers of labels that have results, in their order."""
    measured = {run[:2] for run in results}
    return [(data, labels) for data in SETS for labels in LABELS if (data, labels) in measured]


def spread(found: Sequence[float]) -> float:
    return statistics.stdev(found) if len(found) > 1 else 0.0


def table(results: Results) -> str:
    """Means and standard deviations over the seeds, a row for each set and number of labels, a column for each arm."""
    arms = [arm for arm in ARMS if any(run.arm == arm for run in results)]
    rows = [["set/labels", "metric", *arms], ["---", "---", *["---:"] * len(arms)]]
    for data, labels in points(results):
        row = [f"{data}/{labels}", metric_of(data)]
        for arm in arms:
            found = values(results, data, labels, arm)
            row.append(f"{statistics.mean(found):.3f} ± {spread(found):.3f} ({len(found)})" if found else "")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(results: Results) -> dict[str, dict[str, float]]:
    """Mean metric over the seeds, by arm and set/labels."""
    return {
        arm: {
            f"{data}/{labels}": round(statistics.mean(found), 4)
            for data, labels in points(results)
            if (found := values(results, data, labels, arm))
        }
        for arm in ARMS
    }


def verdict(results: Results, run: Run, value: float) -> str:
    """What the results have of a run, and whether a new value of its metric is within two standard deviations of its
    seeds.
    """
    found, metric = values(results, *run[:3]), metric_of(run.data)
    before = f"{results[run]['metrics'][metric]:.4f}" if run in results else "nothing"
    text = f"{run}: {metric} {value:.4f}; the results have {before}"
    if len(found) < 2:
        return f"{text}, and {len(found)} seeds of this point: no spread to compare with"
    mean, deviation = statistics.mean(found), spread(found)
    inside = "within" if abs(value - mean) <= 2 * deviation else "OUTSIDE of"
    return f"{text}; {inside} two standard deviations of {len(found)} seeds, {mean:.4f} ± {deviation:.4f}"


def curve(results: Results, data: str, arm: str) -> list[tuple[int, float, float]]:
    """Number of labelled images, mean metric and its standard deviation, for each number that has results."""
    line = []
    for labels in LABELS:
        if found := values(results, data, labels, arm):
            number = next(result["num_labelled"] for run, result in results.items() if run[:2] == (data, labels))
            line.append((number, statistics.mean(found), spread(found)))
    return line


def plot(path: Path, results: Results) -> None:
    """The metric over the number of labels, a panel for each set, a line for each arm, with a band of the spread."""
    from matplotlib.figure import Figure  # takes a second

    sets = list(dict.fromkeys(data for data, _ in points(results)))
    figure = Figure(figsize=(5 * len(sets), 4), layout="constrained")
    for index, data in enumerate(sets):
        axis = figure.add_subplot(1, len(sets), index + 1)
        for number, arm in enumerate(ARMS):
            if line := curve(results, data, arm):
                counts, means, deviations = map(np.array, zip(*line))
                color = f"C{number}"  # the same in all panels
                axis.plot(counts, means, marker="o", label=arm, color=color)
                axis.fill_between(counts, means - deviations, means + deviations, alpha=0.15, color=color, lw=0)
        axis.set(title=data, xlabel="labelled images", ylabel=f"test {metric_of(data)}", xscale="log", ylim=(0, None))
        ticks = sorted({int(count) for line in axis.get_lines() for count in line.get_xdata()})
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
