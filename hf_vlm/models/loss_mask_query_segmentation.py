"""Losses of mask queries: each class in an image is given to one query, which learns that class and its mask.

As in Mask2Former (arXiv 2112.01527), masks are compared at points alone. Points are of pixels that have a class: where
there is none, queries may put their masks as they like.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_mask_query_segmentation import VLMViTMaskQuerySegmentationConfig
from .loss_detection import match, mean_over_ranks
from .loss_instance_segmentation import choose_points, mask_losses, pairwise_mask_losses
from .modeling_semantic_segmentation import IGNORED


class ClassMasks(NamedTuple):
    """The classes in the images of a batch, padded to the longest list, and their masks at the points."""

    class_labels: Tensor  # (batch, classes) int64
    counts: tuple[int, ...]  # classes of each image
    masks: Tensor  # (batch, classes, points) float32, 0 or 1; 0 where padded


def sample_labelled_points(labels: Tensor, num_points: int) -> Tensor:
    """Random points (batch, points, 2) of the pixels that have a class, x and y as fractions of the image.

    Args:
        labels: (batch, height, width) integers, 255 for pixels without a class; in an image of these alone, points are
            anywhere.
    """
    height, width = labels.shape[1:]
    is_labelled = (labels != IGNORED).flatten(1)
    weights = (is_labelled | ~is_labelled.any(dim=1, keepdim=True)).float()
    pixels = torch.multinomial(weights, num_points, replacement=True)  # (batch, points)
    corners = torch.stack([pixels % width, pixels // width], dim=-1)
    return (corners + torch.rand(corners.shape, device=labels.device)) / corners.new_tensor([width, height])


def masks_at(labels: Tensor, points: Tensor, num_labels: int) -> ClassMasks:
    """The classes of an image are those that some point is of: others have no mask to be compared with.

    Args:
        labels: (batch, height, width) integers, 255 for pixels without a class.
        points: (batch, points, 2) x and y as fractions of the image.

    Raises:
        ValueError: for classes that the model has not.
    """
    height, width = labels.shape[1:]
    x, y = points.unbind(-1)
    columns, rows = (x * width).long().clamp(max=width - 1), (y * height).long().clamp(max=height - 1)
    classes = labels.flatten(1).long().gather(1, rows * width + columns)  # (batch, points)
    is_labelled = classes != IGNORED
    if bool((is_labelled & ((classes < 0) | (classes >= num_labels))).any()):
        raise ValueError(
            f"Labels have the classes {sorted(set(classes[is_labelled].tolist()))}, but the model has 0 to "
            f"{num_labels - 1}, and {IGNORED} for pixels without a class: set num_labels."
        )
    found = torch.zeros(classes.shape[0], num_labels + 1, dtype=torch.int64, device=classes.device)
    found = found.scatter(1, torch.where(is_labelled, classes, num_labels), 1)[:, :num_labels]  # (batch, labels)
    counts = tuple(found.sum(dim=1).tolist())
    class_labels = found.argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
    return ClassMasks(class_labels, counts, (classes[:, None] == class_labels[:, :, None]).float())


@torch.no_grad()
def matching_cost(
    class_logits: Tensor,
    queries: Tensor,
    pixels: Tensor,
    targets: ClassMasks,
    config: VLMViTMaskQuerySegmentationConfig,
) -> Tensor:
    """Cost (stages, batch, classes, queries) of giving a class to a query; inputs as in [`mask_query_loss`]."""
    stages, batch, num_queries, _ = class_logits.shape
    cost = class_logits.new_zeros(stages, batch, targets.class_labels.shape[1], num_queries)
    for image, count in enumerate(targets.counts):  # one at a time: no tensor is as large as all masks at all points
        scores = class_logits[:, image].softmax(dim=-1)[..., targets.class_labels[image, :count]]
        mask, dice = pairwise_mask_losses(queries[:, image] @ pixels[:, image], targets.masks[image, :count])
        cost[:, image, :count] = (
            config.mask_loss_weight * mask + config.dice_loss_weight * dice - config.class_loss_weight * scores.mT
        )
    return cost


def mask_query_loss(
    class_logits: Tensor,
    queries: Tensor,
    pixels: Tensor,
    targets: ClassMasks,
    config: VLMViTMaskQuerySegmentationConfig,
) -> Tensor:
    """The loss (), summed over the stages; 0 where no image has a labelled pixel.

    Classes: cross entropy, a mean over the queries of images with labels, weighted by `no_object_weight` where a query
    has no class. Masks: cross entropy and Dice, means over points and then over the matches. Means are over all ranks.

    Args:
        class_logits: (stages, batch, queries, labels + 1) float32, the last of no class.
        queries: (stages, batch, queries, channels) float32.
        pixels: (stages, batch, channels, points) float32; mask logits are queries @ pixels.
    """
    matches = match(matching_cost(class_logits, queries, pixels, targets, config), targets.counts)
    at_query, at_target = ((matches.stage, matches.image, index) for index in (matches.query, matches.target))
    shape = class_logits.shape[:3]
    found = targets.class_labels[matches.image, matches.target]
    wanted = found.new_full(shape, config.num_labels).index_put(at_query, found)
    one = class_logits.new_ones(())
    has_labels = torch.tensor(targets.counts, device=one.device) > 0
    weight = class_logits.new_full(shape, config.no_object_weight).index_put(at_query, one) * has_labels[:, None]
    class_loss = weight * F.cross_entropy(class_logits.movedim(-1, 1), wanted, reduction="none")

    slots = (*shape[:2], targets.class_labels.shape[1])  # (stages, batch, classes)
    is_matched = class_logits.new_zeros(slots).index_put(at_target, one)
    matched = queries.new_zeros(*slots, queries.shape[-1]).index_put(at_target, queries[at_query])
    logits = matched @ pixels  # (stages, batch, classes, points)
    mask_loss, dice_loss = mask_losses(*choose_points(logits, targets.masks.expand_as(logits)))

    per_query, per_match = mean_over_ranks(torch.stack([weight[0].sum(), is_matched[0].sum()]))
    masks = is_matched * (config.mask_loss_weight * mask_loss + config.dice_loss_weight * dice_loss)
    return config.class_loss_weight * class_loss.sum() / per_query + masks.sum() / per_match


__all__ = ["ClassMasks", "mask_query_loss", "masks_at", "matching_cost", "sample_labelled_points"]
