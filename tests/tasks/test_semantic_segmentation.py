"""The task of segmentation: what it requires of the data, its evaluation against pixels, in one rank and in two."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.metrics.segmentation import segmentation_metrics
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.tasks import semantic_segmentation
from hf_vlm.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION as TASK

NAMES = ["red", "green", "blue"]
SIZES = [(16, 12), (8, 8), (20, 30), (11, 7), (9, 40)]


def example_of(size, index):
    """An image whose pixels have their class's colour, but for a tenth of them, and a column without a class."""
    rng = np.random.default_rng(index)
    mask = rng.integers(0, 3, size, dtype=np.uint8)
    shown = np.where(rng.random(size) < 0.1, (mask + 1) % 3, mask)
    mask[:, 0] = 255
    return {
        "image": encoded((255 * np.eye(3, dtype=np.uint8))[shown]),
        "image_id": index,
        "mask": encoded(mask),
    }, shown


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def source_of(columns=("image", "image_id", "mask"), names=tuple(NAMES)):
    features = {"image": image_feature(), "image_id": datasets.Value("int64"), "mask": image_feature()}
    rows = [example_of(size, index)[0] for index, size in enumerate(SIZES)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features)).select_columns(list(columns))
    return Source(dataset=table.to_iterable_dataset(), name="photos", split="train", mask_class_names=names)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (source_of(("image", "image_id")), "photos has no masks in split 'train'"),
        (source_of(names=None), "names of their values are not known"),
        (source_of(names=("all",)), "photos has 1 classes of pixels"),
        (source_of(names=tuple(map(str, range(256)))), "takes 2 to 255"),
    ],
    ids=["no masks", "no names", "one class", "too many"],
)
def test_data_without_named_classes_of_pixels_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        TASK.class_names(source)
    assert TASK.class_names(source_of()) == NAMES


class BrightestChannel(torch.nn.Module):
    """Returns each pixel's channels as its logits."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.gain * pixel_values)


def evaluate(processor, model=None, **options):
    stream = ExampleStream(
        source_of().dataset,
        TASK.transform(processor, train=False, class_names=NAMES),
        shuffle=False,
        repeat=False,
        **options,
    )
    return TASK.evaluate(
        BrightestChannel().train() if model is None else model,
        stream,
        processor,
        class_names=NAMES,
        batch_size=2,
        per_class=True,
    )


def processor_of(inference, size=(8, 8)):
    return VLMViTSemanticSegmentationImageProcessor(size=dict(zip(("height", "width"), size)), inference=inference)


def test_evaluation_counts_the_pixels_of_all_images_at_their_own_size(monkeypatch):
    examples = [example_of(size, index) for index, size in enumerate(SIZES)]
    masks = [np.asarray(Image.open(io.BytesIO(example["mask"]["bytes"]))) for example, _ in examples]
    model = BrightestChannel().train()
    # Where no image is resized the prediction is what is shown.
    kept = [index for index, (height, width) in enumerate(SIZES) if min(height, width) >= 8]
    assert len(kept) == 4
    evaluation = evaluate(processor_of("slide"), model)
    assert model.training
    assert evaluation.counted == "pixels"
    assert evaluation.confusion.sum() == sum(height * (width - 1) for height, width in SIZES)
    found = evaluation.confusion
    counts = np.zeros((3, 3), dtype=np.int64)
    for index in kept:
        np.add.at(counts, (masks[index][:, 1:], examples[index][1][:, 1:]), 1)
    assert (found - counts).min() >= 0
    assert (found - counts).sum() == 11 * 6  # of the image that is enlarged
    expected = segmentation_metrics([shown for _, shown in examples], masks, num_classes=3)
    assert evaluation.metrics["miou"] == pytest.approx(expected["miou"], abs=0.05)

    # Two ranks, one after the other, and then together.
    parts, gathered = [], []
    monkeypatch.setattr(semantic_segmentation, "gather_object", lambda counts: parts.extend(counts) or counts)
    for rank in range(2):
        evaluate(processor_of("slide"), rank=rank, world_size=2)
    assert all(part.sum() for part in parts)
    monkeypatch.setattr(semantic_segmentation, "gather_object", lambda counts: gathered.extend(counts) or parts)
    assert evaluate(processor_of("slide"), rank=0, world_size=2).metrics == evaluation.metrics
    np.testing.assert_array_equal(gathered[0], parts[0])


def test_whole_images_are_seen_at_the_models_size():
    whole = evaluate(processor_of("whole", (20, 30)))
    slide = evaluate(processor_of("slide", (8, 8)))
    assert whole.confusion.sum() == slide.confusion.sum()
    assert whole.metrics["miou"] < slide.metrics["miou"]  # what was made smaller is mixed


def test_predictions_are_the_classes_by_the_fraction_that_they_cover():
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 2, :, :3] = 1
    logits[0, 1, 0, 3] = 1
    outputs = SemanticSegmenterOutput(logits=logits)
    model = type("Model", (), {"config": type("Config", (), {"num_labels": 3})})
    for threshold, labels in ((None, [2, 0, 1]), (0.2, [2])):
        (found,) = TASK.post_process(processor_of("whole"), outputs, threshold=threshold, sizes=[(2, 4)], model=model)
        assert found["labels"].tolist() == labels
        assert found["scores"].tolist() == [6 / 8, 1 / 8, 1 / 8][: len(labels)]
        assert found["segmentation"].tolist() == [[2, 2, 2, 1], [2, 2, 2, 0]]
