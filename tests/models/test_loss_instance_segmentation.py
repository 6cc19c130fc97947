"""The losses of masks against dense references in float64, and what no step may form."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from tiny import batch, build, perturb
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vlm.models.loss_detection import Matches, iou_and_giou, matching_cost, to_corners
from hf_vlm.models.loss_instance_segmentation import (
    InstanceTargets,
    MaskLoss,
    PointLogits,
    choose_points,
    mask_losses,
    pairwise_mask_losses,
    sample_points,
)
from hf_vlm.models.mask_layers import box_prior

NAME = "instance_segmentation"
COUNTS = (4, 1, 0, 2)


def slow_losses(logits, truth):
    """Mean cross entropy and Dice loss of one mask's points, one at a time."""
    entropy = overlap = total = 0.0
    for x, t in zip(logits.tolist(), truth.tolist()):
        p = 1 / (1 + math.exp(-x))
        entropy -= t * math.log(p) + (1 - t) * math.log(1 - p)
        overlap += p * t
        total += p + t
    return entropy / len(logits), 1 - (2 * overlap + 1) / (total + 1)


def slow_value(mask, x, y):
    """The value of a mask at relative coordinates: that of the pixel they are in."""
    rows, columns = mask.shape
    return float(mask[min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)])


def slow_interpolation(values, x, y):
    """Bilinear between the centres of pixels, and constant beyond the outer ones."""
    rows, columns = values.shape
    x, y = min(max(x * columns - 0.5, 0), columns - 1), min(max(y * rows - 0.5, 0), rows - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, columns - 1), min(top + 1, rows - 1)
    upper = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
    lower = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
    return float(upper * (1 - y + top) + lower * (y - top))


