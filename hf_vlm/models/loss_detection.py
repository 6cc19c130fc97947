"""Losses of the detector: bipartite matching, IoU-aware classification, boxes, and the dense one-to-many head.

Everything is computed in float32 and for all decoder stages at once: `stages` counts the proposals and each decoder
layer. The cost of matching is linear in the batch, for only the objects of an image are compared with its queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_detection import VLMViTDetectionConfig
from .ranks import sum_over_ranks, world_size

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
QUALITY_ALPHA = 0.25  # weight of the score against the IoU in the classification target
MIN_QUALITY = 0.01
ALIGNMENT_ALPHA = 1.0  # powers of score and IoU in the task-aligned metric
ALIGNMENT_BETA = 6.0
MIN_AREA = 1e-9  # below a hundredth of a pixel's area in a 4k image: only guards divisions


@dataclass(frozen=True)
class DetectionTargets:
    """The objects of a batch, padded to the longest list.

    Attributes:
        class_labels: (batch, objects) int64; 0 where padded.
        boxes: (batch, objects, 4) float32, (cx, cy, w, h) as fractions of the image; 0.5 where padded.
        is_object: (batch, objects) bool; False where padded.
        counts: objects of each image.
    """

    class_labels: Tensor
    boxes: Tensor
    is_object: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_labels(
        cls, labels: Sequence[dict[str, Any]], *, batch_size: int, num_labels: int, device: torch.device
    ) -> "DetectionTargets":
        """Pads label dicts (`class_labels` (n,), `boxes` (n, 4)) into one batch.

        Raises:
            ValueError: naming the image (its position in the batch) whose labels cannot be trained on.
        """
        if len(labels) != batch_size:
            raise ValueError(f"labels hold {len(labels)} dicts for {batch_size} images: give one dict per image.")
        for i, label in enumerate(labels):
            _check_shapes(i, label)
        classes = [label["class_labels"].to(device=device, dtype=torch.int64) for label in labels]
        boxes = [label["boxes"].to(device=device, dtype=torch.float32).reshape(-1, 4) for label in labels]
        _check_values(classes, boxes, num_labels)
        counts = tuple(c.shape[0] for c in classes)
        sizes = torch.tensor(counts, device=device)
        return cls(
            class_labels=torch.nn.utils.rnn.pad_sequence(classes, batch_first=True),
            boxes=torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True, padding_value=0.5),
            is_object=torch.arange(max(counts), device=device) < sizes[:, None],
            counts=counts,
        )


def _check_shapes(index: int, label: dict[str, Any]) -> None:
    if not {"class_labels", "boxes"} <= label.keys():
        raise ValueError(
            f"labels[{index}] has the keys {sorted(label)}, but needs 'class_labels' (n,) and 'boxes' (n, 4)."
        )
    classes, boxes = tuple(label["class_labels"].shape), tuple(label["boxes"].shape)
    fits = boxes == (*classes, 4) or (classes == (0,) and 0 in boxes)
    if len(classes) != 1 or not fits:
        raise ValueError(f"labels[{index}]: class_labels {classes} and boxes {boxes} must be (n,) and (n, 4).")


def _check_values(classes: list[Tensor], boxes: list[Tensor], num_labels: int) -> None:
    """One comparison for the whole batch, as each one that is read waits for the device."""
    labels, corners = torch.cat(classes), torch.cat(boxes)
    bad_class = (labels < 0) | (labels >= num_labels)
    inside = ((corners >= 0) & (corners <= 1 + 1e-4)).all(dim=-1)  # NaN compares false
    bad_box = ~(inside & (corners[:, 2:] > 0).all(dim=-1))
    if not bool((bad_class | bad_box).any()):
        return
    row = int((bad_class | bad_box).nonzero()[0])
    image = next(i for i in range(len(classes)) if row < sum(c.shape[0] for c in classes[: i + 1]))
    if bool(bad_class[row]):
        raise ValueError(
            f"labels[{image}] holds class {int(labels[row])}, but the model has the classes 0 to {num_labels - 1}: "
            "map the ids of the data set to them, or set num_labels."
        )
    raise ValueError(
        f"labels[{image}] holds the box {corners[row].tolist()}, but boxes are (centre x, centre y, width, height) as "
        "fractions of the image, within 0 to 1, with a width and height above 0."
    )


def to_corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) from (cx, cy, w, h) to (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def iou_and_giou(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of corner boxes (..., 4), broadcast against each other."""
    shared = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    intersection, hull_area = shared.clamp(min=0).prod(-1), hull.prod(-1).clamp(min=MIN_AREA)
    union = (areas[0] + areas[1] - intersection).clamp(min=MIN_AREA)
    iou = intersection / union
    return iou, iou - (hull_area - union) / hull_area


