"""Masks against the same mask drawn into its image, and the messages for wrong ones."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.transforms.segmentation import (
    SegmentationEvalTransform,
    SegmentationSettings,
    SegmentationTransform,
    collate_segmentation,
)
from hf_vlm.data.transforms.windows import sample_window
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor

NORMALIZE = {"image_mean": 1.0, "image_std": 0.25}  # a bright mean, which no class has: what is beside the image
COLORS = np.array([0, 60, 120, 180], dtype=np.uint8)  # of the classes
EVERYTHING = {
    "vertical_flip_probability": 0.5,
    "quarter_turn_probability": 0.7,
    "crop_probability": 0.8,
    "crop_scale": [0.1, 2.0],
}


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def make_mask(height=120, width=160):
    """Blocks of 40 x 40 pixels of the classes 0 to 3, none like the one beside it."""
    rows, columns = np.arange(height) // 40, np.arange(width) // 40
    return ((rows[:, None] * 2 + columns) % 4).astype(np.uint8)


def make_example(mask=None, **changes):
    mask = make_mask() if mask is None else mask
    image = COLORS[np.minimum(mask, 3)][:, :, None].repeat(3, axis=2)
    return {"image": encode(image), "image_id": 42, "mask": encode(mask), **changes}


def make_transform(size=(96, 128), num_classes=4, **values):
    return SegmentationTransform.from_dict(values, size=size, num_classes=num_classes, **NORMALIZE)


def levels(transformed):
    """The values (H, W) of the grey image, 0 to 255."""
    return (transformed["pixel_values"].numpy() * 0.25 + 1).mean(axis=0) * 255


def assert_mask_fits(transformed, tolerance):
    """Away from the edges, where the image is a mixture, each pixel has the grey of its class."""
    labels, found = transformed["labels"].numpy(), levels(transformed)
    expected = np.where(labels == 255, 255, COLORS[np.minimum(labels, 3)])
    assert (np.abs(found - expected) > 6).mean() <= tolerance


@pytest.mark.parametrize("size", [(96, 96), (60, 140), (200, 160)])
def test_augmented_masks_are_where_the_image_shows_them(size):
    transform = make_transform(size, **EVERYTHING)
    seen = set()
    for seed in range(60):
        transformed = transform(make_example(), np.random.default_rng(seed))
        assert transformed["pixel_values"].shape == (3, *size)
        assert transformed["labels"].shape == size
        assert_mask_fits(transformed, tolerance=0.12)
        seen |= set(transformed["labels"].unique().tolist())
    assert seen == {0, 1, 2, 3, 255}


def test_a_large_jpeg_is_decoded_smaller_and_its_mask_follows():
    mask = make_mask().repeat(4, axis=0).repeat(4, axis=1)
    image = encode(COLORS[mask][:, :, None].repeat(3, axis=2), "JPEG", quality=95)
    transform = make_transform((90, 90), **EVERYTHING)
    for seed in range(10):
        assert_mask_fits(transform(make_example(mask, image=image), np.random.default_rng(seed)), tolerance=0.12)


def test_pixels_without_a_class_and_beside_the_image_are_ignored():
    mask = make_mask()
    mask[:40] = 255
    options = {"flip_probability": 0, "crop_ratio": [1, 1], "crop_probability": 1}
    plain = make_transform((120, 160), **options, crop_scale=[1, 1])(make_example(mask), np.random.default_rng(0))
    np.testing.assert_array_equal(plain["labels"], mask)
    small = make_transform((120, 160), **options, crop_scale=[4, 4])(make_example(mask), np.random.default_rng(0))
    labels = small["labels"].numpy()
    assert (labels != 255).sum() == 80 * 160 / 4  # a quarter of the labelled pixels
    beside = levels(small).round() == 255
    assert beside.sum() == 3 * 120 * 160 / 4
    assert (labels[beside] == 255).all()


def test_colours_change_the_image_alone():
    jittered = make_transform(jitter=[0.5, 0.5, 0.5, 0.2], jitter_probability=1.0, **EVERYTHING)
    plain = SegmentationTransform(
        (96, 128),
        num_classes=4,
        settings=dataclasses.replace(jittered.settings, jitter=(0, 0, 0, 0)),
        **NORMALIZE,
    )
    changed = [t(make_example(), np.random.default_rng(3)) for t in (jittered, plain)]
    assert torch.equal(changed[0]["labels"], changed[1]["labels"])
    assert not torch.allclose(changed[0]["pixel_values"], changed[1]["pixel_values"])


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_a_window_of_one_class_is_placed_elsewhere(limit):
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[40:60] = 1
    settings = {"flip_probability": 0, "crop_probability": 1, "crop_scale": [0.04, 0.04], "crop_ratio": [1, 1]}
    transform = make_transform((20, 20), max_class_fraction=limit, **settings)
    fractions = []
    for seed in range(100):
        labels = transform(make_example(mask), np.random.default_rng(seed))["labels"]
        fractions.append((labels == 0).float().mean().item())
        parameters = sample_window(transform.settings, np.random.default_rng(seed))
        tops = [round(y * 80) for y, _ in parameters.positions]
        shares = [(mask[top : top + 20, 0] == 0).mean() for top in tops]
        good = [s for s in shares if max(s, 1 - s) <= limit]
        assert fractions[-1] == pytest.approx(good[0] if good else shares[-1])
    assert (np.mean(fractions) < 0.75) == (limit == 0.5)


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_evaluation_sees_what_the_processor_makes_and_the_mask_as_it_is(inference):
    processor = VLMViTSemanticSegmentationImageProcessor(size={"height": 96, "width": 128}, inference=inference)
    mask = make_mask()
    mask[0, 0] = 255
    example = make_example(mask)
    transformed = SegmentationEvalTransform(processor, num_classes=4)(example, np.random.default_rng(0))
    expected = processor(images=Image.open(io.BytesIO(example["image"]["bytes"])), return_tensors="pt")
    assert torch.equal(transformed["pixel_values"], expected["pixel_values"])
    assert transformed["pixel_values"].shape[0] == {"whole": 1, "slide": 4}[inference]
    np.testing.assert_array_equal(transformed["labels"], mask)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mask": encode(np.full((120, 160), 4, np.uint8))},
            "mask of image 42 has the value 4, but there are 4",
        ),
        ({"mask": encode(np.zeros((12, 16), np.uint8))}, "mask of image 42 is 16 x 12 but 160 x 120 is its image"),
        ({"mask": None}, "Image 42 has no mask: "),
    ],
)
def test_wrong_masks_are_explained(changes, words):
    processor = VLMViTSemanticSegmentationImageProcessor()
    for transform in (make_transform(), SegmentationEvalTransform(processor, num_classes=4)):
        with pytest.raises(ValueError, match=words) as error:
            transform(make_example() | changes, np.random.default_rng(0))
        assert not isinstance(error.value, BadImageError)


def test_an_undecodable_mask_is_a_bad_image():
    with pytest.raises(BadImageError, match=r"x\.png"):
        make_transform()(make_example() | {"mask": {"bytes": b"no image", "path": "x.png"}}, np.random.default_rng(0))


def test_palettes_give_their_indices():
    mask = Image.fromarray(make_mask())
    mask.putpalette([200, 0, 0] * 256)
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    settings = {"flip_probability": 0, "crop_probability": 0}
    example = make_example(mask=make_mask()) | {"mask": {"bytes": buffer.getvalue(), "path": None}}
    labels = make_transform((120, 160), **settings)(example, np.random.default_rng(0))["labels"]
    np.testing.assert_array_equal(labels, make_mask())


@pytest.mark.parametrize(
    ("values", "words"),
    [({"max_class_fraction": 2}, "between 0 and 1"), ({"min_visible": 0.3}, "Unknown option 'min_visible'")],
)
def test_bad_settings_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        make_transform(**values)


def test_gray_images_have_no_jitter():
    with pytest.raises(ValueError, match="jitter needs images of 3 channels"):
        SegmentationTransform(
            32, num_classes=2, num_channels=1, settings=SegmentationSettings(jitter=(0.1, 0, 0, 0)), **NORMALIZE
        )


def test_batches_are_stacked():
    transform = make_transform()
    examples = [transform(make_example(), np.random.default_rng(seed)) for seed in range(2)]
    batch = collate_segmentation(examples)
    for name in ("pixel_values", "labels"):
        assert torch.equal(batch[name], torch.stack([example[name] for example in examples]))
