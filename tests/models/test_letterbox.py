"""Images that keep their aspect ratio: what the image processors pad, and boxes and masks back on the image."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor, fitted_size

SIZE = {"height": 24, "width": 32}
STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
# (height, width) of an image, and of its part of the input
IMAGES = [((60, 40), (24, 16)), ((30, 80), (12, 32)), ((48, 64), (24, 32)), ((7, 500), (1, 32)), ((10, 9), (24, 22))]


def random_image(size, num_channels=3):
    return np.random.default_rng(0).integers(0, 256, (*size, num_channels), dtype=np.uint8)


def inverse_letterbox(box, image_size):
    """A box (x0, y0, x1, y1) in pixels of the input to pixels of the image, by hand."""
    scale = min(SIZE["height"] / image_size[0], SIZE["width"] / image_size[1])
    return np.clip(np.array(box) / scale, 0, [image_size[1], image_size[0]] * 2)


@pytest.mark.parametrize(("image_size", "fitted"), IMAGES)
def test_the_image_is_resized_into_a_corner_of_its_mean_colour(image_size, fitted):
    assert fitted_size(image_size, (SIZE["height"], SIZE["width"])) == fitted
    processor = VLMViTImageProcessor(size=SIZE, do_pad=True, **STATISTICS)
    image = random_image(image_size)
    (pixels,) = processor(image, return_tensors="np")["pixel_values"]
    expected = np.empty((SIZE["height"], SIZE["width"], 3), np.uint8)
    expected[:] = np.rint(255 * np.array(STATISTICS["image_mean"]))
    expected[: fitted[0], : fitted[1]] = Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BILINEAR)
    whole = VLMViTImageProcessor(size=SIZE, do_resize=False, **STATISTICS)
    np.testing.assert_array_equal(pixels, whole(expected, return_tensors="np")["pixel_values"][0])


def test_images_of_other_types_are_padded_too():
    processor = VLMViTImageProcessor(size=SIZE, do_pad=True, image_mean=[0.5, 0.25], image_std=[1.0, 1.0])
    image = np.full((40, 40, 2), 255.0, np.float32)
    (pixels,) = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    np.testing.assert_allclose(pixels[:, :, :24], np.broadcast_to([[[0.5]], [[0.75]]], (2, 24, 24)), atol=1e-6)
    np.testing.assert_allclose(pixels[:, :, 24:], 0, atol=0.51 / 255)


def test_the_setting_is_saved_and_read(tmp_path):
    VLMViTDetectionImageProcessor(size=SIZE, do_pad=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_pad"] is True
    assert VLMViTImageProcessor.from_pretrained(tmp_path).covered_size((60, 40)) == (60, 80)
    assert VLMViTImageProcessor(size=SIZE).covered_size((60, 40)) == (60, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_pad": "yes"}, "do_pad is 'yes', but must be true or false"),
        ({"do_pad": True, "do_resize": False}, "set do_resize to True"),
        ({"do_pad": True, "pad_size": 64}, "leave pad_size out"),
        ({"do_pad": True, "inference": "slide"}, "set do_pad to False"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        VLMViTSemanticSegmentationImageProcessor(size=SIZE, **settings)


@pytest.mark.parametrize(("image_size", "fitted"), IMAGES[:3])
def test_boxes_come_back_to_where_they_were_annotated(image_size, fitted):
    height, width = image_size
    boxes = [[0, 0, width, height], [3, 5, 20, 11], [width - 9, height - 8, 9, 8]]  # x, y, width, height
    annotation = {"image_id": 1, "annotations": [{"category_id": i, "bbox": box} for i, box in enumerate(boxes)]}
    processor = VLMViTDetectionImageProcessor(size=SIZE, do_pad=True)
    (labels,) = processor(random_image(image_size), annotations=annotation, return_tensors="pt")["labels"]
    scale = fitted[0] / height  # of both axes
    for (x, y, w, h), found in zip(boxes, labels["boxes"] * torch.tensor([32, 24, 32, 24]), strict=True):
        expected = [(x + w / 2) * scale, (y + h / 2) * scale, w * scale, h * scale]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert labels["area"].tolist() == pytest.approx([w * h * scale**2 for _, _, w, h in boxes])
    assert labels["size"].tolist() == list(fitted)
    outputs = SimpleNamespace(logits=torch.diag(torch.tensor([9.0, 8.0, 7.0]))[None], pred_boxes=labels["boxes"][None])
    (found,) = processor.post_process_object_detection(outputs, threshold=0.9, target_sizes=[image_size])
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).float()
    torch.testing.assert_close(found["boxes"], corners, rtol=0, atol=1e-4)


def test_boxes_in_the_padding_are_cut_or_dropped():
    processor = VLMViTDetectionImageProcessor(size=SIZE, do_pad=True)
    boxes = np.array([[2, 2, 10, 10], [10, 4, 20, 30], [17, 0, 30, 20], [16, 0, 32, 24]])  # the image ends at x = 16
    centres = torch.tensor([[(a + c) / 64, (b + d) / 48, (c - a) / 32, (d - b) / 24] for a, b, c, d in boxes])
    outputs = SimpleNamespace(logits=torch.tensor([[[1.0], [2.0], [9.0], [9.0]]]), pred_boxes=centres[None])
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(60, 40)])
    expected = [inverse_letterbox(boxes[1], (60, 40)), inverse_letterbox(boxes[0], (60, 40))]
    np.testing.assert_allclose(found["boxes"], expected, atol=1e-4)
    assert found["scores"].tolist() == pytest.approx([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-1.0))])
    (kept,) = processor.post_process_object_detection(outputs, threshold=0.0)  # of an unknown image
    assert len(kept["boxes"]) == 4


def slow_resize(rows, size):
    """Bilinear interpolation of a map, pixel by pixel."""
    resized = np.zeros(size)
    for y, x in np.ndindex(*size):
        weights = []
        for position, length, count in ((y, size[0], rows.shape[0]), (x, size[1], rows.shape[1])):
            at = min(max((position + 0.5) * count / length - 0.5, 0), count - 1)
            low = int(at)
            weights.append(((low, 1 - (at - low)), (min(low + 1, count - 1), at - low)))
        resized[y, x] = sum(rows[i, j] * a * b for i, a in weights[0] for j, b in weights[1])
    return resized


@pytest.mark.parametrize(("image_size", "fitted"), IMAGES[:2])
def test_maps_are_cut_from_the_padding_and_resized(image_size, fitted):
    maps = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    instances = VLMViTInstanceSegmentationImageProcessor(size=SIZE, do_pad=True)
    at_input = slow_resize(maps[0, 0].numpy(), (24, 32))
    expected = slow_resize(at_input[: fitted[0], : fitted[1]], image_size)
    (masks,) = instances.binary_masks(maps[0], image_size)
    clear = np.abs(expected) > 1e-4
    np.testing.assert_array_equal(masks[0].numpy()[clear], (expected > 0)[clear])
    semantic = VLMViTSemanticSegmentationImageProcessor(size=SIZE, do_pad=True)
    outputs = SimpleNamespace(logits=torch.cat([torch.zeros_like(maps), maps], dim=1))
    (classes,) = semantic.post_process_semantic_segmentation(outputs, target_sizes=[image_size])
    np.testing.assert_array_equal(classes.numpy()[clear], (expected > 0)[clear])


@pytest.mark.parametrize("image_size", [(48, 32), (24, 64)])
def test_masks_come_back_to_their_own_pixels(image_size):
    """A mask of whole pixels of the input, drawn there by hand, is the rectangle that it came from."""
    mask = torch.full((1, 1, 24, 32), -5.0)
    mask[..., 2:8, 3:11] = 5.0
    mask[..., 20:, 20:] = 5.0  # in the padding of both
    processor = VLMViTInstanceSegmentationImageProcessor(size=SIZE, do_pad=True)
    outputs = SimpleNamespace(logits=torch.ones(1, 1, 1), pred_boxes=torch.full((1, 1, 4), 0.3), pred_masks=mask)
    (found,) = processor.post_process_instance_segmentation(
        outputs, threshold=0.1, target_sizes=[image_size], return_binary_maps=True
    )
    expected = torch.zeros(image_size, dtype=torch.bool)
    expected[4:16, 6:22] = True
    assert torch.equal(found["segmentation"][0], expected)
