"""Checkpoints and models are whole or absent; damage is named; nothing is deleted that is still needed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_vlm.data.io.durable import PARTIAL_FOLDER
from hf_vlm.features.loading import load_model
from hf_vlm.training import checkpoints as module
from hf_vlm.training.checkpoints import (
    checkpoints,
    complete_checkpoints,
    last_checkpoint,
    rotate_checkpoints,
    verify_checkpoint,
)
from hf_vlm.training.run import finetune, pretrain
from hf_vlm.training.trainer import VisionTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "probe_steps": 0}
NAMES = [  # of all files that training needs
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("data_state_0.pt", "trainer_state.json", "config.json"),
]


class StoppedError(BaseException):
    """As a kill: nothing catches it."""


def stop(*args, **kwargs):
    raise StoppedError


class AtStep(TrainerCallback):
    """Calls a function before the step after `step`."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(step, function)`: what the runs of this test call when they have done `step` steps."""

    def set_up(step, function):
        original = VisionTrainer.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(AtStep(step, function))

        monkeypatch.setattr(VisionTrainer, "__init__", init)

    return set_up


@pytest.fixture(scope="module")
def saved(make_recipe_in, tmp_path_factory):
    """A finished run with the checkpoints 2 and 4, and its recipe; only for reading."""
    recipe = make_recipe_in(tmp_path_factory.mktemp("saved"), "mae", **SAVING)
    pretrain(recipe)
    return Path(recipe["output_dir"]), recipe


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the finished run, and its recipe."""
    folder, recipe = saved
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", recipe | {"output_dir": str(tmp_path / "run")}


def names(folder):
    return [path.name for path in checkpoints(folder)]


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- damage


def damaged(path):
    """Each way in which a file is damaged, as a function."""
    content = path.read_bytes()
    middle = len(content) // 2
    yield "missing", path.unlink
    yield "bytes", lambda: path.write_bytes(content[:middle])
    yield "bytes", lambda: path.write_bytes(b"")
    yield "other contents", lambda: path.write_bytes(content[:middle] + b"\0\1" + content[middle + 2 :])


def test_each_file_of_a_checkpoint_that_is_missing_or_damaged_is_named_and_the_older_offered(run):
    folder, _ = run
    last = folder / "checkpoint-4"
    found = {path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(NAMES) < found
    for name in found:
        content = (last / name).read_bytes()
        for what, harm in damaged(last / name):
            harm()
            with pytest.raises(ValueError, match=rf"{name} .*{what}.*--resume_from_checkpoint {folder}/checkpoint-2$"):
                verify_checkpoint(last)
            assert last_checkpoint(folder) == str(last)  # not the older one, silently
            assert (complete_checkpoints(folder) == checkpoints(folder)) == (what == "other contents")
            (last / name).write_bytes(content)
    verify_checkpoint(last)
    (last / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        verify_checkpoint(last)


def test_no_damaged_checkpoint_is_offered(run):
    folder, _ = run
    for step in (2, 4):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="no intact one before it: start again"):
        verify_checkpoint(folder / "checkpoint-4")


@pytest.mark.parametrize("name", NAMES[:-1])
def test_checkpoints_of_earlier_versions_have_no_manifest(run, name):
    folder, _ = run
    last = folder / "checkpoint-4"
    (last / "manifest.json").unlink()
    verify_checkpoint(last)
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[: len(content) // 2])
    if name == "trainer_state.json":  # the last file that they wrote: a run was killed before
        assert last_checkpoint(folder).endswith("checkpoint-2")
    with pytest.raises(ValueError, match=f"{name} is damaged.*checkpoint-2"):
        verify_checkpoint(last)
    (last / name).unlink()
    if name != "data_state_0.pt":  # which a run on another kind of data does not have
        with pytest.raises(ValueError, match=rf"holds no [a-z' ]* \({name[:5]}.*checkpoint-2"):
            verify_checkpoint(last)


def test_each_rank_needs_its_random_states(run):
    folder, _ = run
    last = folder / "checkpoint-4"
    (last / "manifest.json").unlink()
    shutil.copy(last / "data_state_0.pt", last / "data_state_1.pt")
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        verify_checkpoint(last)
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    verify_checkpoint(last)


def test_a_run_is_not_resumed_from_what_is_not_whole(run, monkeypatch):
    folder, recipe = run
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    monkeypatch.setattr(VisionTrainer, "training_step", stop)
    with pytest.raises(ValueError, match=r"optimizer.pt is missing.*checkpoint-2"):
        pretrain(recipe | {"resume_from_checkpoint": "last"})
    with pytest.raises(ValueError, match=r"There is no checkpoint .*checkpoint-3. There are: checkpoint-4, checkp"):
        pretrain(recipe | {"resume_from_checkpoint": str(folder / "checkpoint-3")})
    assert names(folder) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_checkpoint(folder / "nothing")


def test_a_checkpoint_of_weights_alone_is_refused(make_recipe, tmp_path):
    pretrain(make_recipe("mae", **SAVING | {"max_steps": 2}, save_only_model=True))
    with pytest.raises(ValueError, match="holds no optimiser state"):
        verify_checkpoint(tmp_path / "mae" / "checkpoint-2")


# ---- which there are


def test_rotation_goes_by_steps_when_the_clock_goes_back(make_recipe, tmp_path, monkeypatch):
    commit = module.commit_checkpoint

    def commit_earlier(partial, checkpoint):
        commit(partial, checkpoint)
        os.utime(checkpoint, (1e9 - 1e6 * module.step_of(checkpoint),) * 2)

    monkeypatch.setattr("hf_vlm.training.saving.commit_checkpoint", commit_earlier)
    pretrain(make_recipe("mae", **SAVING | {"save_steps": 1}, save_total_limit=2))
    assert names(tmp_path / "mae") == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(("limit", "expected"), [(1, [3, 20]), (2, [3, 20]), (3, [3, 10, 20]), (None, [2, 3, 10, 20])])
def test_rotation_keeps_the_best_and_the_newest(tmp_path, limit, expected):
    for step in (2, 3, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    rotate_checkpoints(tmp_path, limit, keep={tmp_path / "checkpoint-3", tmp_path / "checkpoint-20"})
    assert names(tmp_path) == [f"checkpoint-{step}" for step in expected]


def test_the_best_checkpoint_is_recorded_under_its_name_and_stays(make_recipe, tmp_path, monkeypatch):
    scores = iter((0.2, 0.5, 0.3, 0.4))

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_ap": next(scores)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(VisionTrainer, "evaluate", evaluate)
    monkeypatch.setattr("hf_vlm.training.run._last_metrics", lambda trainer: {})
    best = {"load_best_model_at_end": True, "metric_for_best_model": "ap", "eval_strategy": "steps", "eval_steps": 1}
    finetune(make_recipe("detection", **SAVING | {"save_steps": 1}, save_total_limit=1, **best))
    folder = tmp_path / "detection"
    assert names(folder) == ["checkpoint-2", "checkpoint-4"]  # the last one too: training may go on from it
    for step in (2, 4):
        state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")
        verify_checkpoint(folder / f"checkpoint-{step}")
    assert_same_weights(folder, folder / "checkpoint-2")


def test_the_last_checkpoint_is_of_the_branch_that_was_trained_last(run, saved, at_step, monkeypatch, caplog):
    folder, recipe = run
    with monkeypatch.context() as patch:
        patch.setattr("hf_vlm.training.trainer.verify_checkpoint", stop)
        with pytest.raises(StoppedError):
            pretrain(recipe | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    assert names(folder) == ["checkpoint-2", "checkpoint-4"]  # nothing was trained
    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "training_step", stop)
        with pytest.raises(StoppedError):
            pretrain(recipe | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"{folder}/checkpoint-4 of an earlier branch is now abandoned-checkpoint-4" in caplog.text
    assert_same_weights(folder / "abandoned-checkpoint-4", saved[0] / "checkpoint-4")
    pretrain(recipe | {"resume_from_checkpoint": "last"})
    assert names(folder) == ["checkpoint-2", "checkpoint-4"]
    assert_same_weights(folder / "checkpoint-4", saved[0] / "checkpoint-4")
    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "training_step", stop)
        with pytest.raises(StoppedError):
            pretrain(recipe | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    assert (folder / "abandoned-checkpoint-4-2").is_dir()


def test_a_run_that_begins_at_another_runs_checkpoint_takes_no_folder_of_a_third(run, saved):
    folder, recipe = run
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(recipe | {"resume_from_checkpoint": str(saved[0] / "checkpoint-2")})
    pretrain(recipe | {"resume_from_checkpoint": str(saved[0] / "checkpoint-2"), "overwrite_output_dir": True})
    assert names(folder) == ["checkpoint-4"]
    assert_same_weights(folder, saved[0])


def test_overwriting_leaves_no_weights_that_a_command_could_take(run, at_step):
    folder, recipe = run
    (folder / "notes.txt").write_text("mine")
    (folder / "objective").mkdir()  # the pretraining model of version 0.1
    at_step(1, stop)
    with pytest.raises(StoppedError):
        pretrain(recipe | {"overwrite_output_dir": True})
    assert not list(folder.rglob("*.safetensors"))
    assert not {"config.json", "run.json", "pretraining_model", "objective"} & set(os.listdir(folder))
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"holds no finished model.* or start it again"):
        load_model(folder)


def test_what_a_killed_run_left_aside_is_no_checkpoint_and_is_cleared(run, saved, monkeypatch):
    folder, recipe = run
    with monkeypatch.context() as patch:
        patch.setattr("hf_vlm.training.saving.commit_checkpoint", stop)
        with pytest.raises(StoppedError):
            pretrain(recipe | {"overwrite_output_dir": True})
    assert (folder / PARTIAL_FOLDER / "checkpoint-2" / "optimizer.pt").is_file()
    shutil.copytree(saved[0] / "checkpoint-2", folder / PARTIAL_FOLDER / "checkpoint-3")
    assert names(folder) == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_checkpoint(folder)
    pretrain(recipe)
    assert not (folder / PARTIAL_FOLDER).exists()
    assert_same_weights(folder, saved[0])
