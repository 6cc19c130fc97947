"""What training and evaluation do with images that keep their aspect ratio is what the image processors do."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.data.segmentations import coco_mask, encode_mask, segmentation_text
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.tasks.instance_segmentation import INSTANCE_SEGMENTATION
from hf_vlm.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION

SIZE = (64, 96)
SETTINGS = {
    "size": {"height": SIZE[0], "width": SIZE[1]},
    "image_mean": [0.25, 0.3, 0.2],
    "image_std": [0.2, 0.25, 0.3],
    "do_pad": True,
}
FILL = np.rint(255 * np.array(SETTINGS["image_mean"]))
NAMES = ["red", "green", "blue"]
# x, y, width, height; each rectangle has a channel of its own
BOXES = [[10, 20, 40, 30], [90, 10, 50, 60], [30, 70, 90, 40]]
IMAGE_SIZES = [(120, 160), (120, 400), (300, 160)]
PLAIN = {"flip_probability": 0.0, "crop_probability": 0.0}
EVERYTHING = {
    "vertical_flip_probability": 0.5,
    "quarter_turn_probability": 0.7,
    "crop_probability": 0.8,
    "crop_scale": [0.2, 2.0],
    "crop_ratio": [1, 1],
}


def example_of(size):
    image = np.zeros((*size, 3), np.uint8)
    masks = np.zeros((3, *size), bool)
    for channel, (x, y, w, h) in enumerate(BOXES):
        image[y : y + h, x : x + w, channel] = 255
        masks[channel, y : y + h, x : x + w] = True
    segmentation = [segmentation_text(encode_mask(mask, offset=(0, 0), size=size)) for mask in masks]
    objects = {"bbox": BOXES, "category": [0, 1, 2], "segmentation": segmentation}
    return image, {"image": encode(image), "image_id": 3, "objects": objects}


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def as_bytes(pixel_values):
    values = pixel_values.numpy().transpose(1, 2, 0) * SETTINGS["image_std"] + SETTINGS["image_mean"]
    return np.rint(255 * values).astype(int)


def assert_same_pixels(found, expected):
    """Equal in all but a few values that torch and Pillow round differently, and in the padding."""
    found, expected = as_bytes(found), as_bytes(expected)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 2e-3
    np.testing.assert_array_equal((found == FILL).all(axis=2), (expected == FILL).all(axis=2))


def edges(channel):
    """Left, top, right, bottom of a bright rectangle."""
    columns, rows = (np.flatnonzero((channel > 150).any(axis=axis)) for axis in (0, 1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def corners(labels):
    centre, extent = labels["boxes"].numpy()[:, :2], labels["boxes"].numpy()[:, 2:]
    return np.concatenate([centre - extent / 2, centre + extent / 2], axis=1) * [*SIZE[::-1], *SIZE[::-1]]


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("train", [False, True])
def test_a_detector_is_given_what_its_processor_makes(size, train):
    image, example = example_of(size)
    annotations = [{"category_id": i, "bbox": box} for i, box in enumerate(BOXES)]
    processor = VLMViTDetectionImageProcessor(**SETTINGS)
    expected = processor(image, annotations={"image_id": 3, "annotations": annotations}, return_tensors="pt")
    transform = DETECTION.transform(processor, train=train, class_names=NAMES, augmentation=PLAIN)
    found = transform(example, np.random.default_rng(0))
    assert_same_pixels(found["pixel_values"], expected["pixel_values"][0])
    torch.testing.assert_close(found["labels"]["boxes"], expected["labels"][0]["boxes"], rtol=0, atol=1e-6)


def test_a_large_jpeg_is_shown_at_the_same_place_where_it_is_decoded_smaller():
    size = (4 * 121, 4 * 163)  # of which a half has another aspect ratio, to a pixel
    image = np.full((*size, 3), 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    example = {"image": {"bytes": buffer.getvalue()}, "image_id": 3, "objects": {"bbox": [], "category": []}}
    processor = VLMViTDetectionImageProcessor(**SETTINGS)
    found = DETECTION.transform(processor, train=False, class_names=NAMES)(example, np.random.default_rng(0))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found["pixel_values"], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_augmented_objects_keep_their_aspect_ratio_and_are_not_in_the_padding(size):
    _, example = example_of(size)
    processor = VLMViTInstanceSegmentationImageProcessor(**SETTINGS)
    transform = INSTANCE_SEGMENTATION.transform(processor, train=True, class_names=NAMES, augmentation=EVERYTHING)
    num_padded = 0
    for seed in range(30):
        found = transform(example, np.random.default_rng(seed))
        pixels, labels = as_bytes(found["pixel_values"]), found["labels"]
        is_padding = (pixels == FILL).all(axis=2)
        num_padded += is_padding.any()
        for label, box, mask in zip(labels["class_labels"], corners(labels), labels["masks"].numpy(), strict=True):
            assert np.abs(edges(pixels[..., label]) - box).max() <= 1.01
            assert not (mask & is_padding).any()
            assert np.abs(edges(255 * mask[..., None])[:4] - box).max() <= 1.01
    assert num_padded > 15


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_references_are_of_the_image_without_padding(size):
    """The labels of an evaluation, back in pixels of the image, are the annotations."""
    _, example = example_of(size)
    processor = VLMViTInstanceSegmentationImageProcessor(**SETTINGS)
    transform = INSTANCE_SEGMENTATION.transform(processor, train=False, class_names=NAMES)
    labels = transform(example, np.random.default_rng(0))["labels"]
    for text, (x, y, w, h) in zip(labels["segmentation"], BOXES, strict=True):
        assert coco_mask.toBbox(text).tolist() == [x, y, w, h]
        assert coco_mask.area(text) == w * h
    height, width = processor.covered_size(size)
    found = corners(labels) / [*SIZE[::-1], *SIZE[::-1]] * [width, height, width, height]
    np.testing.assert_allclose(found, [[x, y, x + w, y + h] for x, y, w, h in BOXES], atol=1e-3)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_a_segmenter_learns_no_class_in_the_padding(size):
    image, _ = example_of(size)
    mask = image.argmax(axis=2).astype(np.uint8)
    example = {"image": encode(image), "mask": encode(mask), "image_id": 3}
    processor = VLMViTSemanticSegmentationImageProcessor(**SETTINGS)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    transform = SEMANTIC_SEGMENTATION.transform(processor, train=True, class_names=NAMES, augmentation=PLAIN)
    found = transform(example, np.random.default_rng(0))
    assert_same_pixels(found["pixel_values"], expected)
    np.testing.assert_array_equal(found["labels"] == 255, (as_bytes(expected) == FILL).all(axis=2))
    transform = SEMANTIC_SEGMENTATION.transform(processor, train=True, class_names=NAMES, augmentation=EVERYTHING)
    for seed in range(10):
        found = transform(example, np.random.default_rng(seed))
        pixels = as_bytes(found["pixel_values"])
        assert ((found["labels"].numpy() == 255) == (pixels == FILL).all(axis=2)).mean() > 0.999
        clear = (pixels > 250).sum(axis=2) == 1
        np.testing.assert_array_equal(found["labels"].numpy()[clear], pixels.argmax(axis=2)[clear])
