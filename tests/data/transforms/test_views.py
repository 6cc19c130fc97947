"""Views: which parameters are sampled, where a view is cut out, and what becomes of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from hf_vlm.data.transforms.image_ops import adjust_color, gaussian_blur, resize, solarize
from hf_vlm.data.transforms.views import (
    EvalTransform,
    ViewParameters,
    ViewSettings,
    ViewTransform,
    crop_box,
    render_view,
    required_size,
    sample_view,
)

NORMALIZE = {"image_mean": 0.5, "image_std": 0.25}
SIMCLR = {
    "num_views": 2,
    "size": 32,
    "crop_scale": [0.2, 1.0],
    "flip_probability": 0.5,
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "jitter_probability": 0.8,
    "grayscale_probability": 0.2,
    "blur_probability": 0.5,
}


def encode(image, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def ramp(height, width):
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def noise(*shape):
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def denormalize(pixel_values):
    return (pixel_values.numpy() * 0.25 + 0.5) * 255


def plain_view(**changes):
    return ViewParameters(**{"area": 0.5, "ratio": 1.0, "y": 0.5, "x": 0.5, **changes})


@pytest.mark.parametrize("size", [(200, 250), (250, 110), (64, 64)])
@pytest.mark.parametrize("view", [(48, 48), (32, 64)])
def test_crops_have_the_sampled_area_shape_and_position(size, view):
    settings = ViewSettings(size=view, crop_scale=(0.2, 0.6))
    rng = np.random.default_rng(0)
    for _ in range(200):
        parameters = sample_view(settings, rng)
        top, left, height, width = crop_box(settings, parameters, *size)
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        ratio = parameters.ratio * view[1] / view[0]
        assert abs(width - height * ratio) <= 0.5 + 0.5 * ratio + 1e-6
        assert 0.75 - 1e-9 <= parameters.ratio <= 4 / 3 + 1e-9
        largest = min(size[1] / size[0] / ratio, ratio * size[0] / size[1])
        expected = min(0.2, largest) + parameters.area * (min(0.6, largest) - min(0.2, largest))
        assert abs(height * width / (size[0] * size[1]) - expected) < 0.015
        assert abs(top - parameters.y * (size[0] - height)) <= 0.5
        assert abs(left - parameters.x * (size[1] - width)) <= 0.5


def random_resized_crop(scale, ratio, height, width, rng):
    """torchvision's sampling: (top, left, height, width) relative to the image."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        sampled = np.exp(rng.uniform(*np.log(ratio)))
        crop_width, crop_height = round(np.sqrt(area * sampled)), round(np.sqrt(area / sampled))
        if crop_width <= width and crop_height <= height:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return top, left, crop_height, crop_width
    return None


def figures_of_crops(boxes, height, width):
    top, left, crop_height, crop_width = np.array(boxes, dtype=float).T
    return {
        "area": crop_height * crop_width / (height * width),
        "ratio": np.log(crop_width / crop_height),
        "y": (top + crop_height / 2) / height,
        "x": (left + crop_width / 2) / width,
    }


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.2, 1.0)])
def test_crops_are_distributed_as_torchvisions(scale):
    height = width = 600
    settings = ViewSettings(size=64, crop_scale=scale)
    rng = np.random.default_rng(0)
    ours = [crop_box(settings, sample_view(settings, rng), height, width) for _ in range(4000)]
    theirs = [random_resized_crop(scale, (3 / 4, 4 / 3), height, width, rng) for _ in range(4000)]
    expected = figures_of_crops([box for box in theirs if box is not None], height, width)
    for name, values in figures_of_crops(ours, height, width).items():
        if scale[1] < 0.75:  # every crop fits
            assert ks_2samp(values, expected[name]).pvalue > 1e-3, name
        else:  # we sample areas that fit, they sample again, which favours squares
            assert abs(values.mean() - expected[name].mean()) < 0.03, name
            assert 0.9 < values.std() / expected[name].std() < 1.15, name


def test_required_size_is_enough_for_every_shape_and_no_waste():
    rng = np.random.default_rng(0)
    waste = []
    for _ in range(3000):
        view = (int(rng.integers(16, 300)), int(rng.integers(16, 300)))
        scale = sorted(rng.uniform(0.05, 1.0, 2))
        settings = ViewSettings(size=view, crop_scale=tuple(scale), crop_ratio=(0.5, 2.0))
        parameters = sample_view(settings, rng)
        height, width = required_size(settings, parameters)
        # The smallest image of any shape that satisfies the bound.
        stretch = np.exp(rng.uniform(0, 2))
        height, width = (height, round(width * stretch)) if rng.random() < 0.5 else (round(height * stretch), width)
        _, _, crop_height, crop_width = crop_box(settings, parameters, height, width)
        assert crop_height >= view[0] - 1  # rounding of the crop
        assert crop_width >= view[1] - 1
        waste.append(min(crop_height / view[0], crop_width / view[1]))
    assert np.median(waste) < 1.3


