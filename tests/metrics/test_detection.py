"""COCO metrics against a slow reference written from the definition."""

import math

import numpy as np
import pytest
import torch

from hf_vlm.metrics import CocoDetectionMetric, coco_detection_metrics

AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def overlap(box, other, crowd):
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = (box[2] - box[0]) * (box[3] - box[1])
    other_area = (other[2] - other[0]) * (other[3] - other[1])
    return width * height / (area if crowd else area + other_area - width * height)


def match_image(detections, objects, threshold, low, high):
    """(score, is true, is ignored) of each detection, and the number of objects to find."""
    objects = [(box, crowd, crowd or not low <= area <= high) for box, area, crowd in objects]
    objects.sort(key=lambda entry: entry[2])
    taken, matches = set(), []
    for box, score in detections:
        best, found = min(threshold, 1 - 1e-10), None
        for i, (other, crowd, ignored) in enumerate(objects):
            if i in taken and not crowd:
                continue
            if found is not None and not objects[found][2] and ignored:
                break
            value = overlap(box, other, crowd)
            if value >= best:
                best, found = value, i
        if found is None:
            area = (box[2] - box[0]) * (box[3] - box[1])
            matches.append((score, False, not low <= area <= high))
        else:
            taken.add(found)
            matches.append((score, True, objects[found][2]))
    return matches, sum(not ignored for _, _, ignored in objects)


def curve(predictions, references, label, threshold, area, limit):
    """(average precision, recall) of one class, or None without objects."""
    matches, num_objects = [], 0
    for prediction, reference in zip(predictions, references, strict=True):
        detections = [
            (box, score)
            for box, score, category in zip(
                prediction["boxes"], prediction["scores"], prediction["labels"], strict=True
            )
            if category == label
        ]
        detections.sort(key=lambda entry: -entry[1])
        objects = [
            (box, size, crowd)
            for box, category, size, crowd in zip(
                reference["boxes"], reference["labels"], reference["area"], reference["iscrowd"], strict=True
            )
            if category == label
        ]
        found, count = match_image(detections[:limit], objects, threshold, *AREAS[area])
        matches += found
        num_objects += count
    if not num_objects:
        return None
    matches.sort(key=lambda entry: -entry[0])
    num_true, points = 0, []
    for rank, (_, is_true, _) in enumerate([m for m in matches if not m[2]], start=1):
        num_true += is_true
        points.append((num_true / num_objects, num_true / rank))
    levels = [max((p for r, p in points if r >= i / 100 - 1e-12), default=0.0) for i in range(101)]
    return sum(levels) / 101, num_true / num_objects


def reference_metrics(predictions, references, num_classes, max_detections=100):
    def mean(which, area="all", limit=max_detections, thresholds=THRESHOLDS):
        curves = [
            curve(predictions, references, label, threshold, area, limit)
            for label in range(num_classes)
            for threshold in thresholds
        ]
        values = [c[which] for c in curves if c is not None]
        return sum(values) / len(values) if values else math.nan

    metrics = {"ap": mean(0), "ap50": mean(0, thresholds=[0.5]), "ap75": mean(0, thresholds=[0.75])}
    metrics |= {f"ap_{area}": mean(0, area) for area in ("small", "medium", "large")}
    metrics |= {f"ar_{limit}": mean(1, limit=limit) for limit in (1, 10, max_detections)}
    return metrics | {f"ar_{area}": mean(1, area) for area in ("small", "medium", "large")}


