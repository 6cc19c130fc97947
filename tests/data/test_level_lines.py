"""Regions of drawn pictures are where they were drawn."""

import cv2
import numpy as np
import pytest

from hf_vlm.data.level_lines import find_regions
from hf_vlm.data.segmentations import read_segmentation, segmentation_text

HEIGHT, WIDTH = 60, 80


def picture(*shapes, channels=3, seed=0):
    """Noise with filled ellipses, each (left, top, right, bottom, value)."""
    image = np.random.default_rng(seed).integers(118, 122, (HEIGHT, WIDTH, channels), dtype=np.uint8)
    for left, top, right, bottom, value in shapes:
        centre, axes = ((left + right - 1) / 2, (top + bottom - 1) / 2), ((right - left) / 2, (bottom - top) / 2)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        inside = ((columns - centre[0]) / axes[0]) ** 2 + ((rows - centre[1]) / axes[1]) ** 2 <= 1
        image[inside] = value
    return image


def pixels(boxes):
    return boxes * [WIDTH, HEIGHT, WIDTH, HEIGHT]


DARK, BRIGHT = (8, 10, 30, 26, 40), (45, 20, 70, 52, 210)


@pytest.mark.parametrize("channels", [1, 3])
def test_regions_are_the_shapes_of_a_picture(channels):
    boxes, scores, _ = find_regions(picture(DARK, BRIGHT, channels=channels))
    found = sorted(pixels(boxes).round().astype(int).tolist())
    np.testing.assert_allclose(found, [DARK[:4], BRIGHT[:4]], atol=1)  # blurred by 3 x 3 pixels
    assert boxes.dtype == scores.dtype == np.float32
    assert scores[0] >= scores[1] >= 0.5 * scores[0]


def test_the_whole_object_is_found_and_not_its_parts():
    parts = (50, 28, 56, 34, 40), (60, 28, 66, 34, 40)
    boxes, *_ = find_regions(picture(BRIGHT, *parts))
    np.testing.assert_allclose(pixels(boxes), [BRIGHT[:4]], atol=1)


def test_faint_shapes_are_left_out_and_cut_off_ones_come_later():
    faint, cut_off = (8, 40, 30, 56, 135), (-30, 4, 28, 36, 210)
    boxes = find_regions(picture(BRIGHT, faint, cut_off))[0]
    np.testing.assert_allclose(pixels(boxes), [BRIGHT[:4], (0, 4, 28, 36)], atol=1)
    assert len(find_regions(picture(BRIGHT, faint, cut_off), max_regions=1)[0]) == 1


def test_scores_do_not_depend_on_contrast():
    full = picture(DARK, BRIGHT).astype(float)
    for factor in (0.5, 0.8):
        scaled = np.clip(120 + factor * (full - 120), 0, 255).astype(np.uint8)
        np.testing.assert_allclose(
            pixels(find_regions(scaled)[0]), pixels(find_regions(full.astype(np.uint8))[0]), atol=1
        )


def test_a_ring_is_one_region_and_colour_is_enough():
    ring = picture((20, 10, 60, 50, 210), (30, 20, 50, 40, 120))
    np.testing.assert_allclose(pixels(find_regions(ring)[0]), [[20, 10, 60, 50]], atol=1)
    flat = np.full((HEIGHT, WIDTH, 3), (90, 120, 90), dtype=np.uint8)
    red = flat.copy()
    red[12:32, 20:44] = (150, 92, 90)  # as bright
    assert (
        abs(int(cv2.cvtColor(red, cv2.COLOR_RGB2GRAY).max()) - int(cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY).max())) < 6
    )
    np.testing.assert_allclose(pixels(find_regions(red)[0]), [[20, 12, 44, 32]], atol=1)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH, 3), (4, 4, 3), (1, 1, 1), (40, 3, 3), (30, 30, 4)])
def test_an_image_of_one_colour_has_no_regions(shape):
    boxes, scores, _ = find_regions(np.full(shape, 90, dtype=np.uint8))
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


def test_no_region_lies_within_or_upon_a_better_one():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    boxes, scores, _ = find_regions(cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))
    assert len(boxes) > 3
    assert (np.diff(scores) <= 0).all()
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    later, better = np.tril_indices(len(boxes), -1)
    assert (shared[later, better] <= 0.9 * areas[later] + 1e-6).all()
    assert (shared <= 0.6 * (areas[:, None] + areas - shared) + 1e-6)[later, better].all()


def test_outlines_enclose_the_pixels_of_the_shapes():
    """Rasterised as masks are, at this size and at twice as many pixels."""
    image = picture(DARK, BRIGHT, (20, 36, 40, 56, 120))
    regions = find_regions(image)
    assert len(regions.outlines) == len(regions.boxes) >= 2
    for outline, box in zip(regions.outlines, regions.boxes):
        np.testing.assert_allclose(pixels(np.concatenate([outline.min(0), outline.max(0)])), pixels(box), atol=0.5)
        truth = (image[..., 0] < 80) if box[0] < 0.4 else (image[..., 0] > 160)
        for factor in (1, 2):
            text = segmentation_text([(outline * [factor * WIDTH, factor * HEIGHT]).ravel().tolist()])
            mask = np.zeros((factor * HEIGHT, factor * WIDTH), bool)
            found = read_segmentation(text, *mask.shape)
            left, top, right, bottom = (round(e * s) for e, s in zip(found.frame, mask.shape[::-1] * 2))
            mask[top:bottom, left:right] = found.pixels
            near = np.ones((2 * factor + 3,) * 2, np.uint8)  # blurred by 3 x 3 pixels, and half a pixel off
            expected = np.uint8(truth.repeat(factor, 0).repeat(factor, 1))
            assert (mask >= cv2.erode(expected, near)).all()
            assert (mask <= cv2.dilate(expected, near)).all()
