"""Evaluators against plain loops over the same images."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vlm.data.scenes.render import render_scene, scene_settings
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.views import EvalTransform
from hf_vlm.metrics import coco_detection_metrics, knn_accuracy, linear_accuracy
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training.evaluation import evaluate_detection, evaluate_features, predict_detection
from hf_vlm.training.run import detection_transform, evaluate_run

NAMES = list("01234")
FIGURES = {name + part for name in ("knn", "linear") for part in ("", "_class", "_both")}
ENCODER = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def detector():
    torch.manual_seed(0)
    config = VLMViTDetectionConfig(
        backbone_config=ENCODER,
        num_labels=5,
        hidden_size=32,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        num_queries=9,
    )
    return VLMViTForObjectDetection(config).train()


@pytest.fixture
def processor():
    return VLMViTImageProcessor(size={"height": 48, "width": 48})


def held_out(processor):
    source = open_source("scenes:easy", "test", num_samples=7)
    return ExampleStream(
        source.dataset, detection_transform(processor, train=False, num_classes=5), shuffle=False, repeat=False
    )


def test_references_are_the_boxes_of_the_scenes_in_pixels(detector, processor):
    predictions, references = predict_detection(detector, held_out(processor), processor, batch_size=3)
    assert len(predictions) == len(references) == 7
    for index, reference in enumerate(references):
        scene = render_scene(0, index, scene_settings("easy"), split="test")
        corners = np.concatenate([scene.boxes[:, :2], scene.boxes[:, :2] + scene.boxes[:, 2:]], axis=1)
        np.testing.assert_allclose(reference["boxes"].numpy(), corners, atol=1e-3)
        assert reference["labels"].tolist() == scene.categories.tolist()
    assert detector.training


def test_figures_are_those_of_the_predictions(detector, processor):
    figures = evaluate_detection(detector, held_out(processor), processor, class_names=NAMES, batch_size=2)
    predictions, references = predict_detection(detector, held_out(processor), processor, batch_size=7)
    expected = coco_detection_metrics(predictions, references, class_names=NAMES)
    assert figures == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("use_class_token", [True, False])
def test_frozen_features_are_judged_by_what_the_encoder_has(use_class_token):
    torch.manual_seed(0)
    encoder = VLMViTModel(VLMViTConfig(**ENCODER, use_class_token=use_class_token))
    transform = EvalTransform(48, image_mean=0.5, image_std=0.5)

    def stream(split, n):
        return ExampleStream(
            open_source("scenes:easy", split, num_samples=n).dataset, transform, shuffle=False, repeat=False
        )

    figures = evaluate_features(encoder, stream("train", 60), stream("test", 40), batch_size=16)
    features, labels = {}, {}
    with torch.no_grad():
        for split, n in (("train", 60), ("test", 40)):
            examples = list(stream(split, n))
            images = torch.stack([example["pixel_values"] for example in examples])
            tokens = encoder.eval()(images).last_hidden_state
            features[split] = {"": tokens[:, int(use_class_token) :].mean(1)}
            if use_class_token:
                features[split] |= {"_class": tokens[:, 0]}
                features[split] |= {"_both": torch.cat([tokens[:, 0], features[split][""]], dim=1)}
            labels[split] = torch.tensor([example["label"] for example in examples])
    assert len(figures) == 2 * len(features["test"])
    for suffix, test_features in features["test"].items():
        data = features["train"][suffix], labels["train"], test_features, labels["test"]
        assert figures["knn" + suffix] == pytest.approx(knn_accuracy(*data))
        assert figures["linear" + suffix] == pytest.approx(linear_accuracy(*data), abs=0.026)  # one image
    assert len(set(figures.values())) > 2 or not use_class_token


def test_an_encoder_is_evaluated_from_its_folder(tmp_path, processor):
    VLMViTModel(VLMViTConfig(**ENCODER)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert set(evaluate_run(tmp_path, "scenes:easy", "test", num_examples=20)) == FIGURES


def test_classes_of_the_data_must_be_those_of_the_detector(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has the classes"):
        evaluate_run(tmp_path, "scenes:easy", "test", num_examples=2)
    with pytest.raises(ValueError, match="holds no model"):
        evaluate_run(tmp_path / "nothing", "scenes:easy", "test")


def test_a_detector_without_some_weights_is_refused(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("class_head")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {len(weights) - len(kept)} of the detector's weights"):
        evaluate_run(tmp_path, "scenes:easy", "test", num_examples=2)


def test_as_many_unreadable_images_as_asked_for_are_passed_over(tmp_path, processor):
    VLMViTModel(VLMViTConfig(**ENCODER)).save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    for split, name in itertools.product(("train", "test"), "ab"):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 32), (60 * index, 0, 255 * (name == "a"))).save(folder / f"{index}.png")
        (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 10 images could not be decoded"):
        evaluate_run(tmp_path / "encoder", str(tmp_path / "images"), "test")
    figures = evaluate_run(tmp_path / "encoder", str(tmp_path / "images"), "test", max_bad_fraction=0.2)
    assert set(figures) == FIGURES