def random_case(seed, *, num_images=6, num_classes=3):
    """Boxes of all sizes with crowds, given areas, images without objects, and predictions near and far."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for image in range(num_images):
        num_objects = 0 if image == 2 else int(rng.integers(1, 7))
        corners = rng.uniform(0, 200, (num_objects, 2))
        boxes = np.concatenate([corners, corners + rng.choice([12, 50, 130], (num_objects, 1))], axis=1)
        labels = rng.integers(0, num_classes, num_objects)
        references.append(
            {
                "boxes": boxes,
                "labels": labels,
                "area": (boxes[:, 2] - boxes[:, 0]) ** 2 * rng.uniform(0.5, 1, num_objects),
                "iscrowd": rng.random(num_objects) < 0.2,
            }
        )
        near = boxes[rng.integers(0, num_objects, 12)] if num_objects else np.empty((0, 4))
        near = near + rng.normal(0, 4, near.shape)
        corners = rng.uniform(0, 200, (4, 2))
        far = np.concatenate([corners, corners + rng.uniform(5, 150, (4, 2))], axis=1)
        found = np.concatenate([near, far])
        found = np.sort(found.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        predictions.append(
            {
                "boxes": found,
                "scores": rng.random(len(found)),
                "labels": rng.integers(0, num_classes, len(found)),
            }
        )
    return predictions, references


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_detections", [100, 3])
def test_equals_the_definition(seed, max_detections):
    predictions, references = random_case(seed)
    result = coco_detection_metrics(predictions, references, num_classes=3, max_detections=max_detections)
    expected = reference_metrics(predictions, references, 3, max_detections)
    if max_detections == 3:
        del expected["ar_10"]
    assert result == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert 0 < result["ap"] < 1


def test_per_class_is_the_ap_of_each_class_alone():
    predictions, references = random_case(3)
    result = coco_detection_metrics(predictions, references, class_names=["a", "b", "c", "none"], per_class=True)
    for label, name in enumerate("abc"):
        values = [curve(predictions, references, label, t, "all", 100)[0] for t in THRESHOLDS]
        assert result[f"ap/{name}"] == pytest.approx(sum(values) / 10, abs=1e-12)
    assert math.isnan(result["ap/none"])
    assert result["ap"] == pytest.approx((result["ap/a"] + result["ap/b"] + result["ap/c"]) / 3)


def test_perfect_predictions_score_one():
    _, references = random_case(0)
    references = [entry | {"iscrowd": np.zeros(len(entry["labels"]))} for entry in references]
    predictions = [{"scores": np.ones(len(r["labels"])), **r} for r in references]
    result = coco_detection_metrics(predictions, references)
    assert result["ap"] == result["ap50"] == result["ap75"] == result["ar_100"] == 1.0


def test_crowds_are_neither_found_nor_missed():
    reference = {"boxes": [[0, 0, 50, 50], [100, 0, 150, 50]], "labels": [0, 0], "iscrowd": [0, 1]}
    boxes = [[0, 0, 50, 50], [100, 0, 120, 20], [120, 20, 140, 40]]
    prediction = {"boxes": boxes, "scores": [0.5, 0.9, 0.8], "labels": [0, 0, 0]}
    assert coco_detection_metrics([prediction], [reference])["ap"] == 1.0
    no_crowd = reference | {"iscrowd": [0, 0]}
    assert coco_detection_metrics([prediction], [no_crowd])["ap"] == pytest.approx(51 / 101 / 3)


def test_nothing_to_find_is_nan_and_nothing_found_is_zero():
    empty = {"boxes": [], "scores": [], "labels": []}
    some = {"boxes": [[0, 0, 50, 50]], "scores": [0.5], "labels": [0]}
    assert all(math.isnan(value) for value in coco_detection_metrics([some, empty], [empty, empty]).values())
    assert all(math.isnan(value) for value in coco_detection_metrics([], []).values())
    result = coco_detection_metrics([empty, empty], [some, empty])
    assert result["ap"] == result["ap50"] == result["ar_100"] == result["ap_medium"] == 0.0
    assert math.isnan(result["ap_small"])


def test_an_image_without_objects_counts_its_false_positives():
    some = {"boxes": [[0, 0, 50, 50]], "scores": [0.5], "labels": [0]}
    louder = some | {"scores": [0.9]}
    empty = {"boxes": [], "labels": []}
    assert coco_detection_metrics([some, louder], [some, empty])["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize("max_detections", [100, 4])
def test_batches_equal_all_at_once(max_detections):
    predictions, references = random_case(5, num_images=9)
    metric = CocoDetectionMetric(num_classes=3, max_detections=max_detections)
    for first, last in ((0, 1), (1, 5), (5, 5), (5, 9)):
        metric.add(predictions[first:last], references[first:last])
        metric.compute()  # changes nothing
    assert len(metric) == 9
    at_once = coco_detection_metrics(predictions, references, num_classes=3, max_detections=max_detections)
    assert metric.compute() == at_once


def test_only_predictions_that_count_are_kept():
    metric = CocoDetectionMetric(num_classes=2, max_detections=10)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (900, 2))
    prediction = {
        "boxes": np.concatenate([corners, corners + 20], axis=1),
        "scores": rng.random(900),
        "labels": np.arange(900) % 2,
    }
    metric.add([prediction], [{"boxes": prediction["boxes"][:2], "labels": [0, 1]}])
    kept = metric._predictions[0]
    assert len(kept.labels) == 20
    for label in (0, 1):
        best = np.sort(prediction["scores"][label::2])[-10:]
        np.testing.assert_array_equal(np.sort(kept.extras["scores"][kept.labels == label]), best)


def test_tensors_lists_and_arrays_give_the_same(capfd):
    predictions, references = random_case(1)
    as_tensors = [{key: torch.tensor(value) for key, value in p.items()} for p in predictions]
    as_tensors[0]["scores"].requires_grad_()
    as_lists = [{key: value.tolist() for key, value in r.items()} for r in references]
    assert coco_detection_metrics(as_tensors, as_lists) == coco_detection_metrics(predictions, references)
    assert capfd.readouterr() == ("", "")


def test_default_area_is_that_of_the_box():
    predictions, references = random_case(2)
    boxes = [r["boxes"] for r in references]
    stated = [r | {"area": (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])} for r, b in zip(references, boxes, strict=True)]
    unstated = [{key: value for key, value in r.items() if key != "area"} for r in references]
    assert coco_detection_metrics(predictions, unstated) == coco_detection_metrics(predictions, stated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 50]]}, r"predictions\[0\]: boxes has shape \(1, 3\)"),
        ({"boxes": [[100, 100, 20, 20]]}, r"box \[100.0, 100.0, 20.0, 20.0\] ends before it starts"),
        ({"boxes": [[0, 0, math.nan, 5]]}, "not finite"),
        ({"scores": [0.1, 0.2]}, r"scores has shape \(2,\) for 1 boxes"),
        ({"labels": [2]}, r"labels \[2\] are not all within 0 to 1"),
        ({"labels": [-1]}, r"labels \[-1\]"),
    ],
)
def test_malformed_entries_are_named(change, message):
    entry = {"boxes": [[0, 0, 5, 5]], "scores": [0.5], "labels": [0]}
    with pytest.raises(ValueError, match=message):
        coco_detection_metrics([entry | change], [entry], num_classes=2)


def test_mismatched_arguments():
    entry = {"boxes": [[0, 0, 5, 5]], "labels": [0]}
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        coco_detection_metrics([entry | {"scores": [1]}], [entry, entry])
    with pytest.raises(ValueError, match=r"predictions\[0\] has no 'scores'"):
        coco_detection_metrics([entry], [entry])
    with pytest.raises(ValueError, match="num_classes is 3, but class_names has 2"):
        CocoDetectionMetric(num_classes=3, class_names=["a", "b"])
    with pytest.raises(ValueError, match="max_detections is 0"):
        CocoDetectionMetric(max_detections=0)