@dataclass(frozen=True)
class Matches:
    """Matched pairs, flat: `stage`, `image`, `query` and `target` are (matches,) int64."""

    stage: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, targets: DetectionTargets, *, class_cost: float, bbox_cost: float, giou_cost: float
) -> Tensor:
    """Cost (stages, batch, objects, queries) of giving a query (logits: (stages, batch, queries, labels)) an object.

    Focal class cost, L1 and GIoU as in Deformable DETR (arXiv 2010.04159).
    """
    stages, batch, queries, _ = logits.shape
    index = targets.class_labels[None, :, None, :].expand(stages, batch, queries, -1)
    chosen = logits.gather(-1, index)  # (stages, batch, queries, objects)
    score = chosen.sigmoid()
    positive = -FOCAL_ALPHA * (1 - score) ** FOCAL_GAMMA * F.logsigmoid(chosen)
    negative = -(1 - FOCAL_ALPHA) * score**FOCAL_GAMMA * F.logsigmoid(-chosen)
    target_boxes = targets.boxes[:, None]  # (batch, 1, objects, 4)
    predicted = boxes[:, :, :, None]  # (stages, batch, queries, 1, 4)
    l1 = (predicted - target_boxes).abs().sum(-1)
    giou = iou_and_giou(to_corners(predicted), to_corners(target_boxes))[1]
    cost = class_cost * (positive - negative) + bbox_cost * l1 - giou_cost * giou
    return cost.transpose(-1, -2)


@torch.no_grad()
def match(cost: Tensor, counts: Sequence[int]) -> Matches:
    """Cheapest one-to-one assignment of each image and stage of a cost (stages, batch, objects, queries).

    Matches are ordered by stage, then by image. Where an image has more objects than there are queries, the objects of
    the highest cost stay without one.

    Raises:
        ImportError: if scipy is not installed.
    """
    try:  # only training needs scipy, so loading a detector for inference must not need it
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Training a detector needs scipy to match boxes: `pip install scipy`.") from error
    # Above the cost of any finite pair: a broken prediction is matched last, but does not drown the others.
    finite = torch.isfinite(cost)
    worst = torch.where(finite, cost, 0).amax() + 1 if cost.numel() else 0
    blocks = torch.where(finite, cost, worst).cpu().numpy()  # one transfer for all stages
    rows: list[tuple[int, int, int, int]] = []
    for stage in range(blocks.shape[0]):
        for image, count in enumerate(counts):
            objects, queries = linear_sum_assignment(blocks[stage, image, :count])
            rows.extend((stage, image, int(q), int(t)) for q, t in zip(queries, objects))
    flat = torch.tensor(rows, dtype=torch.int64, device=cost.device).reshape(-1, 4)
    return Matches(*flat.unbind(-1))


