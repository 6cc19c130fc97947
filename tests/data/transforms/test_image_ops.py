"""Pixel operations against Pillow, scipy and plain formulas."""

import colorsys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from hf_vlm.data.transforms.image_ops import (
    Normalizer,
    adjust_color,
    flip,
    gaussian_blur,
    resize,
    rotate_quarter_turns,
    sample_color_jitter,
    solarize,
)

SLOPE = 0.7
LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def photo():
    return load_sample_images().images[0].copy()  # scikit-learn's cannot be written to


@pytest.fixture(scope="module")
def muted(photo):
    """A crop without the extremes, so that no step clips."""
    return (photo[:120, :160] * 0.45 + 60).astype(np.uint8)


def root_mean_square(a, b):
    return np.sqrt(((a.astype(float) - b) ** 2).mean())


def ramp(height, width):
    """Red encodes the column, green the row, at a slope whose rounding favours neither direction."""
    rows, columns = np.mgrid[:height, :width]
    return np.rint(SLOPE * np.stack([columns, rows, columns + rows], axis=-1) % 256).astype(np.uint8)


@pytest.mark.parametrize("size", [(256, 256), (300, 260), (240, 210), (180, 130), (128, 64), (50, 40), (250, 30)])
def test_resize_keeps_every_point_at_its_position(size):
    resized = resize(ramp(256, 256), size).astype(float)
    rows = (np.arange(size[0]) + 0.5) * 256 / size[0] - 0.5
    columns = (np.arange(size[1]) + 0.5) * 256 / size[1] - 0.5
    inner = np.s_[2:-2, 2:-2]
    for shown, expected in ((resized[..., 0], columns[None, :]), (resized[..., 1], rows[:, None])):
        difference = (shown - SLOPE * expected)[inner]
        assert np.abs(difference).max() <= 1.5
        assert abs(difference.mean()) < 0.2


@pytest.mark.parametrize(
    "size", [(500, 700), (427, 320), (300, 450), (250, 350), (213, 320), (60, 90), (300, 90), (9, 8), (1, 1)]
)
def test_resize_is_pillows(photo, size):
    for image in (photo, np.ascontiguousarray(photo[..., :1])):
        expected = np.asarray(Image.fromarray(image.squeeze()).resize(size[::-1], Image.Resampling.BILINEAR))
        difference = np.abs(resize(image, size).astype(int) - expected.reshape(*size, -1))
        assert difference.max() <= 1
        assert difference.mean() < 0.01


def test_resize_takes_a_part_of_an_image(photo):
    np.testing.assert_array_equal(resize(photo[7:91, 30:141], (50, 40)), resize(photo[7:91, 30:141].copy(), (50, 40)))


def test_resize_does_not_alias():
    stripes = np.zeros((400, 400, 1), dtype=np.uint8)
    stripes[:, ::2] = 255
    for width in (310, 210, 150, 90, 33):
        shrunk = resize(stripes, (400, width))[:, 3:-3].astype(float)
        if width <= 210:  # beyond, half of the frequency can still be shown
            assert shrunk.std() < 32
        assert abs(shrunk.mean() - 127.5) < 2


@pytest.mark.parametrize("num_channels", [1, 2, 4, 7])
@pytest.mark.parametrize("size", [(90, 64), (100, 30), (200, 180)])
def test_resize_treats_all_channels_the_same(num_channels, size):
    image = np.random.default_rng(0).integers(0, 256, (120, 110, num_channels), dtype=np.uint8)
    resized = resize(image, size)
    assert resized.shape == (*size, num_channels)
    for channel in range(num_channels):
        alone = resize(image[..., [channel]], size)[..., 0].astype(int)
        assert np.abs(resized[..., channel] - alone).max() <= 1  # torch rounds differently


def test_flip_and_turn_are_numpys():
    for num_channels in (1, 3):
        image = np.random.default_rng(0).integers(0, 256, (5, 7, num_channels), dtype=np.uint8)
        np.testing.assert_array_equal(flip(image, horizontal=True, vertical=False), image[:, ::-1])
        np.testing.assert_array_equal(flip(image, horizontal=False, vertical=True), image[::-1])
        np.testing.assert_array_equal(flip(image, horizontal=True, vertical=True), image[::-1, ::-1])
        assert flip(image, horizontal=False, vertical=False) is image
        for quarter_turns in (1, 2, 3):
            np.testing.assert_array_equal(rotate_quarter_turns(image, quarter_turns), np.rot90(image, quarter_turns))


def adjust_in_float(image, steps):
    """The definitions, without rounding or clipping in between; no hue."""
    image = image.astype(float)
    for name, factor in steps:
        grey = image @ LUMA
        mixed_with = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey[..., None]}[name]
        image = factor * image + (1 - factor) * mixed_with
    return image


