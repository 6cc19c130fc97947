"""The picture of maps shows the values of each patch where it lies in the image."""

import matplotlib as mpl
import numpy as np
import pytest

from hf_vlm.features.maps import FeatureMaps
from hf_vlm.viz.map_sheet import GAP, HEIGHT, map_sheet
from hf_vlm.viz.sheets import captioned, class_color

GRID = 4, 7
GENERATOR = np.random.default_rng(0)
COLORS = GENERATOR.random((2, *GRID, 3), dtype=np.float32)
ATTENTION = GENERATOR.random((2, 3, *GRID), dtype=np.float32)
IMAGES = [np.full((100, 200, 3), 50, dtype=np.uint8), np.full((60, 30, 1), 90, dtype=np.uint8)]
WIDTHS = [2 * HEIGHT, HEIGHT // 2]


@pytest.fixture
def texts(monkeypatch):
    found = []

    def noted(picture, text, **options):
        found.append(text)
        return captioned(picture, text, **options)

    for module in ("sheets", "map_sheet"):
        monkeypatch.setattr(f"hf_vlm.viz.{module}.captioned", noted)
    return found


def tiles(sheet, row, num_columns, width=None):
    """Pixels of the full-size tiles of a row; columns are as wide as the first, wider image."""
    step = HEIGHT + 20 + GAP
    top = sheet.height - (2 - row) * step
    width = WIDTHS[row] if width is None else width
    lefts = [GAP + column * (WIDTHS[0] + GAP) for column in range(num_columns)]
    return [np.asarray(sheet)[top : top + HEIGHT, left : left + width] for left in lefts]


def at_patches(tile, grid=GRID):
    """The pixel in the middle of each patch."""
    rows = ((np.arange(grid[0]) + 0.5) * tile.shape[0] / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * tile.shape[1] / grid[1]).astype(int)
    return tile[rows][:, columns]


def assert_heat(tile, values):
    """The tile shows the values in matplotlib's inferno, whose table differs from opencv's by a level or two."""
    fractions = (values - values.min()) / (values.max() - values.min())
    expected = 255 * mpl.colormaps["inferno"](np.round(255 * fractions).astype(int))[:, :, :3]
    np.testing.assert_allclose(at_patches(tile), expected, atol=2)


def test_components_and_attention_lie_where_the_patches_do(texts):
    maps = FeatureMaps(colors=COLORS, attention=ATTENTION, similarity=None)
    sheet = map_sheet(IMAGES, maps)
    for row in (0, 1):
        image, components, mean = tiles(sheet, row, 3)
        assert (image == IMAGES[row][0, 0]).all()
        np.testing.assert_array_equal(at_patches(components), np.round(255 * COLORS[row]))
        assert_heat(mean, ATTENTION[row].mean(axis=0))
        heads, step = tiles(sheet, row, 4)[3], ((WIDTHS[row] - GAP) // 2 + GAP, (HEIGHT - GAP) // 2 + GAP)
        for head in range(3):
            left, top = head % 2 * step[0], head // 2 * step[1]
            tile = heads[top : top + step[1] - GAP, left : left + step[0] - GAP]
            assert_heat(tile, ATTENTION[row, head])
    even = ATTENTION.mean(axis=1) * GRID[0] * GRID[1]
    ranges = [f"{values.min():.2f} to {values.max():.2f} x even" for values in even]
    assert texts == [*ranges, "image", "principal components", "attention", "of 3 heads"]


def test_similarity_takes_the_place_of_attention(texts):
    similarity = ATTENTION[:, 0] - 0.5
    maps = FeatureMaps(colors=COLORS, attention=None, similarity=similarity)
    sheet = map_sheet(IMAGES, maps)
    for row in (0, 1):
        assert_heat(tiles(sheet, row, 3)[2], similarity[row])
    assert texts[0] == f"{similarity[0].min():.2f} to {similarity[0].max():.2f}"
    assert texts[2:] == ["image", "principal components", "similarity to mean"]


def test_a_chosen_patch_is_marked(texts):
    maps = FeatureMaps(colors=COLORS, attention=None, similarity=ATTENTION[:, 0], patch=(1, 2))
    sheet = map_sheet(IMAGES, maps)
    assert texts[-1] == "similarity to patch 1, 2"
    image = tiles(sheet, 0, 1)[0]
    box = (image != 50).any(axis=2)
    rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
    assert (rows[0], rows[-1] + 1) == (HEIGHT // 4, HEIGHT // 2)
    assert (columns[0], columns[-1] + 1) == (2 * WIDTHS[0] // 7, 3 * WIDTHS[0] // 7)
    assert tuple(image[rows[0], columns[0]]) == class_color(0)


def test_long_images_are_as_wide_as_two_high_ones():
    image = np.full((20, 400, 5), 7, dtype=np.uint8)  # of five channels the first is shown
    maps = FeatureMaps(colors=COLORS[:1], attention=None, similarity=ATTENTION[:1, 0])
    sheet = map_sheet([image], maps)
    assert sheet.width == 3 * 448 + 4 * GAP
    assert (np.asarray(sheet)[:, : 448 + GAP] == 7).all(axis=2).sum() == 448 * 22


def test_equal_values_are_dark_and_no_image_is_an_error():
    maps = FeatureMaps(colors=COLORS, attention=None, similarity=np.full((2, *GRID), 0.3, dtype=np.float32))
    assert (tiles(map_sheet(IMAGES, maps), 0, 3)[2] < 5).all()
    with pytest.raises(ValueError, match="no image"):
        map_sheet([], maps)
