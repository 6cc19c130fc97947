"""The loss of mask queries against dense references in float64, and its points."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import build

from hf_vlm.models.loss_mask_query_segmentation import (
    mask_query_loss,
    masks_at,
    matching_cost,
    sample_labelled_points,
)

STAGES, BATCH, QUERIES, CHANNELS, POINTS, LABELS = 2, 4, 3, 5, 24, 6


def inputs(num_labels=LABELS, seed=0):
    """Outputs of a head at points, and labels: of many classes (more than queries), of one, of none, of two."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = 2 * torch.randn(STAGES, BATCH, QUERIES, num_labels + 1, generator=generator)
    queries = torch.randn(STAGES, BATCH, QUERIES, CHANNELS, generator=generator)
    pixels = torch.randn(STAGES, BATCH, CHANNELS, POINTS, generator=generator)
    labels = torch.randint(num_labels, (BATCH, 7, 9), generator=generator)
    labels[1], labels[2], labels[3] = 4, 255, labels[3] % 2 + 1
    labels[0, :2] = labels[3, 5:] = 255
    points = torch.rand(BATCH, POINTS, 2, generator=generator)
    return class_logits, queries, pixels, labels, points


def slow_classes_at(labels, points):
    """The class of each point of an image."""
    height, width = labels.shape
    return [int(labels[int(y * height), int(x * width)]) for x, y in points.tolist()]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_mask_losses(logits, truth):
    """Mean cross entropy and Dice of the points of one mask."""
    entropy = -sum(math.log(sigmoid(x) if t else sigmoid(-x)) for x, t in zip(logits, truth)) / len(logits)
    overlap = sum(sigmoid(x) for x, t in zip(logits, truth) if t)
    return entropy, 1 - (2 * overlap + 1) / (sum(map(sigmoid, logits)) + sum(truth) + 1)


def slow_cost(class_logits, logits, classes, config):
    """Cost (classes, queries) of one image and stage."""
    found = sorted({c for c in classes if c != 255})
    cost = np.zeros((len(found), len(logits)))
    for (row, label), query in itertools.product(enumerate(found), range(len(logits))):
        entropy, dice = slow_mask_losses(logits[query], [c == label for c in classes])
        exponentials = [math.exp(x) for x in class_logits[query]]
        score = exponentials[label] / sum(exponentials)
        cost[row, query] = (
            config.mask_loss_weight * entropy + config.dice_loss_weight * dice - config.class_loss_weight * score
        )
    return found, cost


def slow_loss(class_logits, queries, pixels, labels, points, config):
    logits = (queries.double() @ pixels.double()).tolist()
    class_sum = weight_sum = mask_sum = dice_sum = num_matches = 0.0
    for stage, image in itertools.product(range(STAGES), range(BATCH)):
        classes = slow_classes_at(labels[image], points[image])
        rows = class_logits[stage, image].double().tolist()
        found, cost = slow_cost(rows, logits[stage][image], classes, config)
        if not found:
            continue
        wanted = dict.fromkeys(range(QUERIES), config.num_labels)
        for row, query in zip(*linear_sum_assignment(cost)):
            wanted[query] = found[row]
            values, truth = logits[stage][image][query], [c == found[row] for c in classes]
            third = len(values) // 3
            order = sorted(range(len(values)), key=lambda i, v=values: abs(v[i]))
            picked = order[: int(0.75 * third)] + list(range(third - int(0.75 * third)))
            entropy, dice = slow_mask_losses([values[i] for i in picked], [truth[i] for i in picked])
            mask_sum, dice_sum, num_matches = mask_sum + entropy, dice_sum + dice, num_matches + 1
        for query, label in wanted.items():
            weight = config.no_object_weight if label == config.num_labels else 1.0
            class_sum += weight * (math.log(sum(map(math.exp, rows[query]))) - rows[query][label])
            weight_sum += weight
    masks = config.mask_loss_weight * mask_sum + config.dice_loss_weight * dice_sum
    return STAGES * (config.class_loss_weight * class_sum / weight_sum + masks / num_matches)


