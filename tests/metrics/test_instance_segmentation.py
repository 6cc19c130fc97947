"""COCO metrics of masks, boundaries and boxes against their definition, one pair of masks at a time."""

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, zoom

from hf_vlm.metrics import CocoInstanceMetric, coco_detection_metrics, coco_instance_metrics
from hf_vlm.metrics.coco import best_per_class
from hf_vlm.metrics.instance_segmentation import encode_masks

SIZES = [(60, 80), (45, 50), (128, 128)]


def blob(rng, size):
    return zoom(rng.normal(size=(4, 5)), (size[0] / 4, size[1] / 5), order=1)[: size[0], : size[1]] > 0.5


def box_of(mask):
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def data(num_classes=2, seed=0):
    """Truth, and predictions that are some of it, shifted, and blobs of their own."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for size in SIZES:
        truth = [mask for mask in (blob(rng, size) for _ in range(6)) if mask.any()]
        labels = rng.integers(0, num_classes, len(truth))
        found = [np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)) for mask in truth[1:]] + [blob(rng, size)]
        references.append({"masks": np.stack(truth), "labels": labels})
        predicted = np.append(labels[1:], 0)
        predictions.append({"masks": np.stack(found), "labels": predicted, "scores": rng.random(len(found))})
    return predictions, references


def mask_iou(a, b):
    return (a & b).sum() / (a | b).sum()


def boundary_iou(a, b):
    """The smaller one of the overlaps of masks and of their edges, 2 % of the diagonal wide."""
    width = max(round(0.02 * np.hypot(*a.shape)), 1)
    edges = [m & ~binary_erosion(m, np.ones((3, 3)), iterations=width, border_value=0) for m in (a, b)]
    return min(mask_iou(a, b), mask_iou(*edges))


def box_iou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box_of(a), box_of(b)
    shared = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    return shared / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared)


def slow_ap(predictions, references, overlap, thresholds, num_classes=2):
    """Mean over thresholds and classes of the mean of 101 interpolated precisions."""
    values = []
    for label in range(num_classes):
        pairs, num_objects = [], 0
        for prediction, reference in zip(predictions, references, strict=True):
            truth = [m for m, c in zip(reference["masks"], reference["labels"]) if c == label]
            found = [
                (s, m)
                for s, m, c in zip(prediction["scores"], prediction["masks"], prediction["labels"])
                if c == label
            ]
            found.sort(key=lambda pair: -pair[0])
            pairs.append(([s for s, _ in found], [[overlap(m, t) for t in truth] for _, m in found]))
            num_objects += len(truth)
        for threshold in thresholds:
            outcomes = []
            for scores, overlaps in pairs:
                taken = set()
                for score, row in zip(scores, overlaps):
                    free = [i for i, value in enumerate(row) if i not in taken and value >= threshold]
                    best = max(free, key=lambda i: row[i], default=None)
                    taken.add(best)
                    outcomes.append((score, best is not None))
            outcomes.sort(key=lambda outcome: -outcome[0])
            hits = np.cumsum([hit for _, hit in outcomes])
            precision, recall = hits / np.arange(1, len(hits) + 1), hits / num_objects
            values.append(np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)]))
    return np.mean(values)


def test_metrics_are_those_of_the_definition():
    predictions, references = data()
    found = coco_instance_metrics(predictions, references, num_classes=2)
    thresholds = np.linspace(0.5, 0.95, 10)
    for prefix, overlap in (("mask", mask_iou), ("boundary", boundary_iou), ("box", box_iou)):
        assert found[f"{prefix}_ap"] == pytest.approx(slow_ap(predictions, references, overlap, thresholds), abs=1e-6)
        assert found[f"{prefix}_ap50"] == pytest.approx(slow_ap(predictions, references, overlap, [0.5]), abs=1e-6)
    assert 0.01 < found["boundary_ap"] < found["mask_ap"] < 0.95


def test_perfect_masks_score_one_and_their_classes_count_apart():
    _, references = data()
    predictions = [{**entry, "scores": np.linspace(1, 0.5, len(entry["labels"]))} for entry in references]
    predictions[0] = {**predictions[0], "labels": 1 - predictions[0]["labels"]}
    found = coco_instance_metrics(predictions, references, class_names=["a", "b"], per_class=True)
    assert 0 < found["mask_ap/a"] < 1
    assert found["mask_ap"] == pytest.approx((found["mask_ap/a"] + found["mask_ap/b"]) / 2)
    perfect = coco_instance_metrics(predictions[1:], references[1:], num_classes=2)
    assert [perfect[f"{prefix}_ap"] for prefix in ("mask", "boundary", "box")] == [1, 1, 1]


def test_masks_may_be_encoded_and_come_in_batches():
    predictions, references = data()
    encoded = [[{**e, "masks": encode_masks(e["masks"])} for e in entries] for entries in (predictions, references)]
    metric = CocoInstanceMetric(num_classes=2)
    for first in range(3):
        metric.add(*(entries[first : first + 1] for entries in encoded))
    assert len(metric) == 3
    expected = coco_instance_metrics(predictions, references, num_classes=2)
    assert metric.compute() == pytest.approx(expected, nan_ok=True, abs=0)


def test_box_metrics_are_the_detectors():
    """Of the boxes that are given, which need not be those of the masks; sizes of objects are those of their masks."""
    predictions, references = data()
    rng = np.random.default_rng(1)
    for entry in (*predictions, *references):
        entry["boxes"] = [np.add(box_of(mask), rng.integers(0, 3, 4)) for mask in entry["masks"]]
    areas = [{**e, "area": [mask.sum() for mask in e["masks"]]} for e in references]
    found = coco_instance_metrics(predictions, references, num_classes=2)
    expected = coco_detection_metrics(predictions, areas, num_classes=2)
    assert {f"box_{name}": value for name, value in expected.items()} == pytest.approx(
        {name: value for name, value in found.items() if name.startswith("box_")}, nan_ok=True
    )


def test_crowds_and_images_without_objects():
    full, empty = np.ones((1, 20, 20)), np.zeros((0, 20, 20))
    half = full.copy()
    half[:, 10:] = 0
    truth = [{"masks": np.concatenate([half, full - half]), "labels": [0, 0], "iscrowd": [0, 1]}]
    found = [{"masks": np.concatenate([half, full - half, full - half]), "labels": [0] * 3, "scores": [0.5, 0.9, 0.8]}]
    nothing = {"masks": empty, "labels": [], "scores": []}
    metrics = coco_instance_metrics([*found, nothing], [*truth, {"masks": [], "labels": []}], num_classes=1)
    assert metrics["mask_ap"] == metrics["boundary_ap"] == 1  # what is found in a crowd counts as nothing
    metrics = coco_instance_metrics([*found, nothing], [*truth, truth[0]], num_classes=1)
    assert metrics["mask_ap"] == pytest.approx(51 / 101)
    assert np.isnan(coco_instance_metrics([nothing], [{"masks": [], "labels": []}], num_classes=1)["mask_ap"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": None}, r"predictions\[0\] has no 'masks'"),
        ({"masks": np.ones((4, 4))}, r"predictions\[0\]: masks has shape \(4, 4\); expected \(n, height, width\)"),
        ({"masks": np.ones((2, 4, 4))}, r"there are 2 masks for 1 labels|labels has shape \(1,\) for 2 boxes"),
        ({"masks": [{"size": [4, 4]}]}, r"masks must be run-length encodings"),
        ({"masks": [{"size": "x", "counts": "1"}]}, r"masks must be run-length encodings"),
        ({"labels": [7]}, r"labels \[7\] are not all within 0 to 1"),
        ({"scores": [np.nan]}, "not finite"),
    ],
)
def test_malformed_entries_are_named(change, message):
    mask = np.ones((1, 4, 4))
    entry = {"masks": mask, "labels": [0], "scores": [0.5], **change}
    with pytest.raises(ValueError, match=message):
        coco_instance_metrics([entry], [{"masks": mask, "labels": [0]}], num_classes=2)


def test_best_of_each_class():
    scores, labels = [0.5, 0.9, 0.5, 0.1, 0.7], [0, 0, 0, 1, 0]
    assert best_per_class(scores, labels, 2).tolist() == [1, 3, 4]
    assert best_per_class(scores, labels, 3).tolist() == [0, 1, 3, 4]  # of equal ones the first
    assert best_per_class([], [], 3).tolist() == []
