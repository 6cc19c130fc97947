"""Tiles cover the image, and what is found in them is each object once, with the box it has in the whole image."""

import itertools

import numpy as np
import pytest
from PIL import Image

from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.tiling import check_tiling, merge_tiles, tiles_of


@pytest.fixture(scope="module")
def predictor(saved_detector):
    return Predictor.from_pretrained(saved_detector, device="cpu")


def picture(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height)))


def found_in(boxes, labels, tile, scores):
    """What a perfect detector finds in a tile: the part of each object that is in it."""
    corners = np.array(tile, dtype=np.float32)
    cut = np.concatenate([np.maximum(boxes[:, :2], corners[:2]), np.minimum(boxes[:, 2:], corners[2:])], axis=1)
    rows = np.flatnonzero((cut[:, 2:] - cut[:, :2] > 3).all(axis=1))
    return Prediction(
        boxes=(cut - np.tile(corners[:2], 2))[rows].astype(np.float32),
        scores=scores[rows],
        labels=labels[rows],
        label_names=[str(label) for label in labels[rows]],
        image_size=(tile.bottom - tile.top, tile.right - tile.left),
    )


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((300, 500), 128, 0.2), ((129, 128), 128, 0.5), ((90, 700), 99, 0)]
)
def test_tiles_cover_the_image_and_overlap(size, tile, overlap):
    covered = np.zeros(size, dtype=int)
    tiles = tiles_of(size, tile, overlap)
    for one in tiles:
        assert one.right - one.left == min(tile, size[1])
        assert one.bottom - one.top == min(tile, size[0])
        covered[one.slices] += 1
    assert covered.min() == 1
    lefts = sorted({one.left for one in tiles})
    assert all(b - a <= tile * (1 - overlap) + 0.5 for a, b in itertools.pairwise(lefts))


def test_an_image_that_fits_one_tile_is_predicted_as_without_tiles(predictor):
    images = [picture(60, 90), picture(128, 100)]
    for one, other in zip(predictor.predict(images, 0.4, tile=128), predictor.predict(images, 0.4), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_without_overlap_detections_are_those_of_the_crops(predictor):
    image = picture(64, 128)
    tiled = predictor.predict(image, 0.4, tile=64, overlap=0)[0]
    left, right = (predictor.predict(np.ascontiguousarray(image[:, x : x + 64]), 0.4)[0] for x in (0, 64))
    boxes = np.concatenate([left.boxes, right.boxes + np.array([64, 0, 64, 0])])
    scores = np.concatenate([left.scores, right.scores])
    order = np.argsort(-scores, kind="stable")
    assert len(tiled) == len(left) + len(right) > 0
    assert tiled.image_size == (64, 128)
    np.testing.assert_allclose(tiled.scores, scores[order], atol=1e-5)
    np.testing.assert_allclose(tiled.boxes, boxes[order], atol=1e-3)


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
    tiles = tiles_of((200, 200), 100, 0.3)
    assert len(tiles) == 9
    merged = merge_tiles([found_in(boxes, labels, tile, scores) for tile in tiles], tiles, image_size=(200, 200))
    np.testing.assert_allclose(merged.boxes, boxes, atol=1e-4)
    np.testing.assert_array_equal(merged.labels, labels)
    np.testing.assert_array_equal(merged.scores, scores)
    assert merged.label_names == [str(label) for label in labels]


def test_tiles_that_make_no_sense(predictor):
    with pytest.raises(ValueError, match="tile is 4; give the side of the tiles in pixels"):
        predictor.predict(picture(30, 30), tile=4)
    with pytest.raises(ValueError, match="overlap is 20"):
        check_tiling(64, 20)
