"""The image processor against numpy, and detections against the boxes that they were made from."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build
from transformers import DetrImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor


def random_image(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    high = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, high, (height, width, channels), endpoint=True).astype(dtype)


def antialiased_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Triangle filter, widened when the image shrinks, along both axes; float64."""
    image = image.astype(np.float64)
    for axis, length in enumerate(size):
        scale = image.shape[axis] / length
        support = max(scale, 1.0)
        centres = (np.arange(length) + 0.5) * scale
        distance = np.abs(np.arange(image.shape[axis]) + 0.5 - centres[:, None]) / support
        weights = np.maximum(0, 1 - distance)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def test_values_are_resized_rescaled_and_normalised() -> None:
    image = random_image(40, 60)
    processor = VLMViTImageProcessor(size={"height": 16, "width": 24})
    pixel_values = processor(images=[Image.fromarray(image)] * 2, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 16, 24)
    expected = (antialiased_resize(image, (16, 24)) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    # Pillow rounds each of its two passes to whole gray levels
    np.testing.assert_allclose(pixel_values[1].permute(1, 2, 0).numpy(), expected, atol=1.1 / 255 / 0.224)


def test_values_without_resizing_are_exact() -> None:
    image = random_image(8, 8)
    processor = VLMViTImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    pixel_values = processor(images=image, return_tensors="np")["pixel_values"][0]
    expected = (image / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6])
    np.testing.assert_allclose(pixel_values.transpose(1, 2, 0), expected, atol=1e-6)


def test_grayscale_and_transparent_images_become_rgb() -> None:
    grayscale = random_image(8, 8, 1)[:, :, 0]
    transparent = np.dstack([random_image(8, 8), np.zeros((8, 8), np.uint8)])
    processor = VLMViTImageProcessor(do_resize=False, do_normalize=False)
    values = processor(images=[Image.fromarray(grayscale), Image.fromarray(transparent)], return_tensors="np")
    for channel in values["pixel_values"][0]:
        np.testing.assert_allclose(channel, grayscale / 255, atol=1e-6)
    np.testing.assert_allclose(values["pixel_values"][1], 1.0)  # on white


def test_one_channel_models_see_grayscale() -> None:
    image = random_image(8, 8)
    processor = VLMViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.25])
    values = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert values.shape == (1, 8, 8)
    np.testing.assert_allclose(values[0], (luma / 255 - 0.5) / 0.25, atol=1 / 255 / 0.25)


@pytest.mark.parametrize(("dtype", "factor"), [(np.uint8, 1 / 255), (np.uint16, 1 / 65535)])
def test_any_number_of_channels_and_bits(dtype: Any, factor: float) -> None:
    image = random_image(40, 60, 5, dtype)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.7, 0.8, 0.9]
    processor = VLMViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=mean, image_std=std, rescale_factor=factor
    )
    expected = (antialiased_resize(image, (16, 16)) * factor - mean) / std
    for given in (image, image.transpose(2, 0, 1)):
        values = processor(images=given, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(values.transpose(1, 2, 0), expected, atol=1e-4)


def test_sixteen_bit_rgb_is_not_cut_to_eight() -> None:
    image = random_image(20, 20, 3, np.uint16)
    processor = VLMViTImageProcessor(size=10, do_normalize=False, rescale_factor=1 / 65535)
    values = processor(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(values.transpose(1, 2, 0), antialiased_resize(image, (10, 10)) / 65535, atol=1e-5)


def test_wrong_channels_are_an_error() -> None:
    with pytest.raises(ValueError, match="has 5 channels, but image_mean is given for 3"):
        VLMViTImageProcessor()(images=random_image(8, 8, 5), input_data_format="channels_last")
    with pytest.raises(ValueError, match="has 3 channels, but image_mean is given for 5"):
        VLMViTImageProcessor(image_mean=[0.5] * 5, image_std=[0.5] * 5)(images=Image.fromarray(random_image(8, 8)))
    processor = VLMViTImageProcessor(image_mean=[0.5] * 5, image_std=[0.5] * 5, resample=0)
    with pytest.raises(ValueError, match="resample=2"):
        processor(images=random_image(8, 8, 5))


def test_save_and_load(tmp_path: Path) -> None:
    processor = VLMViTImageProcessor(size={"height": 16, "width": 24}, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    loaded = VLMViTImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = random_image(40, 60)
    first, second = (p(images=image, return_tensors="pt")["pixel_values"] for p in (processor, loaded))
    assert torch.equal(first, second)


def detections_of(
    boxes: list[list[float]], scores: list[list[float]], sizes: Any = None, **options: Any
) -> list[dict[str, torch.Tensor]]:
    outputs = SimpleNamespace(logits=torch.tensor([scores]).logit(), pred_boxes=torch.tensor([boxes]))
    return VLMViTDetectionImageProcessor().post_process_object_detection(outputs, target_sizes=sizes, **options)


def test_boxes_come_back_in_pixels() -> None:
    height, width = 120, 200
    pixels = torch.tensor([[10.0, 20.0, 60.0, 100.0], [0.0, 0.0, 200.0, 120.0]])  # x0, y0, x1, y1
    x0, y0, x1, y1 = (pixels / torch.tensor([width, height, width, height])).unbind(-1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1).tolist()
    scores = [[0.1, 0.9, 0.2], [0.8, 0.3, 0.6]]
    for sizes in ([(height, width)], torch.tensor([[height, width]])):
        (result,) = detections_of(boxes, scores, sizes)
        torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.8, 0.6]))
        assert result["labels"].tolist() == [1, 0, 2]  # the second query gives two classes
        torch.testing.assert_close(result["boxes"], pixels[[0, 1, 1]], rtol=1e-5, atol=1e-4)
    (fractions,) = detections_of(boxes, scores)
    torch.testing.assert_close(fractions["boxes"][0], torch.stack([x0, y0, x1, y1], dim=-1)[0])