def set_losses(
    logits: Tensor, boxes: Tensor, targets: DetectionTargets, matches: Matches
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed class, L1 and GIoU losses, each (stages,), of matched predictions.

    The class loss is the IoU-aware cross entropy of LW-DETR (arXiv 2406.03459): a matched query learns the target
    p^a IoU^(1-a), every other score is pushed down with the weight p^2. In its log-sigmoid form no score saturates it.

    Args:
        logits: (stages, batch, queries, labels).
        boxes: (stages, batch, queries, 4) as (cx, cy, w, h).
    """
    predicted = boxes[matches.stage, matches.image, matches.query]  # (matches, 4)
    wanted = targets.boxes[matches.image, matches.target]  # (matches, 4)
    iou, giou = iou_and_giou(to_corners(predicted), to_corners(wanted))

    score = logits.sigmoid()
    position = (matches.stage, matches.image, matches.query, targets.class_labels[matches.image, matches.target])
    quality = (score[position] ** QUALITY_ALPHA * iou ** (1 - QUALITY_ALPHA)).detach().clamp(min=MIN_QUALITY)
    positive_weight = torch.zeros_like(logits).index_put(position, quality)
    negative_weight = (score**FOCAL_GAMMA).index_put(position, 1 - quality)
    cross_entropy = -positive_weight * F.logsigmoid(logits) - negative_weight * F.logsigmoid(-logits)

    per_stage = logits.new_zeros(logits.shape[0])
    l1 = per_stage.index_add(0, matches.stage, (predicted - wanted).abs().sum(-1))
    giou_loss = per_stage.index_add(0, matches.stage, 1 - giou)
    return cross_entropy.sum(dim=(1, 2, 3)), l1, giou_loss


@torch.no_grad()
def task_aligned_assignment(
    logits: Tensor, boxes: Tensor, centres: Tensor, targets: DetectionTargets, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """Assigns to each object the locations that predict it best (TOOD, arXiv 2108.07755).

    Candidates are the locations whose centre lies in the box, and the nearest one, so that an object smaller than the
    grid's cells is learned too. A location wanted by several objects goes to the one it overlaps most.

    Args:
        logits: (batch, locations, labels).
        boxes: (batch, locations, 4) as (cx, cy, w, h).
        centres: (locations, 2) x and y as fractions of the image.

    Returns:
        the index of the object (batch, locations), and the wanted score (batch, locations): its alignment, scaled so
        that the best location of an object wants the object's best IoU; 0 where no object is assigned.
    """
    num_locations, num_objects = logits.shape[1], targets.class_labels.shape[1]
    if num_objects == 0:
        return torch.zeros_like(logits[..., 0], dtype=torch.int64), torch.zeros_like(logits[..., 0])
    corners = to_corners(targets.boxes)[:, :, None]  # (batch, objects, 1, 4)
    iou = iou_and_giou(to_corners(boxes)[:, None], corners)[0]  # (batch, objects, locations)
    index = targets.class_labels[:, :, None].expand(-1, -1, num_locations)
    score = logits.transpose(1, 2).sigmoid().gather(1, index)  # (batch, objects, locations)
    alignment = score**ALIGNMENT_ALPHA * iou**ALIGNMENT_BETA

    inside = ((centres > corners[..., :2]) & (centres < corners[..., 2:])).all(-1)  # (batch, objects, locations)
    nearest = (centres - targets.boxes[:, :, None, :2]).square().sum(-1).argmin(-1)  # (batch, objects)
    candidate = inside.scatter(2, nearest[..., None], True) & targets.is_object[..., None]
    ranked = torch.where(candidate, alignment, -1.0)
    best = ranked.topk(min(top_k, num_locations), dim=-1).indices
    chosen = torch.zeros_like(candidate).scatter(2, best, True) & candidate
    assigned = torch.where(chosen, iou, -1.0).argmax(dim=1)  # (batch, locations)
    chosen &= F.one_hot(assigned, num_objects).transpose(1, 2).bool()

    alignment = alignment * chosen
    best_alignment = alignment.amax(-1, keepdim=True).clamp(min=torch.finfo(alignment.dtype).tiny)
    return assigned, (alignment / best_alignment * (iou * chosen).amax(-1, keepdim=True)).amax(dim=1)


def dense_losses(
    logits: Tensor, boxes: Tensor, centres: Tensor, targets: DetectionTargets, *, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed quality focal loss (arXiv 2006.04388) and GIoU loss of the one-to-many head, and the sum of its targets.

    Shapes as in [`task_aligned_assignment`].
    """
    assigned, wanted = task_aligned_assignment(logits, boxes, centres, targets, top_k=top_k)
    image, location = wanted.nonzero(as_tuple=True)
    target, weight = assigned[image, location], wanted[image, location]  # (positives,)
    position = (image, location, targets.class_labels[image, target])
    quality = torch.zeros_like(logits).index_put(position, weight)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    focal = (cross_entropy * (logits.sigmoid() - quality).abs() ** FOCAL_GAMMA).sum()
    giou = iou_and_giou(to_corners(boxes[image, location]), to_corners(targets.boxes[image, target]))[1]
    return focal, (weight * (1 - giou)).sum(), wanted.sum()


def mean_over_ranks(counts: Tensor) -> Tensor:
    """Divisors per rank for losses that are summed: counts over all ranks, at least 1 in all, shared by the ranks.

    DDP averages gradients, so sums divided by (count over all ranks / ranks) add up to the gradient of one process
    with the joined batch. Without gradients (evaluation, which may run on one rank alone) nothing is exchanged.
    """
    if not torch.is_grad_enabled():
        return counts.clamp(min=1)
    return sum_over_ranks(counts).clamp(min=1) / world_size()


class MatchedLoss(Protocol):
    """What a detector with more outputs than boxes adds to the matching and to the loss.

    Attributes:
        weights: Weight of each loss, by its name.
    """

    @property
    def weights(self) -> Mapping[str, float]: ...

    def cost(self) -> Tensor:
        """Cost (stages, batch, objects, queries) of giving a query an object, beside that of class and box."""

    def losses(self, matches: Matches) -> dict[str, Tensor]:
        """Losses (stages,) by name, summed over the matches."""


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    dense: tuple[Tensor, Tensor] | None,
    anchors: Tensor,
    targets: DetectionTargets,
    config: VLMViTDetectionConfig,
    other: MatchedLoss | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss and its parts.

    Args:
        logits: (stages, batch, queries, labels): proposals first, then each decoder layer.
        boxes: (stages, batch, queries, 4) as (cx, cy, w, h).
        dense: logits (batch, locations, labels) and boxes (batch, locations, 4) of the one-to-many head.
        anchors: (locations, 4).
        other: What queries learn beside classes and boxes.

    Returns:
        the loss, and detached parts: `loss_class`, `loss_bbox`, `loss_giou` and those of `other` of the last layer,
        not weighted; `loss_proposals`, `loss_aux` (all earlier layers) and `loss_dense`, weighted within.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, boxes = logits.float(), boxes.float()
        cost = matching_cost(
            logits, boxes, targets,
            class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost,
        )  # fmt: skip
        matches = match(cost if other is None else cost + other.cost(), targets.counts)
        sums = dict(zip(("loss_class", "loss_bbox", "loss_giou"), set_losses(logits, boxes, targets, matches)))
        weights = dict(zip(sums, (config.class_loss_weight, config.bbox_loss_weight, config.giou_loss_weight)))
        if other is not None:
            sums, weights = {**sums, **other.losses(matches)}, {**weights, **other.weights}
        num_objects = targets.boxes.new_tensor(float(sum(targets.counts)))
        if dense is None:
            (divisor,) = mean_over_ranks(num_objects[None])
        else:
            focal, dense_giou, alignment = dense_losses(
                dense[0].float(), dense[1].float(), anchors[:, :2], targets, top_k=config.dense_top_k
            )
            divisor, dense_divisor = mean_over_ranks(torch.stack([num_objects, alignment]))
        table = torch.stack(list(sums.values())) / divisor  # (losses, stages)
        per_stage = table.new_tensor([weights[name] for name in sums]) @ table  # (stages,)
        loss = per_stage.sum()
        loss_dict = dict(zip(sums, table[:, -1]))
        loss_dict |= {"loss_proposals": per_stage[0], "loss_aux": per_stage[1:-1].sum()}
        if dense is not None:
            loss_dict["loss_dense"] = (focal + config.giou_loss_weight * dense_giou) / dense_divisor
            loss = loss + config.dense_loss_weight * loss_dict["loss_dense"]
    return loss, {name: part.detach() for name, part in loss_dict.items()}


__all__ = [
    "DetectionTargets",
    "MatchedLoss",
    "Matches",
    "dense_losses",
    "detection_loss",
    "iou_and_giou",
    "match",
    "matching_cost",
    "mean_over_ranks",
    "set_losses",
    "task_aligned_assignment",
    "to_corners",
]
