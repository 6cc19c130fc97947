"""Saved models of every task are evaluated from their folders; what does not fit is refused."""

import itertools

import datasets
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.features.accuracy import evaluate_features
from hf_vlm.features.extraction import eval_transform_for
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.registry import MODELS
from hf_vlm.tasks import TASKS, TRAINABLE_TASKS
from hf_vlm.tasks.evaluation import eval_stream, evaluate_run, evaluate_split, match_class_names
from hf_vlm.training.recipe import load_recipe, shipped_folder

METRICS = {name + part for name in ("knn", "linear") for part in ("", "_class", "_both")}
ENCODER = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_every_row_has_a_task_with_recipes_and_a_card():
    assert {name for entry in MODELS for name in (entry.task, entry.task_in_use)} == {*TASKS, "pretraining"}
    for task in TASKS.values():
        assert (shipped_folder("model_cards") / task.card).is_file()
        for preset, recipe in task.recipes.items():
            values = load_recipe(recipe)
            assert values["encoder_preset"] == preset
            assert next(row.task for row in MODELS if row.name == values["method"]) == task.name
    assert all(TASKS[name].headline and TASKS[name].post_process for name in TRAINABLE_TASKS)


def test_an_encoder_is_evaluated_from_its_folder(tmp_path, processor):
    VLMViTModel(VLMViTConfig(**ENCODER)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert set(evaluate_run(tmp_path, "scenes:easy", "test", num_examples=20).metrics) == METRICS


def test_an_encoder_is_evaluated_on_what_is_held_out_and_fitted_on_the_rest(tmp_path, processor):
    encoder = VLMViTModel(VLMViTConfig(**ENCODER))
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    split = evaluate_split(tmp_path, "scenes:easy", "train", holdout=0.3, num_examples=12)
    rest, held_out = open_source("scenes:easy").holdout(0.3)
    assert [image.image_id for image in split.images] == [example["image_id"] for example in held_out.take(12)]
    streams = [
        eval_stream(part.take(12), eval_transform_for(processor), max_bad_fraction=0) for part in (rest, held_out)
    ]
    assert split.evaluation.metrics == pytest.approx(evaluate_features(encoder.eval(), *streams, batch_size=64))


def test_classes_of_the_data_must_be_those_of_the_detector(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has classes that the model .* does not have"):
        evaluate_run(tmp_path, "scenes:easy", "test", num_examples=2)
    with pytest.raises(ValueError, match="There is no folder"):
        evaluate_run(tmp_path / "nothing", "scenes:easy", "test")


def test_classes_of_a_split_are_matched_by_name(caplog):
    features = datasets.Features(
        {
            "image": image_feature(),
            "image_id": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["dog", "ant"]),
            "objects": objects_feature(["leg", "eye"]),
        }
    )
    objects = {"bbox": [[0, 0, 1, 1]] * 3, "category": [1, 0, 1], "area": [1] * 3, "iscrowd": [0] * 3}
    rows = [
        {"image": {"bytes": b"x", "path": None}, "image_id": row, "label": label, "objects": objects}
        for row, label in enumerate((0, 1, -1))
    ]
    dataset = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
    source = Source(dataset=dataset, name="photos", split="test")
    names = ["ant", "bee", "dog"]
    matched = match_class_names(source, ["dog", "ant"], names, "the model")
    assert (matched.label_names, matched.object_names) == (names, ["leg", "eye"])
    assert [example["label"] for example in matched] == [2, 0, -1]
    assert [example["objects"]["category"] for example in matched] == [[1, 0, 1]] * 3
    assert "matched by name to those of the model, of which the data lack ['bee']" in caplog.text
    matched = match_class_names(source, ["leg", "eye"], ["eye", "arm", "leg"], "the model")
    assert [example["objects"]["category"] for example in matched] == [[0, 2, 0]] * 3
    assert [example["label"] for example in matched] == [0, 1, -1]
    assert match_class_names(source, ["dog", "ant"], ["dog", "ant"], "the model") is source
    with pytest.raises(ValueError, match=r"'test' of photos has classes that the model does not have: \['dog'\]"):
        match_class_names(source, ["dog", "ant"], ["ant"], "the model")


def test_a_plot_of_confusion_is_refused_before_the_data_are_opened(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no confusion matrix to plot"):
        evaluate_run(tmp_path, str(tmp_path / "no data"), "test", needs_confusion=True)


def test_a_detector_without_some_weights_is_refused(tmp_path, detector, processor):
    detector.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("class_head")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {len(weights) - len(kept)} of the model's weights"):
        evaluate_run(tmp_path, "scenes:easy", "test", num_examples=2)


def test_unreadable_images_up_to_the_allowed_fraction_are_skipped(tmp_path, processor):
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
    evaluation = evaluate_run(tmp_path / "encoder", str(tmp_path / "images"), "test", max_bad_fraction=0.2)
    assert set(evaluation.metrics) == METRICS
