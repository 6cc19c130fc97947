"""Matches and confusion of detections against plain loops, and against COCO's recall."""

import numpy as np
import pytest
import torch

from hf_vlm.metrics.detection import coco_detection_metrics
from hf_vlm.metrics.detection_matches import IGNORED, UNMATCHED, confused_pairs, detection_confusion, match_detections

NUM_CLASSES = 3


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def random_images(seed, num_images=12):
    """Objects, and detections of which most lie near one, some on another class, some anywhere."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(num_images):
        corners = rng.uniform(0, 80, (int(rng.integers(0, 6)), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 40, corners.shape)], axis=1)
        labels = rng.integers(0, NUM_CLASSES, len(boxes))
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 2.5, (3 * len(boxes), 4))
        spurious = rng.uniform(0, 50, (2, 2))
        found = np.concatenate([near, np.concatenate([spurious, spurious + 20], axis=1)])
        classes = np.where(rng.random(len(found)) < 0.7, np.append(np.repeat(labels, 3), [0, 1]), rng.integers(0, 3))
        scores = rng.permutation(len(found)) / len(found)
        predictions.append({name: torch.from_numpy(v) for name, v in
                            (("boxes", found), ("scores", scores), ("labels", classes))})  # fmt: skip
        references.append({"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)})
    return predictions, references


def loop_confusion(predictions, references, threshold):
    """Class by class in falling order of scores, then what is left on objects of other classes."""
    counts = np.zeros((NUM_CLASSES + 1, NUM_CLASSES + 1), dtype=int)
    for prediction, reference in zip(predictions, references):
        boxes, labels = reference["boxes"].tolist(), reference["labels"].tolist()
        order = prediction["scores"].argsort(descending=True).tolist()
        left = [i for i in order if prediction["scores"][i] > threshold]
        free = set(range(len(boxes)))
        for same_class in (True, False):
            for detection in list(left):
                box, label = prediction["boxes"][detection].tolist(), int(prediction["labels"][detection])
                ious = {i: iou(box, boxes[i]) for i in free if (labels[i] == label) == same_class}
                best = max(ious, key=ious.get, default=None)
                if best is not None and ious[best] >= 0.5:
                    counts[labels[best], label] += 1
                    free.remove(best)
                    left.remove(detection)
        for i in free:
            counts[labels[i], -1] += 1
        for detection in left:
            counts[-1, int(prediction["labels"][detection])] += 1
    return counts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.8])
def test_confusion_is_that_of_a_loop(seed, threshold):
    predictions, references = random_images(seed)
    counts = detection_confusion(match_detections(predictions, references), threshold, NUM_CLASSES)
    np.testing.assert_array_equal(counts, loop_confusion(predictions, references, threshold))
    assert (counts > 0).sum() >= 5  # of several kinds


def test_recall_is_that_of_coco():
    predictions, references = random_images(5, num_images=30)
    matches = match_detections(predictions, references, min_iou=0.75)
    recalls = [
        matches.is_right[matches.labels == label].sum() / (matches.object_labels == label).sum() for label in range(3)
    ]
    # AR is the mean over IoU thresholds: that of one threshold is the recall at the end of the curve, here from AP75.
    many = [match_detections(predictions, references, min_iou=threshold) for threshold in np.arange(0.5, 1, 0.05)]
    expected = coco_detection_metrics(predictions, references, num_classes=3)["ar_100"]
    mean = np.mean([[m.is_right[m.labels == c].sum() / (m.object_labels == c).sum() for c in range(3)] for m in many])
    assert mean == pytest.approx(expected, abs=1e-6)
    assert 0.2 < np.mean(recalls) < 0.95


def test_crowds_are_neither_found_nor_missed():
    boxes = [[0, 0, 10, 10], [20, 0, 60, 40], [100, 100, 110, 110]]
    reference = {"boxes": boxes[:2], "labels": [0, 0], "iscrowd": [0, 1], "area": [100, 1600]}
    found = [[0, 0, 10, 10], [25, 5, 35, 15], [25, 5, 35, 15], [100, 100, 110, 110]]
    prediction = {"boxes": found, "scores": [0.9, 0.8, 0.7, 0.6], "labels": [0, 0, 1, 0]}
    matches = match_detections([prediction], [reference])
    assert matches.matches.tolist() == [0, IGNORED, UNMATCHED, UNMATCHED]
    assert len(matches.object_labels) == 1
    np.testing.assert_array_equal(detection_confusion(matches, 0.5, 2), [[1, 0, 0], [0, 0, 0], [1, 1, 0]])


def test_images_without_boxes():
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    matches = match_detections([{**nothing, "scores": torch.empty(0)}] * 2, [nothing] * 2)
    assert (matches.num_images, len(matches.scores), confused_pairs(matches, 0.5)) == (2, 0, [])
    assert len(match_detections([], []).boxes) == 0
    assert not detection_confusion(matches, 0.5, 2).any()
