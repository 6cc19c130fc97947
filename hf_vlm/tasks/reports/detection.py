"""The report of a detector: curves, confusion, per class and size, worst images and likely label errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_vlm.metrics.detection_matches import DetectionMatches, box_ious, confused_pairs, detection_confusion
from hf_vlm.metrics.precision_recall import best_f1, operating_point, precision_recall_curve
from hf_vlm.tasks.reports.parts import (
    NUM_CASES,
    Case,
    Cases,
    Curves,
    Marks,
    Part,
    Table,
    confusion,
    highest,
    score_histogram,
)

__all__ = ["DetectionOutcomes", "report_detection"]

MAX_CURVES = 10  # classes with a curve of their own, those of most objects
MAX_OVERLAP = 0.1  # IoU with any object below which a detection lies where there is none
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # areas in pixels, as COCO's


@dataclass(frozen=True)
class DetectionOutcomes:
    """Detections beside the objects of all images, and the model's score threshold."""

    matches: DetectionMatches
    threshold: float


def report_detection(evaluation: Any, prefix: str = "") -> list[Part]:
    """The parts of a detector's report; all but AP are at IoU 0.5 of the boxes.

    Args:
        prefix: Of the names of the metrics of boxes.
    """
    names, outcomes = list(evaluation.class_names), evaluation.outcomes
    matches, threshold = outcomes.matches, outcomes.threshold
    box_metrics = {n.removeprefix(prefix): v for n, v in evaluation.metrics.items() if n.startswith(prefix)}
    counts = detection_confusion(matches, threshold, len(names))
    above = f"detections with scores above {threshold:.3f}, the model's threshold"
    return [
        _operating_points(matches, threshold),
        _classes(matches, names, threshold, box_metrics),
        _sizes(matches, threshold, box_metrics),
        _precision_recall(matches, names),
        _f1(matches, threshold),
        confusion(
            counts,
            [*names, "background"],
            "objects",
            f"Of {above}: rows are true classes, columns those of the detections at IoU 0.5 or more. The last column "
            "are objects that no detection finds, the last row detections where there is no object.",
        ),
        score_histogram(
            matches.scores,
            {"right": matches.is_right, "wrong": matches.counts & ~matches.is_right},
            title="Scores of right and wrong detections",
            note="The further apart, the better a threshold separates them. The scale is logarithmic.",
            xlabel="score",
            ylabel="detections",
            at=threshold,
        ),
        _worst_images(matches, names, threshold),
        *_label_errors(matches, names, threshold),
    ]


def _operating_points(matches: DetectionMatches, threshold: float) -> Table:
    of_all = matches.scores[matches.counts], matches.is_right[matches.counts], len(matches.object_labels)
    points = {"the model's": operating_point(*of_all, threshold), "of the best F1 here": best_f1(*of_all)}
    return Table(
        title="Score threshold",
        columns=["threshold", "score", "precision", "recall", "F1"],
        rows=[[name, *point] for name, point in points.items()],
        note="All classes together. The model's threshold is what predictions use when no other is given; choose it "
        "on other images than those it is reported on.",
    )


def _classes(matches: DetectionMatches, names: Sequence[str], threshold: float, metrics: dict[str, float]) -> Table:
    rows: list[list[Any]] = []
    for index, name in enumerate(names):
        of_class = _of_class(matches, index)
        point, best = operating_point(*of_class, threshold), best_f1(*of_class)
        ap = metrics.get(f"ap/{name}", float("nan"))
        rows.append([name, of_class[2], ap, *point[1:], best.threshold, best.precision, best.recall, best.f1])
    return Table(
        title="Classes",
        columns=["class", "objects", "AP", "precision", "recall", "F1"]
        + [f"best {what}" for what in ("threshold", "precision", "recall", "F1")],
        rows=sorted(rows, key=lambda row: -row[1]),
        note="Precision, recall and F1 at the model's threshold; then at the threshold of the class's best F1.",
    )


