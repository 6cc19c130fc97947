"""Windows that are cut and put together, against a loop, and against whole images where one window covers all."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build, perturb
from torch.nn import functional as F
from transformers import AutoImageProcessor, pipeline

from hf_vlm.models.image_processing_semantic_segmentation import (
    VLMViTSemanticSegmentationImageProcessor,
    sliding_size,
    sliding_windows,
)

STATISTICS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def processor_of(height=24, width=36, **options):
    return VLMViTSemanticSegmentationImageProcessor(size={"height": height, "width": width}, **STATISTICS, **options)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pipelines_find_the_semantic_method_alone():
    processor = processor_of()
    kinds = ("semantic", "instance", "panoptic")
    assert [hasattr(processor, f"post_process_{kind}_segmentation") for kind in kinds] == [True, False, False]


@pytest.mark.parametrize(
    ("size", "tops", "lefts"),
    [
        ((24, 36), [0], [0]),
        ((25, 36), [0, 1], [0]),
        ((40, 60), [0, 16], [0, 24]),
        ((70, 100), [0, 16, 32, 46], [0, 24, 48, 64]),
    ],
)
def test_windows_overlap_by_a_third_and_end_with_the_image(size, tops, lefts):
    windows = list(sliding_windows(size, (24, 36)))
    assert [(rows.start, columns.start) for rows, columns in windows] == list(itertools.product(tops, lefts))
    assert {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in windows} == {(24, 36)}


def test_small_images_are_enlarged_to_a_window():
    assert sliding_size((12, 36), (24, 36)) == (24, 72)
    assert sliding_size((100, 9), (24, 36)) == (400, 36)
    assert sliding_size((25, 37), (24, 36)) == (25, 37)


def test_windows_are_cut_from_each_image_in_turn():
    processor, images = processor_of(inference="slide"), [noise(24, 36), noise(30, 60, seed=1)]
    windows = processor(images=images, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    expected = [images[0]] + [images[1][top : top + 24, left : left + 36] for top in (0, 6) for left in (0, 24)]
    expected = (np.stack(expected).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(windows, expected, atol=1e-5)
    assert [processor.num_windows(image.shape[:2]) for image in images] == [1, 4]


def test_classes_of_windows_are_those_of_the_mean_logits():
    processor, sizes = processor_of(inference="slide"), [(24, 36), (30, 60), (12, 20)]
    logits = torch.randn(1 + 4 + 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), target_sizes=sizes)
    large = F.interpolate(logits.double(), (24, 36), mode="bilinear")
    assert torch.equal(found[0], large[0].argmax(0))
    second = torch.zeros(30, 60, dtype=torch.int64)
    corners = [(0, 0), (0, 24), (6, 0), (6, 24)]
    for y, x in itertools.product(range(30), range(60)):
        seen = [
            part[:, y - top, x - left]
            for part, (top, left) in zip(large[1:5], corners)
            if 0 <= y - top < 24 and 0 <= x - left < 36
        ]
        second[y, x] = sum(seen).argmax()
    assert torch.equal(found[1], second)
    assert found[2].shape == (12, 20)  # from windows of 24 x 40


def test_one_window_that_covers_all_gives_what_the_whole_image_gives():
    image, outputs = noise(24, 36), SimpleNamespace(logits=torch.randn(1, 3, 4, 6))
    whole, slide = processor_of(), processor_of(inference="slide")
    inputs = [p(images=Image.fromarray(image), return_tensors="pt")["pixel_values"] for p in (whole, slide)]
    torch.testing.assert_close(*inputs)
    maps = [p.post_process_semantic_segmentation(outputs, target_sizes=[(24, 36)])[0] for p in (whole, slide)]
    assert torch.equal(*maps)
    assert len(maps[0].unique()) == 3


def test_whole_images_are_resized_to_their_own_size_or_not_at_all():
    logits = torch.randn(2, 3, 4, 6)
    outputs = SimpleNamespace(logits=logits)
    small = processor_of().post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(small), logits.argmax(1))
    sizes = torch.tensor([[30, 20], [8, 12]])
    for found, values, size in zip(
        processor_of().post_process_semantic_segmentation(outputs, sizes), logits, sizes.tolist()
    ):
        assert torch.equal(found, F.interpolate(values[None], size, mode="bilinear")[0].argmax(0))


def test_what_cannot_be_answered_is_refused():
    outputs = SimpleNamespace(logits=torch.zeros(3, 2, 4, 6))
    with pytest.raises(ValueError, match="3 images or windows, but 2 target_sizes, for which there must be 2"):
        processor_of().post_process_semantic_segmentation(outputs, target_sizes=[(4, 4)] * 2)
    slide = processor_of(inference="slide")
    with pytest.raises(ValueError, match="but 1 target_sizes, for which there must be 4"):
        slide.post_process_semantic_segmentation(outputs, target_sizes=[(30, 60)])
    with pytest.raises(ValueError, match="but 0 target_sizes"):
        slide.post_process_semantic_segmentation(outputs)
    for call in (lambda: processor_of(inference="tile"), lambda: processor_of()(noise(24, 36), inference="tile")):
        with pytest.raises(ValueError, match="inference is 'tile', but must be one of whole, slide"):
            call()


def test_a_saved_processor_slides_in_pipelines(tmp_path):
    model = build("semantic_segmentation").eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    processor_of(32, 32, inference="slide").save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.inference == "slide"
    image = Image.fromarray(noise(48, 70))
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    assert outputs.logits.shape[0] == 2 * 3
    (classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 70)])
    found = pipeline("image-segmentation", model=str(tmp_path))(image)
    labels = classes.unique().tolist()
    assert [entry["label"] for entry in found] == [model.config.id2label[label] for label in labels]
    for entry, label in zip(found, labels):
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, classes == label)
