"""Curves of a log: values, labels and panels."""

import json

import pytest
from matplotlib.axes import Axes
from PIL import Image

from hf_vlm.viz.curves import Panel, plot_panels, plot_probes, series

ENTRIES = [
    {"step": 0, "probe_effective_rank": 5.0, "probe_feature_std": 0.4},
    {"step": 2, "loss": 1.5, "feature_std": 0.6},
    {"step": 4, "loss": float("nan"), "feature_std": 0.5},
    {"step": 4, "probe_effective_rank": 9.0, "probe_feature_std": 0.5, "probe_knn": 0.3, "probe_linear": 0.6},
]


@pytest.fixture
def plotted(monkeypatch):
    """What is plotted: (steps, values, label, marker) of each curve."""
    curves = []
    plot = Axes.plot

    def kept(self, steps, values, marker=None, label=None):
        curves.append((list(steps), list(values), label, marker))
        return plot(self, steps, values, marker=marker, label=label)

    monkeypatch.setattr(Axes, "plot", kept)
    return curves


def test_a_series_leaves_out_entries_without_the_metric():
    assert series(ENTRIES, "probe_effective_rank") == ([0, 4], [5.0, 9.0])
    assert series(ENTRIES, "nothing") == ([], [])


def test_probes_are_plotted_with_the_loss(tmp_path, plotted):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    plot_probes(tmp_path)
    assert [(label, steps) for steps, _, label, _ in plotted] == [
        ("loss", [2, 4]),
        ("probe_effective_rank", [0, 4]),
        ("probe_feature_std", [0, 4]),
        ("feature_std", [2, 4]),
        ("probe_knn", [4]),
        ("probe_linear", [4]),
    ]
    with Image.open(tmp_path / "probes.png") as picture:
        assert picture.size == (1200, 960)


def test_metrics_without_values_get_no_curve(tmp_path, plotted):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES[:2]))
    plot_probes(tmp_path)
    assert "probe_knn" not in [label for *_, label, _ in plotted]
    with Image.open(tmp_path / "probes.png") as picture:
        assert picture.size == (1200, 960)  # three panels: two rows


def test_points_are_marked_where_they_are_few(tmp_path, plotted):
    few, many = (list(range(3)),) * 2, (list(range(30)),) * 2
    plot_panels(tmp_path / "panels.png", [Panel(title="both", curves={"few": few, "many": many})], columns=1)
    assert [(label, marker) for *_, label, marker in plotted] == [("few", "o"), ("many", None)]
    with Image.open(tmp_path / "panels.png") as picture:
        assert picture.size == (600, 480)
