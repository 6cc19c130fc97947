"""Evaluation of detectors against plain loops over the same images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_vlm.data.scenes.render import render_scene, scene_settings
from hf_vlm.data.sources import open_source
from hf_vlm.metrics import coco_detection_metrics
from hf_vlm.models.modeling_detection import VLMViTObjectDetectionOutput
from hf_vlm.tasks.detection import DETECTION, evaluate_detection, predict_detection
from hf_vlm.tasks.evaluation import eval_stream

NAMES = list("01234")


def held_out(processor):
    source = open_source("scenes:easy", "test", num_samples=7)
    return eval_stream(source, DETECTION.transform(processor, train=False, class_names=NAMES), max_bad_fraction=0.0)


def test_references_are_the_boxes_of_the_scenes_in_pixels(detector, processor):
    predictions, references = predict_detection(detector, held_out(processor), processor, batch_size=3)
    assert len(predictions) == len(references) == 7
    for index, reference in enumerate(references):
        scene = render_scene(0, index, scene_settings("easy"), split="test")
        corners = np.concatenate([scene.boxes[:, :2], scene.boxes[:, :2] + scene.boxes[:, 2:]], axis=1)
        np.testing.assert_allclose(reference["boxes"].numpy(), corners, atol=1e-3)
        assert reference["labels"].tolist() == scene.categories.tolist()
    assert detector.training


class Perfect(torch.nn.Module):
    """Detects what a list of references holds, one query per object, with falling scores."""

    def __init__(self, references, num_queries, num_labels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.references, self.num_queries, self.num_labels = references, num_queries, num_labels

    def forward(self, pixel_values):
        logits = torch.full((len(pixel_values), self.num_queries, self.num_labels), -9.0)
        boxes = torch.full((len(pixel_values), self.num_queries, 4), 0.5)
        for image, labels in enumerate(self.references):
            for query, category in enumerate(labels["class_labels"][: self.num_queries]):
                logits[image, query, category] = 5 - query / 100
                boxes[image, query] = labels["boxes"][query]
        return VLMViTObjectDetectionOutput(logits=logits, pred_boxes=boxes)


class OneImage(torch.utils.data.IterableDataset):
    rank, world_size = 0, 1

    def __init__(self, labels):
        self.labels = labels

    def __iter__(self):
        yield {"pixel_values": torch.zeros(3, 8, 8), "labels": self.labels}


@pytest.mark.parametrize(("num_objects", "num_queries", "low", "high"), [(180, 300, 1, 1), (225, 60, 0.2, 0.3)])
def test_a_perfect_detector_of_crowded_images(num_objects, num_queries, low, high, processor, caplog):
    """COCO counts 100 detections per image and class, and no fewer: it scores 1 while it has queries enough."""
    torch.manual_seed(0)
    centre = torch.rand(num_objects, 2) * 0.8 + 0.1
    labels = {
        "class_labels": torch.arange(num_objects) % 3,
        "boxes": torch.cat([centre, torch.full((num_objects, 2), 0.05)], dim=1),
        "area": torch.full((num_objects,), 90.0),
        "iscrowd": torch.zeros(num_objects),
        "orig_size": torch.tensor([200, 300]),
    }
    model = Perfect([labels], num_queries, 3)
    evaluation = evaluate_detection(model, OneImage(labels), processor, class_names=NAMES[:3])
    assert low <= evaluation.metrics["ap"] <= high
    assert ("hold more objects (up to 225) than the model has queries (60)" in caplog.text) == (num_objects == 225)


def test_metrics_are_those_of_the_predictions(detector, processor):
    evaluation = evaluate_detection(detector, held_out(processor), processor, class_names=NAMES, batch_size=2)
    predictions, references = predict_detection(detector, held_out(processor), processor, batch_size=7)
    expected = coco_detection_metrics(predictions, references, class_names=NAMES)
    assert {name: evaluation.metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_the_threshold_of_the_best_f1_is_the_one_to_predict_with(processor):
    """Of two right detections and many wrong ones of lower scores, the threshold keeps the former."""
    labels = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]),
        "area": torch.full((2,), 90.0),
        "iscrowd": torch.zeros(2),
        "orig_size": torch.tensor([200, 300]),
    }
    model = Perfect([labels], 20, 3)
    model.config = SimpleNamespace()
    metrics = evaluate_detection(model, OneImage(labels), processor, class_names=NAMES[:3]).metrics
    assert [metrics[name] for name in ("f1", "precision", "recall")] == [1, 1, 1]
    calibration = DETECTION.calibrate(metrics)
    low, high = torch.tensor([-9.0, 4.99]).sigmoid().tolist()  # of the wrong ones, and the lower of the right ones
    assert calibration.processor == {"score_threshold": pytest.approx((low + high) / 2, rel=1e-3)}
    assert not calibration.config
    calibration.apply(model, processor)
    outputs = model(torch.zeros(1, 3, 8, 8))
    (found,) = DETECTION.post_process(processor, outputs, threshold=None, sizes=[(200, 300)], model=model)
    assert sorted(found["labels"].tolist()) == [0, 1]
    assert not DETECTION.calibrate({**metrics, "score_threshold": float("nan")})