def random_labels(counts=COUNTS, num_labels=3, size=(24, 40), seed=0):
    """Boxes and masks, which need not fit each other for the losses."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(num_labels, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.2,
            "masks": torch.rand(n, *size, generator=generator) < 0.4,
        }
        for n in counts
    ]


def targets_of(labels):
    return InstanceTargets.from_labels(labels, batch_size=len(labels), num_labels=3, device=torch.device("cpu"))


def test_losses_agree_with_a_loop():
    torch.manual_seed(0)
    logits, truth = 3 * torch.randn(2, 5, 30).double(), (torch.rand(2, 5, 30) < 0.3).double()
    mask, dice = mask_losses(logits, truth)
    for index in itertools.product(range(2), range(5)):
        assert (float(mask[index]), float(dice[index])) == pytest.approx(slow_losses(logits[index], truth[index]))


def test_costs_of_pairs_are_the_losses_of_each_pair():
    torch.manual_seed(0)
    logits, truth = 3 * torch.randn(2, 4, 30).double(), (torch.rand(3, 30) < 0.3).double()
    pairs = pairwise_mask_losses(logits, truth)  # (stages, objects, queries)
    expected = mask_losses(logits[:, None].expand(2, 3, 4, 30), truth[None, :, None].expand(2, 3, 4, 30))
    torch.testing.assert_close(pairs, expected)


def test_most_points_are_those_where_the_mask_is_least_sure():
    logits = torch.tensor([[9.0, -8, 1, -7, 6, -0.5, 5, 0.1, 4, -3, 2, 7]])
    truth = torch.arange(12.0)[None]
    found, where = choose_points(logits, truth)  # four of twelve, three of which are uncertain
    assert sorted(where[0, :3].tolist()) == [2, 5, 7]
    assert where[0, 3] == 0  # candidates are random, so that the first one is
    torch.testing.assert_close(found[0], logits[0, where[0].long()])


def test_candidates_are_anywhere_and_at_the_objects():
    """Half and half; each object of an image has as many, whatever its size; without objects all are anywhere."""
    torch.manual_seed(0)
    labels = random_labels((2, 0, 1))
    labels[0]["boxes"] = torch.tensor([[0.2, 0.3, 0.04, 0.02], [0.8, 0.7, 0.1, 0.1]])
    points = sample_points(targets_of(labels), (64, 96), 16)
    assert points.shape == (3, 3 * 64 * 96 // 16, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    for x, y, width, height in labels[0]["boxes"].tolist():
        reach = torch.tensor([width, height]) * 0.75
        is_near = ((points[0] - torch.tensor([x, y])).abs() <= reach).all(dim=1)
        assert is_near.float().mean() == pytest.approx(0.25 + 0.5 * 1.5**2 * width * height, abs=0.04)
    histogram = np.histogram2d(*points[1].T.numpy(), bins=4, range=[[0, 1], [0, 1]])[0]
    assert histogram.min() > 0.6 * histogram.mean()
    assert sample_points(targets_of(random_labels((0, 0))), (8, 8), 16).shape == (2, 3 * 8, 2)


def slow_prior(box, x, y):
    """1 at the centre of a box, 0 on the ellipse within it, at least -30."""
    centre_x, centre_y, width, height = box
    return max(1 - ((x - centre_x) / (width / 2)) ** 2 - ((y - centre_y) / (height / 2)) ** 2, -30.0)


def dense_priors(boxes, rows, columns):
    """The priors (rows, columns) of each of some boxes (..., 4), one pixel at a time."""
    centres = [((j + 0.5) / columns, (i + 0.5) / rows) for i in range(rows) for j in range(columns)]
    priors = [[slow_prior(box, x, y) for x, y in centres] for box in boxes.reshape(-1, 4).tolist()]
    return torch.tensor(priors, dtype=torch.float64).view(*boxes.shape[:-1], rows, columns)


def dense_masks(model, inputs):
    """Mask logits (stages, batch, queries, rows, columns) of all queries without their boxes' priors, in float64, and
    what the detector found."""
    model = model.double()
    found = model.detect(inputs["pixel_values"].double(), all_stages=True)
    head, masks = model.mask_head, []
    for maps, states in zip(head.pixel_maps(found.feature_maps[-1], inputs["pixel_values"]), found.states):
        masks.append(torch.einsum("bqc,bchw->bqhw", head.embed(states), maps) + head.bias)
    return torch.stack(masks), found


def dense_loss(model, inputs):
    """Loss of masks per stage by whole masks, loops over points and pairs, and scipy's assignment."""
    masks, found = dense_masks(model, inputs)
    labels, points, config = inputs["labels"], inputs["points"], model.config
    num_points = points.shape[1] // 3
    boxes_cost = matching_cost(
        torch.stack(found.logits), torch.stack(found.boxes).double(), targets_of(labels),
        class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost,
    )  # fmt: skip
    sums = np.zeros((2, len(masks)))
    for stage, image in itertools.product(range(len(masks)), range(len(labels))):
        places = points[image].tolist()
        truth = [torch.tensor([slow_value(m, *at) for at in places]) for m in labels[image]["masks"]]
        logits = [
            torch.tensor([slow_interpolation(m, *at) + slow_prior(box, *at) for at in places])
            for m, box in zip(masks[stage, image].detach(), found.boxes[stage][image].tolist())
        ]
        cost = boxes_cost[stage, image, : len(truth)].detach().numpy()
        for (i, t), (j, x) in itertools.product(enumerate(truth), enumerate(logits)):
            mask, dice = slow_losses(x[:num_points], t[:num_points])
            cost[i, j] += config.mask_cost * mask + config.dice_cost * dice
        for i, j in zip(*linear_sum_assignment(cost)):
            order = logits[j].abs().argsort()[: int(0.75 * num_points)].tolist()
            chosen = [*order, *range(num_points - len(order))]
            sums[:, stage] += slow_losses(logits[j][chosen], truth[i][chosen])
    return sums / max(sum(len(label["boxes"]) for label in labels), 1)


