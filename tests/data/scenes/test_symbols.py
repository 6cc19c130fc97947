import itertools

import cv2
import numpy as np
import pytest
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from hf_vlm.data.scenes import symbols
from hf_vlm.data.scenes.canvas import Shape
from hf_vlm.data.scenes.colors import LUMA
from hf_vlm.data.scenes.splits import NUM_SAMPLES
from hf_vlm.data.scenes.symbols import SYMBOLS, Surface, Symbol, Symbols, symbols_of_split

CENTER = symbols.RADIUS - 0.5  # in pixels, of a glyph's square


def test_every_symbol_is_in_the_font_once():
    characters = "".join(SYMBOLS.values())
    assert len(set(characters)) == len(characters)
    in_font = FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf").get_charmap()
    assert [character for character in characters if ord(character) not in in_font] == []


def test_splits_share_only_the_glyphs_of_small_classes():
    parts = [Symbols(split) for split in NUM_SAMPLES]
    for category, (name, characters) in enumerate(SYMBOLS.items()):
        glyphs = [{layers.tobytes() for layers in part.glyphs[category]} for part in parts]
        chosen = [set(symbols_of_split(name, split)) for split in NUM_SAMPLES]
        assert [len(part) for part in glyphs] == [len(part) for part in chosen]  # no two look the same
        if len(characters) < symbols.MIN_SAMPLES_TO_SPLIT:
            assert glyphs[0] == glyphs[1] == glyphs[2]
            assert chosen == 3 * [set(characters)]
        else:
            assert sum(map(len, glyphs)) == len(set.union(*glyphs)) == len(characters)


def test_layers_are_a_silhouette_and_the_lines_on_it():
    """Of a ring, which is drawn in lines, and of a disk with a hole, which is solid."""
    rows, columns = np.mgrid[-200:200, -200:200] + 0.5
    radius = np.hypot(rows, columns)
    ring, disk = (np.uint8(255 * ((radius < 200) & (radius > hole))) for hole in (160, 50))
    square = np.hypot(*(np.mgrid[0:112, 0:112] - CENTER)) * 400 / symbols.GLYPH_LENGTH
    outline = symbols.OUTLINE * 400 / symbols.GLYPH_LENGTH
    for glyph, line, fill in ((ring, square > 165, square < 155), (disk, square < 45, (square > 55) & (square < 195))):
        silhouette, lines = symbols._layers(glyph)
        assert (silhouette[square < 200] > 250).all()  # without its hole
        assert (silhouette[square > 200 + 2 * outline] == 0).all()
        assert (lines[line & (square < 195)] > 250).all()
        assert (lines[fill] < 5).all()
        assert (lines[(square > 206) & (square < 200 + 0.7 * outline)] > 200).all()  # the outline


@pytest.mark.parametrize("size", [18, 31, 48])
def test_a_pose_has_the_size_the_angle_and_the_shift(size):
    bar = np.zeros((2, 112, 112), dtype=np.uint8)
    bar[:, 8:104, 46:66] = 255  # 96 long and 20 wide, upright, in the middle
    item = Symbol(0, bar, np.eye(3))
    for angle, shift in itertools.product((0.0, 20.0, -65.0), (0.0, np.array([0.3, -0.4]))):
        shape = item.pose(size, angle, shift=shift)
        side = shape.opacity.shape[0]
        assert side % 2 == 1
        mass = shape.opacity / 255
        assert mass.sum() == pytest.approx(size * size * 20 / 96, rel=0.02)
        offsets = np.mgrid[0:side, 0:side][::-1] - side // 2  # x, y of each pixel from the middle one
        center = (offsets * mass).sum(axis=(1, 2)) / mass.sum()
        np.testing.assert_allclose(center, np.broadcast_to(shift, 2), atol=0.05)
        deviation = (offsets - center[:, None, None]).reshape(2, -1)
        values, vectors = np.linalg.eigh((mass.ravel() * deviation) @ deviation.T / mass.sum())
        assert np.sqrt(12 * values[1]) == pytest.approx(size, rel=0.03)
        x, y = vectors[:, 1]
        error = np.degrees(np.arctan2(x, y)) - angle  # counterclockwise, from upright
        assert (error + 90) % 180 - 90 == pytest.approx(0, abs=1.5)


def test_shapes_fit_into_their_square_however_they_are_distorted():
    solid = np.zeros((2, 112, 112), dtype=np.uint8)
    solid[:, 3:109, 3:109] = 255  # the most a glyph with its outline can fill
    shear, perspective = symbols.MAX_SHEAR, symbols.MAX_PERSPECTIVE / symbols.RADIUS
    for a, b, c, d in itertools.product(
        (-shear, shear), (-shear, shear), (-perspective, perspective), (0, perspective)
    ):
        item = Symbol(0, solid, np.array([[1, a, 0], [b, 1, 0], [c, d, 1]]))
        for angle in (0.0, 25.0, 45.0):
            opacity = item.pose(48, angle).opacity
            assert opacity[[0, -1]].max() == opacity[:, [0, -1]].max() == 0
            assert max(item.pose(48, angle).cropped().opacity.shape) <= 48 * Symbols.max_extent


def test_a_surface_is_a_gradient_with_lines():
    start, end, line = (np.full(3, value, dtype=np.float32) for value in (40, 200, 10))
    lines = np.zeros((8, 20), dtype=np.uint8)
    lines[:, 10] = 255
    shape = Shape(np.full((8, 20), 255, dtype=np.uint8), lines)
    colors = Surface(start, end, 0.0, None, line, 0.0).colors(shape)
    expected = 40 + 160 * np.arange(20) / 20
    expected[10] = 10
    np.testing.assert_allclose(colors, np.broadcast_to(expected[None, :, None], (8, 20, 3)), atol=1e-3)
    texture = np.zeros((symbols.TEXTURE_SIZE, symbols.TEXTURE_SIZE, 3), dtype=np.float32)
    texture[:24], texture[24:] = 30, -30
    textured = Surface(start, end, 0.0, texture, line, 0.0).colors(shape)
    change = np.where(np.arange(8) < 4, 30, -30)[:, None, None] * (np.arange(20) != 10)[None, :, None]
    np.testing.assert_allclose(textured, colors + change, atol=1e-3)


def test_finishes_have_contrast_in_brightness_and_in_hue():
    objects, rng = Symbols("validation"), np.random.default_rng(0)
    shape = Shape(np.full((24, 24), 255, dtype=np.uint8), np.zeros((24, 24), dtype=np.uint8))
    textured = 0
    for below in ([30, 60, 20], [200, 150, 100], [120, 120, 130], [250, 250, 250]):
        for _ in range(40):
            finish = objects.sample_finish(rng, np.array(below, dtype=float), (0.3, 0.4))
            textured += finish.texture is not None
            mean = finish.colors(shape).mean(axis=(0, 1))
            difference = abs(mean @ LUMA - np.array(below) @ LUMA) / 255
            if finish.texture is None:
                assert 0.3 - 0.01 < difference < 0.4 + 0.01
            assert 0.22 < difference < 0.48  # what a texture brings above white or below black is cut off
            hues = cv2.cvtColor(np.uint8([[finish.start, below]]), cv2.COLOR_RGB2HSV)[0, :, 0] / 180
            assert abs((hues[0] - hues[1] + 0.5) % 1 - 0.5) > 0.13
            assert abs(finish.line @ LUMA - mean @ LUMA) > 40
    assert 0.15 < textured / 160 < 0.45