def test_threshold_count_and_clipping() -> None:
    boxes = [[0.0, 0.5, 0.4, 0.2], [0.5, 0.5, 2.0, 2.0]]
    scores = [[0.9, 0.2], [0.3, 0.4]]
    (result,) = detections_of(boxes, scores, [(100, 200)], threshold=0.25)
    assert result["scores"].tolist() == pytest.approx([0.9, 0.4, 0.3])
    torch.testing.assert_close(result["boxes"][0], torch.tensor([0.0, 40.0, 40.0, 60.0]))
    torch.testing.assert_close(result["boxes"][1], torch.tensor([0.0, 0.0, 200.0, 100.0]))
    (result,) = detections_of(boxes, scores, threshold=0.0, max_detections=2)
    assert result["labels"].tolist() == [0, 1]
    (result,) = detections_of(boxes, scores, threshold=0.95)
    assert [len(value) for value in result.values()] == [0, 0, 0]
    with pytest.raises(ValueError, match="2 target_sizes are given for 1 images"):
        detections_of(boxes, scores, [(10, 10)] * 2)


def coco_annotation(*objects: tuple[int, list[Any]], image_id: int = 7) -> dict[str, Any]:
    found = [{"category_id": c, "bbox": box, "area": 9.0 * c + 5, "iscrowd": 0} for c, box in objects]
    return {"image_id": image_id, "annotations": found}


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("tensors", ["pt", "np"])
def test_annotations_are_what_detr_makes_of_them(do_resize: bool, tensors: str) -> None:
    images = [random_image(40, 60), random_image(40, 60)]
    annotations = [
        coco_annotation((2, [10.0, 5.0, 20.5, 30.0]), (0, [-5.0, -5.0, 30.0, 20.0]), (1, [70.0, 5.0, 9.0, 9.0])),
        coco_annotation(image_id=8),
    ]
    annotations[0]["annotations"].append({"category_id": 1, "bbox": [1, 2, 3, 4], "area": 12.0, "iscrowd": 1})
    options = {"size": {"height": 32, "width": 72}, "do_resize": do_resize}
    theirs = DetrImageProcessorPil(**options, do_pad=False)(images, annotations=annotations, return_tensors=tensors)
    ours = VLMViTDetectionImageProcessor(**options)(images, annotations=annotations, return_tensors=tensors)
    np.testing.assert_allclose(np.asarray(ours["pixel_values"]), np.asarray(theirs["pixel_values"]), atol=1e-6)
    for found, expected in zip(ours["labels"], theirs["labels"], strict=True):
        assert found.keys() == expected.keys() | {"size"}  # which DETR gives where it resizes
        for key, value in expected.items():
            assert np.asarray(found[key]).dtype == np.asarray(value).dtype, key
            np.testing.assert_allclose(np.asarray(found[key]), np.asarray(value), rtol=1e-6, err_msg=key)
    assert [len(label["class_labels"]) for label in ours["labels"]] == [2, 0]


def test_a_detector_learns_from_annotations() -> None:
    model = build("detection")
    processor = VLMViTDetectionImageProcessor(size={"height": 32, "width": 32})
    single = processor(random_image(40, 60), annotations=coco_annotation((1, [0, 0, 30, 20])), return_tensors="pt")
    torch.testing.assert_close(single["labels"][0]["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5]]))
    given = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.25, 0.25, 0.5, 0.5]])}]
    torch.testing.assert_close(model(**single).loss, model(single["pixel_values"], labels=given).loss)
    assert set(processor(random_image(40, 60))) == {"pixel_values"}


def test_an_area_is_that_of_the_box_where_none_is_given() -> None:
    annotation = {"image_id": 1, "annotations": [{"category_id": 0, "bbox": [10, 10, 20, 10]}]}
    labels = VLMViTDetectionImageProcessor(size=20)(random_image(40, 40), annotations=annotation)["labels"]
    assert labels[0]["area"].tolist() == [50.0]


@pytest.mark.parametrize(
    ("annotations", "options", "message"),
    [
        ([coco_annotation()] * 2, {}, "2 annotations are given for 1 images"),
        ([{"annotations": []}], {}, r"annotations\[0\] must be .*image_id"),
        ([[]], {}, r"annotations\[0\] must be"),
        (coco_annotation((0, [1, 2, 3])), {}, r"annotations\[0\]\['annotations'\]\[0\] needs .*bbox: \[1, 2, 3\]"),
        ({"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}, {}, "needs 'category_id'"),
        (coco_annotation(), {"do_center_crop": True, "crop_size": 16}, "do_center_crop"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(annotations: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMViTDetectionImageProcessor(size=32)(random_image(40, 60), annotations=annotations, **options)
