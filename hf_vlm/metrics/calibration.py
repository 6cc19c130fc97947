"""Calibration of classifiers: how far confidence is from accuracy, and the temperature that brings them together."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

__all__ = ["NUM_BINS", "ReliabilityBins", "calibration_error", "fit_temperature", "reliability_bins"]

NUM_BINS = 15  # bins of confidence, as in Guo et al. 2017
MAX_TEMPERATURE = 20.0

Floats = NDArray[np.float64]


class ReliabilityBins(NamedTuple):
    """Bins of confidence of equal width, as in a reliability diagram; means are NaN where a bin is empty."""

    counts: NDArray[np.int64]  # (bins,)
    confidence: Floats  # (bins,) mean confidence
    accuracy: Floats  # (bins,) fraction of right predictions


def reliability_bins(confidences: Floats, is_right: NDArray[np.bool_]) -> ReliabilityBins:
    """Mean confidence and accuracy of the predictions in each of 15 bins of confidence.

    Args:
        confidences: (n,) probabilities of the predicted classes.
        is_right: (n,) whether each of them is right.
    """
    bins = np.clip(
        np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1
    )  # (low, high] as in the paper
    counts, *sums = (np.bincount(bins, weights, minlength=NUM_BINS) for weights in (None, confidences, is_right))
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an empty bin
        return ReliabilityBins(counts, *(total / counts for total in sums))


def calibration_error(confidences: Floats, is_right: NDArray[np.bool_]) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over 15 bins of equal width
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    counts, confidence, accuracy = reliability_bins(confidences, is_right)
    return float(np.nansum(np.abs(accuracy - confidence) * counts) / len(confidences))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature by which to divide logits so that the cross entropy is lowest (Guo et al. 2017).

    As in Platt 1999 each label has the probability (n + 1) / (n + 2), n being the number of images: on images that are
    all classified rightly the temperature would otherwise be 0, and the model certain of everything.

    Args:
        logits: (n, classes).
        labels: (n,) classes from 0.

    Returns:
        The temperature, between 1/20 and 20.
    """
    values, uncertainty = logits.astype(np.float64), 1 / (len(labels) + 2)

    def cross_entropy(log_temperature: float) -> float:
        log_probabilities = log_softmax(values * np.exp(-log_temperature), axis=1)  # (n, classes)
        of_label = np.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()
        return float(-(1 - uncertainty) * of_label - uncertainty * log_probabilities.mean())

    limit = np.log(MAX_TEMPERATURE)
    return float(np.exp(minimize_scalar(cross_entropy, bounds=(-limit, limit), method="bounded").x))
