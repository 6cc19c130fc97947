"""The parts of a report: tables, curves, histograms, matrices and cases, without a word on how they are rendered."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NUM_CASES",
    "Case",
    "Cases",
    "Curves",
    "Histogram",
    "Marks",
    "Matrix",
    "Part",
    "Table",
    "default_report",
    "highest",
]

NUM_CASES = 12  # images of a group
MAX_POINTS = 200  # of a curve
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a report.

    Attributes:
        title: Heading.
        note: What it shows, in a sentence or two.
    """

    title: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table(Part):
    """Rows of text and numbers; NaN stands for what is not defined."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Curves(Part):
    """Lines by name, each x and y of its points, from 0 to 1.

    Attributes:
        diagonal: Whether to compare with y = x.
        at: An x to mark.
    """

    lines: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    xlabel: str
    ylabel: str
    diagonal: bool = False
    at: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", {name: _thinned(*line) for name, line in self.lines.items()})


@dataclass(frozen=True, kw_only=True)
class Histogram(Part):
    """Counts by name in bins of 0 to 1 of equal width.

    Attributes:
        at: A value to mark.
    """

    counts: Mapping[str, NDArray[np.int64]]
    xlabel: str
    ylabel: str
    at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix(Part):
    """Counts (rows, rows) by true class (rows) and predicted class."""

    counts: NDArray[np.int64]
    names: Sequence[str]
    counted: str = "images"


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What is marked on an image: boxes, or the class of each pixel; or the image alone, with names below it.

    Attributes:
        names: Names of the boxes, of the classes of pixels, or of the image.
        class_ids: Their numbers.
        scores: Their scores; none for the ground truth.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        segmentation: (height, width) class of each pixel, of the image's shape and any size.
        ignored: Value of pixels without a class.
    """

    names: Sequence[str] = ()
    class_ids: Sequence[int] = ()
    scores: Sequence[float] | None = None
    boxes: NDArray[np.float64] | None = None
    segmentation: NDArray[np.uint8] | None = None
    ignored: int = 255


@dataclass(frozen=True, kw_only=True)
class Case:
    """An image with what was predicted and what is true.

    Attributes:
        image: Number of the image in the order of the evaluation.
        caption: Why it is shown.
        focus: Box in pixels around which a large image is cropped.
    """

    image: int
    caption: str
    predicted: Marks
    truth: Marks
    focus: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Cases(Part):
    """Images to look at."""

    cases: Sequence[Case] = field(default_factory=list)


def highest(values: NDArray[Any], candidates: NDArray[np.bool_] | None = None, *, num: int = NUM_CASES) -> list[int]:
    """Indices of the highest values, of the candidates if these are given; the highest first."""
    indices: Iterable[int] = range(len(values)) if candidates is None else np.flatnonzero(candidates).tolist()
    return heapq.nlargest(num, indices, key=lambda index: values[index])


def default_report(evaluation: Any) -> list[Part]:
    """A table of the metrics per class, and the confusion matrix, where there are any."""
    parts: list[Part] = []
    per_class: dict[str, dict[str, float]] = {}
    for key, value in evaluation.metrics.items():
        metric, slash, name = key.partition("/")
        if slash:
            per_class.setdefault(name, {})[metric] = value
    if per_class:
        columns = list(next(iter(per_class.values())))
        rows: list[list[Any]] = [[name, *map(values.get, columns)] for name, values in per_class.items()]
        parts.append(Table(title="Classes", columns=["class", *columns], rows=rows))
    if evaluation.confusion is not None:
        parts.append(confusion(evaluation.confusion, evaluation.class_names, evaluation.counted))
    return parts


def confusion(counts: NDArray[np.int64], names: Sequence[str], counted: str = "images", note: str = "") -> Matrix:
    """The part that shows a confusion matrix."""
    note = note or f"Rows are true classes, columns predicted ones; colours are fractions of a row's {counted}."
    return Matrix(title="Confusion matrix", counts=counts, names=names, counted=counted, note=note)


def score_histogram(scores: NDArray[Any], groups: Mapping[str, NDArray[np.bool_]], **options: Any) -> Histogram:
    """Histogram of the scores (n,) of groups of predictions, which are masks (n,)."""
    counts = {name: np.histogram(scores[group], bins=20, range=(0, 1))[0] for name, group in groups.items()}
    return Histogram(counts=counts, **options)


def _thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(x) <= MAX_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(np.int64))
    return x[kept], y[kept]