def _of_class(matches: DetectionMatches, index: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
    """Scores of the detections of a class, whether they are right, and the number of its objects."""
    kept = matches.counts & (matches.labels == index)
    return matches.scores[kept], matches.is_right[kept], int((matches.object_labels == index).sum())


def _sizes(matches: DetectionMatches, threshold: float, metrics: dict[str, float]) -> Table:
    is_found = matches.best_scores() > threshold
    rows: list[list[Any]] = []
    for name, (low, high) in SIZES.items():
        of_size = (matches.object_areas >= low) & (matches.object_areas < high)
        recall = float(is_found[of_size].mean()) if of_size.any() else float("nan")
        rows.append([name, int(of_size.sum()), metrics[f"ap_{name}"], metrics[f"ar_{name}"], recall])
    return Table(
        title="Sizes",
        columns=["objects", "number", "AP", "AR", "recall"],
        rows=rows,
        note="As COCO has it: small objects are below 32 x 32 pixels, large ones 96 x 96 and more. Recall is that at "
        "the model's threshold.",
    )


def _precision_recall(matches: DetectionMatches, names: Sequence[str]) -> Curves:
    num_objects = np.bincount(matches.object_labels, minlength=len(names))
    shown = [index for index in highest(num_objects, num=MAX_CURVES) if num_objects[index]]
    lines = {}
    if len(shown) != 1:
        counted = matches.counts
        curve = precision_recall_curve(matches.scores[counted], matches.is_right[counted], int(num_objects.sum()))
        lines["all classes"] = curve.recall, curve.precision
    for index in shown:
        curve = precision_recall_curve(*_of_class(matches, index))
        lines[names[index]] = curve.recall, curve.precision
    some = (
        f" Of the {len(names)} classes the {MAX_CURVES} of most objects are shown." if len(names) > MAX_CURVES else ""
    )
    return Curves(
        title="Precision and recall",
        note=f"Over all score thresholds.{some}",
        lines=lines,
        xlabel="recall",
        ylabel="precision",
    )


def _f1(matches: DetectionMatches, threshold: float) -> Curves:
    counted = matches.counts
    curve = precision_recall_curve(matches.scores[counted], matches.is_right[counted], len(matches.object_labels))
    return Curves(
        title="Choice of the threshold",
        note="All classes together; the line is the model's threshold.",
        lines={name: (curve.thresholds, getattr(curve, name.lower())) for name in ("F1", "precision", "recall")},
        xlabel="score threshold",
        ylabel="",
        at=threshold,
    )


def _worst_images(matches: DetectionMatches, names: Sequence[str], threshold: float) -> Cases:
    spurious = matches.counts & ~matches.is_right & (matches.scores > threshold)
    missed = matches.best_scores() <= threshold
    num_spurious, num_missed = (
        np.bincount(images, minlength=matches.num_images)
        for images in (matches.images[spurious], matches.object_images[missed])
    )
    num_errors = num_spurious + num_missed
    cases = [
        Case(
            image=image,
            caption=f"{num_missed[image]} missed, {num_spurious[image]} wrong",
            predicted=_detections(matches, names, (matches.images == image) & (matches.scores > threshold)),
            truth=_objects(matches, names, matches.object_images == image),
        )
        for image in highest(num_errors, num_errors > 0)
    ]
    return Cases(title="Images with most errors", note="At the model's threshold.", cases=cases)


def _label_errors(matches: DetectionMatches, names: Sequence[str], threshold: float) -> list[Part]:
    """Detections and objects that disagree most: either the model is wrong or the label."""
    swaps = confused_pairs(matches, threshold)
    is_swap = np.zeros(len(matches.scores), dtype=bool)
    is_swap[[detection for detection, _ in swaps]] = True
    wrong = matches.counts & ~matches.is_right & ~is_swap & (matches.scores > threshold)
    best = matches.best_scores()
    missed = best <= threshold
    missed[[object_ for _, object_ in swaps]] = False
    least_found = [index for index in np.lexsort((-matches.object_areas, best)).tolist() if missed[index]]
    unboxed = [
        index for index in np.flatnonzero(wrong)[np.argsort(-matches.scores[wrong])] if _is_alone(matches, index)
    ]
    return [
        Cases(
            title="Likely label errors: detections without a box",
            note="Detections above the threshold that overlap no box, the most confident first: is a box missing?",
            cases=[_pair_case(matches, names, index, None) for index in unboxed[:NUM_CASES]],
        ),
        Cases(
            title="Likely label errors: boxes that are never found",
            note="Boxes without a detection above the threshold, first those of the lowest scores, of equal ones the "
            "largest: is there an object, and is the box right?",
            cases=[_pair_case(matches, names, None, index) for index in least_found[:NUM_CASES]],
        ),
        Cases(
            title="Likely label errors: another class",
            note="Boxes on which the model finds another class, the most confident first: is the class right?",
            cases=[_pair_case(matches, names, *pair) for pair in swaps[:NUM_CASES]],
        ),
    ]


def _is_alone(matches: DetectionMatches, detection: int) -> bool:
    of_image = matches.object_images == matches.images[detection]
    ious = box_ious(matches.boxes[[detection]], matches.object_boxes[of_image])
    return bool((ious < MAX_OVERLAP).all())


def _pair_case(matches: DetectionMatches, names: Sequence[str], detection: int | None, object_: int | None) -> Case:
    """A detection, an object, or both as a case; without a detection or an object, all of the image are shown."""
    if detection is not None:
        image, focus = int(matches.images[detection]), matches.boxes[detection]
        shown = np.arange(len(matches.scores)) == detection
        caption = f"{names[matches.labels[detection]]}: {matches.scores[detection]:.2f}"
    else:
        assert object_ is not None
        image, focus = int(matches.object_images[object_]), matches.object_boxes[object_]
        shown = np.zeros(len(matches.scores), dtype=bool)
        score = matches.scores[matches.matches == object_].max(initial=0.0)
        caption = f"{names[matches.object_labels[object_]]}: best score {score:.2f}"
    if object_ is not None:
        labelled = np.arange(len(matches.object_labels)) == object_
        if detection is not None:
            caption += f", labelled {names[matches.object_labels[object_]]}"
    else:
        labelled = matches.object_images == image
    return Case(
        image=image,
        caption=caption,
        focus=[float(value) for value in focus],
        predicted=_detections(matches, names, shown),
        truth=_objects(matches, names, labelled),
    )


def _detections(matches: DetectionMatches, names: Sequence[str], shown: NDArray[np.bool_]) -> Marks:
    labels = matches.labels[shown].tolist()
    return Marks(
        names=[names[label] for label in labels],
        class_ids=labels,
        scores=matches.scores[shown].tolist(),
        boxes=matches.boxes[shown],
    )


def _objects(matches: DetectionMatches, names: Sequence[str], shown: NDArray[np.bool_]) -> Marks:
    labels = matches.object_labels[shown].tolist()
    return Marks(names=[names[label] for label in labels], class_ids=labels, boxes=matches.object_boxes[shown])
