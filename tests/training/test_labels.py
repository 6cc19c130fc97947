"""A head learns from labels that nobody annotated: in pretraining, and in fine-tuning beside labelled images."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_vlm.data.pseudo_labels import PseudoLabels
from hf_vlm.data.sources import open_source
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_instance_segmentation import VLMViTForInstanceSegmentation
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.tasks.pseudo_labels import find_pseudo_labels
from hf_vlm.training import labels
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.run import finetune, pretrain


@pytest.fixture
def head_recipe(make_recipe):
    def make(**changes):
        recipe = make_recipe("detection", **changes)
        del recipe["num_eval_examples"]
        return recipe

    return make


def test_a_detector_is_pretrained_on_regions_and_fine_tuned_to_other_classes(head_recipe, make_recipe, tmp_path):
    drawn = []
    recipe = head_recipe(output_dir=str(tmp_path / "objects"), max_steps=2)
    summary = pretrain(recipe, render_labels=lambda source, folder: drawn.append((len(list(source)), folder.name)))
    assert summary["finished"]
    assert summary["data"]["class_names"] == ["object"]
    found = find_pseudo_labels(open_source("scenes:easy", "train", num_samples=24), "regions", size=(32, 32))
    assert drawn == [(int((np.diff(found.starts) > 0).sum()), "objects")]
    model = VLMViTForObjectDetection.from_pretrained(tmp_path / "objects")
    assert model.config.id2label == {0: "object"}
    recipe = make_recipe("detection", encoder=str(tmp_path / "objects"), max_steps=1, learning_rate=0.0)
    finetune(recipe)
    detector = VLMViTForObjectDetection.from_pretrained(recipe["output_dir"])
    theirs = model.state_dict()
    same = {name for name, value in detector.state_dict().items() if torch.equal(value, theirs[name])}
    assert detector.config.num_labels == 5
    assert theirs.keys() - same <= detector.class_layers()


@pytest.mark.slow
def test_an_instance_segmenter_is_pretrained_on_the_outlines_of_regions(make_recipe, tmp_path):
    """With its mask head, which fine-tuning takes over, and in a second round on the masks of the first."""
    changes = {"model_config": {"mask_feature_size": 16}, "max_steps": 2, "rounds": 2, "labels_per_image": 1.0}
    recipe = make_recipe("instance_segmentation", output_dir=str(tmp_path / "objects"), **changes)
    del recipe["num_eval_examples"]
    assert pretrain(recipe)["data"]["class_names"] == ["object"]
    for folder in ("objects/round-1", "objects"):
        kept = pq.read_table(tmp_path / folder / labels.LABELS_FILE)
        assert any(text for row in kept["segmentation"].to_pylist() for text in row)
    model = VLMViTForInstanceSegmentation.from_pretrained(tmp_path / "objects").state_dict()
    changes = {"model_config": {}, "encoder": str(tmp_path / "objects"), "max_steps": 1, "learning_rate": 0.0}
    tuned = make_recipe("instance_segmentation", **changes)
    finetune(tuned)
    theirs = VLMViTForInstanceSegmentation.from_pretrained(tuned["output_dir"])
    same = {name for name, value in theirs.state_dict().items() if torch.equal(value, model[name])}
    assert model.keys() - same <= theirs.class_layers()
    assert any(name.startswith("mask_head.") for name in same)


def test_what_was_found_is_kept_for_a_resumed_run(head_recipe, monkeypatch, tmp_path):
    recipe = head_recipe(max_steps=4, save_strategy="steps", save_steps=2)
    whole = pretrain(recipe | {"output_dir": str(tmp_path / "whole")})
    stopped = head_recipe(max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "stopped"))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    (tmp_path / "stopped" / "config.json").unlink()
    monkeypatch.setattr(labels.PseudoLabels, "save", None)  # is not called
    resumed = pretrain(stopped | {"resume_from_checkpoint": "last"})
    assert resumed["num_steps"] == whole["num_steps"] == 4
    weights = [VLMViTForObjectDetection.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def rounds(head_recipe, tmp_path):
    """A recipe of three rounds; a detector of two steps is sure of nothing, so the number of boxes is given."""
    saves = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return head_recipe(output_dir=str(tmp_path / "run"), rounds=3, labels_per_image=1.0, **saves)


@pytest.fixture
def labelled_by(monkeypatch):
    found, label = [], labels._label

    def record(args, source, task, labels_from, **options):
        found.append((Path(args.output_dir).name, Path(labels_from).name))
        return label(args, source, task, labels_from, **options)

    monkeypatch.setattr(labels, "_label", record)
    return found


@pytest.mark.slow
def test_each_round_learns_from_the_one_before(rounds, labelled_by, tmp_path, caplog):
    pretrain(rounds)
    assert caplog.text.count("no gain by pretraining a head") == 1
    assert labelled_by == [("round-1", "regions"), ("round-2", "round-1"), ("run", "round-2")]
    models = [
        VLMViTForObjectDetection.from_pretrained(path).state_dict()
        for path in (tmp_path / "run" / "round-1", tmp_path / "run" / "round-2", tmp_path / "run")
    ]
    assert not any(torch.equal(models[0]["class_head.weight"], model["class_head.weight"]) for model in models[1:])
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "rounds: 3\n" in recipe  # and it can be run again
    assert "labels_from: null\n" in recipe
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(rounds)


@pytest.mark.slow
def test_an_overwritten_run_that_is_stopped_in_a_round_is_not_taken_for_finished(rounds, monkeypatch, tmp_path):
    pretrain(rounds)
    monkeypatch.setattr("hf_vlm.training.run.label_source", None)  # stops the new one at once
    with pytest.raises(TypeError):
        pretrain(rounds | {"overwrite_output_dir": True, "seed": 5})
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.undo()
    assert pretrain(rounds | {"overwrite_output_dir": True, "seed": 5, "resume_from_checkpoint": "auto"})["finished"]
    assert "seed: 5\n" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_run_that_was_stopped_resumes_in_its_round(rounds, labelled_by, tmp_path):
    pretrain(rounds)
    expected = VLMViTForObjectDetection.from_pretrained(tmp_path / "run").state_dict()
    for folder in (tmp_path / "run", tmp_path / "run" / "round-2"):  # as if it had been killed in the second
        (folder / "config.json").unlink()
        shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    labelled_by.clear()
    summary = pretrain(rounds | {"resume_from_checkpoint": "last", "overwrite_output_dir": True})
    assert summary["finished"]
    assert labelled_by == [("round-2", "round-1"), ("run", "round-2")]
    resumed = VLMViTForObjectDetection.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_rounds_are_for_pretraining(make_recipe):
    with pytest.raises(ValueError, match="rounds is for images without labels"):
        finetune(make_recipe("detection", rounds=2))


def test_labels_of_other_images_are_found_again(head_recipe, tmp_path):
    args = parse_arguments(head_recipe(max_steps=2))
    args.resume_from_checkpoint = "auto"
    (tmp_path / "detection").mkdir()
    ids = {}
    for count in (4, 6):
        source = open_source("scenes:easy", "train", num_samples=count)
        labels.label_source(args, source, DETECTION, "regions")
        ids[count] = len(
            PseudoLabels.load(tmp_path / "detection" / labels.LABELS_FILE, origin_of(args, source)).image_ids
        )
    assert ids == {4: 4, 6: 6}


def origin_of(args, source):
    return labels._origin("regions", source, size=args.image_hw, num_channels=3, per_image=None)


def test_images_that_are_held_out_are_not_learned_from_without_labels_either(make_recipe, teacher, monkeypatch):
    seen = []
    record = lambda args, recipe, source, held_out, *_: seen.append((source, held_out)) or {}  # noqa: E731
    monkeypatch.setattr("hf_vlm.training.run._train_head", record)
    same = {"unlabelled_data": "scenes:easy", "num_unlabelled_examples": 24, "labels_from": teacher, "holdout": 0.3}
    finetune(make_recipe("detection", labels_per_image=2.0, **same))
    ((source, held_out),) = seen
    held = {example["image_id"] for example in held_out}
    assert held
    assert not held & {example["image_id"] // 2 for example in source}


@pytest.fixture
def teacher(make_recipe, tmp_path):
    finetune(make_recipe("detection", output_dir=str(tmp_path / "teacher"), max_steps=2))
    return str(tmp_path / "teacher")


def test_unlabelled_images_are_mixed_with_labelled_ones(make_recipe, teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_vlm.training.run._train_head", lambda args, recipe, source, *_: seen.append((args, source)) or {}
    )
    recipe = make_recipe("detection", unlabelled_data="scenes:easy", labels_from=teacher, num_train_examples=6)
    recipe["unlabelled_fraction"] = 0.25
    monkeypatch.setattr(labels, "open_unlabelled_source", lambda _: open_source("scenes:easy", "test", num_samples=12))
    finetune(recipe)
    args, source = seen[0]
    labelled = list(open_source("scenes:easy", "train", num_samples=6))
    per_image = sum(len(example["objects"]["bbox"]) for example in labelled) / 6
    found = find_pseudo_labels(
        open_source("scenes:easy", "test", num_samples=12), teacher, size=(32, 32), per_image=per_image
    )
    assert len(found.boxes) == pytest.approx(per_image * 12, abs=1)
    shares = {example["image_id"] % 2: [] for example in source}
    for example in source:
        shares[example["image_id"] % 2].append(example)
    assert {e["image_id"] // 2 for e in shares[1]} == set(found.image_ids[np.diff(found.starts) > 0].tolist())
    for example in shares[1]:
        here = found.of(example["image_id"] // 2)
        assert example["objects"]["category"] == found.labels[here].tolist()
        np.testing.assert_allclose(example["objects"]["bbox"], found.boxes[here], rtol=1e-5)
    by_id = {example["image_id"]: example["objects"]["bbox"] for example in labelled}
    assert all(example["objects"]["bbox"] == by_id[example["image_id"] // 2] for example in shares[0])
    assert labels.labelling_models(args) == [teacher]


def test_a_student_learns_from_a_teachers_boxes(make_recipe, teacher):
    recipe = make_recipe("detection", unlabelled_data="scenes:easy", labels_from=teacher, max_steps=2)
    summary = finetune(recipe | {"num_train_examples": 6, "num_unlabelled_examples": 12})
    assert "ap" in summary["metrics"]


UNLABELLED = {"unlabelled_data": "scenes:easy", "labels_from": "runs/a"}


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (pretrain, {"unlabelled_data": "scenes:easy"}, "unlabelled_data is for fine-tuning"),
        (pretrain, {"eval_strategy": "steps"}, "leave eval_strategy out"),
        (pretrain, {"labels_per_image": 0.0}, "labels_per_image must be positive"),
        (finetune, {"labels_from": "runs/a"}, "labels_from is for images without labels: pretrain on them, or name"),
        (finetune, {"unlabelled_data": "scenes:easy"}, "name it with labels_from"),
        (finetune, UNLABELLED | {"labels_from": "regions"}, "name it with labels_from"),
        (finetune, UNLABELLED | {"rounds": 2}, "rounds are for pretraining"),
        (pretrain, {"rounds": 0}, "rounds must be 1 or more"),
        (pretrain, {"holdout": 0.1}, "leave holdout out"),
        (pretrain, {"eval_on_start": True}, "leave eval_on_start out"),
        (finetune, UNLABELLED | {"unlabelled_fraction": 1.0}, "unlabelled_fraction must be between 0 and 1"),
    ],
)
def test_keys_that_do_not_fit_are_refused(make_recipe, command, changes, message):
    with pytest.raises(ValueError, match=message):
        command(make_recipe("detection", **changes))


@pytest.mark.parametrize(
    ("command", "method", "changes"),
    [
        (pretrain, "mae", {"rounds": 2}),
        (pretrain, "mae", {"labels_from": "regions"}),
        (finetune, "classification", {"labels_from": "runs/a", "unlabelled_data": "scenes:easy"}),
    ],
)
def test_others_have_no_use_for_boxes_that_are_found(make_recipe, command, method, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is for heads that learn from boxes: {method} has"):
        command(make_recipe(method, **changes))


def test_images_of_other_channels_are_looked_at_in_theirs(head_recipe, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = rng.integers(100, 120, (40, 40), dtype=np.uint8)
        pixels[8:24, 10:30] = 220
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    recipe = head_recipe(data=str(tmp_path), output_dir=str(tmp_path / "run"), max_steps=1)
    recipe["encoder_config"] = {**recipe["encoder_config"], "num_channels": 1}
    del recipe["num_train_examples"]
    assert pretrain(recipe)["data"]["num_examples"] == 6


def test_weights_that_may_not_be_published_are_refused_before_labels_are_found(make_recipe, teacher, monkeypatch):
    run = Path(teacher) / "run.json"
    run.write_text(run.read_text().replace('"origins": []', '"origins": ["facebook/dinov2-small"]'))
    monkeypatch.setattr("hf_vlm.training.run.label_source", None)  # would not be called
    with pytest.raises(ValueError, match=r"weights that come from .*facebook/dinov2-small.* without a licence"):
        pretrain(make_recipe("detection", labels_from=teacher, push_to_hub=True))


def test_a_classifier_has_nothing_to_be_pretrained_on(make_recipe):
    with pytest.raises(
        ValueError, match="no pretraining or object-detection or instance-segmentation method 'classification'"
    ):
        pretrain(make_recipe("classification"))


def test_images_without_anything_to_find_are_refused(head_recipe, tmp_path):
    for index in range(3):
        Image.new("RGB", (40, 40), (90, 90, 90)).save(tmp_path / f"{index}.png")
    recipe = head_recipe(data=str(tmp_path), output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"Nothing was found in 3 images of .* by regions"):
        pretrain(recipe)
