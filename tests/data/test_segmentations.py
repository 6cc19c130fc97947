"""Masks as text: against loops over pixels, and the reference implementation of COCO."""

import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from hf_vlm.data.io.decode import _oriented
from hf_vlm.data.segmentations import (
    box_of_segmentation,
    encode_mask,
    orient_segmentation,
    read_segmentation,
    scale_segmentation,
    segmentation_text,
)

HEIGHT, WIDTH = 23, 31
POLYGONS = [
    [[3.2, 4, 20.7, 2.1, 25.5, 17.9, 11, 20.2]],
    [[1, 1, 9, 1, 9, 9, 1, 9], [12.5, 3.5, 16, 3.5, 14, 20]],  # two parts
    [[2, 2, 2, 20, 28, 20, 28, 2, 2, 2, 8, 8, 22, 8, 22, 14, 8, 14, 8, 8]],  # with a hole
    [[-7.5, 5, 12, -3, 40, 11, 9, 60]],  # sticks out on all sides
]


def full(mask, height=HEIGHT, width=WIDTH):
    """A framed mask as pixels of the whole image."""
    image = np.zeros((height, width), bool)
    if mask is not None:
        left, top, right, bottom = np.rint(np.multiply(mask.frame, [width, height] * 2)).astype(int)
        image[top:bottom, left:right] = mask.pixels
    return image


def noise(generator, density):
    """A random mask within the upper left quarter, moved down."""
    height, width = generator.integers(2, 40, 2).tolist()
    mask = np.zeros((height, width), bool)
    mask[: height // 2 + 1, : width // 2 + 1] = generator.random((height // 2 + 1, width // 2 + 1)) < density
    return np.roll(mask, (height // 3, width // 3), (0, 1))


def runs_of(mask):
    """Run lengths by a loop over the pixels, down the columns."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def test_run_lengths_are_those_of_a_loop_and_of_the_reference():
    generator = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.8) * 20:
        mask = noise(generator, density)
        stored = runs_of(mask)
        reference = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
        reference["counts"] = reference["counts"].decode()
        assert encode_mask(mask, offset=(0, 0), size=mask.shape) == reference
        texts = [segmentation_text(runs) for runs in (stored, reference, json.dumps(reference))]
        assert all(texts) == mask.any()
        for text in texts:
            read = read_segmentation(text, *mask.shape)
            np.testing.assert_array_equal(full(read, *mask.shape), mask)
            assert box_of_segmentation(text) == (coco_mask.toBbox(reference).tolist() if mask.any() else None)
            assert read is None or (read.pixels.any(0).all() or read.pixels.any(0)[[0, -1]].all())


def test_a_part_of_an_image_is_encoded_at_its_offset():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    image = np.zeros((HEIGHT, WIDTH), bool)
    image[17:22, 23:30] = mask
    encoded = encode_mask(mask, offset=(17, 23), size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(coco_mask.decode(encoded), image)
    assert coco_mask.decode(encode_mask(mask[:0, :0], offset=(0, 0), size=(HEIGHT, WIDTH))).sum() == 0


@pytest.mark.parametrize("polygons", POLYGONS)
def test_polygons_are_rasterised_as_by_the_reference(polygons):
    reference = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)))
    read = read_segmentation(segmentation_text(polygons), HEIGHT, WIDTH)
    np.testing.assert_array_equal(full(read), reference)
    assert read.pixels.size < HEIGHT * WIDTH or reference.all(axis=0).any()
    assert read.pixels[0].any()
    assert read.pixels[:, -1].any()


def test_one_polygon_may_be_given_without_a_list_and_as_points():
    expected = "[[1.0,2.0,4.0,2.0,4.0,6.5]]"
    points = [[1, 2], [4, 2], [4, 6.5]]
    for stored in ([1, 2, 4, 2, 4, 6.5], points, [points], [[1, 2, 4, 2, 4, 6.5], [1, 1, 2, 2]], expected):
        assert segmentation_text(stored) == expected


# Text that is none or without an end, and runs that are longer than the image, negative or no numbers.
COUNTS = ["~~~", "\u00e9", "o" * 50, [0, 17], [-1, 3], [[1], [2, 3]], ["a"], None, [16], [], ""]
BROKEN = [{"size": [4, 4], "counts": counts} for counts in COUNTS]


@pytest.mark.parametrize(
    "segmentation",
    [
        *(None, [], [[]], "", "a", "null", "7", "[" * 10_000, 7, float("nan"), [[1, 2, 3]], [["a", "b"]]),
        *([[1, 2, 3, 4]], [[1, 2, 3, 4, 5, float("inf")]], {"size": [4], "counts": [0, 1]}, *BROKEN),
        {"size": [2**20, 2**20], "counts": [0, 2**40]},
    ],
)
def test_what_is_no_segmentation_is_no_text(segmentation):
    assert segmentation_text(segmentation) == ""
    assert box_of_segmentation("") is None
    assert read_segmentation("", 4, 4) is None


def test_polygons_outside_of_the_image_or_endless_have_no_pixel():
    assert read_segmentation(segmentation_text([[40, 2, 50, 2, 50, 9]]), HEIGHT, WIDTH) is None
    assert read_segmentation(segmentation_text([[0, 0, 1e12, 0, 1e12, 1e12]]), HEIGHT, WIDTH) is None  # at once


def test_run_lengths_of_another_size_cover_the_image():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    read = read_segmentation(segmentation_text(runs_of(mask)), 30, 60)
    np.testing.assert_allclose(read.frame, (4 / 20, 2 / 10, 10 / 20, 5 / 10))
    assert read_segmentation(segmentation_text(runs_of(mask)), 5, 11) is not None  # halved and rounded
    with pytest.raises(ValueError, match="has run lengths of 20 x 10 pixels, but its image is 10 x 20"):
        read_segmentation(segmentation_text(runs_of(mask)), 20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_oriented_as_images_are(orientation):
    generator = np.random.default_rng(orientation)
    mask = generator.random((HEIGHT, WIDTH)) < 0.3
    corners = np.zeros((HEIGHT, WIDTH), bool)
    corners[3:7, 11:30] = True
    stored = {"runs": (runs_of(mask), mask), "polygon": ([[11, 3, 30, 3, 30, 7, 11, 7]], corners)}
    for segmentation, pixels in stored.values():
        shown = _oriented(pixels.view(np.uint8), orientation)
        text = orient_segmentation(segmentation_text(segmentation), orientation, (WIDTH, HEIGHT))
        np.testing.assert_array_equal(full(read_segmentation(text, *shown.shape), *shown.shape), shown)


def test_polygons_are_scaled_and_run_lengths_need_not_be():
    assert scale_segmentation("[[1.0,2.0,4.0,2.0,4.0,6.0]]", (2, 0.5)) == "[[2.0,1.0,8.0,1.0,8.0,3.0]]"
    runs = segmentation_text({"size": [3, 4], "counts": [2, 5, 5]})
    assert scale_segmentation(runs, (2, 0.5)) == runs
    assert scale_segmentation("", (2, 0.5)) == orient_segmentation("", 6, (3, 4)) == ""
