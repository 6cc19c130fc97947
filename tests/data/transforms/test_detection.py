"""Boxes against the rectangles found again in the pixels, and the messages for wrong objects."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.segmentations import encode_mask
from hf_vlm.data.transforms.detection import DetectionSettings, DetectionTransform
from hf_vlm.data.transforms.image_ops import adjust_color, resize
from hf_vlm.data.transforms.windows import WindowParameters, sample_window

NORMALIZE = {"image_mean": 0.25, "image_std": 0.25}  # a dark mean, so that padding is no rectangle
HEIGHT, WIDTH = 120, 160
# x, y, width, height; each rectangle has a channel of its own
BOXES = [[10, 20, 40, 30], [90, 10, 50, 60], [30, 70, 90, 40]]
EVERYTHING = DetectionSettings(
    flip_probability=0.5,
    vertical_flip_probability=0.5,
    quarter_turn_probability=0.7,
    crop_probability=0.8,
    crop_scale=(0.1, 2.0),
    min_visible=0.3,
)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def render_rectangles(boxes, height, width):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for channel, (x, y, w, h) in enumerate(boxes):
        image[y : y + h, x : x + w, channel] = 255
    return image


def make_example(boxes=BOXES, categories=None, *, image=None, **objects):
    image = render_rectangles(boxes, HEIGHT, WIDTH) if image is None else image
    objects = {"bbox": boxes, "category": list(range(len(boxes))) if categories is None else categories, **objects}
    return {"image": encode(image), "image_id": 42, "objects": objects}


def denormalize(pixel_values):
    return pixel_values.numpy() * 0.25 + 0.25  # 0 to 1


def find_rectangle(channel):
    """Edges (left, top, right, bottom) of a bright rectangle, between the pixels by how bright they are."""
    rows, columns = channel.max(axis=1), channel.max(axis=0)
    edges = []
    for profile in (columns, rows):
        bright = np.flatnonzero(profile > 0.5)
        edges.append((bright[0], bright[-1] + 1))
    (left, right), (top, bottom) = edges
    return np.array([left, top, right, bottom])


def corners(labels, size):
    center, side = labels["boxes"][:, :2].numpy(), labels["boxes"][:, 2:].numpy()
    return np.concatenate([center - side / 2, center + side / 2], axis=1) * [size[1], size[0], size[1], size[0]]


def assert_boxes_fit(transformed, size, tolerance=1.0):
    pixels, labels = denormalize(transformed["pixel_values"]), transformed["labels"]
    for label, box in zip(labels["class_labels"].tolist(), corners(labels, size)):
        assert np.abs(find_rectangle(pixels[label]) - box).max() <= tolerance


@pytest.mark.parametrize("size", [(120, 160), (96, 96), (64, 200), (240, 320)])
def test_eval_boxes_are_where_the_rectangles_are(size):
    transform = DetectionTransform(size, train=False, settings=EVERYTHING, **NORMALIZE)
    transformed = transform(make_example(), np.random.default_rng(0))
    assert transformed["pixel_values"].shape == (3, *size)
    assert transformed["pixel_values"].dtype == torch.float32
    assert_boxes_fit(transformed, size)
    expected = np.array(BOXES, dtype=float) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    expected[:, :2] += expected[:, 2:] / 2
    np.testing.assert_allclose(transformed["labels"]["boxes"], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 96), (60, 140), (200, 160)])
def test_augmented_boxes_are_where_the_rectangles_are(size):
    transform = DetectionTransform(size, train=True, settings=EVERYTHING, **NORMALIZE)
    num_boxes = []
    for seed in range(60):
        transformed = transform(make_example(), np.random.default_rng(seed))
        assert_boxes_fit(transformed, size)
        assert len(transformed["labels"]["boxes"]) == len(transformed["labels"]["area"])
        num_boxes.append(len(transformed["labels"]["boxes"]))
    assert min(num_boxes) >= 1
    assert {1, 2, 3} == set(num_boxes)


def test_boxes_fit_where_a_large_jpeg_is_decoded_smaller():
    boxes = [[4 * number for number in box] for box in BOXES]
    example = make_example(boxes, image=np.zeros((8, 8, 3), np.uint8))
    example["image"] = encode(render_rectangles(boxes, 4 * HEIGHT, 4 * WIDTH), "JPEG", quality=95, subsampling=0)
    for train in (False, True):
        transform = DetectionTransform((90, 90), train=train, settings=EVERYTHING, **NORMALIZE)
        for seed in range(10):
            transformed = transform(example, np.random.default_rng(seed))
            assert_boxes_fit(transformed, (90, 90))
            assert transformed["labels"]["orig_size"].tolist() == [4 * HEIGHT, 4 * WIDTH]


def test_exif_orientation_is_applied_before_the_boxes():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    stored = np.rot90(render_rectangles(BOXES, HEIGHT, WIDTH))
    example = make_example()
    example["image"] = encode(np.ascontiguousarray(stored), "JPEG", quality=95, subsampling=0, exif=exif)
    transformed = DetectionTransform(96, train=False, **NORMALIZE)(example, np.random.default_rng(0))
    assert transformed["labels"]["orig_size"].tolist() == [HEIGHT, WIDTH]
    assert_boxes_fit(transformed, (96, 96))


def test_labels_are_those_of_the_source():
    example = make_example(area=[7.0, 8.0, 9.0], iscrowd=[0, 1, 0], categories=[2, 0, 1])
    labels = DetectionTransform(64, train=False, **NORMALIZE)(example, np.random.default_rng(0))["labels"]
    assert labels["class_labels"].tolist() == [2, 0, 1]
    assert labels["area"].tolist() == [7, 8, 9]
    assert labels["iscrowd"].tolist() == [0, 1, 0]
    assert labels["image_id"].tolist() == [42]
    assert labels["orig_size"].tolist() == [HEIGHT, WIDTH]
    types = {name: value.dtype for name, value in labels.items()}
    assert types == {
        "class_labels": torch.int64,
        "boxes": torch.float32,
        "image_id": torch.int64,
        "orig_size": torch.int64,
        "area": torch.float32,
        "iscrowd": torch.int64,
    }
    # Without these columns the area is the box's and nothing is a crowd.
    labels = DetectionTransform(64, train=False, **NORMALIZE)(make_example(), np.random.default_rng(0))["labels"]
    assert labels["area"].tolist() == [1200, 3000, 3600]
    assert labels["iscrowd"].tolist() == [0, 0, 0]
    assert labels["area"].dtype == torch.float32


def test_crowds_are_no_training_targets():
    plain = DetectionSettings(flip_probability=0, crop_probability=0)
    transform = DetectionTransform(64, train=True, settings=plain, **NORMALIZE)
    labels = transform(make_example(iscrowd=[0, 1, 0]), np.random.default_rng(0))["labels"]
    assert labels["class_labels"].tolist() == [0, 2]


@pytest.mark.parametrize("train", [True, False])
def test_an_image_without_objects(train):
    transform = DetectionTransform(64, train=train, settings=EVERYTHING, **NORMALIZE)
    for seed in range(5):
        labels = transform(make_example([]), np.random.default_rng(seed))["labels"]
        assert {name: tuple(value.shape) for name, value in labels.items()} == {
            "class_labels": (0,),
            "boxes": (0, 4),
            "image_id": (1,),
            "orig_size": (2,),
            "area": (0,),
            "iscrowd": (0,),
        }
        assert labels["class_labels"].dtype == labels["iscrowd"].dtype == torch.int64
        assert labels["boxes"].dtype == labels["area"].dtype == torch.float32


def test_degenerate_boxes_are_dropped_with_all_that_is_theirs(caplog):
    boxes = [[10, 20, 0, 30], [90, 10, 100, 60], [300, 300, 5, 5], [30, 70, 90, 40]]
    example = make_example(boxes, [5, 6, 7, 8], area=[1, 2, 3, 4], image=np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    transform = DetectionTransform((HEIGHT, WIDTH), train=False, **NORMALIZE)
    with caplog.at_level(logging.WARNING):
        labels = transform(example, np.random.default_rng(0))["labels"]
        transform(example, np.random.default_rng(0))
    assert labels["class_labels"].tolist() == [6, 8]
    assert labels["area"].tolist() == [2, 4]
    np.testing.assert_allclose(corners(labels, (HEIGHT, WIDTH)), [[90, 10, 160, 70], [30, 70, 120, 110]], atol=1e-4)
    assert len(caplog.records) == 1
    assert "2 boxes of image 42" in caplog.text
    assert transform.num_dropped_boxes == 4


def test_a_window_that_loses_all_objects_is_placed_elsewhere_or_not_at_all():
    boxes = [[0, 0, 8, 8]]
    settings = DetectionSettings(flip_probability=0, crop_probability=1, crop_scale=(0.1, 0.1), crop_ratio=(1, 1))
    transform = DetectionTransform(64, train=True, settings=settings, **NORMALIZE)
    fractions = []
    for seed in range(40):
        transformed = transform(make_example(boxes), np.random.default_rng(seed))
        assert_boxes_fit(transformed, (64, 64))
        fractions.append(float(transformed["labels"]["boxes"][0, 2]))
    assert min(fractions) < 0.06  # the whole image
    assert max(fractions) > 0.1


def test_a_larger_window_is_filled_with_the_mean_colour():
    transform = DetectionTransform((60, 80), train=True, **NORMALIZE)
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    objects = transform._read_objects(make_example(), HEIGHT, WIDTH)
    parameters = WindowParameters(window=(2.0, 2.0), positions=((0.5, 0.5),))
    rendered, moved = transform.render(image, objects, parameters, (HEIGHT, WIDTH))
    expected = np.full((60, 80, 3), 64, np.uint8)
    expected[15:45, 20:60] = 255
    np.testing.assert_array_equal(rendered, expected)
    np.testing.assert_allclose(moved.boxes, objects.boxes / 2 + 0.25, atol=1e-6)


def test_colours_are_those_of_the_sampled_steps():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    settings = DetectionSettings(
        flip_probability=0, crop_probability=0, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=1
    )
    transform = DetectionTransform((50, 70), train=True, settings=settings, **NORMALIZE)
    transformed = transform(make_example(image=image), np.random.default_rng(3))
    steps = sample_window(settings, np.random.default_rng(3)).color
    assert len(steps) == 4
    expected = adjust_color(resize(image, (50, 70)), steps).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(denormalize(transformed["pixel_values"]), expected, atol=1e-5)


def blobs(generator, height=HEIGHT, width=WIDTH):
    """Masks (3, height, width) of three discs with holes, and the image that has one in each channel."""
    ys, xs = np.mgrid[:height, :width]
    masks = []
    for _ in range(3):
        y, x, radius = generator.uniform(20, height - 20), generator.uniform(20, width - 20), generator.uniform(12, 30)
        distance = np.hypot(ys - y, xs - x)
        masks.append((distance < radius) & (distance > radius / 3))
    return np.stack(masks), (np.stack(masks, axis=2) * 255).astype(np.uint8)


def masked_example(masks, image, **changes):
    encoded = [encode_mask(mask, offset=(0, 0), size=mask.shape) for mask in masks]
    boxes = coco_mask.toBbox(encoded).tolist()
    return make_example(boxes, image=image, segmentation=[json.dumps(mask) for mask in encoded], **changes)


def test_augmented_masks_are_where_the_image_shows_the_objects():
    transform = DetectionTransform((100, 130), train=True, masks=True, settings=EVERYTHING, **NORMALIZE)
    for seed in range(25):
        example = masked_example(*blobs(np.random.default_rng(seed % 5)))
        transformed = transform(example, np.random.default_rng(seed))
        labels, pixels = transformed["labels"], denormalize(transformed["pixel_values"])
        assert labels["masks"].dtype == torch.bool
        assert len(labels["masks"]) == len(labels["boxes"]) == len(labels["class_labels"]) > 0
        for label, mask, box in zip(labels["class_labels"], labels["masks"].numpy(), corners(labels, (100, 130))):
            # The nearest pixel differs from the interpolated ones at edges alone.
            assert ((pixels[label] > 0.5) ^ mask).mean() < 0.02
            assert not (mask & (pixels[label] < 0.01)).any()
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(box - edges).max() <= 1.5  # of a tip, whose pixel may be none of the nearest


def test_masks_leave_the_rest_as_it_is():
    masked, plain = (
        DetectionTransform(64, train=True, masks=masks, settings=DetectionSettings(crop_probability=0), **NORMALIZE)
        for masks in (True, False)
    )
    example = masked_example(*blobs(np.random.default_rng(1)))
    for seed in range(4):
        first, second = (transform(example, np.random.default_rng(seed)) for transform in (masked, plain))
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert first["labels"].keys() - second["labels"].keys() == {"masks"}
        assert all(torch.equal(first["labels"][name], value) for name, value in second["labels"].items())


def test_eval_masks_are_run_lengths_at_the_size_of_the_image():
    masks, image = blobs(np.random.default_rng(2))
    transform = DetectionTransform(64, train=False, masks=True, settings=EVERYTHING, **NORMALIZE)
    labels = transform(masked_example(masks, image), np.random.default_rng(0))["labels"]
    assert "masks" not in labels
    np.testing.assert_array_equal(coco_mask.decode(labels["segmentation"]).transpose(2, 0, 1), masks)
    polygon = [[10, 20, 50, 20, 50, 50, 10, 50]]
    example = make_example([BOXES[0]], segmentation=[json.dumps(polygon)], image=image)
    (mask,) = transform(example, np.random.default_rng(0))["labels"]["segmentation"]
    assert mask["size"] == [HEIGHT, WIDTH]
    assert isinstance(mask["counts"], str)
    np.testing.assert_array_equal(coco_mask.decode(mask), render_rectangles([BOXES[0]], HEIGHT, WIDTH)[:, :, 0] > 0)


def test_exif_orientation_is_applied_before_the_masks():
    masks, image = blobs(np.random.default_rng(3))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    example = masked_example(masks, image)
    example["image"] = encode(np.ascontiguousarray(np.rot90(image)), exif=exif)
    settings = DetectionSettings(crop_probability=0, flip_probability=0)
    transform = DetectionTransform((HEIGHT, WIDTH), train=True, masks=True, settings=settings, **NORMALIZE)
    transformed = transform(example, np.random.default_rng(0))
    np.testing.assert_array_equal(transformed["labels"]["masks"], masks)
    np.testing.assert_array_equal(denormalize(transformed["pixel_values"]) > 0.5, masks)


def test_objects_without_a_mask_are_crowds():
    masks, image = blobs(np.random.default_rng(4))
    example = masked_example(masks, image)
    example["objects"]["segmentation"][1] = ""
    labels = DetectionTransform(64, train=False, masks=True, **NORMALIZE)(example, np.random.default_rng(0))["labels"]
    assert labels["iscrowd"].tolist() == [0, 1, 0]
    assert coco_mask.area(labels["segmentation"]).tolist() == [masks[0].sum(), 0, masks[2].sum()]
    plain = DetectionSettings(crop_probability=0)
    labels = DetectionTransform(64, train=True, masks=True, settings=plain, **NORMALIZE)(
        example, np.random.default_rng(0)
    )["labels"]
    assert labels["class_labels"].tolist() == [0, 2]
    assert labels["masks"].shape == (2, 64, 64)


def test_an_object_that_no_pixel_shows_is_dropped_with_its_mask():
    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    masks[0, 41, 61] = masks[1, 30:60, 50:90] = True  # of a ninth of the output's pixel, beside its centre
    example = masked_example(masks, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    plain = DetectionSettings(crop_probability=0, flip_probability=0)
    transform = DetectionTransform((HEIGHT // 4, WIDTH // 4), train=True, masks=True, settings=plain, **NORMALIZE)
    labels = transform(example, np.random.default_rng(0))["labels"]
    assert labels["class_labels"].tolist() == [1]
    assert labels["masks"].shape == (1, HEIGHT // 4, WIDTH // 4)
    assert transform(make_example([], segmentation=[]), np.random.default_rng(0))["labels"]["masks"].shape[0] == 0


def test_transform_depends_on_the_generator_alone():
    transform = DetectionTransform(64, train=True, settings=EVERYTHING, **NORMALIZE)
    first, again, other = (transform(make_example(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["labels"]["boxes"], again["labels"]["boxes"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_sampled_windows_have_the_area_and_shape_asked_for():
    settings = DetectionSettings(
        crop_probability=0.4, crop_scale=(0.2, 0.5), crop_ratio=(0.5, 2.0), quarter_turn_probability=0.3
    )
    rng = np.random.default_rng(0)
    sampled = [sample_window(settings, rng) for _ in range(2000)]
    windows = np.array([parameters.window for parameters in sampled if parameters.window])
    assert abs(len(windows) / 2000 - 0.4) < 0.04
    assert 0.2 <= windows.prod(axis=1).min() < 0.21
    assert 0.49 < windows.prod(axis=1).max() <= 0.5 + 1e-9
    assert windows.max() <= 1
    turns = np.bincount([parameters.quarter_turns for parameters in sampled]) / 2000
    np.testing.assert_allclose(turns, [0.7, 0.1, 0.1, 0.1], atol=0.03)
    assert windows[:, 1].max() / windows[:, 0].min() > 1.5


def test_grey_images():
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    transform = DetectionTransform(64, train=True, num_channels=1, settings=EVERYTHING, **NORMALIZE)
    for seed in range(8):
        assert transform(make_example(image=image), np.random.default_rng(seed))["pixel_values"].shape == (1, 64, 64)
    with pytest.raises(ValueError, match="3 channels"):
        DetectionTransform.from_dict({"jitter": [0.1, 0, 0, 0]}, size=64, train=True, num_channels=1, **NORMALIZE)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (make_example(categories=[0, 1, 5]), "Image 42 has an object of class 5, but there are 3 classes, 0 to 2"),
        (make_example(categories=[0, -1, 2]), "Image 42 has an object of class -1"),
        (make_example(categories=[0, 1]), "Image 42 has 3 boxes but 2 classes"),
        (make_example(segmentation=["", ""]), "Image 42 has 3 boxes but 2 values of 'segmentation'"),
        (make_example(), "Image 42 has 3 boxes but no 'segmentation': this needs a source with masks of objects"),
        (
            make_example(segmentation=['{"size":[160,120],"counts":[5,5]}'] * 3),
            "An object of image 42 has run lengths of 120 x 160 pixels, but its image is 160 x 120",
        ),
        ({"image": encode(np.zeros((4, 4, 3), np.uint8)), "image_id": 42}, "Image 42 has no column 'objects'"),
    ],
)
def test_wrong_objects_are_explained(example, message):
    transform = DetectionTransform(64, train=False, masks=True, num_classes=3, **NORMALIZE)
    with pytest.raises(ValueError, match=message) as error:
        transform(example, np.random.default_rng(0))
    assert not isinstance(error.value, BadImageError)


def test_an_undecodable_image_is_a_bad_image():
    example = {**make_example(), "image": {"bytes": b"no image", "path": "x.jpg"}}
    with pytest.raises(BadImageError):
        DetectionTransform(64, train=False, **NORMALIZE)(example, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip_probabilty": 0.5}, "'flip_probabilty' of the detection augmentation.*'flip_probability'"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale must be a pair"),
        ({"min_visible": 1.5}, "min_visible must be between 0 and 1"),
        ({"jitter": 0.4}, "jitter must be four strengths"),
    ],
)
def test_wrong_settings_are_explained(values, message):
    with pytest.raises(ValueError, match=message):
        DetectionTransform.from_dict(values, size=64, train=True, **NORMALIZE)


def test_settings_come_from_plain_values():
    values = {"flip_probability": 0, "crop_scale": [0.5, 1], "jitter": [0.1, 0.2, 0.3, 0.05]}
    transform = DetectionTransform.from_dict(values, size=[32, 64], train=True, **NORMALIZE)
    assert transform.size == (32, 64)
    assert transform.settings == DetectionSettings(
        flip_probability=0.0, crop_scale=(0.5, 1.0), jitter=(0.1, 0.2, 0.3, 0.05)
    )
