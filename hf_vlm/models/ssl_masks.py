"""Masks of self-supervised methods, drawn for whole batches on any device without a wait for it.

Numbers of masked patches are known beforehand, so that all later shapes are.
"""

import math

import torch
from torch import Tensor


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Splits patches by the order of noise (batch, patches) into visible and masked indices (batch, k) each."""
    num_patches = noise.shape[1]
    num_visible = max(1, min(num_patches - 1, round(num_patches * (1 - mask_ratio))))
    order = noise.argsort(dim=1)
    return order[:, :num_visible], order[:, num_visible:]


def mask_of(indices: Tensor, num_patches: int) -> Tensor:
    """(batch, num_patches) bool, true at indices (batch, k)."""
    mask = torch.zeros(len(indices), num_patches, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


def masking_of_units(noise: Tensor, grid_hw: tuple[int, int], unit_hw: tuple[int, int], mask_ratio: float) -> Tensor:
    """Masks square units of several patches each, the masked ones those of the highest noise (SimMIM, 2111.09886).

    Args:
        noise: (batch, units), units row-major; a last row or column of units may be cut off by the grid.
        grid_hw: Patches of an image, rows and columns.
        unit_hw: Patches of a unit.
        mask_ratio: Share of the units that are masked.

    Returns:
        (batch, patches) bool, row-major.
    """
    units_hw = unit_grid(grid_hw, unit_hw)
    masked = mask_of(random_masking(noise, mask_ratio)[1], units_hw[0] * units_hw[1]).unflatten(1, units_hw)
    for axis, (unit, size) in enumerate(zip(unit_hw, grid_hw), start=1):
        masked = masked.repeat_interleave(unit, dim=axis).narrow(axis, 0, size)
    return masked.flatten(1)


def unit_grid(grid_hw: tuple[int, int], unit_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of units that cover a grid of patches."""
    return math.ceil(grid_hw[0] / unit_hw[0]), math.ceil(grid_hw[1] / unit_hw[1])


def block_masking(
    counts: Tensor, grid_hw: tuple[int, int], *, min_patches: int = 4, min_aspect: float = 0.3, num_blocks: int = 32
) -> Tensor:
    """Masks blocks of patches, as many patches of each image as asked for (BEiT's blocks, arXiv 2106.08254).

    Blocks are laid one over the other until the count is reached, the last one in part; should they not reach it, the
    patches that no block covers are masked at random.

    Args:
        counts: (batch,) patches to mask of each image.
        grid_hw: Patches of an image, rows and columns.
        min_patches: Area of a block at least; at most it is the image's count.
        min_aspect: Height / width of a block at least; at most it is the inverse. The logarithm is uniform.
        num_blocks: Blocks drawn for an image at most.

    Returns:
        (batch, patches) bool, row-major, with exactly `counts` true.
    """
    rows, columns = grid_hw
    size, device = (len(counts), num_blocks, 1, 1), counts.device
    most = counts.clamp(min=min_patches)[:, None, None, None]
    area = min_patches + torch.rand(size, device=device) * (most - min_patches)
    aspect = torch.exp((2 * torch.rand(size, device=device) - 1) * -math.log(min_aspect))
    height = (area * aspect).sqrt().round().clamp(1, rows)  # (batch, blocks, 1, 1)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (torch.rand(size, device=device) * (rows - height + 1)).floor()
    left = (torch.rand(size, device=device) * (columns - width + 1)).floor()
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (batch, blocks, h, w)
    # Which block covers a patch first; of the last block that is needed, random patches.
    order = torch.arange(num_blocks, device=device)[:, None, None].expand_as(inside)
    first = torch.where(inside, order, num_blocks).amin(1).flatten(1)  # (batch, patches)
    return rank_of(first + torch.rand(first.shape, device=device)) < counts[:, None]


def rank_of(values: Tensor) -> Tensor:
    """The place of each of the values (batch, n) in ascending order."""
    return values.argsort(dim=1).argsort(dim=1)


__all__ = ["block_masking", "mask_of", "masking_of_units", "random_masking", "rank_of", "unit_grid"]
