"""Masks of instances on an image: against plain loops, and as transformers' pipeline takes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from tiny import build, perturb
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, pipeline

from hf_vlm.models.image_processing_instance_segmentation import (
    VLMViTInstanceSegmentationImageProcessor,
    run_lengths,
)
from hf_vlm.registry import MODELS

PROCESSOR = VLMViTInstanceSegmentationImageProcessor(size={"height": 32, "width": 32})
METHODS = ("panoptic", "instance", "semantic")


def outputs_of(num_images=2, num_queries=6, num_labels=2, size=(8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(num_images, num_queries, 3, 3, generator=generator)
    return SimpleNamespace(
        logits=2 * torch.randn(num_images, num_queries, num_labels, generator=generator),
        pred_boxes=torch.rand(num_images, num_queries, 4, generator=generator) * 0.3 + 0.2,
        pred_masks=3 * F.interpolate(smooth, size, mode="bilinear"),
    )


def slow_instances(outputs, image, threshold, mask_threshold, size):
    """(score, class, box in pixels, mask), best first."""
    found = []
    for query, label in np.ndindex(*outputs.logits.shape[1:]):
        score = 1 / (1 + np.exp(-float(outputs.logits[image, query, label])))
        mask = F.interpolate(outputs.pred_masks[image, query][None, None], size, mode="bilinear")[0, 0].sigmoid()
        x, y, width, height = outputs.pred_boxes[image, query].tolist()
        box = [(x - width / 2) * size[1], (y - height / 2) * size[0], (x + width / 2) * size[1]]
        box = np.clip([*box, (y + height / 2) * size[0]], 0, [*size[::-1], *size[::-1]])
        if score > threshold:
            found.append((score, label, box, (mask > mask_threshold).numpy()))
    return sorted(found, key=lambda instance: -instance[0])


@pytest.mark.parametrize(("threshold", "mask_threshold"), [(0.5, 0.5), (0.2, 0.8), (0.9999, 0.5)])
def test_binary_maps_and_run_lengths_are_all_masks(threshold, mask_threshold):
    outputs, sizes = outputs_of(), [(20, 31), (9, 12)]
    options = {"threshold": threshold, "mask_threshold": mask_threshold, "target_sizes": sizes}
    maps = PROCESSOR.post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
    lengths = PROCESSOR.post_process_instance_segmentation(outputs, return_coco_annotation=True, **options)
    for image, size in enumerate(sizes):
        expected = slow_instances(outputs, image, threshold, mask_threshold, size)
        expected = [instance for instance in expected if instance[3].any()]
        for results in (maps, lengths):
            found = results[image]["segments_info"]
            assert [entry["id"] for entry in found] == list(range(len(expected)))
            assert [entry["label_id"] for entry in found] == [label for _, label, _, _ in expected]
            assert [entry["score"] for entry in found] == pytest.approx([score for score, *_ in expected])
        assert maps[image]["segmentation"].shape == (len(expected), *size)
        for (*_, mask), found, rle in zip(expected, maps[image]["segmentation"], lengths[image]["segmentation"]):
            np.testing.assert_array_equal(found.numpy(), mask)
            compressed = coco_mask.frPyObjects(rle, *size)  # COCO's own reading of run lengths
            np.testing.assert_array_equal(coco_mask.decode(compressed), mask)


@pytest.mark.parametrize("least_visible", [0.0, 0.5, 0.9])
def test_the_map_of_ids_shows_the_best_mask_at_each_pixel(least_visible):
    outputs, size = outputs_of(1), (20, 31)
    (found,) = PROCESSOR.post_process_instance_segmentation(
        outputs, threshold=0.1, overlap_mask_area_threshold=least_visible, target_sizes=torch.tensor([size])
    )
    expected, kept = np.full(size, -1), []
    for score, label, _, mask in slow_instances(outputs, 0, 0.1, 0.5, size):
        shown = [pixel for pixel in np.argwhere(mask).tolist() if expected[tuple(pixel)] == -1]
        if shown and len(shown) > least_visible * mask.sum():
            for pixel in shown:
                expected[tuple(pixel)] = len(kept)
            kept.append((score, label))
    np.testing.assert_array_equal(found["segmentation"].numpy(), expected)
    assert [(entry["score"], entry["label_id"]) for entry in found["segments_info"]] == [
        (pytest.approx(score), label) for score, label in kept
    ]
    assert 0 < len(kept) < 12


def test_boxes_come_with_their_masks():
    outputs, sizes = outputs_of(), [(20, 31), (9, 12)]
    for image, found in enumerate(PROCESSOR.find_instances(outputs, threshold=0.3, target_sizes=sizes)):
        masks = torch.cat(list(PROCESSOR.binary_masks(found["mask_logits"], found["size"])))
        expected = slow_instances(outputs, image, 0.3, 0.5, sizes[image])
        assert len(expected) == len(masks)
        for (_, _, box, mask), found_box, found_mask in zip(expected, found["boxes"], masks):
            np.testing.assert_allclose(found_box, box, atol=1e-4)
            np.testing.assert_array_equal(found_mask, mask)


def test_many_masks_are_resized_in_chunks():
    logits = torch.randn(70, 4, 5)
    chunks = list(PROCESSOR.binary_masks(logits, (9, 11), 0.3))
    assert [len(chunk) for chunk in chunks] == [32, 32, 6]
    assert torch.equal(torch.cat(chunks), F.interpolate(logits[None], (9, 11), mode="bilinear")[0].sigmoid() > 0.3)


def test_nothing_is_found_where_no_score_is_high_enough():
    for options in ({}, {"return_binary_maps": True}, {"return_coco_annotation": True}):
        found = PROCESSOR.post_process_instance_segmentation(outputs_of(), threshold=1.0, **options)
        assert [image["segments_info"] for image in found] == [[], []]
        assert all(len(image["segmentation"]) == (0 if options else 8) for image in found)
        assert options or all((image["segmentation"] == -1).all() for image in found)


@pytest.mark.parametrize("mask", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(3, 4), 1 - np.eye(3, 4)])
def test_run_lengths_go_down_the_columns(mask):
    found = run_lengths(torch.from_numpy(mask))
    assert sum(found["counts"]) == 12
    np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(found, 3, 4)), mask)


def test_what_excludes_each_other_is_refused():
    both = {"return_binary_maps": True, "return_coco_annotation": True}
    with pytest.raises(ValueError, match="exclude each other"):
        PROCESSOR.post_process_instance_segmentation(outputs_of(), **both)
    with pytest.raises(ValueError, match="1 target_sizes are given for 2 images"):
        PROCESSOR.post_process_instance_segmentation(outputs_of(), target_sizes=[(4, 4)])


def test_each_image_processor_segments_in_one_way():
    """The pipeline takes the first of these methods that there is, whatever the model."""
    for entry in MODELS:
        found = [name for name in METHODS if hasattr(entry.processor_class, f"post_process_{name}_segmentation")]
        assert found == [name for name in METHODS if entry.task == f"{name}-segmentation"]


def test_a_saved_folder_is_a_pipeline(tmp_path):
    model = build("instance_segmentation").eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert type(AutoModelForInstanceSegmentation.from_pretrained(tmp_path)) is type(model)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    options = {"threshold": 0.0, "mask_threshold": 0.6, "overlap_mask_area_threshold": 0.1}
    (expected,) = processor.post_process_instance_segmentation(outputs, target_sizes=[(48, 70)], **options)
    found = pipeline("image-segmentation", model=str(tmp_path))(image, **options)
    assert len(found) == len(expected["segments_info"]) > 0
    for entry, segment in zip(found, expected["segments_info"]):
        assert entry["label"] == model.config.id2label[segment["label_id"]]
        assert entry["score"] == pytest.approx(segment["score"], abs=1e-6)
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, expected["segmentation"] == segment["id"])
