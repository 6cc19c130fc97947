"""The evaluate modules, loaded by path with no network, give the plain functions' metrics."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import hf_vlm.metrics as metrics

FOLDER = Path(metrics.__file__).parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def load(name, tmp_path):
    return evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path))


def test_coco_detection(tmp_path):
    references = [
        {"boxes": [[0.0, 0, 50, 50], [60, 60, 90, 80]], "labels": [0, 1], "iscrowd": [0, 1]},
        {"boxes": [], "labels": []},
        {"boxes": [[10.0, 10, 40, 40]], "labels": [1], "area": [500.0]},
    ]
    predictions = [
        {"boxes": [[2.0, 0, 50, 55], [61, 61, 70, 70]], "scores": [0.9, 0.8], "labels": [0, 1]},
        {"boxes": [[5.0, 5, 9, 9]], "scores": [0.4], "labels": [0]},
        {"boxes": [], "scores": [], "labels": []},
    ]
    expected = metrics.coco_detection_metrics(predictions, references, class_names=["a", "b"], per_class=True)
    assert expected["ap50"] == 0.5
    module = load("coco_detection", tmp_path)
    options = {"class_names": ["a", "b"], "per_class": True}
    result = module.compute(predictions=predictions, references=references, **options)
    assert result == pytest.approx(expected, nan_ok=True, abs=0)
    for prediction, reference in zip(predictions, references, strict=True):
        module.add(prediction=prediction, reference=reference)
    assert module.compute(**options) == pytest.approx(expected, nan_ok=True, abs=0)


def test_coco_instance_segmentation(tmp_path):
    masks = np.zeros((3, 12, 16), dtype=np.uint8)
    masks[0, 2:8, 3:9], masks[1, 4:10, 8:15], masks[2, 2:8, 4:9] = 1, 1, 1
    references = [{"masks": masks[:2], "labels": [0, 1], "iscrowd": [0, 0]}, {"masks": [], "labels": []}]
    predictions = [{"masks": masks[2:], "labels": [0], "scores": [0.9]}, {"masks": [], "labels": [], "scores": []}]
    expected = metrics.coco_instance_metrics(predictions, references, class_names=["a", "b"])
    assert expected["mask_ap50"] == 0.5
    module = load("coco_instance_segmentation", tmp_path)
    found = module.compute(predictions=predictions, references=references, class_names=["a", "b"])
    assert found == pytest.approx(expected, nan_ok=True, abs=0)
    for prediction, reference in zip(predictions, references, strict=True):
        module.add(prediction=prediction, reference=reference)
    assert module.compute(class_names=["a", "b"]) == pytest.approx(expected, nan_ok=True, abs=0)


@pytest.mark.parametrize("name", ["knn_accuracy", "linear_accuracy"])
def test_probes(name, tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 4)), rng.normal(size=(40, 4))
    train_labels, test_labels = (train[:, 0] > 0).astype(int), (test[:, 0] > 0).astype(int)
    result = load(name, tmp_path).compute(
        predictions=test, references=test_labels, train_features=train, train_labels=train_labels
    )
    expected = getattr(metrics, name)(train, train_labels, test, test_labels)
    assert result == {name: expected}
    assert expected > 0.7


def test_semantic_segmentation(tmp_path):
    maps = {"predictions": [[[0, 1, 1], [0, 0, 2]], [[2]]], "references": [[[0, 1, 255], [0, 1, 2]], [[0]]]}
    expected = metrics.segmentation_metrics(**maps, num_classes=3, per_class=True)
    assert expected["pixel_accuracy"] == 4 / 6
    assert load("semantic_segmentation", tmp_path).compute(**maps, num_classes=3, per_class=True) == expected
