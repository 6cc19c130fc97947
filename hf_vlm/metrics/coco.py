"""COCO average precision and recall by faster-coco-eval: what is common to boxes and masks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

__all__ = ["CocoMetric", "Entry", "ImageObjects", "best_per_class"]

Entry = Mapping[str, Any]  # what is predicted, or annotated, in one image
AREA_RANGES = ("all", "small", "medium", "large")  # object area: small < 32 ** 2 <= medium < 96 ** 2 <= large


class ImageObjects(NamedTuple):
    """The objects of one image."""

    boxes: NDArray[np.float64]  # (n, 4) x, y, width, height
    labels: NDArray[np.int64]  # (n,)
    extras: dict[str, NDArray[Any]]  # (n,) each: scores, or area and iscrowd
    masks: list[dict[str, Any]] | None = None  # n run-length encodings with `size` and `counts`

    def select(self, kept: NDArray[np.int64]) -> "ImageObjects":
        """Those of these indices, in their order."""
        return ImageObjects(
            self.boxes[kept],
            self.labels[kept],
            {name: values[kept] for name, values in self.extras.items()},
            None if self.masks is None else [self.masks[i] for i in kept],
        )


class CocoMetric:
    """Accumulates images batch by batch, then computes metrics over all of them.

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
        self._predictions: list[ImageObjects] = []
        self._references: list[ImageObjects] = []

    def __len__(self) -> int:
        return len(self._references)

    def add(self, predictions: Sequence[Entry], references: Sequence[Entry]) -> None:
        """Add a batch of images; ValueError for malformed entries."""
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions for {len(references)} references: give one entry per image in both, "
                "with empty arrays where an image has no objects."
            )
        first = len(self)
        predicted = [
            self._parse(entry, f"predictions[{first + i}]", required="scores") for i, entry in enumerate(predictions)
        ]
        expected = [
            self._parse(entry, f"references[{first + i}]", optional=("area", "iscrowd"))
            for i, entry in enumerate(references)
        ]
        self._predictions += [_keep_best(image, self.max_detections) for image in predicted]
        self._references += expected

    def _parse(
        self, entry: Entry, where: str, *, required: str | None = None, optional: Sequence[str] = ()
    ) -> ImageObjects:
        return _parse_boxes(entry, where, required=required, optional=optional, num_classes=self.num_classes)

    def _compute(self, iou_type: str, *, per_class: bool) -> dict[str, float]:
        """Metrics by an overlap of faster-coco-eval: "bbox", "segm" or "boundary"."""
        limits = [limit for limit in (1, 10) if limit < self.max_detections] + [self.max_detections]
        classes = self._classes()
        precision, recall = self._evaluate(iou_type, classes, limits)
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

    def _evaluate(
        self, iou_type: str, classes: list[int], limits: list[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if not self._references or not classes:
            nothing = np.full((10, 101, len(classes), len(AREA_RANGES), len(limits)), -1.0)
            return nothing, nothing[:, 0]
        evaluation = COCOeval_faster(
            *(_as_coco(images, classes, iou_type) for images in (self._references, self._predictions)),
            iouType=iou_type,
        )
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.eval["recall"]


def _parse_boxes(
    entry: Entry, where: str, *, required: str | None = None, optional: Sequence[str] = (), num_classes: int | None
) -> ImageObjects:
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
    return ImageObjects(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), labels, arrays)


def best_per_class(scores: Any, labels: Any, limit: int) -> NDArray[np.int64]:
    """Indices, rising, of the `limit` best scored of each class; of equal scores the first ones."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    order = np.argsort(-scores, kind="stable")
    best = [order[labels[order] == label][:limit] for label in np.unique(labels)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *best]))


def _keep_best(image: ImageObjects, limit: int) -> ImageObjects:
    if len(image.labels) <= limit:
        return image
    # Equal scores are ranked by position, so the order of what stays must not change.
    return image.select(best_per_class(image.extras["scores"], image.labels, limit))


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the defined values: the evaluator marks with -1 what has no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def _as_array(values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _as_coco(images: list[ImageObjects], classes: list[int], iou_type: str) -> COCO:
    return COCO(
        {
            "images": [{"id": i, **_size(image)} for i, image in enumerate(images)],
            "categories": [{"id": label} for label in classes],
            "annotations": list(_annotations(images, iou_type)),
        }
    )


def _size(image: ImageObjects) -> dict[str, int]:
    return dict(zip(("height", "width"), image.masks[0]["size"])) if image.masks else {}


def _annotations(images: list[ImageObjects], iou_type: str) -> Iterator[dict[str, Any]]:
    number = 0
    for image_id, (boxes, labels, extras, masks) in enumerate(images):
        of_boxes = masks is None or iou_type == "bbox"
        areas = extras.get("area", boxes[:, 2] * boxes[:, 3] if of_boxes else coco_mask.area(masks) if masks else [])
        crowds = extras.get("iscrowd", np.zeros(len(labels)))
        scores = extras.get("scores", np.zeros(len(labels)))
        for i, (box, label, area, crowd, score) in enumerate(zip(boxes, labels, areas, crowds, scores, strict=True)):
            number += 1  # from 1: the evaluator reads the id 0 as "not matched"
            yield {
                "id": number,
                "image_id": image_id,
                "category_id": int(label),
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
                "score": float(score),
                **({} if masks is None else {"segmentation": masks[i]}),
            }
