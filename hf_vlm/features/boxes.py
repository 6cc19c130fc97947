"""Features of what boxes show, from the encoder's feature maps of the pass that found the boxes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["box_features", "recorded_maps"]

POINTS = 7  # per side of a box, as RoIAlign's bins


def box_features(maps: Tensor, boxes: Tensor) -> Tensor:
    """Means (batch, boxes, dim) of maps (batch, dim, rows, columns) in boxes (batch, boxes, 4), cxcywh in 0..1."""
    offsets = (torch.arange(POINTS, device=boxes.device) + 0.5) / POINTS - 0.5
    grid = torch.cartesian_prod(offsets, offsets)  # (points, 2)
    points = boxes[:, :, None, :2] + grid * boxes[:, :, None, 2:]  # (batch, boxes, points, 2)
    sampled = F.grid_sample(maps, 2 * points - 1, padding_mode="border", align_corners=False)
    return sampled.mean(-1).transpose(1, 2)


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
