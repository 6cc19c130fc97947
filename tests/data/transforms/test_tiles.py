"""Training on tiles: which part of an image is shown, and which objects are kept."""

import io

import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.data.transforms.segmentation import SegmentationTransform

HEIGHT, WIDTH, TILE = 150, 240, 64
STATISTICS = {"image_mean": 0.0, "image_std": 1.0}
PLAIN = {"flip_probability": 0.0, "crop_probability": 0.0, "tile": TILE}
BOXES = np.array([[5, 5, 20, 30], [60, 50, 30, 40], [200, 100, 40, 50], [120, 20, 100, 10]])  # x, y, width, height


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def positions(height, width):
    """An image whose first two channels are the row and the column of each pixel."""
    rows, columns = np.indices((height, width))
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


def example_of(boxes, height=HEIGHT, width=WIDTH):
    objects = {"bbox": boxes, "category": np.arange(len(boxes))}
    return {"image": encode(positions(height, width)), "image_id": 1, "objects": objects}


def shown(pixel_values):
    """First row and column of the image that are shown, of a tile that is not resized."""
    values = np.rint(255 * pixel_values.numpy()).astype(int)
    top, left = values[0, 0, 0], values[1, 0, 0]
    np.testing.assert_array_equal(values[0], np.arange(top, top + TILE)[:, None] + np.zeros((1, TILE), int))
    np.testing.assert_array_equal(values[1], np.arange(left, left + TILE)[None] + np.zeros((TILE, 1), int))
    return top, left


def test_a_tile_shows_its_pixels_and_the_objects_that_are_visible_enough():
    transform = DetectionTransform.from_dict(PLAIN | {"min_visible": 0.4}, size=TILE, train=True, **STATISTICS)
    corners = set()
    for seed in range(40):
        transformed = transform(example_of(BOXES), np.random.default_rng(seed))
        top, left = shown(transformed["pixel_values"])
        corners.add((top, left))
        expected = {}
        for label, (x, y, w, h) in enumerate(BOXES):
            low, high = np.maximum([x, y], [left, top]), np.minimum([x + w, y + h], [left + TILE, top + TILE])
            if (high > low).all() and (high - low).prod() >= 0.4 * w * h:
                expected[label] = [*(low + high) / 2 - [left, top], *(high - low)]
        labels = transformed["labels"]
        assert labels["class_labels"].tolist() == list(expected)
        found = labels["boxes"].numpy() * TILE
        np.testing.assert_allclose(found, np.array(list(expected.values())).reshape(-1, 4), atol=1e-4)
    assert len(corners) > 30


def test_scales_are_relative_to_the_tile():
    settings = PLAIN | {"crop_probability": 1.0, "crop_scale": [0.25, 0.25], "crop_ratio": [1, 1]}
    transform = DetectionTransform.from_dict(settings, size=TILE // 2, train=True, **STATISTICS)
    values = transform(example_of(BOXES), np.random.default_rng(0))["pixel_values"].numpy() * 255
    assert [np.ptp(values[0]), np.ptp(values[1])] == pytest.approx([TILE / 2 - 1] * 2)


@pytest.mark.parametrize("letterbox", [False, True])
def test_an_image_that_fits_into_a_tile_is_shown_whole(letterbox):
    example = example_of([[0, 0, 20, 40]], height=40, width=60)
    transform = DetectionTransform.from_dict(PLAIN, size=(40, 80), train=True, letterbox=letterbox, **STATISTICS)
    transformed = transform(example, np.random.default_rng(0))
    box = [1 / 8, 1 / 2, 1 / 4, 1] if letterbox else [1 / 6, 1 / 2, 1 / 3, 1]
    np.testing.assert_allclose(transformed["labels"]["boxes"], [box], atol=1e-6)
    if letterbox:
        np.testing.assert_allclose(255 * transformed["pixel_values"][1, :, :60].numpy()[0], np.arange(60), atol=1e-4)


def test_a_tile_may_show_no_object():
    transform = DetectionTransform.from_dict(PLAIN, size=TILE, train=True, **STATISTICS)
    example = example_of([[0, 0, 4, 4]])  # in a corner, which a random tile seldom shows
    counts = [len(transform(example, np.random.default_rng(seed))["labels"]["boxes"]) for seed in range(20)]
    assert 0 in counts
    assert shown(transform(example, np.random.default_rng(counts.index(0)))["pixel_values"]) != (0, 0)


def test_masks_of_classes_are_cut_with_the_image():
    transform = SegmentationTransform.from_dict(PLAIN, size=TILE, num_classes=200, **STATISTICS)
    mask = positions(HEIGHT, WIDTH)[:, :, 0]
    example = {"image": encode(positions(HEIGHT, WIDTH)), "mask": encode(mask), "image_id": 1}
    transformed = transform(example, np.random.default_rng(3))
    top, _ = shown(transformed["pixel_values"])
    np.testing.assert_array_equal(transformed["labels"], np.arange(top, top + TILE)[:, None].repeat(TILE, axis=1))


@pytest.mark.parametrize("tile", [4, "512", 64.5])
def test_tiles_that_make_no_sense(tile):
    with pytest.raises(ValueError, match=r"tile is .*; give the side of the tiles in pixels"):
        DetectionTransform.from_dict({"tile": tile}, size=TILE, train=True, **STATISTICS)
