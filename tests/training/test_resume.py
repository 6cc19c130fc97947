"""A resumed run trains with the settings that its record states, says what has changed, and knows when it is done."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import yaml
from killed_run import KillAt, KilledError
from safetensors.torch import load_file
from sample_data import write_images
from tiny import build
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback

from hf_vlm.data.io.durable import write_manifest
from hf_vlm.training import run
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import last_checkpoint
from hf_vlm.training.data import open_recipe_source
from hf_vlm.training.optim import group_settings, restore_group_settings
from hf_vlm.training.recipe import parse_arguments
from hf_vlm.training.record import RunRecord
from hf_vlm.training.resume import BATCH_DIVISION, FIXED, FREE, SCHEDULE, compare_settings
from hf_vlm.training.run import finetune, pretrain
from hf_vlm.training.trainer import VisionTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "probe_steps": 0}


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_log(folder / "log.jsonl") if "loss" in entry}


def add_callback(monkeypatch, callback):
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(callback)

    monkeypatch.setattr(VisionTrainer, "__init__", init)


def assert_same_weights(first, second):
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def copy_checkpoint(run_folder, step, target):
    shutil.copytree(run_folder / f"checkpoint-{step}", target / f"checkpoint-{step}")


def test_each_key_of_a_recipe_is_in_one_group():
    """A new key, of ours or of transformers, is put into the table of resume.py with it."""
    groups = [FIXED, SCHEDULE, FREE]
    assert frozenset.union(*groups) == {f.name for f in dataclasses.fields(VisionTrainingArguments) if f.init}
    assert sum(map(len, groups)) == len(frozenset.union(*groups))


class Saved:
    """A checkpoint of nothing but the record of its run, to compare other recipes with."""

    def __init__(self, folder, recipe, class_names=None):
        self.folder = folder
        folder.mkdir()
        make_record(recipe, class_names)[0].write(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 8, "global_step": 4}))

    def changes(self, recipe, class_names=None):
        return self.compare(*make_record(recipe | {"resume_from_checkpoint": "last"}, class_names))

    def compare(self, record, args):
        return [change.name for change in compare_settings(self.folder, record, args)]

    def edit(self, name, edit):
        path = self.folder / name
        content = yaml.safe_load(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))


def make_record(recipe, class_names=None):
    args = parse_arguments(recipe)
    source = open_recipe_source(args, args.train_split, args.num_train_examples)
    return RunRecord(args, recipe, source, None, class_names=class_names), args


def test_each_change_is_refused_applied_by_request_or_listed(make_recipe, tmp_path, caplog):
    recipe = make_recipe("mae")
    saved = Saved(tmp_path / "checkpoint-4", recipe)
    assert saved.changes(recipe) == []
    written = (saved.folder / "recipe.yaml").read_text()
    record, args = make_record(recipe | {"resume_from_checkpoint": "last"})
    restarted = dataclasses.replace(args, restart_schedule=True)
    for key in (FIXED | SCHEDULE) - {"images_to_see", "max_steps", "data", *BATCH_DIVISION}:
        saved.edit("recipe.yaml", lambda content, key=key: content.update({key: "another"}))
        with pytest.raises(ValueError, match=rf"\n  {key}: another -> ") as refused:
            saved.compare(record, args)
        assert ("with --restart_schedule true" in str(refused.value)) == (key in SCHEDULE), key
        assert ("cannot change within a run" in str(refused.value)) == (key in FIXED), key
        if key in SCHEDULE:
            assert saved.compare(record, restarted) == [key]
        (saved.folder / "recipe.yaml").write_text(written)
    caplog.clear()
    assert saved.changes(recipe | {"logging_steps": 3, "bf16": True}) == ["bf16", "logging_steps"]
    assert "\n  bf16: False -> True\n  logging_steps: 1 -> 3" in caplog.text
    with pytest.raises(ValueError, match=r"\n  max_steps: 8 -> 9\n"):
        saved.changes(recipe | {"max_steps": 9})
    with pytest.raises(ValueError, match=r"\n  model_config: {.*} -> {.*'mask_ratio': 0.5}\n"):
        saved.changes(recipe | {"model_config": recipe["model_config"] | {"mask_ratio": 0.5}})
    (saved.folder / "recipe.yaml").write_text(written.replace(":", "[", 1))
    with pytest.raises(ValueError, match=r"recipe\.yaml is damaged"):
        saved.changes(recipe)
    (saved.folder / "recipe.yaml").write_text(written)
    same = {key: value for key, value in recipe.items() if key != "max_steps"} | {"images_to_see": 32}
    assert saved.changes(same) == []  # as many steps, given in another way


def test_a_batch_may_be_divided_otherwise(make_recipe, tmp_path):
    recipe = make_recipe("mae")
    saved = Saved(tmp_path / "checkpoint-4", recipe)
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert saved.changes(recipe | divided) == list(divided)
    with pytest.raises(ValueError, match=r"cannot change within a run:\n  per_device_train_batch_size: 4 -> 2"):
        saved.changes(recipe | {"per_device_train_batch_size": 2})


def test_rate_by_the_number_of_processes(make_recipe, tmp_path):
    """The batch of two processes is scaled to another rate, which the recipe does not show."""
    recipe = make_recipe("mae", reference_batch_size=16)
    saved = Saved(tmp_path / "checkpoint-4", recipe)

    def edit(content):
        assert content["scaled_learning_rate"] == pytest.approx(5e-4)
        content |= {"batch_size": 8, "scaled_learning_rate": 1e-3 * math.sqrt(0.5)}

    saved.edit("run.json", edit)
    with pytest.raises(ValueError, match=r"\n  scaled_learning_rate: 0\.000707\d* -> 0\.0005\n"):
        saved.changes(recipe)
    assert saved.changes(recipe | {"restart_schedule": True}) == ["batch_size", "scaled_learning_rate"]


def test_other_images_or_classes_are_refused_and_moved_ones_are_not(make_recipe, tmp_path):
    write_images(tmp_path / "images", [f"{index}.png" for index in range(20)])
    recipe = make_recipe("mae", data=str(tmp_path / "images"), format="imagefolder", num_train_examples=None)
    saved = Saved(tmp_path / "checkpoint-4", recipe, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"data\.class_names: \['cat', 'dog'\] -> \['dog', 'cat'\]"):
        saved.changes(recipe, ["dog", "cat"])
    moved = recipe | {"data": str(tmp_path / "moved")}
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    assert saved.changes(moved, ["cat", "dog"]) == ["data"]
    write_images(tmp_path / "moved", ["more.png"])
    with pytest.raises(ValueError, match=r"data\.num_examples: 20 -> 21"):
        saved.changes(moved, ["cat", "dog"])
    (tmp_path / "moved" / "more.png").unlink()
    write_images(tmp_path / "moved", ["3.png"], start=99)
    with pytest.raises(ValueError, match=r"data\.fingerprint: \w+ -> \w+"):
        saved.changes(moved, ["cat", "dog"])
    mixture = {"scenes:easy": 0.25, "scenes:hard": 0.75}
    other = Saved(tmp_path / "checkpoint-6", recipe | {"data": mixture, "format": None})
    other.edit("recipe.yaml", lambda content: content.update(data={"scenes:easy": 0.75, "scenes:hard": 0.25}))
    with pytest.raises(ValueError, match=r"  data: {.*} -> {.*0\.75}"):
        other.changes(recipe | {"data": mixture, "format": None})


class SetRates(TrainerCallback):
    """From a step on, the settings of the optimiser's groups of a run that has had them from the beginning."""

    def __init__(self, step, recipe):
        self.step, self.recipe = step, recipe

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= self.step:
            step = state.global_step - 2  # after a warm-up of 2 steps, along a line to the 8th
            for group in optimizer.param_groups:
                group["lr"] = self.recipe["learning_rate"] * (1 - step / 6)
                group["weight_decay"] = self.recipe["weight_decay"] if group["decays"] else 0.0
                group["betas"] = (0.9, self.recipe["adam_beta2"])


