"""Which detections find which objects at one IoU threshold: the basis of precision, recall and confusion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DetectionMatches", "confused_pairs", "detection_confusion", "match_detections"]

UNMATCHED, IGNORED = -1, -2  # of `matches`: a wrong detection, and one in the region of a crowd, which does not count

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DetectionMatches:
    """Detections and objects of all images, and which object each detection finds.

    Attributes:
        num_images: Number of images.
        boxes: (n, 4) x1, y1, x2, y2 of the detections in pixels, in the order of the images.
        scores: (n,) scores of the detections.
        labels: (n,) classes of the detections.
        images: (n,) images of the detections.
        matches: (n,) index of the object that a detection finds, which is of its class; -1 where it finds none, and -2
            where it lies in the region of a crowd of its class and counts neither as right nor as wrong.
        object_boxes: (m, 4) boxes of the objects that are no crowds.
        object_labels: (m,) their classes.
        object_areas: (m,) their areas in pixels.
        object_images: (m,) their images.
    """

    num_images: int
    boxes: Floats
    scores: Floats
    labels: Integers
    images: Integers
    matches: Integers
    object_boxes: Floats
    object_labels: Integers
    object_areas: Floats
    object_images: Integers

    @property
    def counts(self) -> NDArray[np.bool_]:
        """(n,) whether each detection is right or wrong, and not in a crowd."""
        return self.matches != IGNORED

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """(n,) whether each detection finds an object."""
        return self.matches >= 0

    def best_scores(self) -> Floats:
        """(m,) score of the detection that finds each object; 0 where none does."""
        scores = np.zeros(len(self.object_labels))
        scores[self.matches[self.is_right]] = self.scores[self.is_right]
        return scores


def match_detections(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], *, min_iou: float = 0.5
) -> DetectionMatches:
    """Match detections to objects of their class as COCO does: the best-scored first, each to the free object of the
    highest IoU.

    A match does not depend on detections of lower scores, so that one matching serves all score thresholds.

    Args:
        predictions: `boxes` (n, 4) as x1, y1, x2, y2 in pixels, `scores` (n,) and `labels` (n,) of each image.
        references: `boxes`, `labels`, and optionally `area` (n,) and `iscrowd` (n,) of each image, in the same order.
        min_iou: Lowest IoU of a match.
    """
    found, objects = [], []
    num_objects = 0
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        boxes, labels, scores = (np.asarray(prediction[name]) for name in ("boxes", "labels", "scores"))
        truth, classes = np.asarray(reference["boxes"]).reshape(-1, 4), np.asarray(reference["labels"])
        crowd = np.asarray(reference.get("iscrowd", np.zeros(len(classes)))).astype(bool)
        areas = np.asarray(reference.get("area", np.prod(truth[:, 2:] - truth[:, :2], axis=1)))
        boxes = boxes.reshape(-1, 4)
        same = labels[:, None] == classes[~crowd]
        matches = _match_image(scores, box_ious(boxes, truth[~crowd]) * same, min_iou)
        matches[matches >= 0] += num_objects
        in_crowd = box_ious(boxes, truth[crowd], of_first=True) * (labels[:, None] == classes[crowd])
        matches[(matches == UNMATCHED) & (in_crowd >= min_iou).any(axis=1)] = IGNORED
        found.append((boxes, scores, labels, np.full(len(labels), index), matches))
        kept = truth[~crowd], classes[~crowd], areas[~crowd]
        objects.append((*kept, np.full(len(kept[1]), index)))
        num_objects += len(kept[1])
    names = ("boxes", "scores", "labels", "images", "matches")
    object_names = ("object_boxes", "object_labels", "object_areas", "object_images")
    return DetectionMatches(num_images=len(references), **_joined(names, found), **_joined(object_names, objects))


def _joined(names: Sequence[str], parts: Sequence[Sequence[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    columns = zip(*parts) if parts else ([np.zeros((0, 4) if "boxes" in name else 0)] for name in names)
    types = {name: np.float64 if name.endswith(("boxes", "scores", "areas")) else np.int64 for name in names}
    return {name: np.concatenate(list(column)).astype(types[name]) for name, column in zip(names, columns)}


def _match_image(scores: NDArray[Any], ious: Floats, min_iou: float) -> Integers:
    """Index of the object of each detection, or -1, from their IoUs (detections, objects)."""
    matches = np.full(len(scores), UNMATCHED)
    candidates = np.flatnonzero((ious >= min_iou).any(axis=1))
    free = ious.copy()
    for detection in candidates[np.argsort(-scores[candidates], kind="stable")]:
        best = int(free[detection].argmax())
        if free[detection, best] >= min_iou:
            matches[detection] = best
            free[:, best] = 0.0
    return matches


def box_ious(first: NDArray[Any], second: NDArray[Any], *, of_first: bool = False) -> Floats:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4), x1, y1, x2, y2; 0 of boxes that are empty.

    With `of_first` the fraction of the first box that is covered.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2, dtype=np.float64)  # (n, m)
    sides = (np.clip(boxes[:, 2:] - boxes[:, :2], 0, None) for boxes in (first, second))
    area, other = (np.prod(side, axis=1, dtype=np.float64) for side in sides)
    total = area[:, None] if of_first else area[:, None] + other - common
    return np.divide(common, total, out=np.zeros_like(common), where=total > 0)


def confused_pairs(matches: DetectionMatches, threshold: float, *, min_iou: float = 0.5) -> list[tuple[int, int]]:
    """Detections with a score above the threshold that lie on an object of another class, which no detection finds.

    Returns:
        Indices of a detection and its object, each in one pair at most; the best-scored detections come first.
    """
    kept = matches.scores > threshold
    is_free = np.ones(len(matches.object_labels), dtype=bool)
    is_free[matches.matches[kept & matches.is_right]] = False
    wrong = np.flatnonzero(kept & (matches.matches == UNMATCHED))
    pairs = []
    for detections, objects in _by_image(matches, wrong, np.flatnonzero(is_free)):
        ious = box_ious(matches.boxes[detections], matches.object_boxes[objects])
        found = _match_image(matches.scores[detections], ious, min_iou)
        pairs += [(int(d), int(objects[o])) for d, o in zip(detections, found) if o >= 0]
    return sorted(pairs, key=lambda pair: -matches.scores[pair[0]])


def _by_image(
    matches: DetectionMatches, detections: Integers, objects: Integers
) -> Iterator[tuple[Integers, Integers]]:
    """The detections and objects of each image that has both; both are in the order of the images."""
    of_detections, of_objects = matches.images[detections], matches.object_images[objects]
    for image in np.intersect1d(of_detections, of_objects):
        yield tuple(  # type: ignore[misc]
            part[slice(*np.searchsorted(images, [image, image + 1]))]
            for part, images in ((detections, of_detections), (objects, of_objects))
        )


def detection_confusion(matches: DetectionMatches, threshold: float, num_classes: int) -> Integers:
    """Number of objects by true class (rows) and class of the detection on them (columns), with the background last.

    The column of the background holds objects that are not found, and its row detections where there is no object. An
    object is found by a detection of its class if there is one, else by one of another class (`confused_pairs`).

    Args:
        threshold: Detections with scores above it count.

    Returns:
        (num_classes + 1, num_classes + 1) counts.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    kept = (matches.scores > threshold) & matches.counts
    right = kept & matches.is_right
    pairs = np.array(confused_pairs(matches, threshold), dtype=np.int64).reshape(-1, 2)
    np.add.at(counts, (matches.labels[right], matches.labels[right]), 1)
    np.add.at(counts, (matches.object_labels[pairs[:, 1]], matches.labels[pairs[:, 0]]), 1)
    spurious, missed = kept & ~right, np.ones(len(matches.object_labels), dtype=bool)
    spurious[pairs[:, 0]] = False
    missed[matches.matches[right]] = missed[pairs[:, 1]] = False
    counts[-1, :-1] = np.bincount(matches.labels[spurious], minlength=num_classes)
    counts[:-1, -1] = np.bincount(matches.object_labels[missed], minlength=num_classes)
    return counts