STEPS = [("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.4)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2), (0,), (1,), (2,)])
def test_colour_steps_are_folded_without_loss(muted, order):
    steps = [STEPS[index] for index in order]
    difference = adjust_color(muted, steps) - adjust_in_float(muted, steps)
    assert np.abs(difference).max() <= 0.75  # opencv rounds the matrix
    assert abs(difference.mean()) < 0.2


@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.4), (0.7, 1.3, 0.6), (1.1, 1.1, 0.0)])
def test_colour_steps_are_pillows(muted, factors):
    steps = list(zip(("brightness", "contrast", "saturation"), factors))
    image = Image.fromarray(muted)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        image = enhance(image).enhance(factor)
    difference = np.abs(adjust_color(muted, steps).astype(float) - np.asarray(image))
    assert difference.mean() < 1.6  # Pillow cuts off decimals at each of three steps
    assert difference.max() <= 3
    for name, factor, enhance in (*steps[0], ImageEnhance.Brightness), (*steps[1], ImageEnhance.Contrast):
        once = np.asarray(enhance(Image.fromarray(muted)).enhance(factor))
        assert np.abs(adjust_color(muted, [(name, factor)]).astype(float) - once).max() <= 1


def test_grey_is_saturation_zero(photo):
    grey = adjust_color(photo, [("saturation", 0.0)])
    assert np.abs(grey.astype(float) - np.asarray(Image.fromarray(photo).convert("L"))[..., None]).max() <= 1


def test_no_steps_change_nothing(photo):
    np.testing.assert_array_equal(adjust_color(photo, []), photo)


def shift_hue_in_float(image, shift):
    colors, indices = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    shifted = []
    for color in colors / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        shifted.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    return 255 * np.array(shifted)[indices.ravel()].reshape(image.shape)


@pytest.mark.parametrize("shift", [0.1, -0.037, 0.3, -0.5])
def test_hue_is_that_of_hsv(photo, shift):
    crop = photo[150:250, 200:300]
    exact = shift_hue_in_float(crop, shift)
    difference = np.abs(adjust_color(crop, [("hue", shift)]) - exact)
    assert difference.mean() < 0.6
    assert np.quantile(difference, 0.999) < 6  # 256 hues, as Pillow has

    hue, saturation, value = Image.fromarray(crop).convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + round(shift * 255)) % 256
    pillow = Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
    assert difference.mean() < np.abs(np.asarray(pillow) - exact).mean() + 0.5


def test_contrast_after_hue_uses_the_mean_after_hue(muted):
    steps = [("brightness", 1.2), ("hue", 0.2), ("contrast", 0.6), ("saturation", 1.2)]
    between = shift_hue_in_float(adjust_color(muted, steps[:1]), 0.2)
    difference = np.abs(adjust_color(muted, steps) - adjust_in_float(between, steps[2:]))
    assert difference.mean() < 0.7
    assert np.quantile(difference, 0.999) < 5


def test_jitter_is_sampled_within_its_strengths_in_every_order():
    rng = np.random.default_rng(0)
    sampled = [sample_color_jitter((0.4, 0.3, 0.2, 0.1), rng) for _ in range(600)]
    assert len({tuple(name for name, _ in steps) for steps in sampled}) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = np.array([dict(steps)[name] for steps in sampled])
        assert low <= values.min() < low + 0.01 * (high - low) + 1e-3
        assert high >= values.max() > high - 0.01 * (high - low) - 1e-3
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
    assert {name for name, _ in sample_color_jitter((0, 0.3, 0, 0), rng)} == {"contrast"}


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0, 4.0])
def test_blur_is_scipys(photo, sigma):
    crop = photo[:80, :90]
    radius = int(np.ceil(3 * sigma))
    exact = gaussian_filter(crop.astype(float), (sigma, sigma, 0), mode="mirror", radius=(radius, radius, 0))
    assert np.abs(gaussian_blur(crop, sigma) - exact).max() <= 0.51
    np.testing.assert_array_equal(gaussian_blur(crop[..., :1], sigma), gaussian_blur(crop, sigma)[..., :1])


def test_solarize_is_pillows(photo):
    np.testing.assert_array_equal(solarize(photo), np.asarray(ImageOps.solarize(Image.fromarray(photo), 128)))


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_normalizer_is_the_formula(num_channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, num_channels), dtype=np.uint8)
    mean, std = rng.uniform(0.3, 0.6, num_channels), rng.uniform(0.2, 0.3, num_channels)
    out = np.full((num_channels, 20, 30), np.nan, dtype=np.float32)
    normalize = Normalizer(mean.tolist(), std.tolist(), num_channels=num_channels)
    normalize(image, out)
    np.testing.assert_allclose(out, ((image / 255 - mean) / std).transpose(2, 0, 1), atol=2e-6)
    np.testing.assert_array_equal(normalize.invert(out), image)
    normalize(np.broadcast_to(normalize.fill, (20, 30, num_channels)).copy(), out)
    assert np.abs(out).max() < 0.011  # half a grey level


def test_normalizer_takes_one_number_for_all_channels():
    image = cv2.randu(np.empty((4, 5, 3), dtype=np.uint8), 0, 256)
    one, each = (np.empty((3, 4, 5), dtype=np.float32) for _ in range(2))
    Normalizer(0.5, 0.25, num_channels=3)(image, one)
    Normalizer([0.5] * 3, [0.25] * 3, num_channels=3)(image, each)
    np.testing.assert_array_equal(one, each)


@pytest.mark.parametrize(("mean", "std"), [([0.5, 0.5], 0.5), (0.5, [0.1] * 4), (0.5, 0.0), (0.5, [1, -1, 1])])
def test_normalizer_refuses_numbers_that_do_not_fit(mean, std):
    with pytest.raises(ValueError, match=r"image_mean|image_std"):
        Normalizer(mean, std, num_channels=3)
