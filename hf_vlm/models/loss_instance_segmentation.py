"""Losses of masks, beside those of the detector: cross entropy and Dice at points, in the matching and in the loss.

A mask is compared with its truth at points alone (PointRend, arXiv 1912.08193; Mask2Former, arXiv 2112.01527), and the
masks of queries that are not matched are never formed: no tensor is as large as queries x mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_instance_segmentation import VLMViTInstanceSegmentationConfig
from .loss_detection import DetectionTargets, Matches
from .mask_layers import box_prior
from .vit_layers import gather_tokens

OVERSAMPLING = 3  # candidates per point of the loss
UNCERTAIN_FRACTION = 0.75  # of the points: those of the candidates where the mask is least sure
OBJECT_REGION = 1.5  # widths and heights of an object's box from which points at it are
SMOOTHING = 1.0  # added to both sides of Dice's fraction


@dataclass(frozen=True)
class InstanceTargets(DetectionTargets):
    """The objects of a batch with their masks.

    Attributes:
        masks: (n, height, width) bool of each image.
    """

    masks: tuple[Tensor, ...]

    @classmethod
    def from_labels(
        cls, labels: Sequence[dict[str, Any]], *, batch_size: int, num_labels: int, device: torch.device
    ) -> "InstanceTargets":
        """Targets from label dicts with `class_labels` (n,), `boxes` (n, 4) and `masks` (n, height, width).

        Raises:
            ValueError: naming the image (its position in the batch) whose labels cannot be trained on.
        """
        boxes = DetectionTargets.from_labels(labels, batch_size=batch_size, num_labels=num_labels, device=device)
        for i, (label, count) in enumerate(zip(labels, boxes.counts)):
            if "masks" not in label:
                raise ValueError(f"labels[{i}] has no 'masks' (n, height, width), but the keys {sorted(label)}.")
            shape = tuple(label["masks"].shape)
            if len(shape) != 3 or shape[0] != count or 0 in shape[1:]:
                raise ValueError(f"labels[{i}]: masks {shape} must be (n, height, width), with n = {count} objects.")
        return cls(**vars(boxes), masks=tuple(label["masks"].to(device).bool() for label in labels))

    def at(self, points: Tensor) -> list[Tensor]:
        """Values (n, points) float32, 0 or 1, of each image's masks at its points (batch, points, 2)."""
        values = []
        for masks, (x, y) in zip(self.masks, points.transpose(1, 2)):
            height, width = masks.shape[1:]
            rows, columns = (y * height).long().clamp(max=height - 1), (x * width).long().clamp(max=width - 1)
            values.append(masks[:, rows, columns].float())
        return values


