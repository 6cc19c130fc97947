"""Masks hide as many patches as asked for, in the shapes of their papers."""

import math

import pytest
import torch
from scipy import ndimage

from hf_vlm.models.ssl_masks import block_masking, grid_block_masking, mask_from_indices, random_masking, ranks


def test_random_masking_keeps_the_lowest_noise():
    noise = torch.tensor([[0.4, 0.1, 0.9, 0.2]])
    visible, masked = random_masking(noise, 0.5)
    assert visible.tolist() == [[1, 3]]
    assert masked.tolist() == [[0, 2]]
    assert mask_from_indices(masked, 4).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_masked"),
    [(49, 0.6, 30), (36, 0.6, 22), (196, 0.75, 147), (10, 0.55, 6), (5, 0.9, 4), (2, 0.1, 1)],
)
def test_the_number_of_masked_patches_is_rounded_up(num_patches, mask_ratio, num_masked):
    """SimMIM's `int(np.ceil(token_count * mask_ratio))`: 30 of its 49 mask blocks; one patch stays visible."""
    visible, masked = random_masking(torch.rand(2, num_patches), mask_ratio)
    assert (visible.shape[1], masked.shape[1]) == (num_patches - num_masked, num_masked)


def test_ranks_are_positions_in_ascending_order():
    assert ranks(torch.tensor([[5.0, -1.0, 2.0]])).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_mask_blocks_are_masked_as_a_whole(grid):
    torch.manual_seed(0)
    rows, columns = -(-grid[0] // 2), -(-grid[1] // 2)
    noise = torch.rand(6, rows * columns)
    masked = grid_block_masking(noise, grid, (2, 2), 0.6).unflatten(1, grid)
    num_visible = rows * columns - math.ceil(rows * columns * 0.6)
    for values, mask in zip(noise, masked, strict=True):
        threshold = values.sort().values[num_visible - 1]
        for row in range(grid[0]):
            for column in range(grid[1]):
                assert mask[row, column] == (values[row // 2 * columns + column // 2] > threshold)


def test_blocks_mask_exactly_as_many_patches_as_asked_for():
    torch.manual_seed(0)
    counts = torch.tensor([0, 1, 5, 40, 97, 140] * 20)
    masked = block_masking(counts, (14, 10))
    assert torch.equal(masked.sum(1), counts)


def test_blocks_are_blocks():
    """Masks are few connected pieces, where random patches would be scattered, and cover the whole grid."""
    torch.manual_seed(0)
    counts = torch.full((300,), 60)
    masked = block_masking(counts, (14, 14))
    scattered = mask_from_indices(random_masking(torch.rand(300, 196), 60 / 196)[1], 196)

    def edges(masks):
        images = masks.unflatten(1, (14, 14)).float()
        return (images.diff(dim=1).abs().sum() + images.diff(dim=2).abs().sum()) / len(masks)

    assert edges(masked) < 0.45 * edges(scattered)
    pieces = sum(ndimage.label(mask.numpy())[1] for mask in masked.unflatten(1, (14, 14))) / 300
    assert pieces < 8
    frequency = masked.float().mean(0)
    assert frequency.min() > 0.01  # corners lie in few of the blocks that fit, as in BEiT
    assert frequency.max() < 0.65


def test_few_blocks_are_completed_at_random():
    torch.manual_seed(0)
    masked = block_masking(torch.full((50,), 100), (12, 12), num_blocks=1)
    assert torch.equal(masked.sum(1), torch.full((50,), 100))
