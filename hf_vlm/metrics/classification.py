"""Classification metrics: for one class per image, or any number of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_vlm.metrics.calibration import calibration_error

__all__ = ["classification_metrics", "confusion_matrix", "multi_label_metrics"]

Floats = NDArray[np.float64]


def classification_metrics(
    probabilities: Any, labels: Any, *, class_names: Sequence[str] | None = None, per_class: bool = False
) -> dict[str, float]:
    """Accuracy and calibration where each image has one class.

    Args:
        probabilities: (n, classes) tensor, array or lists; each row sums to 1.
        labels: (n,) integers from 0.
        class_names: Names of the classes, for the keys of `per_class`; their indices by default.
        per_class: Also return `recall/<class name>` of every class; NaN where a class has no image.

    Returns:
        Metrics from 0 to 1:

        - `top1`, and `top5`: fraction of images whose class is the most probable one, or among the five most probable
          ones (1 where there are no more classes than that);
        - `balanced_accuracy`: mean recall of the classes that have images;
        - `macro_f1`: mean F1 of the classes that have images or predictions;
        - `ece`: expected calibration error, the mean distance between confidence and accuracy over 15 bins of equal
          width (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Raises:
        ValueError: Shapes do not match, there is no image, or rows do not sum to 1.
    """
    scores, names = _probabilities(probabilities, class_names)
    if not np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        raise ValueError("The probabilities of an image do not sum to 1: give the softmax of the logits.")
    num_images, num_classes = scores.shape
    classes = _labels(labels, num_images, num_classes)
    ranking = np.argsort(-scores, axis=1, kind="stable")  # (n, classes)
    hits = ranking == classes[:, None]
    counts = confusion_matrix(classes, ranking[:, 0], num_classes)  # (classes, classes)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a class without images
        recalls = counts.diagonal() / counts.sum(axis=1)
    metrics = {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :5].any(axis=1).mean()),
        "balanced_accuracy": float(np.nanmean(recalls)),
        "macro_f1": _macro_f1(counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)),
        "ece": calibration_error(scores.max(axis=1), hits[:, 0]),
    }
    if per_class:
        metrics |= {f"recall/{name}": float(recall) for name, recall in zip(names, recalls)}
    return metrics


def multi_label_metrics(
    probabilities: Any,
    labels: Any,
    *,
    threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
    per_class: bool = False,
) -> dict[str, float]:
    """Average precision and F1 where each image has any number of classes.

    Args:
        probabilities: (n, classes) tensor, array or lists of probabilities from 0 to 1, independent for each class.
        labels: (n, classes), 1 for each class that is present and 0 for the others.
        threshold: Lowest probability at which a class counts as predicted, for F1.
        class_names: Names of the classes, for the keys of `per_class`; their indices by default.
        per_class: Also return `ap/<class name>` of every class; NaN where a class is in no image.

    Returns:
        Metrics from 0 to 1:

        - `map`: mean over the classes of average precision, the sum over the recall steps of the precision there
          (scikit-learn's `average_precision_score`); classes that are in no image are left out; NaN
          where no class is in any image;
        - `micro_f1`: F1 over all pairs of image and class; `macro_f1`: mean F1 of the classes that are present or
          predicted in some image.

    Raises:
        ValueError: Shapes do not match, there is no image, or values are out of their range.
    """
    from sklearn.metrics import average_precision_score  # takes a second to import

    scores, names = _probabilities(probabilities, class_names)
    present = _array(labels)
    if present.shape != scores.shape or not np.isin(present, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1 and of the probabilities' shape {scores.shape}: got {present.shape}.")
    precisions = np.array([
        average_precision_score(column, score) if column.any() else np.nan
        for column, score in zip(present.T, scores.T)
    ])  # fmt: skip
    found = scores >= threshold
    both, num_found, num_present = (found * present).sum(axis=0), found.sum(axis=0), present.sum(axis=0)
    total = num_found.sum() + num_present.sum()
    metrics = {
        "map": float(np.nanmean(precisions)) if present.any() else float("nan"),
        "micro_f1": float(2 * both.sum() / total) if total else float("nan"),
        "macro_f1": _macro_f1(both, num_found, num_present),
    }
    if per_class:
        metrics |= {f"ap/{name}": float(precision) for name, precision in zip(names, precisions)}
    return metrics


def confusion_matrix(labels: Any, predictions: Any, num_classes: int) -> NDArray[np.int64]:
    """Number of images (classes, classes) by true class (rows) and predicted class (columns).

    Args:
        labels: (n,) integers from 0.
        predictions: (n,) integers from 0.

    Raises:
        ValueError: There is not one prediction per label, or a class is out of range.
    """
    true = _labels(labels, len(labels), num_classes)
    predicted = _labels(predictions, len(labels), num_classes, name="predictions")
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _macro_f1(both: NDArray[Any], predicted: NDArray[Any], true: NDArray[Any]) -> float:
    """Mean over classes of 2 both / (predicted + true), leaving out classes without both predictions and images."""
    total = predicted + true
    occurs = total > 0
    return float(np.mean(2 * both[occurs] / total[occurs])) if occurs.any() else float("nan")


def _array(values: Any) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _probabilities(values: Any, class_names: Sequence[str] | None) -> tuple[Floats, Sequence[Any]]:
    """Checked probabilities (n, classes), and a name for each class."""
    scores = _array(values)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"probabilities have shape {scores.shape}; expected (n, classes) with n > 0.")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            "probabilities must be between 0 and 1: give the softmax or the sigmoid of the logits. NaN comes from a "
            "model that has diverged."
        )
    names = range(scores.shape[1]) if class_names is None else class_names
    if len(names) != scores.shape[1]:
        raise ValueError(f"There are {len(names)} class_names for {scores.shape[1]} classes.")
    return scores, names


def _labels(values: Any, num_images: int, num_classes: int, name: str = "labels") -> NDArray[np.int64]:
    labels = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if labels.shape != (num_images,) or (labels.size and not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(
            f"{name} have shape {labels.shape} and type {labels.dtype}; expected {num_images} whole numbers."
        )
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(f"{name} {np.unique(labels).tolist()} are not all within 0 to {num_classes - 1}.")
    return labels.astype(np.int64)
