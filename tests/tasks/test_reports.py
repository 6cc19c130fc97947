"""Reports find what was planted: wrong labels, the worst images, the right numbers."""

import numpy as np
import pytest

from hf_vlm.metrics.detection_matches import match_detections
from hf_vlm.metrics.segmentation import pixel_confusion
from hf_vlm.tasks.reports.classification import (
    ClassificationOutcomes,
    MultiLabelOutcomes,
    neighbor_votes,
    report_classification,
)
from hf_vlm.tasks.reports.detection import DetectionOutcomes, report_detection
from hf_vlm.tasks.reports.parts import NUM_CASES, Cases, default_report
from hf_vlm.tasks.reports.segmentation import SegmentationOutcomes, report_segmentation
from hf_vlm.tasks.task import Evaluation

NAMES = ["cat", "dog"]


def parts_of(parts):
    assert len({part.title for part in parts}) == len(parts)
    return {part.title: part for part in parts}


def images_of(part):
    assert isinstance(part, Cases)
    return [case.image for case in part.cases]


@pytest.fixture(scope="module")
def detection():
    """Images with: a right detection; one where there is no box; a box that is not found; a dog labelled as a cat."""
    box, other = [10, 10, 50, 50], [60, 60, 90, 90]
    truth = [([box], [0]), ([], []), ([box, other], [0, 1]), ([box], [0])]
    found = [([box, other], [0.9, 0.2], [0, 0]), ([other], [0.8], [1]), ([box], [0.7], [0]), ([box], [0.6], [1])]
    references = [{"boxes": np.array(boxes, dtype=float).reshape(-1, 4), "labels": np.array(labels, dtype=int)}
                  for boxes, labels in truth]  # fmt: skip
    predictions = [dict(zip(("boxes", "scores", "labels"), map(np.array, image))) for image in found]
    metrics = {f"{kind}_{size}": 0.5 for kind in ("ap", "ar") for size in ("small", "medium", "large")}
    outcomes = DetectionOutcomes(match_detections(predictions, references), 0.5)
    return Evaluation(metrics=metrics | {"ap/cat": 0.25, "ap/dog": 0.0}, class_names=NAMES, outcomes=outcomes)


def test_the_cases_of_a_detector(detection):
    parts = parts_of(report_detection(detection))
    assert images_of(parts["Likely label errors: detections without a box"]) == [1]
    assert images_of(parts["Likely label errors: boxes that are never found"]) == [2]
    (swap,) = parts["Likely label errors: another class"].cases
    assert (swap.image, swap.caption) == (3, "dog: 0.60, labelled cat")
    assert (swap.predicted.names, swap.truth.names) == (["dog"], ["cat"])
    worst = parts["Images with most errors"]
    assert [(case.image, case.caption) for case in worst.cases] == [
        (3, "1 missed, 1 wrong"),
        (1, "0 missed, 1 wrong"),
        (2, "1 missed, 0 wrong"),
    ]


