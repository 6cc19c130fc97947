"""Whole runs on CPU: what they leave, and that a run that was killed continues as if it had not been."""

import dataclasses
import json
import math
import multiprocessing
import re
import time

import numpy as np
import pytest
import torch
import yaml
from killed_run import KillAt, KilledError
from PIL import Image
from safetensors.torch import load_file
from sample_data import write_coco
from tiny import slow_but

from hf_vlm.data.io.durable import write_manifest
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source
from hf_vlm.data.transforms.views import ViewTransform
from hf_vlm.deploy.model_card import write_model_card
from hf_vlm.features.loading import load_model
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_classification import VLMViTForImageClassification
from hf_vlm.models.modeling_detection import VLMViTForObjectDetection
from hf_vlm.models.modeling_mae import MAEForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.registry import find_model
from hf_vlm.tasks import TASKS, Evaluation
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.tasks.evaluation import evaluate_run, evaluate_split
from hf_vlm.training.build import build_config, build_model
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import last_checkpoint
from hf_vlm.training.provenance import publishable, write_origins
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.record import RunRecord, fingerprint
from hf_vlm.training.run import finetune, pretrain
from hf_vlm.training.trainer import VisionTrainer


@pytest.fixture
def kill_at(monkeypatch):
    """`kill_at(step)` makes the next runs stop there with `KilledError`; None lets them finish."""
    steps = []
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if steps and steps[-1] is not None:
            self.add_callback(KillAt(steps[-1]))

    monkeypatch.setattr(VisionTrainer, "__init__", init)
    return steps.append


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_log(folder / "log.jsonl") if "loss" in entry}


@pytest.mark.parametrize(
    "method",
    slow_but(
        [
            *("simclr", "mae", "mae_image_losses", "simmim", "ijepa", "lejepa", "dinov2", "distill", "moco_v3"),
            "image_text",
            "detection",
        ],
        *("mae", "detection"),
    ),
)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_twice_and_resumed_equals_uninterrupted(make_recipe, tmp_path, kill_at, method, num_workers):
    train = finetune if method == "detection" else pretrain
    recipe = make_recipe(method, save_strategy="steps", save_steps=2, dataloader_num_workers=num_workers)
    whole = tmp_path / "whole"
    train(recipe | {"output_dir": str(whole)})

    broken = tmp_path / "broken"
    resumed = recipe | {"output_dir": str(broken)}
    for step, resume in ((3, None), (7, "last")):  # stops between checkpoints, the second time in a resumed run
        kill_at(step)
        with pytest.raises(KilledError):
            train(resumed | {"resume_from_checkpoint": resume})
    kill_at(None)
    train(resumed | {"resume_from_checkpoint": "last"})

    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(broken) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, 9))


def test_a_new_run_takes_no_folder_of_another(make_recipe, tmp_path, kill_at):
    recipe = make_recipe("mae", save_strategy="steps", save_steps=2)
    (tmp_path / "mae" / "checkpoint-1").mkdir(parents=True)  # cut off while it was written: nothing to go on from
    kill_at(5)
    with pytest.raises(KilledError):
        pretrain(recipe)
    log = (tmp_path / "mae" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"holds a run already \(checkpoint-2\).*resume_from_checkpoint last"):
        pretrain(recipe)
    assert (tmp_path / "mae" / "log.jsonl").read_text() == log
    kill_at(3)
    with pytest.raises(KilledError):
        pretrain(recipe | {"overwrite_output_dir": True})
    assert last_checkpoint(tmp_path / "mae").endswith("checkpoint-2")  # not the first run's fourth
    kill_at(None)
    pretrain(recipe | {"resume_from_checkpoint": "last"})
    with pytest.raises(ValueError, match=r"holds a run already"):
        pretrain(recipe | {"save_strategy": "no"})


def finetune_opened(recipe):
    """As the command does that has chosen its recipe by the images."""
    return finetune(recipe, open_source(recipe["data"], "train"))


@pytest.mark.parametrize("train", [pretrain, finetune, finetune_opened])
def test_images_that_use_a_small_part_of_their_range_are_not_trained_on(make_recipe, tmp_path, train):
    for row in range(12):
        folder = tmp_path / "images" / f"class_{row % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40), 4000 + row, dtype=np.uint16)).save(folder / f"{row}.png")
    recipe = make_recipe("mae" if train is pretrain else "classification", data=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"images: the first 12 images of 16 bits have no value above 4095"):
        train(recipe)