@pytest.mark.parametrize("view", [(96, 96), (40, 60), (200, 200)])
def test_rendered_pixels_come_from_the_crop(view):
    settings = ViewSettings(size=view)
    rng = np.random.default_rng(1)
    image = ramp(240, 250)
    for _ in range(10):
        parameters = sample_view(settings, rng)
        top, left, height, width = crop_box(settings, parameters, 240, 250)
        rendered = render_view(image, settings, parameters).astype(float)
        rows = top + (np.arange(view[0]) + 0.5) * height / view[0] - 0.5
        columns = left + (np.arange(view[1]) + 0.5) * width / view[1] - 0.5
        columns = columns[::-1] if parameters.flip else columns
        inner = np.s_[2:-2, 2:-2]
        assert np.abs(rendered[..., 0] - columns[None, :])[inner].max() <= 1.5
        assert np.abs(rendered[..., 1] - rows[:, None])[inner].max() <= 1.5


def test_vertical_flip_turns_the_view_upside_down():
    settings = ViewSettings(size=(20, 20))
    image = noise(50, 60, 3)
    upright = render_view(image, settings, plain_view())
    np.testing.assert_array_equal(render_view(image, settings, plain_view(vertical_flip=True)), upright[::-1])
    both = render_view(image, settings, plain_view(flip=True, vertical_flip=True))
    np.testing.assert_array_equal(both, upright[::-1, ::-1])


def test_operations_follow_each_other_in_the_documented_order():
    settings = ViewSettings(size=(20, 20), crop_scale=(1, 1))
    image = noise(40, 40, 3)
    color = (("contrast", 0.7), ("hue", 0.1), ("brightness", 1.2))
    rendered = render_view(image, settings, plain_view(color=color, sigma=1.2, solarize=True))
    expected = solarize(gaussian_blur(adjust_color(resize(image, (20, 20)), color), 1.2))
    np.testing.assert_array_equal(rendered, expected)


def test_the_image_itself_is_never_changed():
    settings = ViewSettings(size=(40, 40), crop_scale=(1, 1), crop_ratio=(1, 1))
    image = noise(40, 40, 3)
    before = image.copy()
    render_view(image, settings, plain_view(flip=True, color=(("hue", 0.2),), sigma=1.0, solarize=True))
    np.testing.assert_array_equal(image, before)


def test_probabilities_are_those_asked_for():
    settings = ViewSettings(
        size=8,
        flip_probability=0.3,
        vertical_flip_probability=0.1,
        jitter=(0.4, 0, 0, 0),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.6,
        solarize_probability=0.4,
    )
    rng = np.random.default_rng(0)
    sampled = [sample_view(settings, rng) for _ in range(4000)]
    fractions = {
        "flip_probability": (np.mean([view.flip for view in sampled]), 0.3),
        "vertical_flip_probability": (np.mean([view.vertical_flip for view in sampled]), 0.1),
        "jitter": (np.mean([any(name == "brightness" for name, _ in view.color) for view in sampled]), 0.8),
        "grayscale_probability": (np.mean([("saturation", 0.0) in view.color for view in sampled]), 0.2),
        "blur_probability": (np.mean([view.sigma > 0 for view in sampled]), 0.6),
        "solarize_probability": (np.mean([view.solarize for view in sampled]), 0.4),
    }
    for name, (fraction, expected) in fractions.items():
        assert abs(fraction - expected) < 0.03, name
    sigmas = [view.sigma for view in sampled if view.sigma]
    assert 0.1 <= min(sigmas) < 0.11
    assert 1.99 < max(sigmas) <= 2.0
    areas = np.array([view.area for view in sampled])
    assert abs(areas.mean() - 0.5) < 0.02
    assert abs(np.mean(np.log([view.ratio for view in sampled]))) < 0.02


def test_transform_renders_and_normalises_each_view():
    image = noise(60, 80, 3)
    transform = ViewTransform.from_dict(SIMCLR, **NORMALIZE)
    pixel_values = transform({"image": encode(image)}, np.random.default_rng(4))["pixel_values"]
    assert pixel_values.shape == (2, 3, 32, 32)
    assert pixel_values.dtype == torch.float32
    rng = np.random.default_rng(4)
    for view, settings in zip(pixel_values, transform.views):
        sampled = sample_view(settings, rng)
        expected = render_view(image, settings, sampled).transpose(2, 0, 1)
        np.testing.assert_allclose(denormalize(view), expected, atol=1e-3)
    assert not torch.equal(pixel_values[0], pixel_values[1])