@pytest.fixture(scope="module")
def config():
    return build(
        "mask_query_segmentation",
        id2label={i: str(i) for i in range(LABELS)},
        class_loss_weight=1.5,
        mask_loss_weight=3,
        dice_loss_weight=4,
    ).config


def test_the_loss_is_that_of_loops(config):
    class_logits, queries, pixels, labels, points = inputs()
    targets = masks_at(labels, points, LABELS)
    assert targets.counts[0] > QUERIES  # those that cost most stay without a query
    assert targets.counts[1:] == (1, 0, 2)
    loss = mask_query_loss(class_logits, queries, pixels, targets, config)
    assert loss.item() == pytest.approx(slow_loss(class_logits, queries, pixels, labels, points, config), rel=1e-5)


def test_the_cost_is_that_of_loops(config):
    class_logits, queries, pixels, labels, points = inputs()
    targets = masks_at(labels, points, LABELS)
    cost = matching_cost(class_logits, queries, pixels, targets, config)
    logits = (queries.double() @ pixels.double()).tolist()
    for stage, image in itertools.product(range(STAGES), range(BATCH)):
        classes = slow_classes_at(labels[image], points[image])
        rows = class_logits[stage, image].double().tolist()
        found, expected = slow_cost(rows, logits[stage][image], classes, config)
        assert targets.class_labels[image, : len(found)].tolist() == found
        np.testing.assert_allclose(cost[stage, image, : len(found)], expected, rtol=1e-4, atol=1e-5)


def test_labels_of_pixels_without_a_class_change_nothing(config):
    """Neither what the model finds there nor how many there are."""
    class_logits, queries, pixels, labels, points = inputs()
    labels[:] = labels % 2
    expected = mask_query_loss(class_logits, queries, pixels, masks_at(labels, points, LABELS), config)
    larger = torch.full((BATCH, 7, 18), 255)
    larger[:, :, :9] = labels
    moved = points * torch.tensor([0.5, 1.0])
    found = mask_query_loss(class_logits, queries, pixels, masks_at(larger, moved, LABELS), config)
    torch.testing.assert_close(found, expected)
    sampled = sample_labelled_points(larger, 500)
    assert ((sampled[..., 0] < 0.5) & (sampled >= 0).all(-1) & (sampled[..., 1] < 1)).all()


def test_points_are_spread_over_the_labelled_pixels():
    labels = torch.zeros(2, 4, 8, dtype=torch.uint8)
    labels[0, :, :4], labels[1] = 255, 255
    x, y = sample_labelled_points(labels, 4000).unbind(-1)
    counts = torch.zeros(2, 4, 8).index_put(
        (torch.arange(2)[:, None], (y * 4).long(), (x * 8).long()), torch.ones(()), accumulate=True
    )
    assert not counts[0, :, :4].any()
    assert (counts[0, :, 4:] / 4000 - 1 / 16).abs().max() < 0.02
    assert (counts[1] / 4000 - 1 / 32).abs().max() < 0.02  # anywhere, where there is no label
    inside = (x * 8) % 1
    assert abs(inside.mean().item() - 0.5) < 0.02


def test_as_many_classes_as_masks_can_hold():
    """255 classes in one image, of which five queries learn five."""
    model = build("mask_query_segmentation", id2label={i: str(i) for i in range(255)})
    labels = torch.arange(256).reshape(1, 16, 16).repeat(2, 1, 1)
    loss = model(torch.randn(2, 3, 32, 32), labels=labels).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_without_labelled_pixels_the_loss_is_zero_with_gradients():
    model = build("mask_query_segmentation")
    loss = model(torch.randn(2, 3, 32, 32), labels=torch.full((2, 32, 32), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_classes_that_the_model_has_not_are_named():
    labels = torch.tensor([[[0, 3], [255, 1]]])
    points = torch.tensor([[[0.2, 0.2], [0.8, 0.2], [0.2, 0.8]]])
    with pytest.raises(ValueError, match=r"classes \[0, 3\], but the model has 0 to 2, and 255 for"):
        masks_at(labels, points, 3)
