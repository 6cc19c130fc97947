"""What happens to boxes and masks, against points and pixels moved one by one."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from hf_vlm.data.segmentations import encode_mask, read_segmentation
from hf_vlm.data.transforms.objects import Masks, Objects, Span


def make_objects(boxes):
    num = len(boxes)
    return Objects(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        class_labels=np.arange(num),
        area=np.arange(num, dtype=np.float32) * 10,
        iscrowd=np.arange(num) % 2,
    )


def random_boxes(num, rng):
    corners = np.sort(rng.random((num, 2, 2)), axis=1)
    return corners.reshape(num, 4)  # left, top, right, bottom


def test_select_keeps_rows_together():
    kept = make_objects(random_boxes(5, np.random.default_rng(0))).select(np.array([True, False, False, True, True]))
    np.testing.assert_array_equal(kept.class_labels, [0, 3, 4])
    np.testing.assert_array_equal(kept.area, [0, 30, 40])
    np.testing.assert_array_equal(kept.iscrowd, [0, 1, 0])
    assert len(kept) == 3


def test_turns_and_flips_undo_themselves():
    objects = make_objects(random_boxes(6, np.random.default_rng(0)))
    np.testing.assert_allclose(objects.turn(1).turn(3).boxes, objects.boxes, atol=1e-15)
    np.testing.assert_allclose(objects.turn(4).boxes, objects.boxes, atol=1e-15)
    half = objects.flip(horizontal=True, vertical=True)
    np.testing.assert_allclose(objects.turn(2).boxes, half.boxes, atol=1e-15)
    np.testing.assert_allclose(half.flip(horizontal=True, vertical=True).boxes, objects.boxes, atol=1e-15)


@pytest.mark.parametrize("change", ["turn", "horizontal", "vertical"])
def test_boxes_go_where_their_pixels_go(change):
    objects = make_objects([[0.2, 0.1, 0.5, 0.3]])
    mask = np.zeros((10, 10))
    mask[1:3, 2:5] = 1
    if change == "turn":
        moved, mask = objects.turn(1), np.rot90(mask)
    else:
        horizontal = change == "horizontal"
        moved = objects.flip(horizontal=horizontal, vertical=not horizontal)
        mask = mask[:, ::-1] if horizontal else mask[::-1]
    rows, columns = np.nonzero(mask)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(moved.boxes[0] * 10, expected, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.05, 0.4, 1.0, 1.7, 8.0])
@pytest.mark.parametrize(("length", "output"), [(100, 64), (30, 100), (3, 7)])
def test_span_shows_a_part_of_the_image_on_a_part_of_the_output(length, output, fraction):
    for position in (0.0, 0.3, 1.0):
        span = Span.of_window(length, output, fraction, position)
        assert 0 <= span.source[0] < span.source[1] <= length
        assert 0 <= span.target[0] < span.target[1] <= output
        if fraction <= 1:
            assert span.target == (0, output)
            assert abs(span.source[1] - span.source[0] - max(length * fraction, 1)) <= 0.5
            assert abs(span.source[0] - position * (length - (span.source[1] - span.source[0]))) <= 0.5
        else:
            assert span.source == (0, length)
            assert abs((span.target[1] - span.target[0]) - output / fraction) <= 1.5
        edges = span.map(np.array(span.source) / length)
        np.testing.assert_allclose(edges, span.shown, atol=1e-12)


def test_crop_clips_and_drops_by_the_visible_fraction():
    # The left half is shown: boxes of which all, three quarters, half, a quarter and nothing lies in it.
    boxes = [
        [0.1, 0.1, 0.5, 0.5],
        [0.2, 0.2, 0.6, 0.6],
        [0.3, 0.3, 0.7, 0.7],
        [0.4, 0.4, 0.8, 0.8],
        [0.5, 0.1, 0.9, 0.2],
    ]
    rows, columns = Span.of_window(100, 50, 1.0, 0.0), Span.of_window(100, 50, 0.5, 0.0)
    for min_visible, expected in ((0.0, [0, 1, 2, 3]), (0.3, [0, 1, 2]), (0.51, [0, 1]), (1.0, [0])):
        kept = make_objects(boxes).crop(rows, columns, min_visible=min_visible)
        np.testing.assert_array_equal(kept.class_labels, expected)
    np.testing.assert_allclose(
        make_objects(boxes).crop(rows, columns, min_visible=0.3).boxes,
        [[0.2, 0.1, 1.0, 0.5], [0.4, 0.2, 1.0, 0.6], [0.6, 0.3, 1.0, 0.7]],
    )


def test_no_objects():
    empty = make_objects([])
    rows = columns = Span.of_window(100, 50, 0.5, 0.5)
    for objects in (
        empty.turn(1),
        empty.flip(horizontal=True, vertical=True),
        empty.crop(rows, columns, min_visible=0.3),
    ):
        assert objects.boxes.shape == (0, 4)


HEIGHT, WIDTH = 24, 30


def make_masked(generator, number=4, height=HEIGHT, width=WIDTH):
    """Objects with random masks, and these as pixels (n, height, width) of the image."""
    pixels = np.zeros((number, height, width), bool)
    for mask in pixels:
        top, left = generator.integers(0, (height - 8, width - 8))
        mask[top : top + 8, left : left + 8] = generator.random((8, 8)) < 0.4
    texts = [json.dumps(encode_mask(mask, offset=(0, 0), size=mask.shape)) for mask in pixels]
    masks = Masks.of([read_segmentation(text, height, width) for text in texts])
    return dataclasses.replace(make_objects(masks.frames), masks=masks), pixels


def box_of(mask):
    """Edges (left, top, right, bottom) of the pixels of a mask, relative to its image, by a loop."""
    found = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    (top, left), (bottom, right) = np.min(found, axis=0), np.max(found, axis=0) + 1
    return np.array([left / mask.shape[1], top / mask.shape[0], right / mask.shape[1], bottom / mask.shape[0]])


def test_turned_and_mirrored_masks_are_those_of_the_pixels():
    objects, pixels = make_masked(np.random.default_rng(0))
    for turns in range(4):
        turned, expected = objects.turn(turns), np.rot90(pixels, turns, axes=(1, 2))
        np.testing.assert_array_equal(turned.masks.rasterise(expected.shape[1:]), expected)
        np.testing.assert_allclose(turned.masks.frames, turned.boxes)
    for horizontal, vertical in itertools.product([False, True], repeat=2):
        flipped = objects.flip(horizontal=horizontal, vertical=vertical)
        expected = pixels[:, :: -1 if vertical else 1, :: -1 if horizontal else 1]
        np.testing.assert_array_equal(flipped.masks.rasterise((HEIGHT, WIDTH)), expected)
        for encoded, mask in zip(flipped.masks.encode((HEIGHT, WIDTH)), expected, strict=True):
            np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


def test_cropped_masks_are_those_of_the_pixels():
    generator = np.random.default_rng(0)
    num_cut = num_gone = 0
    for fraction in (0.4, 0.6, 0.9, 1.0, 1.6) * 6:
        objects, pixels = make_masked(generator)
        extents = [max(round(side * fraction), 1) for side in (HEIGHT, WIDTH)]
        rows, columns = (
            Span.of_window(side, extent, fraction, generator.random())
            for side, extent in zip((HEIGHT, WIDTH), extents)
        )
        cropped = objects.crop(rows, columns, min_visible=0.0)
        expected = np.zeros((len(pixels), *extents), bool)
        source = pixels[:, slice(*rows.source), slice(*columns.source)]
        expected[:, slice(*rows.target), slice(*columns.target)] = source
        is_left = expected.any(axis=(1, 2))
        np.testing.assert_array_equal(cropped.class_labels, np.flatnonzero(is_left))
        np.testing.assert_array_equal(cropped.masks.rasterise(tuple(extents)), expected[is_left])
        boxes = [box_of(mask) for mask in expected[is_left]]
        np.testing.assert_allclose(cropped.boxes, np.reshape(boxes, (-1, 4)), atol=1e-12)
        num_gone += np.count_nonzero(~is_left)
        num_cut += np.count_nonzero(expected[is_left].sum((1, 2)) < pixels[is_left].sum((1, 2)))
    assert num_cut > 10
    assert num_gone > 5


def test_the_box_of_an_object_is_kept_where_nothing_cuts_it():
    objects, _ = make_masked(np.random.default_rng(0), number=1)
    annotated = objects.boxes + np.array([-0.01, -0.01, 0.01, 0.01])
    objects = dataclasses.replace(objects, boxes=annotated)
    whole = objects.crop(Span.of_window(HEIGHT, 50, 1, 0), Span.of_window(WIDTH, 50, 1, 0), min_visible=0)
    np.testing.assert_allclose(whole.boxes, annotated)
    middle = Span(WIDTH, (0, round((annotated[0, 0] + annotated[0, 2]) / 2 * WIDTH)), (0, 50), 50)
    half = objects.crop(Span.of_window(HEIGHT, 50, 1, 0), middle, min_visible=0)
    np.testing.assert_allclose(half.boxes, half.masks.frames)


@pytest.mark.parametrize("size", [(48, 60), (37, 41), (12, 15), (16, 40)])
def test_resized_masks_show_the_nearest_pixels(size):
    objects, pixels = make_masked(np.random.default_rng(3))
    for mask, found in zip(pixels, objects.masks.rasterise(size), strict=True):
        expected = [
            [mask[int((y + 0.5) * HEIGHT / size[0]), int((x + 0.5) * WIDTH / size[1])] for x in range(size[1])]
            for y in range(size[0])
        ]
        np.testing.assert_array_equal(found, expected)


def test_objects_without_masks_in_a_set_that_has_some():
    masks = Masks.of([None, None])
    assert masks.are_there.tolist() == [False, False]
    assert not masks.turn(1).flip(horizontal=True, vertical=True).rasterise((4, 5)).any()
    assert coco_mask.area(masks.encode((4, 5))).tolist() == [0, 0]
    assert Masks.of([]).rasterise((4, 5)).shape == (0, 4, 5)