def sample_points(targets: DetectionTargets, mask_hw: tuple[int, int], ratio: int) -> Tensor:
    """Random candidates (batch, points, 2) for the points of the losses: x and y as fractions of the image.

    Half of them are anywhere in the image, and half in or close to the box of one of its objects: of points anywhere,
    small objects would have hardly one, and empty masks would fit them.
    """
    rows, columns = mask_hw
    batch, num_points = targets.boxes.shape[0], OVERSAMPLING * max(rows, rows * columns // ratio)
    anywhere = torch.rand(batch, num_points, 2, device=targets.boxes.device)
    if targets.boxes.shape[1] == 0:
        return anywhere
    counts = targets.is_object.sum(dim=1)[:, None]  # (batch, 1)
    chosen = gather_tokens(targets.boxes, (torch.rand_like(anywhere[..., 0]) * counts).long())  # (batch, points, 4)
    at_objects = chosen[..., :2] + OBJECT_REGION * (anywhere - 0.5) * chosen[..., 2:]
    is_at_object = (torch.rand_like(anywhere[..., 0]) < 0.5) & (counts > 0)  # (batch, points)
    return torch.where(is_at_object[..., None], at_objects.clamp(0, 1), anywhere)


class PointLogits(NamedTuple):
    """What the mask logits of all stages at points are made of: queries x pixels + bias + [`box_prior`]."""

    pixels: Tensor  # (stages, batch, channels, points)
    queries: Tensor  # (stages, batch, queries, channels)
    bias: Tensor  # (1,)
    boxes: Tensor  # (stages, batch, queries, 4)
    points: Tensor  # (batch, points, 2) x and y as fractions of the image

    def of_all(self, num_points: int) -> Tensor:
        """Logits (stages, batch, queries, num_points) of all queries at the first points."""
        x, y = self.points[:, None, :num_points].unbind(-1)  # (batch, 1, points)
        prior = box_prior(self.boxes[:, :, :, None], x, y)
        return self.queries @ self.pixels[..., :num_points] + self.bias + prior

    def of(self, image: int, queries: Tensor) -> Tensor:
        """Logits (stages, picked, points) of some queries (stages, picked) of an image at all points."""
        boxes = gather_tokens(self.boxes[:, image], queries)[:, :, None]  # (stages, picked, 1, 4)
        picked = gather_tokens(self.queries[:, image], queries)  # (stages, picked, channels)
        return picked @ self.pixels[:, image] + self.bias + box_prior(boxes, *self.points[image].unbind(-1))


class MaskLoss:
    """The part of masks in a detector's matching and loss: a [`MatchedLoss`].

    Args:
        logits: Those at candidates, random points of each image.
        truth: (n, points) 0 or 1 of each image.
    """

    def __init__(self, logits: PointLogits, truth: Sequence[Tensor], config: VLMViTInstanceSegmentationConfig):
        self.logits, self.truth, self.config = logits, truth, config
        self.weights = {"loss_mask": config.mask_loss_weight, "loss_dice": config.dice_loss_weight}

    @torch.no_grad()
    def cost(self) -> Tensor:
        """Cost (stages, batch, objects, queries) at random points that all masks of an image share."""
        stages, batch, num_queries, _ = self.logits.queries.shape
        num_points = self.logits.points.shape[1] // OVERSAMPLING
        logits = self.logits.of_all(num_points)
        cost = logits.new_zeros(stages, batch, max(truth.shape[0] for truth in self.truth), num_queries)
        for image, truth in enumerate(self.truth):
            mask, dice = pairwise_mask_losses(logits[:, image], truth[:, :num_points])
            cost[:, image, : truth.shape[0]] = self.config.mask_cost * mask + self.config.dice_cost * dice
        return cost

    def losses(self, matches: Matches) -> dict[str, Tensor]:
        """Cross entropy and Dice (stages,) of the matched masks, each a mean over points, summed over the matches."""
        stages, _, num_queries, _ = self.logits.queries.shape
        sizes = [min(truth.shape[0], num_queries) for truth in self.truth]  # matches per image, the same in each stage
        queries, targets = (
            flat.view(stages, sum(sizes)).split(sizes, dim=1) for flat in (matches.query, matches.target)
        )
        logits = [self.logits.of(image, picked) for image, picked in enumerate(queries)]
        truth = [values[target] for values, target in zip(self.truth, targets)]  # (stages, matches, points) each
        chosen = choose_points(torch.cat(logits, dim=1), torch.cat(truth, dim=1))
        mask, dice = mask_losses(*chosen)  # (stages, matches)
        return {"loss_mask": mask.sum(dim=1), "loss_dice": dice.sum(dim=1)}


def choose_points(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates (..., points) a third: for the most part where |logit| is smallest, for the rest at random."""
    num_points = logits.shape[-1] // OVERSAMPLING
    num_uncertain = int(UNCERTAIN_FRACTION * num_points)
    uncertain = logits.detach().abs().topk(num_uncertain, dim=-1, largest=False).indices
    others = torch.arange(num_points - num_uncertain, device=logits.device).expand(*uncertain.shape[:-1], -1)
    chosen = torch.cat([uncertain, others], dim=-1)
    return logits.gather(-1, chosen), truth.gather(-1, chosen)


def mask_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and Dice loss (...) of masks (..., points)."""
    scores = logits.sigmoid()
    dice = (2 * (scores * truth).sum(-1) + SMOOTHING) / (scores.sum(-1) + truth.sum(-1) + SMOOTHING)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1), 1 - dice


def pairwise_mask_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """As [`mask_losses`], of each pair of masks (stages, queries, points) and truth (objects, points).

    Both are (stages, objects, queries), by products of matrices: cross entropy is softplus(x) - x * truth.
    """
    scores, num_points = logits.sigmoid(), logits.shape[-1]
    mask = F.softplus(logits).mean(-1)[:, None] - truth @ logits.mT / num_points
    dice = (2 * (truth @ scores.mT) + SMOOTHING) / (scores.sum(-1)[:, None] + truth.sum(-1)[:, None] + SMOOTHING)
    return mask, 1 - dice


__all__ = [
    "InstanceTargets",
    "MaskLoss",
    "PointLogits",
    "choose_points",
    "mask_losses",
    "pairwise_mask_losses",
    "sample_points",
]