def test_a_restarted_schedule_has_the_new_rates_and_the_old_moments(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("mae", **SAVING, weight_decay=0.05)
    pretrain(recipe)
    changed = recipe | {"learning_rate": 4e-3, "weight_decay": 0.2, "adam_beta2": 0.9}
    again = changed | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last"}
    copy_checkpoint(tmp_path / "mae", 4, tmp_path / "again")
    with pytest.raises(ValueError, match=r"(?s)learning_rate: 0.001 -> 0.004.*weight_decay: 0.05 -> 0.2.*restart_sch"):
        pretrain(again)
    summary = pretrain(again | {"restart_schedule": True})
    changes = {"weight_decay": [0.05, 0.2], "learning_rate": [1e-3, 4e-3], "adam_beta2": [0.999, 0.9]}
    assert summary["changes"][0].items() >= {"step": 4, **changes}.items()
    assert json.loads((tmp_path / "again" / "checkpoint-8" / "run.json").read_text())["changes"] == summary["changes"]
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["learning_rate"] == 4e-3

    by_hand = tmp_path / "by_hand"
    copy_checkpoint(tmp_path / "mae", 4, by_hand)
    add_callback(monkeypatch, SetRates(4, changed))
    pretrain(recipe | {"output_dir": str(by_hand), "resume_from_checkpoint": "last"})
    assert_same_weights(by_hand, tmp_path / "again")
    assert losses(by_hand) == losses(tmp_path / "again")


def test_a_schedule_that_is_no_function_of_the_step_is_not_restarted():
    optimizer = AdamW([torch.zeros(1)])
    with pytest.raises(ValueError, match="restart_schedule needs an lr_scheduler_type that is a function of the step"):
        restore_group_settings(optimizer, ReduceLROnPlateau(optimizer), group_settings(optimizer))


def test_intervals_follow_the_settings_and_not_the_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe("mae", **SAVING)
    pretrain(recipe | {"max_steps": 4})
    changed = {"logging_steps": 2, "save_steps": 3, "restart_schedule": True}
    pretrain(recipe | {"resume_from_checkpoint": "last", **changed})
    assert sorted(losses(tmp_path / "mae")) == [1, 2, 3, 4, 6, 8]
    assert {path.name for path in (tmp_path / "mae").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    }


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("method", "train"), [("mae", pretrain), ("detection", finetune)])
def test_a_finished_run_is_left_as_it_is(make_recipe, tmp_path, caplog, method, train):
    recipe = make_recipe(method, **SAVING, max_steps=2)
    summary = train(recipe)
    before = tree(tmp_path / method)
    caplog.set_level("INFO", logger="hf_vlm")
    for wanted in ("last", "auto", str(tmp_path / method / "checkpoint-2")):
        caplog.clear()
        found = train(recipe | {"resume_from_checkpoint": wanted, "logging_steps": 2})
        assert found == json.loads((tmp_path / method / "run.json").read_text())
        assert found["num_steps"] == summary["num_steps"] == 2
        assert "is finished, with its 2 steps: nothing is changed" in caplog.text
    assert tree(tmp_path / method) == before
    longer = train(recipe | {"resume_from_checkpoint": "auto", "max_steps": 3, "restart_schedule": True})
    assert longer["num_steps"] == 3


