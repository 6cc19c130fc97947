"""Features of what boxes show, from the encoder's feature maps of the pass that found the boxes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["appearance_features", "box_features", "recorded_maps"]

POINTS = 7  # per side of a box, as RoIAlign's bins
INNER = 0.5  # of the sides of a box: what is farther out is often background or a neighbour


def box_features(maps: Tensor, boxes: Tensor) -> Tensor:
    """Means (batch, boxes, dim) of maps (batch, dim, rows, columns) in boxes (batch, boxes, 4), cxcywh in 0..1."""
    offsets = (torch.arange(POINTS, device=boxes.device) + 0.5) / POINTS - 0.5
    grid = torch.cartesian_prod(offsets, offsets)  # (points, 2)
    points = boxes[:, :, None, :2] + grid * boxes[:, :, None, 2:]  # (batch, boxes, points, 2)
    sampled = F.grid_sample(maps, 2 * points - 1, padding_mode="border", align_corners=False)
    return sampled.mean(-1).transpose(1, 2)


def appearance_features(feature_map: Tensor, boxes: Tensor, size: tuple[float, float]) -> Tensor:
    """What the middle of each box shows: (n, dim) from the feature map (dim, rows, columns) of an image.

    Args:
        feature_map: Of the model's whole input.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        size: Height and width of what the input shows, in pixels of the image: of the image, and its padding.
    """
    height, width = size
    corners = boxes.float() / torch.tensor([width, height, width, height], device=boxes.device)
    low, high = corners[:, :2], corners[:, 2:]
    centered = torch.cat([(low + high) / 2, INNER * (high - low)], dim=1)  # (n, 4) cxcywh
    return box_features(feature_map[None].float(), centered[None])[0]


@contextlib.contextmanager
def recorded_maps(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the last feature map (batch, dim, rows, columns) of each pass of the model's backbone."""
    maps: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        if getattr(output, "feature_maps", None) is not None:
            maps.append(output.feature_maps[-1])

    backbone = getattr(model, "backbone", None)
    if backbone is None:
        yield maps
        return
    handle = backbone.register_forward_hook(record)
    try:
        yield maps
    finally:
        handle.remove()
