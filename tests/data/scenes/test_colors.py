import colorsys

import numpy as np
import pytest

from hf_vlm.data.scenes.colors import LUMA, hue_at, hue_of, sample_brightness


@pytest.mark.parametrize("hue", [0.0, 0.11, 1 / 3, 0.5, 0.66, 0.95, 1.2])
@pytest.mark.parametrize("brightness", [10.0, 90.0, 128.0, 240.0])
def test_a_hue_has_the_brightness_asked_for(hue, brightness):
    color = hue_at(hue, brightness)
    assert (color.min() >= 0, color.max() <= 255.01) == (True, True)
    assert color @ LUMA == pytest.approx(brightness, abs=0.01)
    assert hue_of(color) == pytest.approx(hue % 1, abs=1e-3)
    # It is as saturated as can be: some channel is at an end of the range.
    assert min(color.min(), 255 - color.max()) == pytest.approx(0, abs=0.01)
    assert colorsys.rgb_to_hsv(*color.tolist())[0] == hue_of(color)


def test_brightness_beyond_the_range_is_black_or_white():
    np.testing.assert_array_equal(hue_at(0.3, -20.0), [0, 0, 0])
    np.testing.assert_allclose(hue_at(0.3, 300.0), [255, 255, 255])


def test_brightness_differs_by_the_contrast_on_a_side_that_has_room():
    rng = np.random.default_rng(0)
    for below in (0.0, 60.0, 128.0, 200.0, 255.0):
        sampled = np.array([sample_brightness(rng, below, (0.2, 0.3), low=40, high=230) for _ in range(200)])
        assert (np.abs(sampled - below) >= 0.2 * 255 - 1e-9).all()
        assert (np.abs(sampled - below) <= 0.3 * 255 + 1e-9).all()
        assert (sampled >= 40).all()
        assert (sampled <= 230).all()
        if below == 128.0:
            assert 0.35 < (sampled < below).mean() < 0.65
