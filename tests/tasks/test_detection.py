"""Evaluation of detectors against plain loops over the same images."""

import numpy as np
import pytest

from hf_vlm.data.scenes.render import render_scene, scene_settings
from hf_vlm.data.sources import open_source
from hf_vlm.metrics import coco_detection_metrics
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


def test_metrics_are_those_of_the_predictions(detector, processor):
    evaluation = evaluate_detection(detector, held_out(processor), processor, class_names=NAMES, batch_size=2)
    predictions, references = predict_detection(detector, held_out(processor), processor, batch_size=7)
    expected = coco_detection_metrics(predictions, references, class_names=NAMES)
    assert evaluation.metrics == pytest.approx(expected, nan_ok=True)