def test_the_numbers_of_a_detector(detection):
    parts = parts_of(report_detection(detection))
    np.testing.assert_array_equal(parts["Confusion matrix"].counts, [[2, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert parts["Confusion matrix"].names == [*NAMES, "background"]
    cat, dog = parts["Classes"].rows
    assert cat[:6] == ["cat", 3, 0.25, 1.0, pytest.approx(2 / 3), pytest.approx(4 / 5)]
    assert cat[6:] == pytest.approx([0.45, 1, 2 / 3, 4 / 5])  # halfway between 0.7 and 0.2
    assert dog[:5] == ["dog", 1, 0.0, 0.0, 0.0]
    (_, _, *point), (_, best, *_) = parts["Score threshold"].rows
    assert point == pytest.approx([2 / 4, 2 / 4, 2 / 4])
    assert best == pytest.approx(0.65)
    assert [row[1] for row in parts["Sizes"].rows] == [1, 3, 0]
    assert parts["Sizes"].rows[1][4] == pytest.approx(2 / 3)
    counts = parts["Scores of right and wrong detections"].counts
    assert (counts["right"].sum(), counts["wrong"].sum()) == (2, 3)


def test_a_planted_label_error_of_a_classifier_is_found():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = rng.normal(0, 0.1, (60, 3)).astype(np.float32)
    features[np.arange(60), labels] += 1
    logits = 4 * features[:, :2]
    labels[[7, 20]] = 1 - labels[[7, 20]]  # wrong ones
    logits[33] = logits[33, ::-1] / 4  # an error of the model
    outcomes = ClassificationOutcomes(logits, labels, 1.5, features)
    confusion = np.zeros((2, 2), dtype=int)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    parts = parts_of(
        report_classification(Evaluation(metrics={}, class_names=NAMES, confusion=confusion, outcomes=outcomes))
    )
    assert sorted(images_of(parts["Largest losses"])[:2]) == [7, 20]
    assert sorted(images_of(parts["Largest losses"])) == [7, 20, 33]
    assert sorted(images_of(parts["Likely label errors: neighbours of another class"])) == [7, 20]
    assert list(parts["Reliability"].lines) == ["temperature 1.5", "without temperature"]
    assert parts["Most confused classes"].rows[0][2] == confusion[[0, 1], [1, 0]].max()


def test_votes_are_those_of_the_most_similar_images():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(1100, 4)).astype(np.float32), rng.integers(0, 3, 1100)  # two blocks
    votes = neighbor_votes(features, labels, 3)
    for image in (0, 500, 1024, 1099):
        cosine = [f @ features[image] / np.linalg.norm(f) for f in features]
        nearest = [other for other in np.argsort(cosine)[::-1] if other != image][:10]
        np.testing.assert_array_equal(votes[image], np.bincount(labels[nearest], minlength=3))


def test_labels_that_several_classes_disagree_with():
    present = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1], [0.2, 0.7], [0.8, 0.05], [0.95, 0.4]], dtype=np.float32)
    outcomes = MultiLabelOutcomes(scores, present, 0.5)
    parts = parts_of(report_classification(Evaluation(metrics={}, class_names=NAMES, outcomes=outcomes)))
    (extra,) = parts["Likely label errors: classes that are not labelled"].cases
    (missing,) = parts["Likely label errors: classes that are not found"].cases
    assert (extra.image, extra.predicted.names, extra.truth.names) == (3, ["cat"], [])
    assert (missing.image, missing.predicted.names, missing.truth.names) == (2, ["cat"], ["cat", "dog"])
    assert parts["Classes"].rows[0][:3] == ["cat", 2, pytest.approx(2 / 3)]


def test_the_images_of_the_lowest_iou_are_kept():
    rng = np.random.default_rng(2)
    outcomes, counts = SegmentationOutcomes(), np.zeros((2, 2), dtype=np.int64)
    for fraction in rng.permutation(40) / 40:
        truth = np.zeros((4, 1000), dtype=np.uint8)
        predicted = truth + (np.arange(1000) < 1000 * fraction)
        truth[:, -10:] = 255
        of_image = pixel_confusion(truth, predicted, 2)
        outcomes.add(of_image, predicted, truth)
        counts += of_image
    evaluation = Evaluation(metrics={}, class_names=NAMES, confusion=counts, counted="pixels", outcomes=outcomes)
    parts = parts_of(report_segmentation(evaluation))
    expected = np.argsort(outcomes.ious)[:NUM_CASES].tolist()
    assert images_of(parts["Images of the lowest IoU"]) == expected
    worst = parts["Images of the lowest IoU"].cases[0]
    assert worst.predicted.segmentation.shape == (2, 480)
    assert worst.caption == f"mean IoU {min(outcomes.ious):.3f}"
    assert (worst.truth.names, worst.truth.segmentation.max()) == (["cat"], 255)
    assert parts["Mean IoU of the images"].counts["images"].sum() == 40


def test_other_tasks_have_a_table_of_their_classes():
    metrics = {"miou": 0.5, "iou/cat": 0.25, "iou/dog": 0.75, "pq/dog": 0.5}
    (table,) = default_report(Evaluation(metrics=metrics))
    assert list(table.columns) == ["class", "iou"]
    assert table.rows == [["cat", 0.25], ["dog", 0.75]]
    assert default_report(Evaluation(metrics={"knn": 0.5})) == []
