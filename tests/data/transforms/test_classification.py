"""A classifier's inputs, labels and batches against views and mixes made by hand."""

import functools
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.schema import image_feature
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.classification import (
    ClassificationSettings,
    ClassificationTransform,
    collate_classification,
)
from hf_vlm.data.transforms.image_ops import resize
from hf_vlm.data.transforms.mixing import MixParameters, erase, sample_mix
from hf_vlm.data.transforms.views import ViewSettings, render_view, sample_view
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor

NORMALIZE = {"image_mean": 0.5, "image_std": 0.25}
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def noise(*shape, seed=5):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_example(label=2, image_id=42, **columns):
    return {"image": encode(noise(60, 80, 3)), "image_id": image_id, "label": label, **columns}


def with_objects(*categories):
    boxes = [[1.0, 2.0, 3.0, 4.0] for _ in categories]
    return {
        "image": encode(noise(60, 80, 3)),
        "image_id": 42,
        "objects": {"bbox": boxes, "category": list(categories)},
    }


def make_transform(*, train, num_channels=3, size=32, **values):
    return ClassificationTransform.from_dict(
        values, size=size, train=train, num_classes=4, num_channels=num_channels, **NORMALIZE
    )


def normalised(image):
    return (image.transpose(2, 0, 1) / 255 - 0.5) / 0.25


# --- transform ------------------------------------------------------------------------------------------------------


def test_a_training_view_is_the_one_of_the_generator():
    values = {"jitter": [0.3, 0.3, 0.3, 0.1], "vertical_flip_probability": 0.5, "crop_scale": [0.2, 0.5]}
    transform = make_transform(train=True, size=[24, 32], **values)
    settings = ViewSettings(size=(24, 32), **values)
    for seed in range(5):
        transformed = transform(make_example(), np.random.default_rng(seed))
        expected = render_view(noise(60, 80, 3), settings, sample_view(settings, np.random.default_rng(seed)))
        np.testing.assert_allclose(transformed["pixel_values"], normalised(expected), atol=1e-5)
        assert transformed["pixel_values"].dtype == torch.float32
        assert transformed["label"] == 2
        assert set(transformed) == {"pixel_values", "label"}


