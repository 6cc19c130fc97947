"""A confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_vlm.data.io.messages import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion_figure", "plain_text", "plot_confusion"]

MAX_NAMED = 40  # classes; the names of more would be illegible
MAX_LENGTH = 24  # characters of a name; longer ones would leave no room for the matrix
MAX_COUNTED = 15  # classes; the counts of more would be illegible


def plot_confusion(path: Path, matrix: NDArray[Any], class_names: Sequence[str], *, counted: str = "images") -> None:
    """Plot a confusion matrix as a heat map, each row divided by its sum, with the accuracy as its title.

    Names are shown for up to 40 classes, the counts for up to 15.

    Args:
        path: File of the picture.
        matrix: (classes, classes) numbers of images or pixels, true classes in rows, predicted ones in columns.
        class_names: Name of each class.
        counted: What the matrix counts.

    Raises:
        ValueError: Where the names do not fit the matrix, or it counts nothing.
    """
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes) or not matrix.sum():
        raise ValueError(
            f"A confusion matrix of {num_classes} classes must be {num_classes} x {num_classes} and count "
            f"some {counted}, but is {' x '.join(map(str, matrix.shape))} and counts {matrix.sum():g}."
        )
    figure = confusion_figure(matrix, class_names)
    figure.axes[0].set_title(f"accuracy {np.trace(matrix) / matrix.sum():.3f} of {matrix.sum():,} {counted}")
    figure.savefig(path, dpi=120)


def confusion_figure(matrix: NDArray[Any], class_names: Sequence[str]) -> "Figure":
    """The heat map of `plot_confusion`, without its title."""
    from matplotlib.figure import Figure  # takes a second

    num_classes = len(class_names)
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)  # rows of classes without images stay 0
    side = min(max(0.45 * num_classes, 4), 14)
    figure = Figure(figsize=(side + 1.5, side), layout="compressed")
    axis = figure.add_subplot()
    image = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="fraction of the true class", shrink=0.8)
    axis.set(xlabel="predicted class", ylabel="true class")
    if num_classes <= MAX_NAMED:
        positions, names = range(num_classes), [plain_text(name) for name in class_names]
        axis.set_xticks(positions, names, rotation=90)
        axis.set_yticks(positions, names)
    if num_classes <= MAX_COUNTED:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def plain_text(name: str) -> str:
    """A name for a plot, in one line, shortened, and as it is: in matplotlib's text two dollars enclose a formula."""
    name = one_line(name)
    short = name if len(name) <= MAX_LENGTH else name[: MAX_LENGTH - 1] + "…"
    return short.replace("$", r"\$")
