"""Metrics of segmentation against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from hf_vlm.metrics.segmentation import confusion_segmentation_metrics, pixel_confusion, segmentation_metrics

NAMES = ["sky", "road", "car", "bus"]


def maps_of(*classes, sizes=((6, 8), (5, 3), (9, 2)), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.choice(classes, size=size) for size in sizes]


@pytest.mark.parametrize(
    ("true", "predicted"),
    [((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 1, 255), (0, 1)), ((0, 2, 255), (0, 2, 3)), ((1, 3), (0, 1))],
    ids=["all", "ignored", "predicted alone", "never predicted"],
)
def test_equals_scikit_learn(true, predicted):
    references, predictions = maps_of(*true), maps_of(*predicted, seed=1)
    found = segmentation_metrics(predictions, references, num_classes=4, class_names=NAMES, per_class=True)
    labels, guesses = (np.concatenate([m.ravel() for m in maps]) for maps in (references, predictions))
    labels, guesses = labels[labels != 255], guesses[labels != 255]
    present = sorted({*labels.tolist(), *guesses.tolist()})
    ious = dict(zip(present, jaccard_score(labels, guesses, labels=present, average=None, zero_division=0)))
    expected = {f"iou/{name}": ious.get(index, np.nan) for index, name in enumerate(NAMES)}
    there = sorted(set(labels.tolist()))
    expected["mean_accuracy"] = recall_score(labels, guesses, labels=there, average="macro", zero_division=0)
    expected |= {"miou": np.mean(list(ious.values())), "pixel_accuracy": accuracy_score(labels, guesses)}
    assert found == pytest.approx(expected, nan_ok=True)
    counts = sum(pixel_confusion(r, p, 4) for r, p in zip(references, predictions))
    np.testing.assert_array_equal(counts, confusion_matrix(labels, guesses, labels=range(4)))


def test_another_value_can_be_ignored():
    found = segmentation_metrics([[[1, 1, 0]]], [[[1, 0, 3]]], num_classes=2, ignore_index=3)
    assert found["pixel_accuracy"] == 1 / 2


@pytest.mark.parametrize(
    ("prediction", "reference", "words"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"labels are \(3, 2\), but the predictions \(2, 3\)"),
        (np.zeros((2, 3), int), np.full((2, 3), 4), "not all within 0 to 3"),
        (np.full((2, 3), 255), np.zeros((2, 3), int), "predictions .* not all within 0 to 3"),
        (np.zeros((2, 3), int), np.full((2, 3), 255), "no pixel with a class"),
    ],
)
def test_what_cannot_be_counted_is_refused(prediction, reference, words):
    with pytest.raises(ValueError, match=words):
        segmentation_metrics([prediction], [reference], num_classes=4)


def test_there_is_one_name_per_class():
    with pytest.raises(ValueError, match="3 class_names for 2 classes"):
        confusion_segmentation_metrics(np.eye(2, dtype=np.int64), class_names=NAMES[:3])
