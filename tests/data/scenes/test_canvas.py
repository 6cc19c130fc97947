import numpy as np
import pytest

from hf_vlm.data.scenes.canvas import Canvas, Shape
from hf_vlm.data.scenes.digits import Uniform


class Surface(Uniform):
    shadow = 0.5


def square(side):
    return Shape(np.full((side, side), 255, dtype=np.uint8))


def grey(value, finish=Uniform):
    return finish(np.full(3, value, dtype=np.float32))


def test_overlap_is_bounded_by_the_settings():
    shape, opacity = square(10), square(10).opacity
    canvas = Canvas(np.zeros((32, 32, 3), dtype=np.float32))
    paint = {"finish": grey(255), "category": 1}
    canvas.paint(shape, 0, 0, track_id=0, **paint)
    assert canvas.is_free(opacity, 10, 0, max_overlap=0.0)
    assert not canvas.is_free(opacity, 9, 0, max_overlap=0.09)
    assert canvas.is_free(opacity, 9, 0, max_overlap=0.1)
    canvas.paint(shape, 7, 0, track_id=1, **paint)  # leaves 70 of 100 pixels
    assert not canvas.is_free(opacity, 0, 9, max_overlap=0.3)  # 7 more
    scene = canvas.scene()
    assert scene.areas.tolist() == [70, 100]
    assert scene.boxes.tolist() == [[0, 0, 7, 10], [7, 0, 10, 10]]


def test_painting_cuts_off_what_lies_outside():
    canvas = Canvas(np.zeros((8, 8, 3), dtype=np.float32))
    canvas.paint(square(5), -2, -3, finish=grey(255), category=0, track_id=0)
    canvas.paint(square(5), 6, 5, finish=grey(255), category=1, track_id=1)
    expected = np.zeros((8, 8), dtype=np.uint8)
    expected[:2, :3], expected[5:, 6:] = 1, 2
    np.testing.assert_array_equal(canvas.scene().instance_mask, expected)
    np.testing.assert_array_equal(canvas.scene().image[:, :, 0], 255 * (expected > 0))


def test_hidden_objects_leave_the_truth():
    canvas = Canvas(np.zeros((16, 16, 3), dtype=np.float32))
    canvas.paint(square(10), 0, 0, finish=grey(200), category=4, track_id=0)
    canvas.paint(square(10), 0, 1, finish=grey(200), category=5, track_id=1)  # 10 of 100 pixels of the first remain
    scene = canvas.scene()
    assert (scene.categories.tolist(), scene.track_ids.tolist()) == ([5], [1])
    assert scene.instance_mask.max() == 1
    assert scene.semantic_mask[0].max() == 0


def test_a_shadow_darkens_but_is_no_part_of_the_object():
    canvas = Canvas(np.full((40, 40, 3), 200, dtype=np.float32))
    canvas.paint(square(12), 10, 10, finish=grey(250, Surface), category=0, track_id=0)
    scene = canvas.scene()
    inside = np.zeros((40, 40), dtype=bool)
    inside[10:22, 10:22] = True
    np.testing.assert_array_equal(scene.instance_mask == 1, inside)
    assert scene.boxes.tolist() == [[10, 10, 12, 12]]
    assert (scene.image[inside] == 250).all()
    # The shadow ends at 24, blurred: next to the object it is nearly as dark as it gets.
    assert int(scene.image[16, 22, 0]) == pytest.approx(110, abs=12)
    assert scene.image[16, 8, 0] > 195
    assert (scene.image[:5] == 200).all()
    assert (scene.image[30:] == 200).all()


def test_a_shadow_beyond_the_image_is_cut_off():
    canvas = Canvas(np.full((16, 16, 3), 200, dtype=np.float32))
    for corner in ((0, 0), (8, 8), (-3, 11)):
        canvas.paint(square(8), *corner, finish=grey(250, Surface), category=0, track_id=0)
    assert canvas.scene().areas.tolist() == [64, 64, 25]


def test_colours_of_a_shape_are_cut_off_with_it():
    class Columns(Uniform):
        def colors(self, shape):
            return np.broadcast_to(np.arange(5, dtype=np.float32)[None, :, None] * 10, (5, 5, 3))

    canvas = Canvas(np.full((8, 8, 3), 200, dtype=np.float32))
    canvas.paint(square(5), -2, 6, finish=grey(0, Columns), category=0, track_id=0)
    assert canvas.scene().image[6:, :4, 0].tolist() == [[20, 30, 40, 200]] * 2


def test_a_cropped_shape_has_no_empty_border():
    opacity = np.zeros((7, 9), dtype=np.uint8)
    opacity[2:5, 1:8] = np.arange(1, 22).reshape(3, 7)
    shape = Shape(opacity, opacity // 2).cropped()
    np.testing.assert_array_equal(shape.opacity, np.arange(1, 22).reshape(3, 7))
    np.testing.assert_array_equal(shape.lines, np.arange(1, 22).reshape(3, 7) // 2)
    assert Shape(opacity).cropped().lines is None