def test_the_loss_at_points_is_that_of_whole_masks():
    torch.manual_seed(0)
    model = build(NAME, num_decoder_layers=2, mask_loss_weight=2, dice_loss_weight=3)
    perturb(model, 0.05)  # so little that boxes are at the objects, and the mask losses above 0
    inputs = batch(NAME, 3)
    found = model(**inputs)
    parts = found.loss_dict
    mask, dice = dense_loss(model, inputs)
    assert float(parts["loss_mask"]) == pytest.approx(mask[-1], rel=1e-4)
    assert float(parts["loss_dice"]) == pytest.approx(dice[-1], rel=1e-4)
    without = build(NAME, num_decoder_layers=2, mask_loss_weight=0, dice_loss_weight=0)
    without.load_state_dict(model.float().state_dict())
    rest = without(**inputs)  # matched by masks too
    weighted = 2 * mask + 3 * dice
    assert (found.loss - rest.loss).item() == pytest.approx(weighted.sum(), rel=1e-4)
    for name, expected in (("loss_proposals", weighted[0]), ("loss_aux", weighted[1])):
        assert float(parts[name] - rest.loss_dict[name]) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_masks_of_inference_are_those_of_the_last_stage():
    torch.manual_seed(0)
    model = build(NAME, num_decoder_layers=2).eval()
    perturb(model)
    inputs = batch(NAME, 2)
    output = model(inputs["pixel_values"])
    expected = dense_masks(model, inputs)[0][-1] + dense_priors(output.pred_boxes, 8, 8)
    torch.testing.assert_close(output.pred_masks.double(), expected, rtol=1e-4, atol=1e-4)


def test_new_masks_are_the_ellipses_in_the_boxes():
    """So that they are not empty, and each at its own object, before anything is learned; also in half precision."""
    y, x = torch.meshgrid(*[(torch.arange(64) + 0.5) / 64] * 2, indexing="ij")
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.2, 0.7, 0.01, 0.02], [0.5, 0.5, 0.0, 0.0]])
    prior = box_prior(boxes[:, None, None], x, y)
    assert (prior[0] > 0).float().mean() == pytest.approx(math.pi / 4 * 0.5 * 0.25, abs=2e-3)
    columns, rows = (prior[0] > 0).any(dim=0).nonzero(), (prior[0] > 0).any(dim=1).nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (16, 47, 24, 39)  # the sides of the box
    assert prior.isfinite().all()
    assert torch.equal(box_prior(boxes.bfloat16(), x[0, :1], y[0, :1]).isfinite(), torch.ones(3, dtype=torch.bool))


@torch.no_grad()
def test_each_pixel_of_a_mask_sees_its_part_of_the_image():
    """The first map is the enlarged one and the projection of the part, one output at a time; also at sizes that the
    stride does not divide, where parts are of the image as enlarged to whole ones."""
    torch.manual_seed(0)
    head = build(NAME).mask_head
    weight, bias = head.image_projection.weight, head.image_projection.bias.normal_()
    features = torch.randn(1, 32, 3, 5)
    for size in ((24, 40), (22, 39)):
        image = torch.randn(1, 3, *size)
        first = next(head.pixel_maps(features, image))[0]
        enlarged = F.interpolate(head.reduction(features), (6, 10), mode="bilinear")[0]
        fitting = F.interpolate(image, (24, 40), mode="bilinear")[0]
        for row, column in itertools.product(range(6), range(10)):
            part = fitting[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected = enlarged[:, row, column] + (weight * part).sum(dim=(1, 2, 3)) + bias
            torch.testing.assert_close(first[:, row, column], expected, rtol=1e-4, atol=1e-5)


def test_masks_do_not_move_boxes():
    """The gradient of the boxes' head is that of the boxes' losses alone."""
    torch.manual_seed(0)
    model, inputs = build(NAME, mask_cost=0, dice_cost=0), batch(NAME, 2)
    perturb(model)
    gradients = []
    for weight in (0, 5):
        model.config.mask_loss_weight = model.config.dice_loss_weight = weight
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.box_head.parameters()])
    torch.testing.assert_close(*gradients)


