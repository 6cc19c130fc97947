"""What happens to boxes, against points moved one by one."""

import numpy as np
import pytest

from hf_vlm.data.transforms.objects import Objects, Span


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
