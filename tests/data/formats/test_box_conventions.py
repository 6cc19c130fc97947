"""Boxes of another convention than their format's are found by all of them together, and right ones never are."""

import numpy as np
import pytest

from hf_vlm.data.formats.annotations import check_boxes
from hf_vlm.data.formats.box_conventions import CENTERS, CORNERS, XYWH, check_convention

SIZE = np.array([200.0, 100.0])


def sample_boxes(number, max_side=0.5, seed=0):
    """Corners (n, 4) of boxes anywhere in images of 200 x 100."""
    generator = np.random.default_rng(seed)
    sides = generator.uniform(0.05, max_side, (number, 2)) * SIZE
    low = generator.uniform(0, 1, (number, 2)) * (SIZE - sides)
    return np.concatenate([low, low + sides], axis=1)


def stored_as(convention, corners):
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate(
        {CORNERS: [low, high], XYWH: [low, high - low], CENTERS: [(low + high) / 2, high - low]}[convention], axis=1
    )


def judge(values, declared=XYWH, size=SIZE):
    return check_convention(values, width=size[0], height=size[1], source="here", declared=declared)


@pytest.mark.parametrize("declared", [XYWH, CORNERS, CENTERS])
@pytest.mark.parametrize("size", [SIZE, np.ones(2)])
def test_boxes_of_the_declared_convention_are_right(declared, size):
    for number in (1, 5, 300):
        for max_side in (0.1, 0.5, 1.0):
            values = stored_as(declared, sample_boxes(number, max_side)) * np.tile(size / SIZE, 2)
            assert judge(values, declared, size) is None


@pytest.mark.parametrize(
    ("declared", "stored"), [(XYWH, CORNERS), (CENTERS, CORNERS), (CORNERS, XYWH), (CORNERS, CENTERS)]
)
def test_many_boxes_of_another_convention_are_refused_and_few_are_named(declared, stored):
    values = stored_as(stored, sample_boxes(300))
    with pytest.raises(ValueError, match=f"^here: .* as {declared}, while 100% do as {stored}, .* convert them"):
        judge(values, declared)
    assert f"as {stored}: if they are that" in judge(values[:6], declared)


@pytest.mark.parametrize("max_side", [0.15, 0.5])
@pytest.mark.parametrize(("declared", "stored"), [(XYWH, CENTERS), (CENTERS, XYWH)])
def test_centres_and_low_corners_are_told_apart_by_the_boxes_near_edges(declared, stored, max_side):
    values = stored_as(stored, sample_boxes(300, max_side))
    with pytest.raises(ValueError, match=f"while 100% do as {stored}, which they therefore are"):
        judge(values, declared)


def test_centres_are_certain_by_three_boxes():
    inner = np.tile([60.0, 40, 100, 60], (17, 1))  # which lie inside as centres and as low corners
    edge = np.tile([170.0, 70, 200, 100], (3, 1))
    values = stored_as(CENTERS, np.concatenate([inner, edge]))
    assert f"2 of 19 boxes do not lie in their image as {XYWH}, while 100% do as {CENTERS}" in judge(values[:19])
    with pytest.raises(ValueError, match=f"3 of 20 boxes .* as {CENTERS}, which they therefore are"):
        judge(values)


def test_all_conventions_are_named_that_boxes_may_be_of():
    values = np.tile([100.0, 50, 40, 20], (12, 1))  # in the middle, where centres and low corners fit alike
    with pytest.raises(
        ValueError, match=f"12 of 12 boxes .* as {CORNERS}, while 100% do as {XYWH} or {CENTERS}, which"
    ):
        judge(values, CORNERS)


def test_large_boxes_of_which_some_stick_out_are_no_corners():
    """They would all lie inside as corners, as images turned by a quarter have them."""
    values = np.tile([20.0, 10, 160, 80], (40, 1))
    values[:8, 2] = 190
    assert f"8 of 40 boxes do not lie in their image as {XYWH}" in judge(values)


def test_slips_do_not_make_another_convention():
    boxes = stored_as(XYWH, sample_boxes(300))
    boxes[:10, 2:] *= 3
    boxes[10:20, 0] = np.nan
    assert judge(boxes) is None
    one = np.array([[100.0, 10, 120, 30]])
    assert "1 of 1 boxes" in judge(one)


@pytest.mark.parametrize("declared", [XYWH, CORNERS])
@pytest.mark.parametrize("size", [SIZE, [np.inf, np.inf]])
def test_fractions_are_no_pixels_even_in_images_of_unknown_size(declared, size):
    values = stored_as(declared, sample_boxes(4) / np.tile(SIZE, 2))
    with pytest.raises(ValueError, match=f"^here: .* its 4 boxes lie in 0 to 1: .* {declared} in pixels; multiply"):
        judge(values, declared, size)


def test_boxes_of_smaller_images_are_named():
    boxes = stored_as(XYWH, sample_boxes(30))
    assert judge(boxes) is None
    assert "all 30 boxes lie in the upper left 49% x 50%" in judge(boxes / 2)
    assert judge(boxes[:10] / 2) is None


def test_all_formats_judge_when_they_check_boxes(caplog):
    corners = sample_boxes(30)
    options = {"width": np.full(30, 200.0), "height": np.full(30, 100.0), "class_names": ["cat"], "source": "here"}
    with pytest.raises(ValueError, match=f"while 100% do as {CORNERS}"):
        check_boxes(corners, np.zeros(30, int), name_of=str, **options)
    caplog.clear()
    assert check_boxes(stored_as(XYWH, corners), np.zeros(30, int), name_of=str, **options).all()
    assert not caplog.text
