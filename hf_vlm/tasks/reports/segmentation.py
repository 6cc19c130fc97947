"""The report of a segmenter: classes, confusion, IoU per image, and the images of the lowest."""

import heapq
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hf_vlm.metrics.segmentation import confusion_segmentation_metrics
from hf_vlm.tasks.reports.parts import NUM_CASES, Case, Cases, Marks, Part, Table, confusion, score_histogram

__all__ = ["SegmentationOutcomes", "report_segmentation"]

Mask = NDArray[np.uint8]
MAX_SIDE = 480  # pixels of the masks that are kept


@dataclass
class SegmentationOutcomes:
    """Mean IoU of each image, and the masks of those of the lowest: memory does not grow with masks.

    Attributes:
        ious: (images,) mean IoU of the classes in each image; NaN where no pixel has a class.
        worst: Heap of the images of the lowest IoU: the negative IoU and number, the predicted and the true mask.
    """

    ious: list[float] = field(default_factory=list)
    worst: list[tuple[float, int, Mask, Mask]] = field(default_factory=list)

    def add(self, counts: NDArray[np.int64], predicted: NDArray[Any], truth: NDArray[Any]) -> None:
        """Add the next image: its pixels (classes, classes) by true and predicted class, and its masks."""
        number = len(self.ious)
        self.ious.append(confusion_segmentation_metrics(counts)["miou"] if counts.sum() else float("nan"))
        entry = -self.ious[-1], -number
        if counts.sum() and (len(self.worst) < NUM_CASES or entry > self.worst[0][:2]):
            push = heapq.heappush if len(self.worst) < NUM_CASES else heapq.heapreplace
            push(self.worst, (*entry, _thumbnail(predicted), _thumbnail(truth)))


def _thumbnail(mask: NDArray[Any]) -> Mask:
    mask = np.ascontiguousarray(mask, dtype=np.uint8)
    scale = min(1.0, MAX_SIDE / max(mask.shape))
    size = [max(1, round(side * scale)) for side in mask.shape[::-1]]
    return np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)


def report_segmentation(evaluation: Any) -> list[Part]:
    """The parts of a segmenter's report."""
    names, counts, outcomes = list(evaluation.class_names), evaluation.confusion, evaluation.outcomes
    right, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: a class that is not there
        values = true / counts.sum(), right / (true + predicted - right), right / predicted, right / true
    rows: list[list[Any]] = [[name, *map(float, row)] for name, *row in zip(names, *values)]
    ious = np.array(outcomes.ious)
    return [
        Table(
            title="Classes",
            columns=["class", "fraction of pixels", "IoU", "precision", "recall"],
            rows=sorted(rows, key=lambda row: -row[1]),
        ),
        confusion(counts, names, "pixels"),
        score_histogram(
            ious,
            {"images": np.isfinite(ious)},
            title="Mean IoU of the images",
            note="Over the classes that are in an image or predicted in it.",
            xlabel="mean IoU of an image",
            ylabel="images",
        ),
        Cases(
            title="Images of the lowest IoU",
            note="The model's worst errors, and masks that may be wrong.",
            cases=[
                Case(
                    image=-number,
                    caption=f"mean IoU {-iou:.3f}",
                    predicted=_marks(predicted_mask, names),
                    truth=_marks(truth, names),
                )
                for iou, number, predicted_mask, truth in sorted(outcomes.worst, key=lambda entry: entry[:2])[::-1]
            ],
        ),
    ]


def _marks(mask: Mask, names: list[str]) -> Marks:
    ids = [int(value) for value in np.unique(mask) if value < len(names)]
    return Marks(names=[names[value] for value in ids], class_ids=ids, segmentation=mask)
