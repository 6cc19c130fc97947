"""The picture of a confusion matrix: values, names and counts."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_vlm.viz.confusion import plot_confusion


@pytest.fixture
def plotted(monkeypatch):
    """The axes of each figure, which is not rendered."""
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: axes.append(self.axes[0]))
    return axes


def names_of(axis):
    return [tick.get_text() for tick in axis.get_yticklabels()], [tick.get_text() for tick in axis.get_xticklabels()]


def test_rows_are_fractions_of_the_true_class(tmp_path, plotted):
    matrix = np.array([[6, 2, 0], [0, 1, 3], [0, 0, 0]])
    plot_confusion(tmp_path / "confusion.png", matrix, ["cat", "dog", "bird"])
    (axis,) = plotted
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25, 0], [0, 0.25, 0.75], [0, 0, 0]])
    assert axis.get_title() == "accuracy 0.583 of 12 images"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert names_of(axis) == (["cat", "dog", "bird"],) * 2
    texts = {text.get_position(): text.get_text() for text in axis.texts}  # at (column, row)
    assert texts == {(c, r): str(matrix[r, c]) for r in range(3) for c in range(3)}


@pytest.mark.parametrize(("num_classes", "named", "counted"), [(16, True, False), (41, False, False)])
def test_many_classes_are_shown_without_names_and_counts(tmp_path, plotted, num_classes, named, counted):
    plot_confusion(
        tmp_path / "confusion.png", np.eye(num_classes, dtype=int), [f"class {i}" for i in range(num_classes)]
    )
    (axis,) = plotted
    assert ("class 15" in names_of(axis)[0]) == named
    assert bool(axis.texts) == counted


def test_any_name_is_rendered(tmp_path):
    plot_confusion(tmp_path / "confusion.png", np.eye(3, dtype=int), ["5 $", r"\frac$x$ _^", 100 * "long "])
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_what_is_counted_is_in_the_title(tmp_path, plotted):
    plot_confusion(tmp_path / "confusion.png", 600 * np.eye(2, dtype=int), ["sky", "road"], counted="pixels")
    assert plotted[0].get_title() == "accuracy 1.000 of 1,200 pixels"


def test_long_names_are_truncated(tmp_path, plotted):
    plot_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), [24 * "a", 25 * "b"])
    assert names_of(plotted[0])[0] == [24 * "a", 23 * "b" + "…"]


@pytest.mark.parametrize("matrix", [np.eye(3), np.zeros((2, 2)), np.ones((2, 3))])
def test_malformed_matrices_are_refused(tmp_path, matrix):
    with pytest.raises(ValueError, match="2 classes must be 2 x 2 and count some images"):
        plot_confusion(tmp_path / "confusion.png", matrix, ["a", "b"])