def test_parts_of_a_loss_are_logged(make_recipe, tmp_path):
    pretrain(make_recipe("mae_image_losses"))
    entries = [entry for entry in read_log(tmp_path / "mae_image_losses" / "log.jsonl") if "loss" in entry]
    assert len(entries) == 8
    for entry in entries:
        expected = entry["loss_pixel"] + entry["loss_perceptual"] + entry["loss_discriminator"]
        if entry["step"] > 4:  # a half of training is done when the fifth step begins
            expected += 0.1 * entry["loss_adversarial"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)


VIEWS = {"local": {"num_views": 1, "size": 16}, "jitter": [0.4, 0.4, 0.4, 0]}  # no hue: its 8 bits are told apart


def test_views_of_the_device_resume_exactly_and_are_those_of_the_workers(make_recipe, tmp_path, kill_at, monkeypatch):
    batches = []
    training_step = VisionTrainer.training_step

    def kept(self, model, inputs, *args, **kwargs):
        prepared = self._prepare_inputs(inputs)
        batches.append({name: values.clone() for name, values in prepared.items()})
        return training_step(self, model, inputs, *args, **kwargs)

    recipe = make_recipe("simclr", views_on="device", views=VIEWS, save_strategy="steps", save_steps=2, max_steps=4)
    monkeypatch.setattr(SimCLRForPreTraining, "forward", _without_local_views(SimCLRForPreTraining.forward))
    monkeypatch.setattr(VisionTrainer, "training_step", kept)
    pretrain(recipe | {"output_dir": str(tmp_path / "whole")})
    pretrain(recipe | {"output_dir": str(tmp_path / "workers"), "views_on": "workers"})
    kill_at(3)
    with pytest.raises(KilledError):
        pretrain(recipe)
    kill_at(None)
    pretrain(recipe | {"resume_from_checkpoint": "last"})

    whole, workers, broken = batches[:4], batches[4:8], batches[8:11] + batches[11:]
    assert len(broken) == 5  # the third step twice
    for found, expected in zip(broken, [*whole[:3], *whole[2:]]):
        assert all(torch.equal(found[name], expected[name]) for name in ("pixel_values", "local_pixel_values"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "simclr"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    std = min(VLMViTImageProcessor().image_std)
    for found, expected in zip(whole, workers):
        assert found.keys() == expected.keys() == {"pixel_values", "local_pixel_values"}
        for name, values in found.items():
            assert values.shape == expected[name].shape
            difference = (values - expected[name]).abs() * 255 * std  # grey levels
            assert difference.max() <= 3
            assert difference.mean() < 0.5


def _without_local_views(forward):
    """SimCLR's forward takes no local views; here they are only looked at."""
    return lambda self, pixel_values, local_pixel_values=None, **kwargs: forward(self, pixel_values, **kwargs)


def test_pretraining_leaves_an_encoder_and_its_objective(make_recipe, tmp_path):
    summary = pretrain(make_recipe("mae"))
    folder = tmp_path / "mae"
    encoder, objective = (
        VLMViTModel.from_pretrained(folder),
        MAEForPreTraining.from_pretrained(folder / "pretraining_model"),
    )
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder.eval()(images)[0], objective.backbone.eval()(images)[0])
    assert (folder / "modeling_vlm_vit.py").is_file()
    assert json.loads((folder / "run.json").read_text()) == summary
    assert summary["num_images_seen"] == 32
    assert summary["data"]["fingerprint"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"] == "scenes:easy"
    assert not list(folder.rglob("training_args.bin"))


def test_saved_recipes_hold_no_token(make_recipe, tmp_path):
    args = parse_arguments(make_recipe("mae", probe_data="https://me:hf_secret@host/x.parquet?key=hf_secret"))
    record = RunRecord(args, {}, open_source("scenes:easy"), None)
    assert record.recipe["probe_data"] == "https://host/x.parquet"
    pretrain(make_recipe("mae", hub_token="hf_secret", max_steps=1))
    assert not [p for p in (tmp_path / "mae").rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]


def test_records_tell_no_folders_from_the_root_on(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"scenes:easy": 0.5, "https://me:secret@host/x.parquet?key=secret": 0.5}
    told = {
        "data": (source, {"scenes:easy": 0.5, "https://host/x.parquet": 0.5}),
        "probe_data": ("/home/client/scans", "scans"),
        "output_dir": (str(tmp_path / "runs" / "mae"), "./runs/mae"),
        "encoder": ("runs/mae", "./runs/mae"),
        "hub_model_id": ("me/mae", "me/mae"),
        "views": ({"crop_scale": [0.2, 1.0]}, {"crop_scale": [0.2, 1.0]}),
    }
    (tmp_path / "runs" / "mae").mkdir(parents=True)  # a name as on the Hub, but of a folder
    given = {name: value for name, (value, _) in told.items()}
    record = RunRecord(parse_arguments(make_recipe("mae", **given)), given, open_source("scenes:easy"), None)
    assert {name: record.recipe[name] for name in told} == {name: expected for name, (_, expected) in told.items()}
    assert record.summary["data"]["source"] == told["data"][1]
    assert publishable({"/a/images": 0.7, "/b/images": 0.3}) == {"images": 0.7, "images (2)": 0.3}


def test_records_name_the_models_of_others_whose_weights_went_in(tmp_path, make_recipe):
    for name in ("converted", "downloaded", "own"):
        (tmp_path / name).mkdir()
    write_origins(tmp_path / "converted", "org/dinov2")
    (tmp_path / "own" / "run.json").write_text("{}")
    origins = {"org/encoder": ["org/encoder"], "converted": ["org/dinov2"], "downloaded": ["downloaded"], "own": []}
    for name, expected in origins.items():
        source = name if "/" in name else str(tmp_path / name)
        args = parse_arguments(make_recipe("mae", encoder=source))
        record = RunRecord(args, {}, open_source("scenes:easy"), None)
        assert record.summary["origins"] == expected
        (tmp_path / "next").mkdir(exist_ok=True)
        record.write(tmp_path / "next")  # what is made of that model has the same origins, and its own teacher's
        args = parse_arguments(make_recipe("detection", encoder=str(tmp_path / "next")))
        record = RunRecord(args, {}, open_source("scenes:easy"), None, external_weights=["org/teacher"])
        assert record.summary["origins"] == [*expected, "org/teacher"]


def test_finetuning_from_an_encoder_and_evaluating_the_folder(make_recipe, tmp_path):
    pretrain(make_recipe("mae"))
    summary = finetune(make_recipe("detection", encoder=str(tmp_path / "mae"), max_steps=1, learning_rate=0.0))
    detector = VLMViTForObjectDetection.from_pretrained(tmp_path / "detection")
    encoder = VLMViTModel.from_pretrained(tmp_path / "mae")
    for name, weight in encoder.state_dict().items():  # a learning rate of 0 leaves what was loaded
        assert torch.equal(detector.backbone.state_dict()[name], weight), name
    again = evaluate_run(tmp_path / "detection", "scenes:easy", "validation", num_examples=8).metrics
    for name, value in summary["metrics"].items():
        assert again[name] == pytest.approx(value, nan_ok=True), name
    assert "ap/3" in again
    threshold = summary["metrics"]["score_threshold"]
    processor = VLMViTDetectionImageProcessor.from_pretrained(tmp_path / "detection")
    assert processor.score_threshold == (pytest.approx(threshold, rel=1e-3) if math.isfinite(threshold) else 0.5)


def test_finetuning_stores_the_temperature_of_a_classifier(make_recipe, tmp_path):
    summary = finetune(make_recipe("classification", max_steps=1))
    saved = VLMViTForImageClassification.from_pretrained(tmp_path / "classification")
    assert saved.config.temperature == pytest.approx(summary["metrics"]["temperature"], rel=1e-3) != 1
    again = evaluate_run(tmp_path / "classification", "scenes:easy", "validation", num_examples=8).metrics
    assert again["ece"] == pytest.approx(summary["metrics"]["ece_calibrated"], abs=1e-3)
    assert again["top1"] == summary["metrics"]["top1"]


def test_evaluation_enters_the_log_and_the_last_one_the_record(make_recipe, tmp_path):
    summary = finetune(make_recipe("detection", eval_strategy="steps", eval_steps=4))
    entries = [entry for entry in read_log(tmp_path / "detection" / "log.jsonl") if "eval_ap50" in entry]
    assert [entry["step"] for entry in entries] == [4, 8]
    assert all(0 <= entry["eval_ap50"] <= 1 for entry in entries)
    assert summary["metrics"]["ap50"] == entries[-1]["eval_ap50"]


def replace_evaluation(monkeypatch, evaluate):
    monkeypatch.setitem(TASKS, "object-detection", dataclasses.replace(DETECTION, evaluate=evaluate))


def test_held_out_images_that_stop_the_evaluation_leave_the_detector(make_recipe, tmp_path, monkeypatch):
    def evaluate(*args, **kwargs):
        raise ValueError("2 of 10 images could not be decoded")

    replace_evaluation(monkeypatch, evaluate)
    with pytest.raises(ValueError, match="2 of 10"):
        finetune(make_recipe("detection", max_steps=1))
    VLMViTForObjectDetection.from_pretrained(tmp_path / "detection")
    assert json.loads((tmp_path / "detection" / "run.json").read_text())["num_steps"] == 1


@pytest.mark.parametrize(("method", "train"), [("mae", pretrain), ("classification", finetune)])
def test_a_card_or_plot_that_fails_costs_no_model(make_recipe, tmp_path, monkeypatch, caplog, method, train):
    """Templates with an error, as a changed one may have: the run is complete, and the error is named."""
    templates = tmp_path / "templates"
    templates.mkdir()
    for name in ("encoder.md", "classifier.md"):
        (templates / name).write_text("{{ no_such_value }}")
    monkeypatch.setattr("hf_vlm.training.recipe.shipped_folder", lambda name: templates)
    plot = {"plot": lambda folder: 1 / 0} if method == "mae" else {}
    train(make_recipe(method), write_card=write_model_card, **plot)
    assert "The model card could not be written" in caplog.text
    assert "UndefinedError: 'no_such_value' is undefined" in caplog.text
    assert ("ZeroDivisionError" in caplog.text) is bool(plot)
    assert json.loads((tmp_path / method / "run.json").read_text())["finished"]
    assert load_model(tmp_path / method).entry.name == ("encoder" if plot else method)
    assert not (tmp_path / method / "README.md").exists()


def test_held_out_images_may_be_as_bad_as_the_recipe_says(make_recipe, monkeypatch):
    fractions = []

    def evaluate(model, stream, *args, **kwargs):
        fractions.append(stream.max_bad_fraction)
        return Evaluation(metrics={})

    replace_evaluation(monkeypatch, evaluate)
    finetune(make_recipe("detection", max_steps=1, max_bad_fraction=0.25))
    assert fractions == [0.25]


def test_logged_loss_is_the_mean_under_gradient_accumulation(make_recipe, tmp_path, monkeypatch):
    seen = []
    original = MAEForPreTraining.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        seen.append(output.loss.item())
        return output

    monkeypatch.setattr(MAEForPreTraining, "forward", forward)
    pretrain(make_recipe("mae", gradient_accumulation_steps=2, logging_steps=2, max_steps=4))
    logged = losses(tmp_path / "mae")
    del seen[0]  # the pass that counts FLOPs
    assert len(seen) == 8
    assert logged[2] == pytest.approx(sum(seen[:4]) / 4, rel=1e-3)
    assert logged[4] == pytest.approx(sum(seen[4:]) / 4, rel=1e-3)


def test_parts_of_the_loss_are_logged_as_means(make_recipe, tmp_path):
    finetune(make_recipe("detection", logging_steps=4))
    entry = next(e for e in read_log(tmp_path / "detection" / "log.jsonl") if "loss_giou" in e)
    assert 0 < entry["loss_giou"] < 2
    assert entry["loss"] > entry["loss_giou"]


def test_another_number_of_processes_or_workers_is_refused_or_approximated_when_asked(make_recipe, tmp_path, caplog):
    recipe = make_recipe("mae", save_strategy="steps", save_steps=6, max_steps=6)  # 24 images: an epoch
    pretrain(recipe)
    checkpoint = tmp_path / "mae" / "checkpoint-6"
    resumed = recipe | {"resume_from_checkpoint": str(checkpoint), "max_steps": 8, "restart_schedule": True}
    saved = torch.load(checkpoint / "data_state_0.pt", weights_only=True)
    for name, message in (("processes", "2 processes .now 1"), ("data workers", "2 data workers .now 0")):
        torch.save(saved | {name: 2}, checkpoint / "data_state_0.pt")
        write_manifest(checkpoint)
        with pytest.raises(ValueError, match=message):
            pretrain(resumed)
    pretrain(resumed | {"approximate_resume": True})
    assert "continues at the start of epoch 1" in caplog.text
    approximated = losses(tmp_path / "mae")
    torch.save(saved, checkpoint / "data_state_0.pt")
    write_manifest(checkpoint)
    pretrain(resumed)  # the epoch has ended here, so that the beginning of the next one is where it stood
    assert losses(tmp_path / "mae") == approximated


def test_waiting_for_data_is_logged_and_warned_about_once(make_recipe, tmp_path, monkeypatch, caplog):
    transform = ViewTransform.__call__

    def slow(*args):
        time.sleep(0.05)
        return transform(*args)

    monkeypatch.setattr(ViewTransform, "__call__", slow)
    pretrain(make_recipe("mae"))
    shares = [entry["data_wait"] for entry in read_log(tmp_path / "mae" / "log.jsonl") if "data_wait" in entry]
    assert len(shares) == 7
    assert all(0.5 < share < 1 for share in shares)
    assert caplog.text.count("Raise dataloader_num_workers (now 0") == 1


def test_no_data_worker_outlives_training(make_recipe):
    """A program would wait for them at its end: they do not end at SIGTERM, in which a step is finished and saved."""
    pretrain(make_recipe("mae", max_steps=2, dataloader_num_workers=2))
    assert multiprocessing.active_children() == []


def test_after_step_gets_the_progress(make_recipe, monkeypatch):
    progress = []
    monkeypatch.setattr(MAEForPreTraining, "after_step", lambda self, p: progress.append(p), raising=False)
    pretrain(make_recipe("mae", max_steps=4))
    assert progress == [0.25, 0.5, 0.75, 1.0]


def test_losses_fall(make_recipe, tmp_path):
    pretrain(make_recipe("mae", max_steps=60, num_train_examples=4, learning_rate=3e-3))
    values = losses(tmp_path / "mae")
    assert values[60] < 0.9 * values[1]
    assert math.isfinite(values[60])


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("mae", {"data": "no/such/folder"}, "no/such/folder"),
        ("mae", {"data": ""}, "No data"),
        (
            "mae",
            {"method": "classification"},
            "no pretraining or object-detection or instance-segmentation method 'classification'",
        ),
        ("mae", {"method": "mea"}, "did you mean 'mae'"),
        ("mae", {"encoder": "nowhere/at-all"}, "neither a folder with a model nor one on the Hub"),
        ("mae", {"model_config": {"mask_ration": 0.5}}, "no field 'mask_ration'"),
        (
            "mae",
            {"model_config": {"perceptual_weight": 1.0}},
            "Methods with a field 'perceptual_weight': mae_image_losses",
        ),
        ("simmim", {"model_config": {"mask_unit_size": 16}}, "'mask_unit_size' is now called 'mask_patch_size'"),
        ("mae", {"encoder_config": {"hidden_size": "wide"}}, "encoder_config"),
        ("mae", {"encoder_preset": "enormous"}, "There are: nano"),
        ("mae", {"views": {"blur_probabilty": 1}}, "blur_probability"),
        ("mae", {"image_size": 30}, "not a multiple"),
        (
            "distill",
            {"model_config": {"teacher": "nowhere/at-all"}},
            "neither a folder with a model nor one on the Hub",
        ),
        ("distill", {"model_config": {"teacher": ""}}, "there is no teacher"),
        ("ijepa", {"image_size": 16}, "2 x 2 patches is too small"),
        ("simmim", {"model_config": {"mask_patch_size": 20}}, "mask_patch_size 20 is not a multiple"),
        ("detection", {"augmentation": {"flip_probabilty": 1}}, "flip_probability"),
        ("detection", {"eval_split": "tset"}, "tset"),
    ],
)
def test_bad_input_says_what_is_wrong(make_recipe, monkeypatch, method, changes, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    train = finetune if method == "detection" else pretrain
    with pytest.raises(ValueError, match=words):
        train(make_recipe(method, **changes))


def test_the_best_checkpoint_is_not_chosen_by_what_is_not_measured(make_recipe):
    for metric in ("loss", "eval_loss", "app"):
        with pytest.raises(ValueError, match=f"{metric}', which evaluation does not measure: name one of ap, ap50"):
            finetune(make_recipe("detection") | {"metric_for_best_model": metric})


def test_what_the_data_decide_is_not_overridden(make_recipe):
    args = parse_arguments(make_recipe("detection") | {"model_config": {"problem_type": "a"}})
    options = {"class_names": ["x", "y"], "head_fields": {"problem_type": "b"}}
    with pytest.raises(ValueError, match="problem_type is 'a', but the data make it 'b': leave it out"):
        build_config(args, find_model("classification"), **options)
    args.model_config = {"problem_type": "single_label_classification", "id2label": {0: "u", 1: "v"}}
    options["head_fields"] = {"problem_type": "single_label_classification"}
    with pytest.raises(ValueError, match=r"id2label is .* but the data make it"):
        build_config(args, find_model("classification"), **options)


def test_there_are_more_queries_than_objects(make_recipe, caplog):
    args = parse_arguments(make_recipe("detection") | {"model_config": {"num_queries": 60, "hidden_size": 32}})
    entry = find_model("detection")
    fields = DETECTION.minimum_fields(Source(dataset=None, max_objects=225))
    assert build_model(args, entry, class_names=["x"], minimum_fields=fields).config.num_queries == 338
    assert "num_queries is 60; the data need 338, which is used" in caplog.text
    caplog.clear()
    fields = DETECTION.minimum_fields(Source(dataset=None, max_objects=40))
    assert build_model(args, entry, class_names=["x"], minimum_fields=fields).config.num_queries == 60
    assert not caplog.text


def test_a_fraction_is_held_out_where_there_is_no_split_to_evaluate_on(make_recipe, tmp_path, caplog):
    write_coco(tmp_path / "data" / "annotations.json", tmp_path / "data", num_images=40)
    recipe = make_recipe("detection", data=str(tmp_path / "data"), max_steps=1)
    with pytest.raises(ValueError, match=r"(?s)validation.*--eval_split.*--holdout 0\.1"):
        finetune(recipe)
    with caplog.at_level("INFO", logger="hf_vlm"):
        summary = finetune(recipe | {"holdout": 0.25, "num_train_examples": None, "num_eval_examples": None})
    num_train, num_held_out = map(
        int, re.search(r"0\.25 .*: training on (\d+), evaluating on (\d+)", caplog.text).groups()
    )
    assert num_train + num_held_out == 40
    assert 4 <= num_held_out <= 16
    assert yaml.safe_load((tmp_path / "detection" / "recipe.yaml").read_text())["holdout"] == 0.25
    again = evaluate_split(tmp_path / "detection", str(tmp_path / "data"), "train", holdout=0.25)
    assert len(again.images) == num_held_out
    assert "ap" in summary["metrics"]
    metrics = {name: value for name, value in summary["metrics"].items() if name in again.evaluation.metrics}
    assert again.evaluation.metrics == pytest.approx(again.evaluation.metrics | metrics, nan_ok=True)


def test_an_encoder_of_another_patch_size_is_refused_unless_asked_for(make_recipe, tmp_path, caplog):
    pretrain(make_recipe("mae", max_steps=1))
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
    recipe = make_recipe("detection", encoder=str(tmp_path / "mae"), encoder_config=encoder, max_steps=1)
    with pytest.raises(ValueError, match=r"(?s)patch_size: its weights have 8, the recipe asks for 16.*resize_enc"):
        finetune(recipe)
    with caplog.at_level("INFO", logger="hf_vlm"):
        finetune(recipe | {"resize_encoder": True, "learning_rate": 0.0})
    assert "embeddings.patch_projection.weight" in caplog.text
    detector = VLMViTForObjectDetection.from_pretrained(tmp_path / "detection")
    weights = VLMViTModel.from_pretrained(tmp_path / "mae").layers[1].mlp.up_projection.weight
    assert torch.equal(detector.backbone.layers[1].mlp.up_projection.weight, weights)


def test_a_teacher_gets_images_as_it_knows_them(make_recipe):
    """The configuration holds the normalisation of the run: the usual one, or that of the encoder it starts from."""
    recipe = make_recipe("distill")
    config = build_config(parse_arguments(recipe), find_model("distill"))
    assert (config.image_mean, config.teacher_mean) == (list(VLMViTImageProcessor().image_mean), [0.5] * 3)
    started = recipe | {"encoder": recipe["model_config"]["teacher"]}
    config = build_config(parse_arguments(started), find_model("distill"))
    assert (config.image_mean, config.image_std) == (config.teacher_mean, config.teacher_std) == ([0.5] * 3, [0.2] * 3)


def test_the_fingerprint_tells_data_apart():
    easy, again, hard = (fingerprint(open_source(name)) for name in ("scenes:easy", "scenes:easy", "scenes:hard"))
    assert easy == again != hard
