"""COCO average precision and recall of predicted boxes, computed by faster-coco-eval."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

__all__ = ["CocoDetectionMetric", "coco_detection_metrics"]

Boxes = Mapping[str, Any]
AREA_RANGES = ("all", "small", "medium", "large")  # object area: small < 32 ** 2 <= medium < 96 ** 2 <= large


class _Image(NamedTuple):
    boxes: NDArray[np.float64]  # (n, 4) x, y, width, height
    labels: NDArray[np.int64]  # (n,)
    extras: dict[str, NDArray[Any]]  # (n,) each: scores, or area and iscrowd


def coco_detection_metrics(
    predictions: Sequence[Boxes],
    references: Sequence[Boxes],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    max_detections: int = 100,
    per_class: bool = False,
) -> dict[str, float]:
    """COCO box AP and AR of `predictions` against `references`, one entry per image in the same order.

    The metrics are those of pycocotools (Lin et al. 2014, https://cocodataset.org/#detection-eval): AP is the mean of
    101 interpolated precisions, averaged over the IoU thresholds 0.50:0.05:0.95 and over the classes.

    Args:
        predictions: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `scores` (n,) and `labels` (n,) of each image.
        references: `boxes` and `labels` as above; optionally `area` (n,) in pixels (default: the box's) and `iscrowd`
            (n,), whose regions may be matched any number of times and count neither as found nor as missed.
        num_classes: Number of classes, where the classes have no names. Default: the labels that occur.
        class_names: Names of the classes 0, 1, ...; used for the keys of `per_class`.
        max_detections: Number of best-scored predictions that count, per image and class.
        per_class: Also return `ap/<class name>` of every class.

    Returns:
        `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, `ar_1`, `ar_10`, `ar_<max_detections>`, `ar_small`,
        `ar_medium`, `ar_large`, each 0 to 1. A metric over no object at all is NaN (pycocotools returns -1), and a
        class without objects does not enter the mean; objects without predictions score 0.

    Raises:
        ValueError: The two lists differ in length, or boxes, scores or labels are malformed.
    """
    metric = CocoDetectionMetric(num_classes=num_classes, class_names=class_names, max_detections=max_detections)
    metric.add(predictions, references)
    return metric.compute(per_class=per_class)


class CocoDetectionMetric:
    """Accumulates images batch by batch, then computes the metrics of `coco_detection_metrics` over all of them.

    Only the predictions that can count are kept (the `max_detections` best per image and class), so that memory grows
    with the number of images and not with the number of a model's queries.
    """

    def __init__(
        self, *, num_classes: int | None = None, class_names: Sequence[str] | None = None, max_detections: int = 100
    ) -> None:
        if class_names is not None:
            if num_classes not in (None, len(class_names)):
                raise ValueError(f"num_classes is {num_classes}, but class_names has {len(class_names)} names.")
            num_classes = len(class_names)
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}: at least 1 detection must count.")
        self.num_classes = num_classes
        self.class_names = class_names
        self.max_detections = max_detections
        self._predictions: list[_Image] = []
        self._references: list[_Image] = []

    def __len__(self) -> int:
        return len(self._references)

    def add(self, predictions: Sequence[Boxes], references: Sequence[Boxes]) -> None:
        """Add a batch of images; see `coco_detection_metrics` for the entries and the errors raised."""
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one entry per image in both, "
                "with empty arrays where an image has no boxes."
            )
        first = len(self)
        predicted = [
            _parse(entry, f"predictions[{first + i}]", required="scores", num_classes=self.num_classes)
            for i, entry in enumerate(predictions)
        ]
        expected = [
            _parse(entry, f"references[{first + i}]", optional=("area", "iscrowd"), num_classes=self.num_classes)
            for i, entry in enumerate(references)
        ]
        self._predictions += [_keep_best(image, self.max_detections) for image in predicted]
        self._references += expected

    def compute(self, *, per_class: bool = False) -> dict[str, float]:
        """The metrics over all images added so far, which are kept; see `coco_detection_metrics`."""
        limits = [limit for limit in (1, 10) if limit < self.max_detections] + [self.max_detections]
        classes = self._classes()
        precision, recall = self._evaluate(classes, limits)
        # precision (iou thresholds, recall levels, classes, areas, limits), recall the same without recall levels
        metrics = {
            "ap": _mean(precision[..., 0, -1]),
            "ap50": _mean(precision[0, ..., 0, -1]),
            "ap75": _mean(precision[5, ..., 0, -1]),
        }
        metrics |= {f"ap_{name}": _mean(precision[..., i, -1]) for i, name in enumerate(AREA_RANGES) if i}
        metrics |= {f"ar_{limit}": _mean(recall[..., 0, i]) for i, limit in enumerate(limits)}
        metrics |= {f"ar_{name}": _mean(recall[..., i, -1]) for i, name in enumerate(AREA_RANGES) if i}
        if per_class:
            names = self.class_names or classes
            metrics |= {f"ap/{name}": _mean(precision[:, :, i, 0, -1]) for i, name in enumerate(names)}
        return metrics

    def _classes(self) -> list[int]:
        if self.num_classes is not None:
            return list(range(self.num_classes))
        return sorted({int(label) for image in self._references + self._predictions for label in image.labels})

    def _evaluate(self, classes: list[int], limits: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if not self._references or not classes:
            nothing = np.full((10, 101, len(classes), len(AREA_RANGES), len(limits)), -1.0)
            return nothing, nothing[:, 0]
        evaluation = COCOeval_faster(
            _as_coco(self._references, classes), _as_coco(self._predictions, classes), iouType="bbox"
        )
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.eval["recall"]


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the defined values: the evaluator marks with -1 what has no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def _as_array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _parse(
    entry: Boxes, where: str, *, required: str | None = None, optional: Sequence[str] = (), num_classes: int | None
) -> _Image:
    """Checked copies of one image's arrays, so that the caller may reuse its own."""
    keys = ["boxes", "labels", *([required] if required else [])]
    if missing := [key for key in keys if key not in entry]:
        raise ValueError(f"{where} has no {missing[0]!r}; it has {sorted(entry)}.")
    keys += [key for key in optional if entry.get(key) is not None]
    arrays = {key: _as_array(entry[key]) for key in keys}
    boxes = arrays.pop("boxes")
    boxes = boxes if boxes.size else boxes.reshape(0, 4)  # an empty list has no second dimension
    num_boxes = len(boxes)
    if boxes.shape != (num_boxes, 4):
        raise ValueError(f"{where}: boxes has shape {boxes.shape}; expected (n, 4) as x1, y1, x2, y2.")
    for key, values in arrays.items():
        if values.shape != (num_boxes,):
            raise ValueError(f"{where}: {key} has shape {values.shape} for {num_boxes} boxes.")
    if not all(np.isfinite(values).all() for values in (boxes, *arrays.values())):
        raise ValueError(f"{where} holds values that are not finite; the model that made them may have diverged.")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        bad = boxes[(boxes[:, 2:] < boxes[:, :2]).any(axis=1)][0].tolist()
        raise ValueError(f"{where}: box {bad} ends before it starts; give x1, y1, x2, y2, not x, y, width, height.")
    labels = arrays.pop("labels").astype(np.int64)
    highest = num_classes if num_classes is not None else np.iinfo(np.int64).max
    if ((labels < 0) | (labels >= highest)).any():
        raise ValueError(f"{where}: labels {np.unique(labels).tolist()} are not all within 0 to {highest - 1}.")
    return _Image(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), labels, arrays)


def _keep_best(image: _Image, limit: int) -> _Image:
    if len(image.labels) <= limit:
        return image
    order = np.argsort(-image.extras["scores"], kind="stable")
    best = [order[image.labels[order] == label][:limit] for label in np.unique(image.labels)]
    # Equal scores are ranked by position, so the order of what stays must not change.
    kept = np.sort(np.concatenate(best))
    return _Image(image.boxes[kept], image.labels[kept], {"scores": image.extras["scores"][kept]})


def _as_coco(images: list[_Image], classes: list[int]) -> COCO:
    return COCO(
        {
            "images": [{"id": i} for i in range(len(images))],
            "categories": [{"id": label} for label in classes],
            "annotations": list(_annotations(images)),
        }
    )


def _annotations(images: list[_Image]) -> Iterator[dict[str, Any]]:
    number = 0
    for image_id, (boxes, labels, extras) in enumerate(images):
        areas = extras.get("area", boxes[:, 2] * boxes[:, 3])
        crowds = extras.get("iscrowd", np.zeros(len(labels)))
        scores = extras.get("scores", np.zeros(len(labels)))
        for box, label, area, crowd, score in zip(boxes, labels, areas, crowds, scores, strict=True):
            number += 1  # from 1: the evaluator reads the id 0 as "not matched"
            yield {
                "id": number,
                "image_id": image_id,
                "category_id": int(label),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
                "score": float(score),
            }
