"""Rendered pixels are where the boxes are."""

import numpy as np
import pytest
from PIL import Image

from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.sheets import class_color, contact_sheet, side_by_side

BACKGROUND = (10, 20, 30)


def blank(width=400, height=330):
    return Image.new("RGB", (width, height), BACKGROUND)


def changed_pixels(picture):
    """Mask (height, width) of the pixels that differ from the background."""
    return (np.asarray(picture) != BACKGROUND).any(axis=2)


def test_a_box_covers_exactly_its_own_edge_pixels():
    picture = render_detections(blank(), [[50.2, 60.4, 149.6, 159.9]], [""], class_ids=[3])
    assert picture.size == (400, 330)
    expected = np.zeros((330, 400), dtype=bool)
    expected[60:160, 50:150] = True
    expected[62:158, 52:148] = False  # the line lies inside and is two pixels wide
    np.testing.assert_array_equal(changed_pixels(picture), expected)
    assert picture.getpixel((50, 60)) == picture.getpixel((149, 159)) == class_color(3)


def test_a_small_image_is_enlarged_with_its_boxes():
    picture = render_detections(blank(64, 48), [[10, 20, 30, 40]], [""], class_ids=[0])
    assert picture.size == (320, 240)
    rows, columns = np.nonzero(changed_pixels(picture))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (100, 199, 50, 149)
    assert render_detections(blank(64, 48), [], [], scale=1).size == (64, 48)
    assert render_detections(blank(64, 48), [], [], scale=3).size == (192, 144)


def test_boxes_outside_are_clipped_and_none_fails():
    boxes = [[-50, -50, 20, 20], [380, 300, 500, 500], [395, 325, 395, 325], [600, 600, 700, 700], [-9, -9, -5, -5]]
    picture = render_detections(blank(), boxes, [""] * 5, class_ids=range(5))
    assert picture.getpixel((0, 0)) == class_color(4)
    assert picture.getpixel((19, 19)) == class_color(0)
    assert picture.getpixel((380, 329)) == class_color(1)
    assert changed_pixels(picture)[100:290, 30:370].sum() == 0


def test_the_original_is_left_alone_and_arrays_work():
    original = blank()
    picture = render_detections(original, [[50, 60, 150, 160]], ["cat"], scores=[0.5])
    assert not changed_pixels(original).any()
    assert (
        picture.tobytes()
        == render_detections(np.asarray(original), [[50, 60, 150, 160]], ["cat"], scores=[0.5]).tobytes()
    )
    grey = render_detections(np.full((330, 400), 7, dtype=np.uint8), [], [])
    assert grey.getpixel((5, 5)) == (7, 7, 7)


def test_text_lies_above_its_box_in_its_colour():
    picture = render_detections(blank(), [[50, 60, 350, 160]], ["cat"], class_ids=[1])
    above = np.asarray(picture)[30:60]
    label = (above == class_color(1)).all(axis=2)
    assert label.sum() > 200
    rows, columns = np.nonzero(label)
    assert (columns.min(), rows.max()) == (50, 29)  # from the box's left edge, down to its upper edge
    inside = above[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].reshape(-1, 3)
    assert not (inside == BACKGROUND).all(axis=1).any()
    assert ((inside != class_color(1)).any(axis=1)).sum() > 20  # letters
    longer = render_detections(blank(), [[50, 60, 350, 160]], ["cat"], scores=[0.876], class_ids=[1])
    assert changed_pixels(longer)[30:60].sum() > changed_pixels(picture)[30:60].sum()


def test_texts_do_not_lie_on_each_other():
    boxes = [[100, 100, 300, 250], [102, 101, 298, 249], [104, 102, 296, 248]]
    picture = render_detections(blank(), boxes, ["first", "second", "third"], class_ids=[0, 1, 2])
    pixels = np.asarray(picture)
    alone = [
        (np.asarray(render_detections(blank(), [box], [name], class_ids=[i])) == class_color(i)).all(axis=2).sum()
        for i, (box, name) in enumerate(zip(boxes, ["first", "second", "third"], strict=True))
    ]
    for i in range(3):  # next to nothing of each label is hidden: only lines cross
        assert (pixels == class_color(i)).all(axis=2).sum() > 0.6 * alone[i]


def test_texts_that_would_hide_the_picture_are_left_out():
    boxes = [[x, y, x + 20, y + 20] for x in range(10, 390, 40) for y in range(10, 320, 40)]
    names = ["a long name"] * len(boxes)
    crowded = render_detections(blank(), boxes, names, class_ids=[1] * len(boxes))
    plain = render_detections(blank(), boxes, [""] * len(boxes), class_ids=[1] * len(boxes))
    assert crowded.tobytes() == plain.tobytes()
    assert render_detections(blank(), boxes[:9], names[:9], class_ids=[1] * 9).tobytes() != plain.tobytes()


def test_text_stays_in_the_picture():
    picture = render_detections(blank(), [[380, 0, 400, 330]], ["a long name of a class"], scores=[0.5], class_ids=[2])
    columns = np.nonzero(changed_pixels(picture).any(axis=0))[0]
    assert columns.max() == 399
    assert columns.min() < 300


def test_colours_are_fixed_and_differ():
    assert class_color("cat") == class_color("cat")
    colors = [np.array(class_color(i), dtype=int) for i in range(10)]
    distances = [np.abs(a - b).sum() for i, a in enumerate(colors) for b in colors[:i]]
    assert min(distances) > 60
    picture = render_detections(blank(), [[50, 60, 150, 160]], [""], class_ids=np.array([4]))
    assert picture.getpixel((50, 60)) == class_color(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["a", "b"]}, "2 names for 1 boxes"),
        ({"scores": [0.1, 0.2]}, "2 scores for 1 boxes"),
        ({"class_ids": []}, "0 class_ids for 1 boxes"),
        ({"scale": 0}, "scale is 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        render_detections(blank(), [[0, 0, 5, 5]], **({"names": ["a"]} | options))


def test_side_by_side_keeps_both_pictures():
    left, right = Image.new("RGB", (100, 80), (255, 0, 0)), Image.new("RGB", (50, 40), (0, 0, 255))
    sheet = side_by_side(left, right, captions=("left", "right"))
    band = sheet.height - 80
    assert sheet.width == 100 + 4 + 100  # the right one is brought to the height of the left one
    pixels = np.asarray(sheet)
    assert (pixels[band:, :100] == (255, 0, 0)).all()
    assert (pixels[band:, 104:] == (0, 0, 255)).all()
    assert (pixels[band:, 100:104] == 255).all()
    assert (pixels[:band, :100] < 128).any()
    assert (pixels[:band, 104:] < 128).any()


def test_contact_sheet_fills_row_by_row():
    pictures = [Image.new("RGB", (20, 10), (i, i, i)) for i in range(5)]
    sheet = np.asarray(contact_sheet(pictures, columns=2, gap=3))
    assert sheet.shape == (3 * 13 + 3, 2 * 23 + 3, 3)
    for i in range(5):
        top, left = 3 + i // 2 * 13, 3 + i % 2 * 23
        assert (sheet[top : top + 10, left : left + 20] == i).all()
    assert (sheet[29:39, 26:46] == 255).all()
    assert contact_sheet(pictures[:1], columns=4, gap=3).size == (26, 16)
    with pytest.raises(ValueError, match="not 0 and 2"):
        contact_sheet([], columns=2)
