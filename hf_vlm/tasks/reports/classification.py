"""The report of a classifier: calibration, confusion or precision and recall, worst images, likely label errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from hf_vlm.metrics.calibration import calibration_error, reliability_bins
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

__all__ = ["ClassificationOutcomes", "MultiLabelOutcomes", "report_classification"]

Floats = NDArray[np.float32]
MAX_CURVES = 10  # classes with a curve of their own, those of most images
MAX_PAIRS = 15  # confused classes of the table
NUM_NEIGHBORS = 10
MAX_NEIGHBORHOOD = 20_000  # images of which each is compared with each


@dataclass(frozen=True)
class ClassificationOutcomes:
    """Outcomes of one class per image."""

    logits: Floats  # (images, classes), as the classifier gives them
    labels: NDArray[np.int64]  # (images,)
    temperature: float  # of the model
    features: Floats | None = None  # (images, features) that the classifier reads


@dataclass(frozen=True)
class MultiLabelOutcomes:
    """Outcomes of several classes per image."""

    probabilities: Floats  # (images, classes)
    labels: NDArray[np.bool_]  # (images, classes), whether the class is in the image
    threshold: float  # of the model


def report_classification(evaluation: Any) -> list[Part]:
    """The parts of a classifier's report."""
    names, outcomes = list(evaluation.class_names), evaluation.outcomes
    if isinstance(outcomes, MultiLabelOutcomes):
        return _report_multi_label(outcomes, names)
    probabilities = np.exp(log_softmax(outcomes.logits / outcomes.temperature, axis=1))
    is_right = probabilities.argmax(axis=1) == outcomes.labels
    return [
        _classes(evaluation.confusion, names),
        confusion(evaluation.confusion, names),
        _confused_classes(evaluation.confusion, names),
        _reliability(outcomes, is_right),
        score_histogram(
            probabilities.max(axis=1),
            {"right": is_right, "wrong": ~is_right},
            title="Confidence of right and wrong predictions",
            xlabel="probability of the predicted class",
            ylabel="images",
        ),
        _largest_losses(probabilities, outcomes.labels, names),
        *_disagreeing_neighbors(probabilities, outcomes, names),
    ]


def _classes(counts: NDArray[np.int64], names: Sequence[str]) -> Table:
    right, images, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        values = right / predicted, right / images, 2 * right / (images + predicted)
    rows: list[list[Any]] = [[name, int(num), *map(float, row)] for name, num, *row in zip(names, images, *values)]
    return Table(
        title="Classes", columns=["class", "images", "precision", "recall", "F1"], rows=sorted(rows, key=_by_images)
    )


def _by_images(row: Sequence[Any]) -> float:
    return -row[1]  # type: ignore[no-any-return]


def _confused_classes(counts: NDArray[np.int64], names: Sequence[str]) -> Table:
    wrong = counts - np.diag(counts.diagonal())
    pairs = [divmod(index, len(names)) for index in highest(wrong.ravel(), wrong.ravel() > 0, num=MAX_PAIRS)]
    rows: list[list[Any]] = [
        [names[t], names[p], int(wrong[t, p]), float(wrong[t, p] / counts[t].sum())] for t, p in pairs
    ]
    return Table(
        title="Most confused classes", columns=["true class", "predicted class", "images", "of the class"], rows=rows
    )


def _reliability(outcomes: ClassificationOutcomes, is_right: NDArray[np.bool_]) -> Curves:
    temperatures = {"without temperature": 1.0}
    if outcomes.temperature != 1:
        temperatures = {f"temperature {outcomes.temperature:.3g}": outcomes.temperature, **temperatures}
    lines, errors = {}, []
    for name, temperature in temperatures.items():
        confidences = np.exp(log_softmax(outcomes.logits.astype(np.float64) / temperature, axis=1)).max(axis=1)
        counts, confidence, accuracy = reliability_bins(confidences, is_right)
        lines[name] = confidence[counts > 0], accuracy[counts > 0]
        errors.append(f"{calibration_error(confidences, is_right):.3f} {name}")
    return Curves(
        title="Reliability",
        note=f"Accuracy of the images in each of 15 bins of confidence, which a calibrated model's equals. Expected "
        f"calibration error: {', '.join(errors)}.",
        lines=lines,
        xlabel="confidence",
        ylabel="accuracy",
        diagonal=True,
    )


def _largest_losses(probabilities: Floats, labels: NDArray[np.int64], names: Sequence[str]) -> Cases:
    of_label = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    predicted = probabilities.argmax(axis=1)
    return Cases(
        title="Largest losses",
        note="Images whose label the model gives the lowest probability: its worst errors, and confident disagreement "
        "with labels that may be wrong.",
        cases=[
            _case(image, predicted[image], probabilities, labels, names)
            for image in highest(-of_label, predicted != labels)
        ],
    )


def _case(
    image: int, predicted: int, probabilities: Floats, labels: NDArray[np.int64], names: Sequence[str], more: str = ""
) -> Case:
    label, score = int(labels[image]), float(probabilities[image, predicted])
    return Case(
        image=image,
        caption=f"{names[predicted]} ({score:.2f}), labelled {names[label]} ({probabilities[image, label]:.2g}){more}",
        predicted=Marks(names=[names[predicted]], class_ids=[int(predicted)], scores=[score]),
        truth=Marks(names=[names[label]], class_ids=[label]),
    )


