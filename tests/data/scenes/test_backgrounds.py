import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from hf_vlm.data.scenes.backgrounds import (
    BACKGROUNDS,
    PALETTES,
    SPLIT_STRIPS,
    STRIP_WIDTH,
    landscapes,
    photographs,
    sample_background,
)
from hf_vlm.data.scenes.splits import NUM_SAMPLES


def test_splits_have_no_strip_in_common():
    for picture in range(2):
        numbers = [number for strips in SPLIT_STRIPS.values() for number in strips[picture]]
        assert sorted(numbers) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_splits_have_no_pixels_in_common(name):
    """Also not upside down. Rows of a strip's full width are unique but where they are of one colour."""
    rows = []
    for split in NUM_SAMPLES:
        strips = BACKGROUNDS[name].load(split)
        assert all(strip.shape[1:] == (STRIP_WIDTH, 3) and strip.dtype == np.uint8 for strip in strips)
        rows.append({row.tobytes() for strip in strips for row in strip if row.std(axis=0).max() > 1})
    assert min(map(len, rows)) > 500
    assert sum(map(len, rows)) == len(set.union(*rows))


def test_photographs_are_cut_without_change():
    china, flower = load_sample_images().images
    strips = photographs("train")
    np.testing.assert_array_equal(strips[0], china[:, :128])
    np.testing.assert_array_equal(strips[2], china[:, 384:512])
    np.testing.assert_array_equal(strips[4], flower[:, 256:384])
    assert len(strips) == 6


@pytest.mark.parametrize("split", NUM_SAMPLES)
def test_landscapes_are_photographs_and_terrain_of_many_colours(split):
    strips = landscapes(split)
    upright = strips[: len(strips) // 2]
    for strip, turned in zip(upright, strips[len(strips) // 2 :], strict=True):
        np.testing.assert_array_equal(strip[::-1], turned)
    of_photos = sum(any(strip is photo for photo in photographs(split)) for strip in upright)
    assert 0.2 < of_photos / len(upright) < 0.6
    terrain = upright[of_photos:]
    assert len(terrain) == len(PALETTES) * sum(map(len, SPLIT_STRIPS[split]))
    # Palettes differ by more than the light does, and no strip is of one colour or burnt out.
    means = np.array([strip.mean(axis=(0, 1)) for strip in terrain[: len(PALETTES)]])
    assert np.ptp(means, axis=0).max() > 60
    for strip in terrain:
        assert strip.std() > 20
        assert ((strip == 0) | (strip == 255)).mean() < 0.25


def test_a_view_has_the_size_asked_for_and_moves_with_the_offset():
    gradient = np.tile(np.arange(STRIP_WIDTH, dtype=np.uint8)[None, :, None], (300, 1, 3))
    view = sample_background(np.random.default_rng(0), (gradient,), size=48, min_crop=64)
    image = view(0.0)
    assert (image.shape, image.dtype) == ((48, 48, 3), np.float32)
    across = np.diff(image[:, :, 0].mean(axis=0))  # grey levels of a pixel of the scene: 64..128 pixels in 48
    assert 0.9 * 0.8 * 64 / 48 - 0.1 < np.abs(across.mean()) < 1.1 * 1.1 * 128 / 48 + 0.1
    np.testing.assert_array_equal(image, view(0.0))
    assert not np.array_equal(image, view(np.array([0.1, 0.0])))
