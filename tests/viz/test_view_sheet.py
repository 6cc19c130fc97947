"""The picture of views shows what the model gets, where it lies in the image."""

import numpy as np
import pytest

from hf_vlm.training.preview import SampledViews
from hf_vlm.viz.sheets import captioned, class_color
from hf_vlm.viz.view_sheet import FRAME, GAP, MASKED, view_sheet


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def sampled_image(channels=3, masks=(), **changes):
    values = {
        "image": np.full((60, 80, channels), 90, dtype=np.uint8),
        "views": [noise(112, 100, channels), noise(112, 100, channels) // 2],
        "local_views": [],
        "boxes": [(10, 20, 30, 40), (0, 0, 60, 60)],
        "masks": list(masks),
    }
    return SampledViews(**values | changes)


def columns(sheet, row, sampled, scale=2):
    """The pixels of each view's tile of a row, without frames, and the position where the columns end."""
    height = sampled.views[0].shape[0] * scale
    band = sheet.height - (sheet.height // (height + 2 * FRAME + GAP)) * (height + 2 * FRAME + GAP)
    top = band + row * (height + 2 * FRAME + GAP)
    left = 2 * GAP + round(sampled.image.shape[1] * (height + 2 * FRAME) / sampled.image.shape[0])
    pixels, tiles = np.asarray(sheet), []
    for _ in (*sampled.views, *sampled.masks):
        width = sampled.views[0].shape[1] * scale
        frame = pixels[top : top + height + 2 * FRAME, left : left + width + 2 * FRAME]
        tiles.append(frame)
        left += width + 2 * FRAME + GAP
    return tiles, top, left


def test_a_tile_is_the_view_in_the_colour_of_its_box():
    sampled = sampled_image()
    sheet = view_sheet([sampled, sampled])
    for row in (0, 1):
        tiles, top, _ = columns(sheet, row, sampled)
        for index, (tile, view) in enumerate(zip(tiles, sampled.views)):
            np.testing.assert_array_equal(tile[FRAME:-FRAME:2, FRAME:-FRAME:2], view)
            np.testing.assert_array_equal(tile[FRAME + 1 : -FRAME : 2, FRAME + 1 : -FRAME : 2], view)
            assert (tile[:FRAME] == class_color(index)).all()
            assert (tile[:, -FRAME:] == class_color(index)).all()
        scale = 232 / 60  # the image is as high as the tiles
        image = np.asarray(sheet)[top : top + 232, GAP : GAP + 309]
        assert tuple(image[round(10 * scale), round(40 * scale)]) == class_color(0)
        assert tuple(image[round(30 * scale), round(20 * scale)]) == class_color(0)
        assert tuple(image[round(20 * scale), 0]) == class_color(1)
        assert tuple(image[round(25 * scale), round(40 * scale)]) == (90, 90, 90)
        assert tuple(image[round(30 * scale), round(70 * scale)]) == (90, 90, 90)


def test_masked_patches_are_grey():
    upper = np.zeros((112, 100), dtype=bool)
    upper[:56] = True
    sampled = sampled_image(masks=[upper, ~upper])
    tiles, _, _ = columns(view_sheet([sampled]), 0, sampled)
    for tile, view, mask in zip(tiles[2:], sampled.views, (upper, ~upper)):
        shown = tile[FRAME:-FRAME:2, FRAME:-FRAME:2]
        assert (shown[mask] == MASKED).all()
        np.testing.assert_array_equal(shown[~mask], view[~mask])


def test_local_views_are_in_columns_at_their_relative_size():
    local = [noise(40, 48, 3) // (index + 1) for index in range(3)]
    sampled = sampled_image(local_views=local, boxes=[(0, 0, 9, 9)] * 5)
    sheet = view_sheet([sampled])
    _, top, left = columns(sheet, 0, sampled)
    pixels = np.asarray(sheet)
    width, height = 2 * 48 + 2 * FRAME, 2 * 40 + 2 * FRAME
    for index, view in enumerate(local):  # two fit above each other, and so they form a row of two
        x, y = left + index % 2 * (width + GAP), top + index // 2 * (height + GAP)
        tile = pixels[y : y + height, x : x + width]
        np.testing.assert_array_equal(tile[FRAME:-FRAME:2, FRAME:-FRAME:2], view)
        assert tuple(tile[0, 0]) == class_color(2 + index)
    assert (pixels[top + height + GAP :, left + width + GAP :] == 255).all()


def test_large_views_are_shown_as_they_are_and_grey_ones_in_grey():
    view = noise(300, 310, 1)
    sampled = sampled_image(channels=1, views=[view], boxes=[(0, 0, 60, 60)])
    tiles, _, _ = columns(view_sheet([sampled]), 0, sampled, scale=1)
    np.testing.assert_array_equal(tiles[0][FRAME:-FRAME, FRAME:-FRAME], view.repeat(3, axis=2))


def test_titles_are_above_their_columns(monkeypatch):
    titles = []
    monkeypatch.setattr(
        "hf_vlm.viz.sheets.captioned",
        lambda picture, text, **options: titles.append(text) or captioned(picture, text, **options),
    )
    view_sheet([sampled_image(local_views=[noise(40, 48, 3)], boxes=[(0, 0, 9, 9)] * 3)] * 2)
    assert titles == ["image", "view 1, 100 x 112", "view 2, 100 x 112", "local views, 48 x 40"]
    titles.clear()
    view_sheet([sampled_image(views=[noise(112, 100, 3)], masks=[np.eye(112, 100) > 2])])
    assert titles == ["image", "view, 100 x 112", "0% masked"]


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        view_sheet([])