def test_transform_depends_on_the_generator_alone():
    example = {"image": encode(noise(60, 80, 3))}
    transform = ViewTransform.from_dict(SIMCLR, **NORMALIZE)
    first, again, other = (transform(example, np.random.default_rng(seed))["pixel_values"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    rows, columns = np.mgrid[:1200, :1600] / 100
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=-1)
    large = (waves * 100 + 128).astype(np.uint8)
    transform = ViewTransform.from_dict({"size": 96, "num_views": 4}, **NORMALIZE)
    jpeg = transform({"image": encode(large, "JPEG")}, np.random.default_rng(0))["pixel_values"]
    png = transform({"image": encode(large)}, np.random.default_rng(0))["pixel_values"]
    assert np.abs(denormalize(jpeg) - denormalize(png)).mean() < 2


def test_views_may_differ_and_local_views_have_their_own_size():
    transform = ViewTransform.from_dict(
        {
            "size": 32,
            "crop_scale": [0.4, 1.0],
            "views": [{"blur_probability": 1.0}, {"blur_probability": 0.1, "solarize_probability": 0.2}],
            "local": {"num_views": 3, "size": [16, 24], "crop_scale": [0.05, 0.4]},
        },
        **NORMALIZE,
    )
    assert [view.blur_probability for view in transform.views] == [1.0, 0.1]
    assert [view.solarize_probability for view in transform.views] == [0.0, 0.2]
    assert {view.crop_scale for view in transform.views} == {(0.4, 1.0)}
    assert [(view.size, view.crop_scale) for view in transform.local_views] == [((16, 24), (0.05, 0.4))] * 3
    views = transform({"image": encode(noise(60, 80, 3))}, np.random.default_rng(0))
    assert views["pixel_values"].shape == (2, 3, 32, 32)
    assert views["local_pixel_values"].shape == (3, 3, 16, 24)


def test_grey_images():
    image = noise(60, 80, 1)
    transform = ViewTransform.from_dict(
        {"size": 32, "blur_probability": 1.0, "solarize_probability": 0.5}, num_channels=1, **NORMALIZE
    )
    pixel_values = transform({"image": encode(image)}, np.random.default_rng(0))["pixel_values"]
    expected = render_view(image, transform.views[0], sample_view(transform.views[0], np.random.default_rng(0)))
    np.testing.assert_allclose(denormalize(pixel_values)[0], expected.transpose(2, 0, 1), atol=1e-3)
    for option in ({"jitter": [0.1, 0, 0, 0]}, {"grayscale_probability": 0.1}):
        with pytest.raises(ValueError, match="3 channels"):
            ViewTransform.from_dict({"size": 32, **option}, num_channels=1, **NORMALIZE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 32, "crop_scal": [0.2, 1]}, r"'crop_scal' of views.*'crop_scale'"),
        ({"size": 32, "local": {"siz": 16}}, r"'siz' of views.local.*'size'"),
        (
            {"size": 32, "views": [{}, {"blur_probabilty": 1}]},
            r"'blur_probabilty' of views.views\[1\].*'blur_probability'",
        ),
        ({"num_views": 2}, "'size'.*is missing"),
        ({"size": 32, "num_views": 3, "views": [{}, {}]}, "lists 2 views but num_views is 3"),
        ({"size": 32, "num_views": 0}, "At least one view"),
        ({"size": 32, "views": [{}, {"size": 16}]}, "one size"),
        ({"size": 32, "crop_scale": [0.5, 0.2]}, "crop_scale must be a pair"),
        ({"size": 32, "grey": 0.2}, "'grey' of views is now called 'grayscale_probability'"),
        ({"size": 32, "flip_probability": 2}, "flip_probability must be between 0 and 1"),
    ],
)
def test_wrong_settings_are_explained(values, message):
    with pytest.raises(ValueError, match=message):
        ViewTransform.from_dict(values, **NORMALIZE)


def test_eval_view_shows_the_whole_image():
    image = noise(50, 80, 3)
    rng = np.random.default_rng(0)
    transformed = EvalTransform((24, 32), **NORMALIZE)({"image": encode(image), "label": 7}, rng)
    assert transformed["label"] == 7
    np.testing.assert_allclose(
        denormalize(transformed["pixel_values"]), resize(image, (24, 32)).transpose(2, 0, 1), atol=1e-3
    )
    assert set(EvalTransform(24, **NORMALIZE)({"image": encode(image)}, rng)) == {"pixel_values"}


def test_eval_view_of_the_centre_keeps_the_shape():
    image = ramp(100, 200)
    transform = EvalTransform(50, center=True, **NORMALIZE)
    shown = denormalize(transform({"image": encode(image)}, np.random.default_rng(0))["pixel_values"])
    np.testing.assert_allclose(shown[0, :, 0], 50.5, atol=0.51)  # columns 50 and 51
    np.testing.assert_allclose(shown[0, :, -1], 148.5, atol=0.51)
    np.testing.assert_allclose(shown[1, 0], 0.5, atol=0.51)
    tall = EvalTransform((60, 30), center=True, **NORMALIZE)
    shown = denormalize(tall({"image": encode(ramp(60, 200))}, np.random.default_rng(0))["pixel_values"])
    np.testing.assert_allclose(shown[0, 0], np.arange(85, 115), atol=1e-3)
