"""The detector's losses against slow references in plain Python and float64, and across two ranks."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_vlm.models.configuration_detection import VLMViTDetectionConfig
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.loss_detection import (
    DetectionTargets,
    dense_losses,
    detection_loss,
    iou_and_giou,
    match,
    matching_cost,
    mean_over_ranks,
    set_losses,
    task_aligned_assignment,
    to_corners,
)

NUM_LABELS = 3
COSTS = {"class_cost": 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}


def random_boxes(num: int, generator: torch.Generator) -> Tensor:
    size = torch.rand(num, 2, generator=generator) * 0.4 + 0.05
    centre = size / 2 + torch.rand(num, 2, generator=generator) * (1 - size)
    return torch.cat([centre, size], dim=-1)


def random_labels(counts: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(NUM_LABELS, (n,), generator=generator),
            "boxes": random_boxes(n, generator),
        }
        for n in counts
    ]


def targets_of(labels: list[dict[str, Tensor]]) -> DetectionTargets:
    return DetectionTargets.from_labels(
        labels, batch_size=len(labels), num_labels=NUM_LABELS, device=torch.device("cpu")
    )


def random_predictions(stages: int, batch: int, queries: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(stages, batch, queries, NUM_LABELS, generator=generator) * 2 - 1
    boxes = random_boxes(stages * batch * queries, generator).view(stages, batch, queries, 4)
    return logits, boxes


# --- references: one pair of boxes, one score at a time -------------------------------------------------------------


def slow_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two (cx, cy, w, h) boxes."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union, overlap / union - (hull - union) / hull


def slow_cost(logits: Tensor, box: Tensor, label: int, wanted: Tensor) -> float:
    p = 1 / (1 + math.exp(-float(logits[label])))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    l1 = sum(abs(float(x) - float(y)) for x, y in zip(box, wanted))
    return 2 * focal + 5 * l1 - 2 * slow_giou(box.tolist(), wanted.tolist())[1]


def slow_set_losses(logits: Tensor, boxes: Tensor, label: dict[str, Tensor]) -> tuple[float, float, float]:
    """Class, L1 and GIoU loss of one image and stage, matched by trying every assignment."""
    queries, num = len(logits), len(label["class_labels"])

    def cost(order: tuple[int, ...]) -> float:
        pairs = enumerate(order)
        return sum(slow_cost(logits[q], boxes[q], int(label["class_labels"][t]), label["boxes"][t]) for t, q in pairs)

    best = min(itertools.permutations(range(queries), num), key=cost)
    class_loss = l1 = giou_loss = 0.0
    positives = {}
    for target, query in enumerate(best):
        iou, giou = slow_giou(boxes[query].tolist(), label["boxes"][target].tolist())
        l1 += float((boxes[query] - label["boxes"][target]).abs().sum())
        giou_loss += 1 - giou
        positives[query, int(label["class_labels"][target])] = iou
    for query, c in itertools.product(range(queries), range(NUM_LABELS)):
        p = 1 / (1 + math.exp(-float(logits[query, c])))
        if (query, c) in positives:
            quality = max(0.01, p**0.25 * positives[query, c] ** 0.75)
            class_loss -= quality * math.log(p) + (1 - quality) * math.log(1 - p)
        else:
            class_loss -= p**2 * math.log(1 - p)
    return class_loss, l1, giou_loss


def slow_assignment(
    logits: Tensor, boxes: Tensor, centres: Tensor, label: dict[str, Tensor], top_k: int
) -> dict[int, tuple[int, float]]:
    """Location -> (object, wanted score) of one image, as TOOD describes it."""
    metric: dict[tuple[int, int], float] = {}
    overlap: dict[tuple[int, int], float] = {}
    for t, (c, box) in enumerate(zip(label["class_labels"].tolist(), label["boxes"].tolist())):
        distance = [(x - box[0]) ** 2 + (y - box[1]) ** 2 for x, y in centres.tolist()]
        for i, (x, y) in enumerate(centres.tolist()):
            inside = abs(x - box[0]) < box[2] / 2 and abs(y - box[1]) < box[3] / 2
            if inside or distance[i] == min(distance):
                overlap[t, i] = slow_giou(boxes[i].tolist(), box)[0]
                metric[t, i] = 1 / (1 + math.exp(-float(logits[i, c]))) * overlap[t, i] ** 6
    kept = [
        (t, i)
        for t in range(len(label["class_labels"]))
        for i in sorted((i for s, i in metric if s == t), key=lambda i, t=t: -metric[t, i])[:top_k]
    ]
    owner = {i: max((t for t, j in kept if j == i), key=lambda t, i=i: overlap[t, i]) for _, i in kept}
    wanted = {}
    for i, t in owner.items():
        mine = [j for j, s in owner.items() if s == t]
        if metric[t, i] > 0:
            scale = max(overlap[t, j] for j in mine) / max(metric[t, j] for j in mine)
            wanted[i] = (t, metric[t, i] * scale)
    return wanted


# --- boxes ----------------------------------------------------------------------------------------------------------


def test_giou_agrees_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = random_boxes(30, generator).double(), random_boxes(20, generator).double()
    iou, giou = iou_and_giou(to_corners(first)[:, None], to_corners(second))
    for i, j in itertools.product(range(30), range(20)):
        expected = slow_giou(first[i].tolist(), second[j].tolist())
        assert (float(iou[i, j]), float(giou[i, j])) == pytest.approx(expected, abs=1e-12)


def test_giou_of_known_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.5, 1.0], [3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    iou, giou = iou_and_giou(boxes[:1], boxes)
    torch.testing.assert_close(iou, torch.tensor([1.0, 1 / 3, 0.0, 0.0]))
    torch.testing.assert_close(giou, torch.tensor([1.0, 1 / 3, -0.5, 0.0]))


# --- targets --------------------------------------------------------------------------------------------------------


def test_targets_are_padded() -> None:
    labels = random_labels([2, 0, 3])
    targets = targets_of(labels)
    assert targets.counts == (2, 0, 3)
    assert targets.is_object.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    torch.testing.assert_close(targets.boxes[targets.is_object], torch.cat([label["boxes"] for label in labels]))
    assert targets.class_labels[targets.is_object].tolist() == torch.cat([x["class_labels"] for x in labels]).tolist()


def test_empty_lists_of_boxes_may_have_any_shape() -> None:
    empty = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0)}
    assert targets_of([empty, *random_labels([1])]).counts == (0, 1)


@pytest.mark.parametrize(
    ("classes", "boxes", "message"),
    [
        ([3], [[0.5, 0.5, 0.2, 0.2]], r"labels\[1\] holds class 3, but the model has the classes 0 to 2"),
        ([-1], [[0.5, 0.5, 0.2, 0.2]], r"labels\[1\] holds class -1"),
        ([0], [[50.0, 50.0, 20.0, 20.0]], r"labels\[1\] holds the box \[50.0, 50.0, 20.0, 20.0\].*fractions"),
        ([0], [[0.5, 0.5, -0.2, 0.2]], r"labels\[1\] holds the box"),
        ([0], [[0.5, 0.5, 0.0, 0.2]], r"labels\[1\] holds the box"),
        ([0], [[0.5, math.nan, 0.1, 0.2]], r"labels\[1\] holds the box"),
        ([0, 1], [[0.5, 0.5, 0.1, 0.2]], r"labels\[1\]: class_labels \(2,\) and boxes \(1, 4\)"),
    ],
)
def test_bad_labels_are_named(classes: list[int], boxes: list[list[float]], message: str) -> None:
    bad = {"class_labels": torch.tensor(classes), "boxes": torch.tensor(boxes)}
    with pytest.raises(ValueError, match=message):
        targets_of([*random_labels([2]), bad, *random_labels([1])])


def test_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels\[0\] has the keys \['boxes'\]"):
        targets_of([{"boxes": torch.zeros(0, 4)}])
    with pytest.raises(ValueError, match="labels hold 1 dicts for 2 images"):
        DetectionTargets.from_labels(
            random_labels([1]), batch_size=2, num_labels=NUM_LABELS, device=torch.device("cpu")
        )


# --- matching -------------------------------------------------------------------------------------------------------


def test_cost_agrees_with_a_loop() -> None:
    labels = random_labels([2, 3])
    logits, boxes = random_predictions(2, 2, 4)
    cost = matching_cost(logits, boxes, targets_of(labels), **COSTS)
    assert cost.shape == (2, 2, 3, 4)
    for s, b, q in itertools.product(range(2), range(2), range(4)):
        for t, (c, box) in enumerate(zip(labels[b]["class_labels"].tolist(), labels[b]["boxes"])):
            assert float(cost[s, b, t, q]) == pytest.approx(
                slow_cost(logits[s, b, q], boxes[s, b, q], c, box), abs=1e-5
            )


@pytest.mark.parametrize(("num_objects", "num_queries"), [(3, 6), (5, 5), (5, 3), (1, 1)])
def test_matcher_finds_the_best_permutation(num_objects: int, num_queries: int) -> None:
    cost = torch.rand(2, 2, num_objects, num_queries, generator=torch.Generator().manual_seed(num_objects))
    matches = match(cost, [num_objects, num_objects])
    for stage, image in itertools.product(range(2), range(2)):
        here = (matches.stage == stage) & (matches.image == image)
        block = cost[stage, image]
        total = float(block[matches.target[here], matches.query[here]].sum())
        if num_objects <= num_queries:
            orders = itertools.permutations(range(num_queries), num_objects)
            best = min(sum(float(block[t, q]) for t, q in enumerate(order)) for order in orders)
        else:
            orders = itertools.permutations(range(num_objects), num_queries)
            best = min(sum(float(block[t, q]) for q, t in enumerate(order)) for order in orders)
        assert total == pytest.approx(best, abs=1e-6)
        assert len(set(matches.query[here].tolist())) == int(here.sum()) == min(num_objects, num_queries)


def test_objects_beyond_an_images_count_are_never_matched() -> None:
    matches = match(torch.zeros(2, 3, 4, 5), [1, 0, 4])
    pairs = list(zip(matches.stage.tolist(), matches.image.tolist(), matches.target.tolist()))
    assert pairs == [(s, i, t) for s in range(2) for i, t in [(0, 0), (2, 0), (2, 1), (2, 2), (2, 3)]]


def test_broken_predictions_are_matched_last() -> None:
    labels = random_labels([2])
    logits, boxes = random_predictions(1, 1, 4)
    logits[0, 0, 1], boxes[0, 0, 2] = math.nan, math.inf
    cost = matching_cost(logits, boxes, targets_of(labels), **COSTS)
    assert not torch.isfinite(cost[:, :, :, 1:3]).any()
    assert sorted(match(cost, [2]).query.tolist()) == [0, 3]


# --- losses ---------------------------------------------------------------------------------------------------------


def test_set_losses_agree_with_a_slow_reference() -> None:
    labels = random_labels([2, 0, 3])
    logits, boxes = random_predictions(2, 3, 5)
    targets = targets_of(labels)
    matches = match(matching_cost(logits, boxes, targets, **COSTS), targets.counts)
    losses = torch.stack(set_losses(logits.double(), boxes.double(), targets, matches))  # (3, stages)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for stage, image in itertools.product(range(2), range(3)):
        parts = slow_set_losses(logits[stage, image].double(), boxes[stage, image].double(), labels[image])
        expected[:, stage] += torch.tensor(parts, dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


def dense_example() -> tuple[Tensor, Tensor, Tensor, list[dict[str, Tensor]]]:
    labels = random_labels([3, 0, 6], seed=4)
    labels[0]["boxes"][0] = torch.tensor([0.26, 0.26, 0.02, 0.02])  # smaller than a cell, over no centre
    generator = torch.Generator().manual_seed(2)
    y, x = torch.meshgrid(*[(torch.arange(8) + 0.5) / 8] * 2, indexing="ij")
    centres = torch.stack([x, y], dim=-1).flatten(0, 1)
    size = torch.rand(3, 64, 2, generator=generator) * 0.3 + 0.05
    boxes = torch.cat([centres.expand(3, -1, -1) + 0.02 * torch.randn(3, 64, 2, generator=generator), size], dim=-1)
    return torch.randn(3, 64, NUM_LABELS, generator=generator), boxes, centres, labels


@pytest.mark.parametrize("top_k", [1, 4, 13, 100])
def test_assignment_agrees_with_a_slow_reference(top_k: int) -> None:
    logits, boxes, centres, labels = (x.double() if isinstance(x, Tensor) else x for x in dense_example())
    assigned, wanted = task_aligned_assignment(logits, boxes, centres, targets_of(labels), top_k=top_k)
    for image, label in enumerate(labels):
        expected = slow_assignment(logits[image], boxes[image], centres, label, top_k)
        got = {i: (int(assigned[image, i]), float(wanted[image, i])) for i in wanted[image].nonzero()[:, 0].tolist()}
        assert got.keys() == expected.keys()
        for i, (target, score) in expected.items():
            assert got[i][0] == target
            assert got[i][1] == pytest.approx(score, rel=1e-5)


def test_dense_losses_agree_with_a_slow_reference() -> None:
    logits, boxes, centres, labels = (x.double() if isinstance(x, Tensor) else x for x in dense_example())
    focal, giou, total = dense_losses(logits, boxes, centres, targets_of(labels), top_k=5)
    expected_focal = expected_giou = expected_total = 0.0
    for image, label in enumerate(labels):
        wanted = slow_assignment(logits[image], boxes[image], centres, label, 5)
        for i, c in itertools.product(range(64), range(NUM_LABELS)):
            p = 1 / (1 + math.exp(-float(logits[image, i, c])))
            y = wanted[i][1] if i in wanted and int(label["class_labels"][wanted[i][0]]) == c else 0.0
            expected_focal += (p - y) ** 2 * -(y * math.log(p) + (1 - y) * math.log(1 - p))
        for i, (target, score) in wanted.items():
            expected_giou += score * (1 - slow_giou(boxes[image, i].tolist(), label["boxes"][target].tolist())[1])
            expected_total += score
    assert (float(focal), float(giou), float(total)) == pytest.approx(
        (expected_focal, expected_giou, expected_total), rel=1e-5
    )


def small_config(**overrides: float) -> VLMViTDetectionConfig:
    encoder = VLMViTConfig(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return VLMViTDetectionConfig(backbone_config=encoder, num_labels=NUM_LABELS, **overrides)


def test_whole_loss_is_the_weighted_sum_of_its_parts() -> None:
    logits, boxes = random_predictions(3, 3, 5)
    dense_logits, dense_boxes, centres, labels = dense_example()
    labels = random_labels([2, 0, 3])
    targets = targets_of(labels)
    anchors = torch.cat([centres, torch.full_like(centres, 0.25)], dim=-1)
    config = small_config(class_loss_weight=1.5, bbox_loss_weight=4.0, giou_loss_weight=3.0, dense_loss_weight=0.5)
    loss, parts = detection_loss(logits, boxes, (dense_logits, dense_boxes), anchors, targets, config)

    expected = []
    for stage in range(3):
        sums = [slow_set_losses(logits[stage, b], boxes[stage, b], labels[b]) for b in range(3)]
        expected.append([sum(column) / 5 for column in zip(*sums)])  # 5 objects
    weighted = [1.5 * c + 4 * l1 + 3 * g for c, l1, g in expected]
    focal, giou, total = dense_losses(dense_logits, dense_boxes, centres, targets, top_k=13)
    dense = float((focal + 3 * giou) / max(1.0, float(total)))
    assert [float(parts[k]) for k in ("loss_class", "loss_bbox", "loss_giou")] == pytest.approx(expected[2], rel=1e-5)
    assert float(parts["loss_proposals"]) == pytest.approx(weighted[0], rel=1e-5)
    assert float(parts["loss_aux"]) == pytest.approx(weighted[1], rel=1e-5)
    assert float(parts["loss_dense"]) == pytest.approx(dense, rel=1e-5)
    assert float(loss) == pytest.approx(sum(weighted) + 0.5 * dense, rel=1e-5)


@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
def test_saturated_scores_have_finite_loss_and_gradients(counts: list[int]) -> None:
    logits, boxes = random_predictions(2, 2, 4)
    logits = torch.where(logits > 0, 1e4, -1e4).requires_grad_()
    boxes.requires_grad_()
    centres = torch.tensor([[0.25, 0.25], [0.75, 0.75]])
    dense = (
        torch.full((2, 2, NUM_LABELS), 1e4, requires_grad=True),
        torch.cat([centres, centres], -1).expand(2, -1, -1),
    )
    loss, parts = detection_loss(logits, boxes, dense, centres, targets_of(random_labels(counts)), small_config())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part) for part in parts.values())
    for tensor in (logits, boxes, dense[0]):
        assert torch.isfinite(tensor.grad).all()
    if counts == [0, 0]:
        assert float(parts["loss_bbox"]) == float(parts["loss_giou"]) == 0
        assert not boxes.grad.any()
        assert logits.grad.any()


def test_perfect_predictions_cost_nothing() -> None:
    labels = random_labels([2])
    logits = torch.full((2, 1, 2, NUM_LABELS), -30.0)
    for query, label in enumerate(labels[0]["class_labels"].tolist()):
        logits[:, :, query, label] = 30.0
    boxes = labels[0]["boxes"].expand(2, 1, -1, -1)
    loss, _ = detection_loss(logits, boxes, None, boxes[0, 0], targets_of(labels), small_config())
    assert float(loss) == pytest.approx(0, abs=1e-5)


# --- ranks ----------------------------------------------------------------------------------------------------------


def test_divisors_in_one_process() -> None:
    assert mean_over_ranks(torch.tensor([7.0, 0.2])).tolist() == [7.0, 1.0]


def toy_gradient(weight: Tensor, images: list[int], labels: list[dict[str, Tensor]]) -> Tensor:
    """Gradient of the loss of some images with respect to a parameter that every prediction depends on."""
    weight = weight.clone().requires_grad_()
    logits, boxes = random_predictions(2, 4, 6)
    logits = logits[:, images] * weight[0]
    boxes = boxes[:, images] * torch.stack([weight[1], weight[1], weight[2], weight[2]])
    dense_logits, dense_boxes, centres, _ = dense_example()
    dense = dense_logits[[0, 1, 2, 0]][images] * weight[3], dense_boxes[[0, 1, 2, 0]][images] * weight[1]
    targets = targets_of([labels[i] for i in images])
    detection_loss(logits, boxes, dense, centres, targets, small_config())[0].backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("halves", [[[0, 1], [2, 3]], [[1], [3]], [[2], [3]]])  # objects: 4 and 1; none; 1 and none
def test_two_ranks_have_the_gradient_of_one_process(halves: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange is played by two passes: the first hears what each rank sends, the second answers with the sum.

    test_two_ranks.py does the same with processes and DDP.
    """
    labels, weight = random_labels([4, 0, 1, 0]), torch.tensor([1.0, 1.1, 0.9, 1.0])
    expected = toy_gradient(weight, halves[0] + halves[1], labels)
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group=None: sent.append(counts.clone()))
    for half in halves:
        toy_gradient(weight, half, labels)
    assert len(sent) == 2  # one exchange a step
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group=None: counts.copy_(sent[0] + sent[1]))
    averaged = sum(toy_gradient(weight, half, labels) for half in halves) / 2
    torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # one rank may evaluate alone: nothing is exchanged
        assert mean_over_ranks(torch.tensor([30.0])).item() == 30