def test_a_run_killed_in_its_last_save_trains_no_further_step(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("mae", **SAVING)
    summary = pretrain(recipe | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(recipe)
    steps = []
    stock = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, *args, **kwargs: steps.append(1) or stock(self, *args, **kwargs))
    found = pretrain(recipe | {"resume_from_checkpoint": "auto"})
    assert steps == []
    assert_same_weights(tmp_path / "mae", tmp_path / "whole")
    assert found["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-6)
    assert (found["num_steps"], found["num_images_seen"], found["finished"]) == (8, 32, True)
    assert losses(tmp_path / "mae") == losses(tmp_path / "whole")


def test_a_record_counts_all_starts_of_a_run(make_recipe, tmp_path):
    recipe = make_recipe("mae", **SAVING)
    whole = pretrain(recipe)
    path = tmp_path / "again" / "checkpoint-4" / "run.json"
    copy_checkpoint(tmp_path / "mae", 4, tmp_path / "again")
    saved = json.loads(path.read_text())
    assert (saved["num_steps"], saved["num_images_seen"]) == (4, 16)
    assert 0 < saved["seconds"] <= whole["seconds"]
    path.write_text(json.dumps(saved | {"seconds": 1000.0, "num_images_seen": 100}))  # at another batch size
    write_manifest(path.parent)
    found = pretrain(recipe | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last"})
    assert found["num_images_seen"] == 100 + 16
    assert 1000 <= found["seconds"] < 1000 + 60
    assert found["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)


def test_auto_begins_where_there_is_nothing_to_resume(make_recipe, tmp_path):
    recipe = make_recipe("mae", **SAVING, resume_from_checkpoint="auto")
    assert pretrain(recipe | {"max_steps": 2})["num_steps"] == 2
    with pytest.raises(ValueError, match=r"holds no complete checkpoint"):
        pretrain(recipe | {"resume_from_checkpoint": "last", "output_dir": str(tmp_path / "none")})


def test_a_rewound_run_leaves_its_later_checkpoints_aside(make_recipe, tmp_path, monkeypatch):
    recipe, folder = make_recipe("mae", **SAVING), tmp_path / "mae"
    pretrain(recipe)
    with pytest.raises(ValueError, match=r"There is no checkpoint .*/checkpoint-5\. There are: checkpoint-8, "):
        pretrain(recipe | {"rewind_to": 5})
    changed = recipe | {"learning_rate": 4e-3}
    with monkeypatch.context() as patch:
        add_callback(patch, KillAt(7))
        with pytest.raises(KilledError):
            pretrain(changed | {"rewind_to": 4, "restart_schedule": True})
    assert last_checkpoint(folder).endswith("checkpoint-6")
    assert losses(folder).keys() == set(range(1, 7))
    assert {path.name for path in folder.glob("abandoned-*")} == {"abandoned-checkpoint-6", "abandoned-checkpoint-8"}
    assert not json.loads((folder / "run.json").read_text())["finished"]  # the model there is the earlier branch's
    with pytest.raises(ValueError, match=r"learning_rate: 0\.004 -> 0\.001"):
        pretrain(recipe | {"resume_from_checkpoint": "last"})
    summary = pretrain(changed | {"resume_from_checkpoint": "auto"})
    assert [change["step"] for change in summary["changes"]] == [4]

    copy_checkpoint(folder, 4, tmp_path / "again")
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last", "restart_schedule": True}
    pretrain(changed | again)
    assert_same_weights(folder, tmp_path / "again")


@pytest.mark.slow
def test_a_resumed_segmenter_masks_attention_as_far_as_it_was(make_recipe, tmp_path):
    """From an encoder of MAE: the queries that are masked depend on the progress, which is in the weights."""
    build("mae").save_pretrained(tmp_path / "encoder")
    changes = {"encoder": str(tmp_path / "encoder"), "encoder_config": {}, "num_eval_examples": 2, "max_steps": 4}
    recipe, folder = make_recipe("mask_query_segmentation", **SAVING, **changes), tmp_path / "mask_query_segmentation"
    finetune(recipe)
    copy_checkpoint(folder, 2, tmp_path / "again")
    finetune(recipe | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last"})
    assert_same_weights(folder, tmp_path / "again")
    masked = load_file(tmp_path / "again" / "checkpoint-2" / "model.safetensors")["annealing.fractions"]
    assert masked.tolist() == pytest.approx([0.5**0.9])


def test_options_that_contradict_each_other_are_refused():
    for recipe, words in (
        ({"rewind_to": 4, "resume_from_checkpoint": "runs/x/checkpoint-8"}, "leave out resume_from_checkpoint"),
        ({"restart_schedule": True}, "needs a run to resume"),
        ({"enable_jit_checkpoint": True}, "saves its state at SIGTERM and SIGINT by itself"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_arguments({"max_steps": 8, "use_cpu": True, **recipe})
