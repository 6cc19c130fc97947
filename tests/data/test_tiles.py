"""Tiles cover the image, and what is found in them is each object once, with the box it has in the whole image."""

import itertools

import numpy as np
import pytest

from hf_vlm.data.tiles import Tiling, merge_tiles


def found_in(boxes, labels, tile, scores):
    """What a perfect detector finds in a tile: the part of each object that is in it."""
    corners = np.array(tile, dtype=np.float32)
    cut = np.concatenate([np.maximum(boxes[:, :2], corners[:2]), np.minimum(boxes[:, 2:], corners[2:])], axis=1)
    rows = np.flatnonzero((cut[:, 2:] - cut[:, :2] > 3).all(axis=1))
    return {
        "boxes": (cut - np.tile(corners[:2], 2))[rows].astype(np.float32),
        "scores": scores[rows],
        "labels": labels[rows],
    }


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((300, 500), 128, 0.2), ((129, 128), 128, 0.5), ((90, 700), 99, 0)]
)
def test_tiles_cover_the_image_and_overlap(size, tile, overlap):
    covered = np.zeros(size, dtype=int)
    tiles = Tiling(tile, overlap).tiles(size)
    for one in tiles:
        assert one.right - one.left == min(tile, size[1])
        assert one.bottom - one.top == min(tile, size[0])
        covered[one.slices] += 1
    assert covered.min() == 1
    lefts = sorted({one.left for one in tiles})
    assert all(b - a <= tile * (1 - overlap) + 0.5 for a, b in itertools.pairwise(lefts))


def test_objects_cut_by_edges_are_found_once_with_their_own_boxes():
    boxes = np.array(
        [
            [10, 10, 40, 40],  # in one tile
            [90, 20, 125, 60],  # cut by the edge at 100 and whole in the next tile
            [85, 85, 110, 110],  # at the corner of four tiles
            [100, 22, 128, 58],  # another class at the position of the second
            [20, 150, 170, 175],  # longer than a tile
            [88, 180, 99, 199],  # two neighbours of one class that both are in two tiles
            [102, 180, 113, 199],
        ],
        dtype=np.float32,
    )
    labels = np.array([0, 1, 0, 2, 1, 3, 3])
    scores = np.linspace(0.9, 0.6, len(boxes)).astype(np.float32)
    tiles = Tiling(100, 0.3).tiles((200, 200))
    assert len(tiles) == 9
    merged = merge_tiles([found_in(boxes, labels, tile, scores) for tile in tiles], tiles, image_size=(200, 200))
    np.testing.assert_allclose(merged["boxes"], boxes, atol=1e-4)
    np.testing.assert_array_equal(merged["labels"], labels)
    np.testing.assert_array_equal(merged["scores"], scores)


@pytest.mark.parametrize(
    ("side", "overlap", "message"), [(4, 0.2, "tile is 4; give the side"), (64, 20, "overlap is 20")]
)
def test_tiles_that_make_no_sense(side, overlap, message):
    with pytest.raises(ValueError, match=message):
        Tiling(side, overlap)
