"""Views made in batches: the same as one by one, from the same parameters."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

from hf_vlm.data.transforms.device_views import DeviceViews, blur_matrix, resize_matrix, shift_hue
from hf_vlm.data.transforms.image_ops import resize, shrink
from hf_vlm.data.transforms.views import ViewTransform, render_view, required_size, sample_view

BASE = {"size": [64, 48], "num_views": 2, "local": {"num_views": 3, "size": [20, 32], "crop_scale": [0.05, 0.4]}}
COLOR = {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_probability": 0.8, "grayscale_probability": 0.2}


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return {"image": {"bytes": buffer.getvalue(), "path": None}}


def photos():
    """Crops of two photographs, of other sizes each."""
    first, second = load_sample_images().images
    parts = [first[:200, :300], second[50:400, 100:330], first[200:290, 300:420], second[:33, :500], second]
    return [part.copy() for part in parts]


def both(options, images, dtype=None, num_channels=3):
    """Grey levels of all views by either executor, from the same images: {name: (B, V, C, h, w)} each."""
    transform = ViewTransform.from_dict(BASE | options, image_mean=0.0, image_std=1 / 255, num_channels=num_channels)
    views = DeviceViews(transform, dtype)
    sampled = [views.sample(encode(image), np.random.default_rng(seed)) for seed, image in enumerate(images)]
    rendered = {name: values.numpy().astype(float) for name, values in views.render(views.collate(sampled)).items()}
    expected = {name: [] for name in rendered}
    for seed, example in enumerate(sampled):
        rng = np.random.default_rng(seed)
        for name, settings in views.groups.items():
            image = example["image"].numpy()
            expected[name].append([render_view(image, view, sample_view(view, rng)) for view in settings])
    return rendered, {name: np.array(values).transpose(0, 1, 4, 2, 3) for name, values in expected.items()}


# One by one, views are rounded to grey levels between the operations.
@pytest.mark.parametrize(
    "options",
    [
        {"flip_probability": 0.0},
        {"flip_probability": 0.5, "vertical_flip_probability": 0.5},
        {"crop_ratio": [0.3, 3.0], "crop_scale": [0.01, 1.0]},
        {"jitter": [0.4, 0, 0, 0]},
        {"jitter": [0, 0.4, 0, 0]},
        {"jitter": [0, 0, 0.4, 0]},
        {"grayscale_probability": 0.5},
        {"blur_probability": 1.0},
        {"blur_probability": 0.5, "blur_sigma": [0.5, 9.0]},
        {"solarize_probability": 0.5},
        {"views": [{"blur_probability": 1.0}, {"blur_probability": 0.1, "solarize_probability": 0.3}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_views_of_a_batch_are_those_made_one_by_one(options, dtype):
    rendered, expected = both(options, photos() * 3, dtype)
    assert set(rendered) == {"pixel_values", "local_pixel_values"}
    for name, views in rendered.items():
        assert views.shape == expected[name].shape
        difference = np.abs(views - expected[name])
        assert difference.max() <= 2
        assert difference.mean() < 0.4


def test_steps_of_colour_amplify_what_was_rounded():
    rendered, expected = both({"jitter": [0.4, 0.4, 0.4, 0], "grayscale_probability": 0.3}, photos() * 3)
    for name, views in rendered.items():
        difference = np.abs(views - expected[name])
        assert difference.max() <= 3  # half a level or one of the resize, times at most 1.4 for each step
        assert np.quantile(difference, 0.999) <= 2
        assert difference.mean() < 0.5


# One by one, hue and saturation have 8 bits: a step of hue is up to six levels of a saturated colour.
@pytest.mark.parametrize(
    "options",
    [{"jitter": [0, 0, 0, 0.5]}, COLOR, COLOR | {"blur_probability": 0.5, "solarize_probability": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_hue_differs_by_the_steps_of_eight_bits(options, dtype):
    rendered, expected = both(options, photos() * 3, dtype)
    for name, views in rendered.items():
        difference = np.abs(views - expected[name])
        assert difference.max() <= 15  # steps of colour amplify the six
        assert np.quantile(difference, 0.999) < 7
        assert difference.mean() < 0.7
        assert abs((views - expected[name]).mean()) < 0.2


def test_images_of_one_channel():
    rendered, expected = both(
        {"blur_probability": 0.5, "solarize_probability": 0.5}, [image[..., :1].copy() for image in photos()], None, 1
    )
    for name, views in rendered.items():
        assert np.abs(views - expected[name]).max() <= 2


def test_images_of_many_channels_are_resized_and_blurred_the_same():
    transform = ViewTransform.from_dict(
        BASE | {"blur_probability": 1.0}, image_mean=[0.1] * 5, image_std=[0.2] * 5, num_channels=5
    )
    image = np.random.default_rng(0).integers(0, 256, (90, 100, 5), dtype=np.uint8)
    transform.sample = lambda example, rng: (image, [sample_view(view, rng) for view in settings])
    settings = (*transform.views, *transform.local_views)
    views = DeviceViews(transform)
    rendered = views.render(views.collate([views.sample({}, np.random.default_rng(3))]))
    rng = np.random.default_rng(3)
    for name, group in views.groups.items():
        for view, setting in zip(rendered[name][0], group):
            expected = render_view(image, setting, sample_view(setting, rng)).transpose(2, 0, 1)
            assert np.abs((view.numpy() * 0.2 + 0.1) * 255 - expected).max() <= 2


def test_batches_depend_on_their_examples_alone():
    """An image's views are the same whatever it is padded to, and in a worker's shared memory."""
    transform = ViewTransform.from_dict(BASE | COLOR | {"blur_probability": 0.5}, image_mean=0.5, image_std=0.25)
    views = DeviceViews(transform)
    sampled = [views.sample(encode(image), np.random.default_rng(seed)) for seed, image in enumerate(photos())]
    together = views.render(views.collate(sampled))
    for index, example in enumerate(sampled):
        for name, values in views.render(views.collate([example])).items():
            torch.testing.assert_close(values[0], together[name][index], atol=1e-4, rtol=0)
    loaded = next(iter(DataLoader(sampled, batch_size=len(sampled), collate_fn=views.collate, num_workers=1)))
    for name, values in views.render(loaded).items():
        assert torch.equal(values, together[name])


@pytest.mark.parametrize(
    ("start", "extent", "size"), [(0, 90, 40), (13, 77, 64), (50, 9, 30), (89, 1, 5), (20, 40, 1)]
)
def test_a_resize_matrix_is_pillows_filter(start, extent, size):
    line = np.random.default_rng(0).uniform(0, 255, 90).astype(np.float32)
    cut = Image.fromarray(line[None, start : start + extent])
    expected = np.asarray(cut.resize((size, 1), Image.Resampling.BILINEAR))[0]
    box = torch.tensor([start, extent], dtype=torch.float32)
    for flipped, values in ((0, expected), (1, expected[::-1])):
        matrix = resize_matrix(size, 90, box, torch.tensor(flipped))
        np.testing.assert_allclose(matrix @ torch.from_numpy(line), values, atol=1e-2)


@pytest.mark.parametrize(("size", "sigma"), [(40, 0.1), (40, 2.0), (9, 4.0), (2, 3.0), (1, 1.0)])
def test_a_blur_matrix_is_scipys_filter(size, sigma):
    line = np.random.default_rng(0).uniform(0, 255, size)
    expected = gaussian_filter(line, sigma, mode="mirror", radius=math.ceil(3 * sigma))
    matrix = blur_matrix(size, torch.tensor([sigma, 0.5]), max_sigma=5.0)[0]
    np.testing.assert_allclose(matrix.double() @ torch.from_numpy(line), expected, atol=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3, 0.95])
def test_hue_is_exact(shift):
    image = np.concatenate([photos()[0][:40, :40], np.random.default_rng(0).integers(0, 256, (40, 40, 3))])
    expected = np.empty(image.shape)
    for pixel in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[pixel] / 255)
        expected[pixel] = 255 * np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    shifted = shift_hue(torch.from_numpy(image).float().permute(2, 0, 1)[None], torch.tensor([[shift]]))[0]
    np.testing.assert_allclose(shifted.permute(1, 2, 0), expected, atol=2e-3)


def test_shrinking_is_the_mean_of_blocks():
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    expected = image[:48, :63].reshape(16, 3, 21, 3, 3).mean((1, 3))
    np.testing.assert_allclose(shrink(image, 3), expected, atol=0.51)


def test_large_images_are_sent_smaller_and_still_large_enough():
    transform = ViewTransform.from_dict({"size": 32, "crop_scale": [0.5, 1.0]}, image_mean=0.0, image_std=1 / 255)
    views = DeviceViews(transform)
    photo = load_sample_images().images[0].copy()
    for seed in range(5):
        sent = views.sample(encode(photo), np.random.default_rng(seed))["image"]
        sampled = sample_view(transform.views[0], np.random.default_rng(seed))
        needed = required_size(transform.views[0], sampled)[0]
        assert needed <= sent.shape[0] < 1.5 * needed  # from a fifth on, whole parts lie close together
        assert abs(sent.shape[1] / sent.shape[0] - 640 / 427) < 0.05
    panorama = np.tile(resize(photo, (60, 90)), (1, 50, 1))
    assert views.sample(encode(panorama), np.random.default_rng(0))["image"].shape[1] <= 4 * 64
    line = np.zeros((1, 4000, 3), dtype=np.uint8)
    assert views.sample(encode(line), np.random.default_rng(0))["image"].shape[0] == 1
