"""The task of classification: what it requires of the data, and its evaluation against counts by hand."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vlm.data.schema import image_feature
from hf_vlm.data.stream import ExampleStream
from hf_vlm.metrics.classification import multi_label_metrics
from hf_vlm.models.image_processing_classification import VLMViTClassificationImageProcessor
from hf_vlm.tasks.classification import CLASSIFICATION

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
NAMES = ["red", "green", "blue"]


def source_of(labels, objects):
    return SimpleNamespace(name="photos", split="train", label_names=labels, object_names=objects)


def test_classes_are_those_of_the_labels_or_else_of_the_objects():
    for labels, objects, problem_type in ((NAMES, ["car"], SINGLE), (NAMES, None, SINGLE), (None, NAMES, MULTI)):
        source = source_of(labels, objects)
        assert CLASSIFICATION.class_names(source) == NAMES
        assert CLASSIFICATION.head_fields(source) == {"problem_type": problem_type}


@pytest.mark.parametrize(
    ("labels", "objects", "words"),
    [
        (None, None, "photos has neither labels nor boxes"),
        (["red"], NAMES, r"has the classes \['red'\]"),
        (None, ["car"], "needs at least 2"),
    ],
)
def test_data_with_fewer_than_two_classes_are_refused(labels, objects, words):
    with pytest.raises(ValueError, match=words):
        CLASSIFICATION.class_names(source_of(labels, objects))


class BrightestChannel(torch.nn.Module):
    """Returns the mean of each channel as the logit of a class."""

    def __init__(self, problem_type):
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem_type, num_labels=3, temperature=1.0)
        self.classifier = torch.nn.Identity()
        self.gain = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, pixel_values):
        return SimpleNamespace(
            logits=self.classifier(self.gain * pixel_values.mean(dim=(2, 3))) / self.config.temperature
        )


COLORS = [(255, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 100, 200)]
PROCESSOR = VLMViTClassificationImageProcessor(
    size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


def stream_of(column, feature, values):
    rows = []
    for index, (color, value) in enumerate(zip(COLORS, values)):
        file = io.BytesIO()
        Image.new("RGB", (16, 12), color).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "image_id": index, column: value})
    features = {"image": image_feature(), "image_id": datasets.Value("int64"), column: feature}
    source = datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_iterable_dataset()
    transform = CLASSIFICATION.transform(PROCESSOR, train=False, class_names=NAMES)
    return ExampleStream(source, transform, shuffle=False, repeat=False)


def labelled():
    return stream_of("label", datasets.Value("int64"), [0, 1, 1, 2, 2])


def with_objects():
    objects = [[0], [0, 0, 1], [1], [2], []]
    feature = {"category": datasets.List(datasets.Value("int64"))}
    return stream_of("objects", feature, [{"category": categories} for categories in objects])


def evaluate(model, stream, **options):
    return CLASSIFICATION.evaluate(model, stream, PROCESSOR, class_names=NAMES, batch_size=2, **options)


def test_one_class_per_image():
    model = BrightestChannel(SINGLE).train()
    evaluation = evaluate(model, labelled(), per_class=True)
    np.testing.assert_array_equal(evaluation.confusion, [[1, 0, 0], [1, 1, 0], [0, 0, 2]])
    assert evaluation.class_names == NAMES
    assert evaluation.metrics["top1"] == 4 / 5
    assert evaluation.metrics["balanced_accuracy"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert [evaluation.metrics[f"recall/{name}"] for name in NAMES] == [1, 1 / 2, 1]
    assert model.training


def test_a_temperature_is_fitted_to_the_undivided_logits():
    model = BrightestChannel(SINGLE)
    before = evaluate(model, labelled()).metrics
    calibration = CLASSIFICATION.calibrate(before)
    assert calibration.config == {"temperature": pytest.approx(before["temperature"], rel=1e-3)}
    assert not calibration.processor
    calibration.apply(model, PROCESSOR)
    assert model.config.temperature == calibration.config["temperature"] != 1
    after = evaluate(model, labelled()).metrics
    assert after["temperature"] == pytest.approx(before["temperature"], rel=1e-3)
    assert after["ece"] == pytest.approx(before["ece_calibrated"], abs=1e-3) != before["ece"]
    assert after["top1"] == before["top1"]


def test_several_classes_per_image():
    evaluation = evaluate(BrightestChannel(MULTI), with_objects(), per_class=True)
    scores = 1 / (1 + np.exp(-4 * (np.array(COLORS) / 127.5 - 1)))
    labels = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    expected = multi_label_metrics(scores, labels, class_names=NAMES, per_class=True)
    f1_of = {
        threshold: multi_label_metrics(scores, labels, threshold=threshold)["micro_f1"]
        for threshold in np.linspace(0.025, 0.975, 39)
    }
    best = {name: evaluation.metrics.pop(name) for name in ("best_micro_f1", "score_threshold")}
    assert best["best_micro_f1"] == pytest.approx(max(f1_of.values()))
    assert f1_of[min(f1_of, key=lambda threshold: abs(threshold - best["score_threshold"]))] == best["best_micro_f1"]
    assert CLASSIFICATION.calibrate(best).processor == {
        "score_threshold": pytest.approx(best["score_threshold"], 1e-3)
    }
    assert evaluation.metrics == pytest.approx(expected)
    assert evaluation.confusion is None
    assert CLASSIFICATION.has_confusion(BrightestChannel(SINGLE))
    assert not CLASSIFICATION.has_confusion(BrightestChannel(MULTI))
    assert 0.5 < expected["map"] < 1


def test_data_of_the_other_problem_type_are_refused():
    with pytest.raises(ValueError, match="data have several classes per image, but the model predicts one"):
        evaluate(BrightestChannel(SINGLE), with_objects())
    with pytest.raises(ValueError, match="data have one class per image, but the model predicts several"):
        evaluate(BrightestChannel(MULTI), labelled())


@pytest.mark.parametrize(
    ("kind", "threshold", "labels"),
    [
        (SINGLE, None, [[1], [0]]),  # 0.72 and 0.67
        (SINGLE, 0.7, [[1], []]),
        (MULTI, None, [[1, 0], []]),  # 0.95, 0.88, 0.27; 0.05, 0.02, 0.01
        (MULTI, 0.9, [[1], []]),
        (MULTI, 0.04, [[1, 0, 2], [0]]),
    ],
)
def test_predictions(kind, threshold, labels):
    outputs = SimpleNamespace(logits=torch.tensor([[2.0, 3.0, -1.0], [-3.0, -4.0, -5.0]]))
    options = {"sizes": [(12, 16)] * 2, "model": BrightestChannel(kind)}
    found = CLASSIFICATION.post_process(PROCESSOR, outputs, threshold=threshold, **options)
    assert [image["labels"].tolist() for image in found] == labels


def test_training_batches_are_mixed_where_asked_for():
    augmentation = {"mixup_alpha": 0.8}
    options = {"class_names": NAMES, "augmentation": augmentation}
    example = {"image": {"bytes": None, "path": None}, "image_id": 0, "label": 1}
    file = io.BytesIO()
    Image.new("RGB", (16, 12)).save(file, "PNG")
    example["image"]["bytes"] = file.getvalue()
    for train, shape in ((True, (2, 3)), (False, (2,))):
        transform = CLASSIFICATION.transform(PROCESSOR, train=train, **options)
        examples = [transform(example, np.random.default_rng(seed)) for seed in range(2)]
        assert CLASSIFICATION.collate(train=train, **options)(examples)["labels"].shape == shape