def _disagreeing_neighbors(
    probabilities: Floats, outcomes: ClassificationOutcomes, names: Sequence[str]
) -> list[Part]:
    """Images most of whose nearest neighbours, by the classifier's features, have one other label."""
    features, labels = outcomes.features, outcomes.labels
    if features is None or not NUM_NEIGHBORS < len(labels) <= MAX_NEIGHBORHOOD:
        return []
    votes = neighbor_votes(features, labels, len(names))  # (images, classes)
    other = votes.argmax(axis=1)
    disagreement = (votes.max(axis=1) - np.take_along_axis(votes, labels[:, None], axis=1)[:, 0]) / NUM_NEIGHBORS
    return [
        Cases(
            title="Likely label errors: neighbours of another class",
            note=f"Images whose {NUM_NEIGHBORS} most similar ones, by the features that the classifier reads, are "
            "mostly labelled as another class.",
            cases=[
                _case(
                    image,
                    int(probabilities[image].argmax()),
                    probabilities,
                    labels,
                    names,
                    f"; {votes[image, other[image]]} of {NUM_NEIGHBORS} neighbours are {names[other[image]]}",
                )
                for image in highest(disagreement, disagreement > 1 / 2)
            ],
        )
    ]


def neighbor_votes(features: Floats, labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Labels (images, classes) of the 10 nearest neighbours of each image, by cosine similarity."""
    normalised = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    votes = np.zeros((len(labels), num_classes), dtype=np.int64)
    for first in range(0, len(labels), 1024):
        rows = np.arange(first, min(first + 1024, len(labels)))
        similarity = normalised[rows] @ normalised.T
        similarity[rows - first, rows] = -np.inf  # not itself
        nearest = np.argpartition(-similarity, NUM_NEIGHBORS, axis=1)[:, :NUM_NEIGHBORS]
        np.add.at(votes, (rows[:, None], labels[nearest]), 1)
    return votes


def _report_multi_label(outcomes: MultiLabelOutcomes, names: Sequence[str]) -> list[Part]:
    scores, present, threshold = outcomes.probabilities, outcomes.labels, outcomes.threshold
    of_all = scores.ravel(), present.ravel(), int(present.sum())
    points = {"the model's": operating_point(*of_all, threshold), "of the best F1 here": best_f1(*of_all)}
    classes: list[list[Any]] = []
    for index, name in enumerate(names):
        of_class = scores[:, index], present[:, index], int(present[:, index].sum())
        best = best_f1(*of_class)
        classes.append([name, of_class[2], *operating_point(*of_class, threshold)[1:], *best])
    curve = precision_recall_curve(*of_all)
    return [
        Table(
            title="Score threshold",
            columns=["threshold", "score", "precision", "recall", "F1"],
            rows=[[name, *point] for name, point in points.items()],
            note="All pairs of image and class together. The model's threshold is what predictions use when no other "
            "is given; choose it on other images than those it is reported on.",
        ),
        Table(
            title="Classes",
            columns=["class", "images", "precision", "recall", "F1"]
            + [f"best {what}" for what in ("threshold", "precision", "recall", "F1")],
            rows=sorted(classes, key=_by_images),
            note="At the model's threshold; then at the threshold of the class's best F1.",
        ),
        _precision_recall(scores, present, names),
        Curves(
            title="Choice of the threshold",
            note="All pairs of image and class together; the line is the model's threshold.",
            lines={name: (curve.thresholds, getattr(curve, name.lower())) for name in ("F1", "precision", "recall")},
            xlabel="score threshold",
            ylabel="",
            at=threshold,
        ),
        score_histogram(
            scores.ravel(),
            {"class is there": present.ravel(), "class is not there": ~present.ravel()},
            title="Scores of classes that are there or not",
            xlabel="score",
            ylabel="pairs of image and class",
            at=threshold,
        ),
        *_multi_label_cases(scores, present, names, threshold),
    ]


def _precision_recall(scores: Floats, present: NDArray[np.bool_], names: Sequence[str]) -> Curves:
    curve = precision_recall_curve(scores.ravel(), present.ravel(), int(present.sum()))
    lines = {"all classes": (curve.recall, curve.precision)}
    num_images = present.sum(axis=0)
    for index in highest(num_images, num_images > 0, num=MAX_CURVES):
        curve = precision_recall_curve(scores[:, index], present[:, index], int(num_images[index]))
        lines[names[index]] = curve.recall, curve.precision
    return Curves(
        title="Precision and recall",
        note="Over all score thresholds, of the classes that are in most images.",
        lines=lines,
        xlabel="recall",
        ylabel="precision",
    )


def _multi_label_cases(
    scores: Floats, present: NDArray[np.bool_], names: Sequence[str], threshold: float
) -> list[Part]:
    found = scores >= threshold

    def marks(image: int, which: NDArray[np.bool_], with_scores: bool) -> Marks:
        ids = np.flatnonzero(which[image]).tolist()
        shown = scores[image, ids].tolist() if with_scores else None
        return Marks(names=[names[index] for index in ids], class_ids=ids, scores=shown)

    def cases(values: Floats, candidates: NDArray[np.bool_]) -> list[Case]:
        best = highest(values.ravel(), candidates.ravel(), num=NUM_CASES)
        return [
            Case(
                image=image,
                caption=f"{names[index]}: {scores[image, index]:.2g}",
                predicted=marks(image, found, True),
                truth=marks(image, present, False),
            )
            for image, index in (divmod(position, len(names)) for position in best)
        ]

    return [
        Cases(
            title="Likely label errors: classes that are not labelled",
            note="Confident predictions of classes that the labels do not have.",
            cases=cases(scores, found & ~present),
        ),
        Cases(
            title="Likely label errors: classes that are not found",
            note="Labelled classes of the lowest scores.",
            cases=cases(-scores, present & ~found),
        ),
    ]
