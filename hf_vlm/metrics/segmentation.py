"""Metrics of semantic segmentation, from one confusion matrix of all pixels."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_vlm.metrics.classification import confusion_matrix

__all__ = ["confusion_segmentation_metrics", "pixel_confusion", "segmentation_metrics"]


def segmentation_metrics(
    predictions: Iterable[Any],
    references: Iterable[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    class_names: Sequence[str] | None = None,
    per_class: bool = False,
) -> dict[str, float]:
    """Mean IoU and accuracies of segmented images, counted over the pixels of all images together.

    Args:
        predictions: One map (height, width) of classes from 0 per image.
        references: One map of the true classes per image, of the same size.
        num_classes: Number of classes.
        ignore_index: Value of the pixels of `references` that are not counted.
        class_names: Names of the classes, for the keys of `per_class`; their indices by default.
        per_class: Also return `iou/<class name>` of every class.

    Returns:
        What `confusion_segmentation_metrics` returns.

    Raises:
        ValueError: The maps of an image differ in size or have values that are no class, or no pixel is counted.
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for prediction, reference in zip(predictions, references, strict=True):
        counts += pixel_confusion(reference, prediction, num_classes, ignore_index=ignore_index)
    return confusion_segmentation_metrics(counts, class_names=class_names, per_class=per_class)


def pixel_confusion(labels: Any, predictions: Any, num_classes: int, *, ignore_index: int = 255) -> NDArray[np.int64]:
    """Number of pixels (classes, classes) by true class (rows) and predicted class (columns).

    Args:
        labels: (height, width) integers from 0, or `ignore_index` for pixels that are not counted.
        predictions: (height, width) integers from 0.

    Raises:
        ValueError: The maps differ in size, or a class is out of range.
    """
    true, predicted = np.asarray(labels), np.asarray(predictions)
    if true.shape != predicted.shape:
        raise ValueError(f"The labels are {true.shape}, but the predictions {predicted.shape}: resize the latter.")
    counted = true != ignore_index
    return confusion_matrix(true[counted], predicted[counted], num_classes)


def confusion_segmentation_metrics(
    counts: NDArray[np.int64], *, class_names: Sequence[str] | None = None, per_class: bool = False
) -> dict[str, float]:
    """Metrics from 0 to 1 of a confusion matrix of pixels.

    Args:
        counts: (classes, classes) pixels by true class (rows) and predicted class (columns).
        class_names: Names of the classes, for the keys of `per_class`; their indices by default.
        per_class: Also return `iou/<class name>` of every class; NaN where it is neither there nor predicted.

    Returns:
        - `miou`: mean over the classes that are there or predicted of intersection over union (the Jaccard index): the
          pixels of the class that are found, over those that are of the class or taken for it;
        - `mean_accuracy`: mean over the classes that are there of the fraction of their pixels that is found;
        - `pixel_accuracy`: fraction of all pixels that is right.

    Raises:
        ValueError: No pixel is counted, or there is not one name per class.
    """
    if not counts.sum():
        raise ValueError("There is no pixel with a class to evaluate on.")
    names: Sequence[Any] = range(len(counts)) if class_names is None else class_names
    if len(names) != len(counts):
        raise ValueError(f"There are {len(names)} class_names for {len(counts)} classes.")
    right, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a class that is not there
        ious, recalls = right / (true + predicted - right), right / true
    metrics = {
        "miou": float(np.nanmean(ious)),
        "mean_accuracy": float(np.nanmean(recalls)),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
    if per_class:
        metrics |= {f"iou/{name}": float(iou) for name, iou in zip(names, ious)}
    return metrics
