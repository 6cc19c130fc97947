"""Masks of self-supervised methods, sampled for whole batches on any device without waiting for it.

The numbers of masked patches are known beforehand, and with them all later shapes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .vit_layers import patch_grid, unpatchify


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Splits patches by the order of noise (batch, patches) into visible and masked indices (batch, k) each.

    The number of masked ones is rounded up, as in the official code of SimMIM and of MAE; one at least stays visible.
    """
    num_patches = noise.shape[1]
    num_visible = max(1, num_patches - math.ceil(num_patches * mask_ratio))
    order = noise.argsort(dim=1)
    return order[:, :num_visible], order[:, num_visible:]


def mask_from_indices(indices: Tensor, num_patches: int) -> Tensor:
    """(batch, num_patches) bool, true at indices (batch, k)."""
    mask = torch.zeros(indices.shape[0], num_patches, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


def pixel_mask(masked: Tensor, images: Tensor, patch_hw: tuple[int, int]) -> Tensor:
    """A mask of patches (batch, patches) as a mask of the images' pixels (batch, 1, height, width)."""
    values = masked[:, :, None].expand(-1, -1, patch_hw[0] * patch_hw[1])
    return unpatchify(values, patch_grid(images, patch_hw), patch_hw)


def grid_block_masking(
    noise: Tensor, grid_hw: tuple[int, int], block_hw: tuple[int, int], mask_ratio: float
) -> Tensor:
    """Masks whole blocks of a regular grid, those of the highest noise (SimMIM, arXiv 2111.09886).

    Args:
        noise: (batch, mask blocks), row-major; the border of the image may cut off the last row or column of blocks.
        grid_hw: Patches of an image, rows and columns.
        block_hw: Patches of a mask block, rows and columns.
        mask_ratio: Fraction of the mask blocks that are masked.

    Returns:
        (batch, patches) bool, row-major.
    """
    return blocks_to_patches(
        mask_from_indices(random_masking(noise, mask_ratio)[1], noise.shape[1]), grid_hw, block_hw
    )


def blocks_to_patches(values: Tensor, grid_hw: tuple[int, int], block_hw: tuple[int, int]) -> Tensor:
    """Values (batch, mask blocks) of a regular grid of blocks, as those (batch, patches) of their patches."""
    values = values.unflatten(1, block_grid(grid_hw, block_hw))
    for axis, (block, size) in enumerate(zip(block_hw, grid_hw), start=1):
        values = values.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
    return values.flatten(1)


def block_grid(grid_hw: tuple[int, int], block_hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of mask blocks that cover a grid of patches."""
    return math.ceil(grid_hw[0] / block_hw[0]), math.ceil(grid_hw[1] / block_hw[1])


def block_masking(
    counts: Tensor, grid_hw: tuple[int, int], *, min_patches: int = 4, min_aspect: float = 0.3, num_blocks: int = 32
) -> Tensor:
    """Masks blocks of patches, a given number of patches per image (BEiT's blocks, arXiv 2106.08254).

    Blocks are laid one over the other until the count is reached, the last one in part; should they not reach it, the
    patches that no block covers are masked at random.

    Args:
        counts: (batch,) number of patches to mask in each image.
        grid_hw: Patches of an image, rows and columns.
        min_patches: Smallest area of a block; the largest is the image's count.
        min_aspect: Smallest height / width of a block; the largest is the inverse. The logarithm is uniform.
        num_blocks: Largest number of blocks per image.

    Returns:
        (batch, patches) bool, row-major, with exactly `counts` true.
    """
    rows, columns = grid_hw
    size, device = (counts.shape[0], num_blocks, 1, 1), counts.device
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
    return ranks(first + torch.rand(first.shape, device=device)) < counts[:, None]


def context_and_targets(
    num_images: int,
    grid_hw: tuple[int, int],
    *,
    num_targets: int = 4,
    target_scale: Sequence[float] = (0.15, 0.2),
    target_aspect: Sequence[float] = (0.75, 1.5),
    context_scale: Sequence[float] = (0.85, 1.0),
) -> tuple[Tensor, Tensor]:
    """Samples I-JEPA's target blocks, and for each image the block of context around them (arXiv 2301.08243).

    The sizes of the blocks are sampled once, their positions for each image. The context is its block less all
    targets, cut at random to the smallest context of the batch. Where that is next to nothing, as it can be on small
    grids, patches of no target fill it up to a sixteenth of the grid.

    All of it is sampled on the CPU: the size of the context depends on the positions, and a device would have to be
    waited for.

    Args:
        num_images: Number of images.
        grid_hw: Patches of an image, rows and columns.
        num_targets: Target blocks of an image, which may overlap.
        target_scale, context_scale: Ranges of a block's area as a fraction of the grid.
        target_aspect: Range of a target block's height / width; the context's block is square, where that fits.

    Returns:
        Indices of the context (images, context) and of the targets (images, num_targets, patches of a block),
        row-major and ascending, on the CPU.

    Raises:
        ValueError: if the grid is too small for the targets.
    """
    rows, columns = grid_hw
    num_patches, most = rows * columns, int(target_scale[1] * rows * columns + 1e-6)
    if most < 1 or num_targets * most >= num_patches:
        raise ValueError(
            f"A grid of {rows} x {columns} patches is too small for {num_targets} target blocks of up to "
            f"{target_scale[1]:g} of it: use larger images, smaller patches or other targets."
        )
    fractions = torch.rand(3, device="cpu").tolist()
    target_hw = _block_hw(grid_hw, target_scale, target_aspect, (fractions[0], fractions[1]), most)
    context_hw = _block_hw(grid_hw, context_scale, (1.0, 1.0), (fractions[2], 0.0), num_patches)
    targets = _sample_block_positions((num_images, num_targets), grid_hw, target_hw)  # (images, targets, patches)
    block = mask_from_indices(_sample_block_positions((num_images, 1), grid_hw, context_hw).flatten(1), num_patches)
    taken = mask_from_indices(targets.flatten(1), num_patches)  # (images, patches)
    counts = (block & ~taken).sum(1).tolist()
    # At least this many patches lie in no target, wherever the blocks are.
    spare = num_patches - num_targets * target_hw[0] * target_hw[1]
    length = max(min(counts), min(spare, max(1, num_patches // 16)))
    noise = torch.rand(num_images, num_patches, device="cpu")
    order = (noise + (~block).float() + 2 * taken.float()).argsort(dim=1)  # the context, other patches, the targets
    return order[:, :length].sort(dim=1).values, targets


def _block_hw(
    grid_hw: tuple[int, int], scale: Sequence[float], aspect: Sequence[float], fractions: Sequence[float], most: int
) -> tuple[int, int]:
    """Rows and columns of a block of at most `most` patches, at `fractions` of the way through both ranges."""
    area, ratio = (low + part * (high - low) for (low, high), part in zip((scale, aspect), fractions))
    area *= grid_hw[0] * grid_hw[1]
    height = min(max(round(math.sqrt(area * ratio)), 1), grid_hw[0], most)
    width = min(max(round(math.sqrt(area / ratio)), 1), grid_hw[1])
    return height, min(width, most // height)


def _sample_block_positions(counts: tuple[int, int], grid_hw: tuple[int, int], block_hw: tuple[int, int]) -> Tensor:
    """Indices of patches (images, blocks, patches of a block) of blocks of one size at random positions."""
    top, left = (torch.randint(n - size + 1, (*counts, 1), device="cpu") for n, size in zip(grid_hw, block_hw))
    row, column = (torch.arange(size, device="cpu") for size in block_hw)
    return top * grid_hw[1] + left + (row[:, None] * grid_hw[1] + column).flatten()


def ranks(values: Tensor) -> Tensor:
    """The rank of each of the values (batch, n) in ascending order, from 0."""
    return values.argsort(dim=1).argsort(dim=1)


__all__ = [
    "block_grid",
    "block_masking",
    "blocks_to_patches",
    "context_and_targets",
    "grid_block_masking",
    "mask_from_indices",
    "pixel_mask",
    "random_masking",
    "ranks",
]