class LargestTensor(TorchDispatchMode):
    """The largest result of any operator, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, value.numel() if isinstance(value, torch.Tensor) else 0)
        return result


def test_no_tensor_of_training_holds_a_mask_of_each_query():
    """Of 64 queries and masks of 64 x 64, the whole ones of two images would hold half a million numbers."""
    model = build(NAME, {}, {"image_size": 64}, num_queries=64, mask_stride=1, mask_feature_size=4)
    labels = random_labels((6, 2), size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    with LargestTensor() as training:
        model(images, labels=labels).loss.backward()
    with LargestTensor() as inference:
        model(images)
    assert inference.numel == 2 * 64 * 64 * 64
    assert training.numel < inference.numel / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: label.pop("masks"), r"labels\[1\] has no 'masks' \(n, height, width\), but the keys"),
        (lambda label: label.update(masks=label["masks"][:, 0]), r"labels\[1\]: masks \(1, 40\) must be \(n, height"),
        (lambda label: label.update(masks=label["masks"][:0]), r"masks \(0, 24, 40\) must be .* with n = 1 objects"),
        (lambda label: label.update(masks=label["masks"][:, :0]), r"labels\[1\]: masks \(1, 0, 40\)"),
    ],
)
def test_bad_masks_are_named(change, message):
    labels = random_labels()
    change(labels[1])
    with pytest.raises(ValueError, match=message):
        targets_of(labels)


def test_values_at_points_are_those_of_the_pixels_there():
    labels, points = random_labels(), torch.rand(4, 50, 2)
    points[0, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.999999, 0.0], [0.5, 1.0]])
    for values, label, places in zip(targets_of(labels).at(points), labels, points.tolist()):
        expected = [[slow_value(mask, x, y) for x, y in places] for mask in label["masks"]]
        assert values.tolist() == expected


def test_more_objects_than_queries():
    """As many matches as queries, in each stage, whatever the number of objects."""
    torch.manual_seed(0)
    truth = [(torch.rand(n, 12) < 0.5).float() for n in (7, 2)]
    pixels, queries = torch.randn(1, 2, 3, 12), torch.randn(1, 2, 4, 3)
    boxes, points = torch.rand(1, 2, 4, 4), torch.rand(2, 12, 2)
    masks = MaskLoss(PointLogits(pixels, queries, torch.zeros(1), boxes, points), truth, build(NAME).config)
    flat = torch.tensor([[0, 0, 1, 5], [0, 0, 0, 2], [0, 0, 2, 6], [0, 0, 3, 0], [0, 1, 3, 0], [0, 1, 1, 1]])
    found = masks.losses(Matches(*flat.T))
    expected = torch.zeros(2)
    for _, image, query, target in flat.tolist():
        prior = [slow_prior(boxes[0, image, query].tolist(), *at) for at in points[image].tolist()]
        logits = queries[0, image, query] @ pixels[0, image] + torch.tensor(prior)
        chosen = choose_points(logits, truth[image][target])
        expected += torch.stack(mask_losses(*chosen))
    torch.testing.assert_close(torch.cat([found["loss_mask"], found["loss_dice"]]), expected)


@pytest.mark.parametrize(
    ("counts", "num_labels", "num_queries"), [((0, 0), 3, 5), ((3, 0), 1, 5), ((2, 1), 1000, 5), ((500, 1), 3, 16)]
)
def test_any_number_of_objects_and_classes(counts, num_labels, num_queries):
    """Each parameter has a finite gradient, also where no image has an object: no rank may wait for one in vain."""
    torch.manual_seed(0)
    model = build(NAME, id2label=dict(enumerate(map(str, range(num_labels)))), num_queries=num_queries)
    perturb(model, 0.02)
    output = model(torch.randn(2, 3, 32, 32), labels=random_labels(counts, num_labels))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    has_mask_gradient = any(p.grad.any() for p in model.mask_head.parameters())
    assert has_mask_gradient == (sum(counts) > 0)
    assert (float(output.loss_dict["loss_mask"]) > 0) == (sum(counts) > 0)


def test_overfits_one_batch():
    """A disc and a square in each image: masks that differ where boxes do not."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    masks = torch.stack([(x - 9) ** 2 + (y - 8) ** 2 < 36, ((x - 22).abs() < 7) & ((y - 21).abs() < 7)])
    boxes, images = torch.tensor([[9, 8, 12, 12], [22, 21, 14, 14]]) / 32, 0.3 * torch.randn(2, 3, 32, 32)
    images[:] += 2.0 * (masks[0].float() - masks[1].float())
    images[1] = images[1].flip(1)
    upside_down = {"boxes": (boxes * torch.tensor([1, -1, 1, 1]) + torch.tensor([0, 1, 0, 0])), "masks": masks.flip(1)}
    labels = [{"class_labels": torch.arange(2), **label} for label in ({"boxes": boxes, "masks": masks}, upside_down)]
    model = build(NAME, None, {"num_hidden_layers": 1}, dense_loss_weight=0.0, mask_stride=2, mask_point_ratio=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=80)
    for _ in range(80):
        model(images, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        output = model.eval()(images)
    for image, label in enumerate(labels):
        for category, mask in enumerate(label["masks"]):
            best = output.pred_masks[image, output.logits[image, :, category].argmax()]
            found = F.interpolate(best[None, None], (32, 32), mode="bilinear")[0, 0] > 0
            assert (found & mask).sum() / (found | mask).sum() > 0.9


def crowd():
    """An image of nine discs that look the same, and its labels."""
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    centres = torch.cartesian_prod(*[torch.tensor([5.0, 16.0, 27.0])] * 2) + torch.randint(-1, 2, (9, 2))
    masks = (x - centres[:, :1, None]) ** 2 + (y - centres[:, 1:, None]) ** 2 < 16
    boxes = torch.cat([centres, torch.full((9, 2), 8.0)], dim=1) / 32
    image = 0.3 * torch.randn(1, 3, 32, 32) + 2 * masks.any(dim=0)
    return image, [{"class_labels": torch.zeros(9, dtype=torch.int64), "boxes": boxes, "masks": masks}]


def boxes_and_masks_of_a_crowd(name, **fields):
    """Mean IoU of the best box and of the best mask of each object after 60 steps on one image."""
    torch.manual_seed(0)
    (image, labels), fields = crowd(), {"dense_loss_weight": 0.0, "num_queries": 12, **fields}
    model = build(name, None, {"num_hidden_layers": 1}, **fields)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=60)
    for _ in range(60):
        model(image, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        output = model.eval()(image)
    truth, wanted = labels[0]["masks"], to_corners(labels[0]["boxes"])
    box_ious = iou_and_giou(to_corners(output.pred_boxes[0])[:, None], wanted)[0].amax(dim=0)
    if name == "detection":
        return box_ious.mean().item(), None
    found = F.interpolate(output.pred_masks, (32, 32), mode="bilinear")[0, :, None] > 0
    mask_ious = (found & truth).sum(dim=(2, 3)) / (found | truth).sum(dim=(2, 3))
    return box_ious.mean().item(), mask_ious.amax(dim=0).mean().item()


def test_alike_objects_have_masks_of_their_own_and_boxes_as_the_detectors():
    """By features alone no query tells its disc from the others: all masks stay empty (an IoU of 0.0 here)."""
    box_iou, mask_iou = boxes_and_masks_of_a_crowd(NAME, mask_stride=2, mask_point_ratio=4)
    detectors_box_iou, _ = boxes_and_masks_of_a_crowd("detection")
    assert mask_iou > 0.6
    assert box_iou > detectors_box_iou - 0.05


def test_boxes_are_found_as_by_the_detector():
    """The same weights, the same boxes: masks are beside them."""
    torch.manual_seed(0)
    model, detector = build(NAME).eval(), build("detection").eval()
    perturb(model)
    detector.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mask_head.")})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = model(images), detector(images)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)
    assert torch.equal(found.logits, expected.logits)


def test_half_precision_has_a_finite_loss():
    model, inputs = build(NAME), batch(NAME)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        output = model.eval().to(torch.bfloat16)(inputs["pixel_values"].bfloat16())
    assert (output.pred_masks.dtype, output.pred_boxes.dtype) == (torch.bfloat16, torch.float32)
