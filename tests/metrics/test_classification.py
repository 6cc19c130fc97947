"""Classification metrics against scikit-learn and against loops."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from hf_vlm.metrics import classification
from hf_vlm.metrics.classification import classification_metrics, confusion_matrix, multi_label_metrics


def predictions(num_images=200, num_classes=8, seed=0):
    """Probabilities that are correlated with the labels; the last class is in no image."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes - 1, num_images)
    logits = rng.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += 1.5
    probabilities = np.exp(logits)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


def slow_calibration_error(probabilities, labels):
    """From the definition of Guo et al. 2017, equation 3."""
    confidences, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for index in range(15):
        inside = [i for i, value in enumerate(confidences) if index / 15 < value <= (index + 1) / 15]
        if inside:
            error += len(inside) / len(labels) * abs(np.mean(right[inside]) - np.mean(confidences[inside]))
    return error


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("as_given", [np.asarray, torch.tensor, lambda values: values.tolist()])
def test_accuracies_equal_scikit_learn(as_given):
    probabilities, labels = predictions()
    found = probabilities.argmax(axis=1)
    assert 7 in found
    assert 7 not in labels
    metrics = classification_metrics(as_given(probabilities), as_given(labels))
    expected = {
        "top1": sklearn_metrics.accuracy_score(labels, found),
        "top5": sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(8)),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, found),
        "macro_f1": sklearn_metrics.f1_score(labels, found, average="macro"),
        "ece": slow_calibration_error(probabilities, labels),
    }
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert metrics["top1"] < metrics["top5"] < 1


def test_recall_per_class():
    probabilities, labels = predictions()
    names = list("abcdefgh")
    metrics = classification_metrics(probabilities, labels, class_names=names, per_class=True)
    recalls = sklearn_metrics.recall_score(
        labels, probabilities.argmax(axis=1), labels=range(8), average=None, zero_division=np.nan
    )
    found = [metrics[f"recall/{name}"] for name in names]
    np.testing.assert_allclose(found, recalls)
    assert math.isnan(found[-1])
    assert "recall/0" in classification_metrics(probabilities, labels, per_class=True)


def test_top5_of_few_classes_is_one():
    probabilities, labels = predictions(num_classes=3)
    assert classification_metrics(probabilities, labels)["top5"] == 1


def test_perfect_and_certain_predictions():
    metrics = classification_metrics(np.eye(4), np.arange(4))
    assert metrics == {"top1": 1, "top5": 1, "balanced_accuracy": 1, "macro_f1": 1, "ece": 0}


def multi_label_predictions(num_images=120, num_classes=6):
    """Scores with ties; the last class is in no image, the first in most."""
    rng = np.random.default_rng(1)
    labels = (rng.random((num_images, num_classes)) < np.linspace(0.8, 0, num_classes)).astype(int)
    return np.round(0.7 * rng.random(labels.shape) + 0.25 * labels, 1), labels


def slow_average_precision(scores, labels):
    """Sum over descending thresholds of the step of recall x the precision there."""
    value, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        next_recall = labels[found].sum() / labels.sum()
        value += (next_recall - recall) * labels[found].mean()
        recall = next_recall
    return value


@pytest.mark.parametrize("as_given", [np.asarray, torch.tensor])
def test_several_labels_per_image(as_given):
    scores, labels = multi_label_predictions()
    metrics = multi_label_metrics(
        as_given(scores), as_given(labels), threshold=0.6, class_names=list("abcdef"), per_class=True
    )
    precisions = [slow_average_precision(scores[:, i], labels[:, i]) for i in range(5)]
    found = scores >= 0.6
    assert [metrics[f"ap/{name}"] for name in "abcde"] == pytest.approx(precisions)
    assert math.isnan(metrics["ap/f"])
    assert metrics["map"] == pytest.approx(np.mean(precisions))
    assert metrics["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(labels, found, average="micro"))
    assert metrics["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels, found, average="macro", zero_division=np.nan)
    )


def test_no_label_at_all():
    metrics = multi_label_metrics(np.full((3, 2), 0.1), np.zeros((3, 2)))
    assert all(math.isnan(metrics[name]) for name in ("map", "micro_f1", "macro_f1"))


def test_confusion_matrix_counts_images():
    labels, found = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    matrix = confusion_matrix(torch.tensor(labels), found, 4)
    np.testing.assert_array_equal(matrix, sklearn_metrics.confusion_matrix(labels, found, labels=range(4)))
    assert matrix.dtype == np.int64


@pytest.mark.parametrize(
    ("probabilities", "labels", "words"),
    [
        ([[0.5, 0.6]], [0], "do not sum to 1"),
        ([[2.0, -1.0]], [0], "must be between 0 and 1"),
        ([[math.nan, 0.5]], [0], "diverged"),
        ([0.5, 0.5], [0], r"shape \(2,\)"),
        (np.zeros((0, 2)), [], "n > 0"),
        ([[0.5, 0.5]], [0, 1], "expected 1 whole numbers"),
        ([[0.5, 0.5]], [0.0], "expected 1 whole numbers"),
        ([[0.5, 0.5]], [2], r"labels \[2\] are not all within 0 to 1"),
    ],
)
def test_malformed_inputs_are_explained(probabilities, labels, words):
    with pytest.raises(ValueError, match=words):
        classification_metrics(probabilities, labels)


def test_names_and_labels_must_fit():
    with pytest.raises(ValueError, match="1 class_names for 2 classes"):
        classification_metrics([[0.5, 0.5]], [0], class_names=["a"])
    for labels in ([1, 0], [[1, 2]], [[1, 0, 0]]):
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            multi_label_metrics([[0.5, 0.5]], labels)
    with pytest.raises(ValueError, match="predictions have shape"):
        confusion_matrix([0, 1], [0], 2)


def test_evaluate_module(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    folder = Path(classification.__file__).parent / "image_classification"
    module = evaluate.load(str(folder), cache_dir=str(tmp_path))
    probabilities, labels = predictions()
    result = module.compute(predictions=probabilities, references=labels, per_class=True)
    expected = classification_metrics(probabilities, labels, per_class=True)
    assert result == pytest.approx(expected, nan_ok=True, abs=0)