def test_evaluation_sees_what_the_image_processor_makes():
    transform = make_transform(train=False, size=[24, 32], erasing_probability=1.0, **MIX)
    transformed = transform(make_example(), np.random.default_rng(0))
    assert set(transformed) == {"pixel_values", "label"}
    np.testing.assert_allclose(transformed["pixel_values"], normalised(resize(noise(60, 80, 3), (24, 32))), atol=1e-5)
    processor = VLMViTClassificationImageProcessor(
        size={"height": 24, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    expected = processor(images=Image.fromarray(noise(60, 80, 3)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transformed["pixel_values"], expected, rtol=0, atol=1.1 / 255 / 0.25)


def test_erasing_and_mixing_come_after_the_view():
    plain, erased = (make_transform(train=True, erasing_probability=p, **MIX) for p in (0.0, 1.0))
    before = plain(make_example(), np.random.default_rng(3))["pixel_values"].numpy()
    transformed = erased(make_example(), np.random.default_rng(3))
    rng = np.random.default_rng(3)
    sample_view(erased.settings.view, rng)
    rng.random()
    erase(before, rng)
    np.testing.assert_array_equal(transformed["pixel_values"], before)
    assert transformed["mix"] == sample_mix(erased.settings.mix, (32, 32), rng)


def test_objects_become_the_classes_that_are_present():
    for train in (False, True):
        transform = make_transform(train=train)
        for categories, expected in (((3, 0, 3), [1, 0, 0, 1]), ((), [0, 0, 0, 0])):
            label = transform(with_objects(*categories), np.random.default_rng(0))["label"]
            assert label.tolist() == expected
            assert label.dtype == torch.float32


def test_a_label_comes_before_objects():
    example = {**with_objects(3), "label": 1}
    assert make_transform(train=False)(example, np.random.default_rng(0))["label"] == 1


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (make_example(-1), "Image 42 has no class"),
        (make_example(None), "Image 42 has no class"),
        (make_example(4), "Image 42 is of class 4, but there are 4 classes, 0 to 3"),
        (with_objects(0, 7), "Image 42 is of class 7"),
        (with_objects(-1), "Image 42 is of class -1"),
        ({"image": encode(noise(4, 4, 3)), "image_id": 42}, "neither a column 'label' nor 'objects'"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_wrong_labels_are_explained(example, words, train):
    with pytest.raises(ValueError, match=words) as error:
        make_transform(train=train)(example, np.random.default_rng(0))
    assert not isinstance(error.value, BadImageError)


def test_an_undecodable_image_is_a_bad_image():
    with pytest.raises(BadImageError):
        make_transform(train=True)(make_example(image={"bytes": b"no image", "path": "x"}), np.random.default_rng(0))


def test_grey_images():
    example = make_example(image=encode(noise(60, 80, 1)))
    transformed = make_transform(train=True, num_channels=1)(example, np.random.default_rng(0))
    assert transformed["pixel_values"].shape == (1, 32, 32)
    with pytest.raises(ValueError, match="3 channels"):
        make_transform(train=True, num_channels=1, jitter=[0.1, 0, 0, 0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup": 0.5}, "'mixup' of the classification augmentation.*'mixup_alpha'"),
        ({"size": 32}, "Unknown option 'size'"),
        ({"flip": 0.5}, "now called 'flip_probability'"),
        ({"erasing_probability": 2}, "erasing_probability must be between 0 and 1"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale must be a pair"),
        ({"cutmix_alpha": -1}, "cutmix_alpha must be"),
    ],
)
def test_wrong_settings_are_explained(values, words):
    with pytest.raises(ValueError, match=words):
        ClassificationTransform.from_dict(values, size=32, train=True, num_classes=4, **NORMALIZE)


def test_settings_by_default():
    settings = ClassificationSettings.from_dict({}, size=64)
    assert settings.view == ViewSettings(size=(64, 64), crop_scale=(0.35, 1.0))
    assert settings.erasing_probability == 0
    assert not settings.mix.mixes


# --- batches --------------------------------------------------------------------------------------------------------


def examples_of(labels, mixes=None):
    examples = [
        {"pixel_values": torch.full((3, 4, 4), float(index)), "label": label} for index, label in enumerate(labels)
    ]
    return [{**e, "mix": m} for e, m in zip(examples, mixes)] if mixes else examples


def test_labels_are_stacked_where_nothing_is_mixed():
    batch = collate_classification(examples_of([2, 0, 3]), num_classes=4)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["labels"].tolist() == [2, 0, 3]
    assert batch["labels"].dtype == torch.int64
    present = [torch.tensor([1.0, 0, 1, 0]), torch.zeros(4)]
    assert torch.equal(collate_classification(examples_of(present), num_classes=4)["labels"], torch.stack(present))


@pytest.mark.parametrize(
    "labels", [[2, 0, 3], [torch.tensor(row) for row in ([0.0, 0, 1, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 1])]]
)
def test_each_image_is_mixed_with_the_next(labels):
    mixes = [MixParameters(0.75), MixParameters(), MixParameters(0.75, (0, 0, 2, 2))]
    batch = collate_classification(examples_of(labels, mixes), num_classes=4)
    expected = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None].expand(3, 3, 4, 4).clone()
    expected[0] = 0.25
    expected[2, :, :2, :2] = 0
    torch.testing.assert_close(batch["pixel_values"], expected)
    torch.testing.assert_close(batch["labels"], torch.tensor([[0.25, 0, 0.75, 0], [1.0, 0, 0, 0], [0, 0, 0.25, 0.75]]))
    assert batch["labels"].dtype == torch.float32


def make_loader(num_workers):
    rows = [{**make_example(i % 4, image_id=i), "image": encode(noise(40, 40, 3, seed=i))} for i in range(12)]
    features = {"image": image_feature(), "image_id": datasets.Value("int64"), "label": datasets.Value("int64")}
    source = datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_iterable_dataset()
    return StatefulDataLoader(
        ExampleStream(source, make_transform(train=True, erasing_probability=0.5, **MIX), block_size=8),
        batch_size=4,
        collate_fn=functools.partial(collate_classification, num_classes=4),
        num_workers=num_workers,
    )


def take(iterator, number):
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mixed_batches_resume_exactly(num_workers):
    whole = take(iter(make_loader(num_workers)), 6)
    first = make_loader(num_workers)
    take(iter(first), 2)
    torch.manual_seed(1)  # other randomness than the first time
    resumed = make_loader(num_workers)
    resumed.load_state_dict(first.state_dict())
    for batch, expected in zip(take(iter(resumed), 4), whole[2:]):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["labels"], expected["labels"])
    assert batch["labels"].shape == (4, 4)
    torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(4))
