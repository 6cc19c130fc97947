"""Precision and recall over all thresholds of a score, and the threshold of the best F1."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["OperatingPoint", "PrecisionRecallCurve", "best_f1", "operating_point", "precision_recall_curve"]

Floats = NDArray[np.float64]


class PrecisionRecallCurve(NamedTuple):
    """Precision and recall of what scores at least a threshold, for each score that occurs."""

    thresholds: Floats  # (n,), falling
    precision: Floats  # (n,)
    recall: Floats  # (n,), rising; NaN where there is nothing to find
    f1: Floats  # (n,)


class OperatingPoint(NamedTuple):
    """A threshold, and the precision, recall and F1 of what scores above it."""

    threshold: float
    precision: float
    recall: float
    f1: float


def precision_recall_curve(
    scores: NDArray[np.floating], is_right: NDArray[np.bool_], num_relevant: int
) -> PrecisionRecallCurve:
    """The curve of predictions that are right or wrong.

    Args:
        scores: (n,) scores of the predictions.
        is_right: (n,) whether each of them is right.
        num_relevant: How many right ones there would be if all were found.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    last = np.flatnonzero(np.diff(ranked, append=-np.inf))  # (m,) positions of the last of equal scores
    num_right, num_found = np.cumsum(is_right[order])[last], last + 1
    recall = num_right / num_relevant if num_relevant else np.full(len(last), np.nan)
    f1 = 2 * num_right / (num_found + num_relevant)
    return PrecisionRecallCurve(ranked[last], num_right / num_found, recall, f1)


def best_f1(scores: NDArray[np.floating], is_right: NDArray[np.bool_], num_relevant: int) -> OperatingPoint:
    """The point of the best F1; its threshold is halfway between the lowest score to keep and the next one.

    Args:
        scores: (n,) scores of the predictions, 0 to 1.
        is_right: (n,) whether each of them is right.
        num_relevant: How many right ones there would be if all were found.

    Returns:
        The point; its threshold and precision are NaN where no prediction is right, and all is where there is nothing
        to find.
    """
    if not num_relevant:
        return OperatingPoint(*4 * [float("nan")])
    if not is_right.any():
        return OperatingPoint(float("nan"), float("nan"), 0.0, 0.0)
    curve = precision_recall_curve(scores, is_right, num_relevant)
    best = int(np.argmax(curve.f1))
    thresholds = np.append(curve.thresholds, 0.0)
    threshold = (thresholds[best] + thresholds[best + 1]) / 2
    return OperatingPoint(float(threshold), *(float(values[best]) for values in curve[1:]))


def operating_point(
    scores: NDArray[np.floating], is_right: NDArray[np.bool_], num_relevant: int, threshold: float
) -> OperatingPoint:
    """Precision, recall and F1 of the predictions that score above a threshold; NaN where they are not defined."""
    kept = scores > threshold
    num_right, num_found = int(is_right[kept].sum()), int(kept.sum())
    precision = num_right / num_found if num_found else float("nan")
    recall = num_right / num_relevant if num_relevant else float("nan")
    total = num_found + num_relevant
    return OperatingPoint(threshold, precision, recall, 2 * num_right / total if total else float("nan"))
