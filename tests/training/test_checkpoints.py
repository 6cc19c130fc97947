"""Checkpoints and models are whole or absent; damage is named; nothing is deleted that is still needed."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from full_disk import no_file_above
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_vlm.data.io.durable import PARTIAL_FOLDER
from hf_vlm.features.loading import load_model
from hf_vlm.training import checkpoints as module
from hf_vlm.training import run as run_module
from hf_vlm.training.callbacks import LogFile, read_log
from hf_vlm.training.checkpoints import (
    checkpoints,
    commit_model,
    complete_checkpoints,
    last_checkpoint,
    prepare_run_folder,
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


@contextmanager
def at_step(step, function):
    """Calls a function when the run within this context has done `step` steps."""
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(AtStep(step, function))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTrainer, "__init__", init)
        yield


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
    (folder / "config.json").unlink()  # or else the run is finished, and nothing is resumed
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


def test_a_checkpoint_stays_until_it_is_published(make_recipe, tmp_path, monkeypatch):
    uploads = []

    def upload(self, folder, message, *, blocking=True):
        uploads.append((Path(folder).name, Future()))
        return uploads[-1][1]

    def finish():
        assert names(tmp_path / "mae") == ["checkpoint-1", "checkpoint-3"]
        uploads[0][1].set_result(None)

    monkeypatch.setattr(VisionTrainer, "upload", upload)
    monkeypatch.setattr(VisionTrainer, "init_hf_repo", lambda self: setattr(self, "push_in_progress", None))
    monkeypatch.setattr(VisionTrainer, "_finish_current_push", lambda self: None)
    with at_step(3, finish):
        pretrain(make_recipe("mae", **SAVING | {"save_steps": 1}, save_total_limit=1, push_to_hub=True))
    assert names(tmp_path / "mae") == ["checkpoint-4"]
    assert [name for name, _ in uploads] == ["checkpoint-1", "checkpoint-4", "mae"]


def test_the_last_checkpoint_is_of_the_branch_that_was_trained_last(run, saved, monkeypatch, caplog):
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


def test_overwriting_leaves_no_weights_that_a_command_could_take(run):
    folder, recipe = run
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder / "pretraining_model", folder / "objective")  # its name in version 0.1
    shutil.copytree(folder / "checkpoint-4", folder / "abandoned-checkpoint-4")
    with pytest.raises(StoppedError), at_step(1, stop):
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


# ---- models


class Disk:
    """Stops at the n-th change of a name on the disk."""

    def __init__(self, monkeypatch, num_changes):
        self.num_left = num_changes
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(Path, name, self.counted(getattr(Path, name)))
        monkeypatch.setattr("shutil.rmtree", self.counted(shutil.rmtree))

    def counted(self, function):
        def change(*args, **kwargs):
            if self.num_left == 0:
                raise StoppedError
            self.num_left -= 1
            return function(*args, **kwargs)

        return change


def model_of(folder, version):
    """A model in two files of weights, with what belongs to it, all of one version."""
    (folder / "pretraining_model").mkdir(parents=True)
    shards = [f"model-{version}-of-2.safetensors", "model.safetensors.index.json"]
    for name in (*shards, "config.json", "run.json", "preprocessor_config.json", "pretraining_model/config.json"):
        (folder / name).write_text(version)


def test_a_kill_leaves_the_old_model_or_none_or_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    found = set()
    for num_changes in range(30):
        folder = tmp_path / str(num_changes)
        model_of(folder, "old")
        model_of(folder / PARTIAL_FOLDER / "run", "new")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(StoppedError):
            Disk(patch, num_changes)
            commit_model(folder / PARTIAL_FOLDER / "run", folder)
        if not (folder / "config.json").exists():
            found.add("none")
            continue
        paths = [path for path in folder.rglob("*") if path.is_file() and PARTIAL_FOLDER not in path.parts]
        (version,) = {path.read_text() for path in paths}
        assert [path.name for path in folder.glob("model-*")] == [f"model-{version}-of-2.safetensors"]
        found.add(version)
    assert found == {"old", "none", "new"}
    assert not (folder / PARTIAL_FOLDER).exists()


def test_damaged_weights_of_a_model_are_named(run):
    folder, _ = run
    load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(folder)


# ---- disks that cannot be written to


@pytest.mark.parametrize(
    "what", ["everything", "optimizer.pt", pytest.param("model.safetensors", marks=pytest.mark.slow)]
)
def test_a_full_disk_at_a_checkpoint_ends_the_run_which_can_be_resumed(saved, tmp_path, what):
    recipe = saved[1] | {"output_dir": str(tmp_path / "run")}
    limit = 1 if what == "everything" else (saved[0] / "checkpoint-4" / what).stat().st_size - 1
    message = r"checkpoint of step 4 could not .*/run: .* Free space there .*checkpoint-2, is kept: continue with"
    with (
        pytest.raises(ValueError, match=message),
        ExitStack() as stack,
        at_step(2, lambda: stack.enter_context(no_file_above(limit))),
    ):
        pretrain(recipe)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert not list((tmp_path / "run" / PARTIAL_FOLDER).iterdir())
    pretrain(recipe | {"resume_from_checkpoint": "last"})
    assert_same_weights(tmp_path / "run", saved[0])
    for folder in (saved[0], tmp_path / "run"):
        assert [e["step"] for e in read_log(folder / "log.jsonl") if "loss" in e] == [1, 2, 3, 4]


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(saved, tmp_path, monkeypatch):
    recipe = saved[1] | {"output_dir": str(tmp_path / "run")}
    train = run_module._train
    stack = ExitStack()
    monkeypatch.setattr(run_module, "_train", lambda *args: (train(*args), stack.enter_context(no_file_above(1000))))
    with stack, pytest.raises(ValueError, match=r"The model could not be written .*checkpoint-4, is kept"):
        pretrain(recipe)
    verify_checkpoint(tmp_path / "run" / "checkpoint-4")
    assert not (tmp_path / "run" / "config.json").exists()
    assert not list((tmp_path / "run" / PARTIAL_FOLDER).iterdir())


def test_a_full_disk_does_not_end_the_log_nor_the_run(tmp_path, caplog):
    log, state = LogFile(), TrainerState(is_world_process_zero=True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    log.on_train_begin(args, state, TrainerControl())
    path = tmp_path / "log.jsonl"

    def write(step):
        state.global_step = step
        log.on_log(args, state, TrainerControl(), logs={"loss": 0.5})

    write(1)
    with no_file_above(path.stat().st_size + 10):
        write(2)
        write(3)
        assert [entry["step"] for entry in read_log(path)] == [1]
        assert path.read_text().endswith("}\n")
    assert caplog.text.count("cannot be written: File too large. Training continues") == 1
    write(4)
    assert read_log(path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3, 4)]


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(make_recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(VisionTrainer, "training_step", stop)
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=rf"run could not be written to {folder}: .*--output_dir a folder that"):
            pretrain(make_recipe("mae", output_dir=str(folder)))
    with pytest.raises(ValueError, match="run could not be written"), no_file_above(10):
        prepare_run_folder(tmp_path / "full")


class FillingDisk(io.StringIO):
    is_full = False

    def write(self, text):
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_full_disk_below_the_output_does_not_end_the_run(make_recipe, monkeypatch, disable_tqdm):
    run_module.quiet_libraries()
    output = FillingDisk()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, output)
    with at_step(1, lambda: setattr(output, "is_full", True)):
        summary = pretrain(make_recipe("mae", max_steps=2, probe_steps=0, disable_tqdm=disable_tqdm))
    assert summary["num_steps"] == 2
    assert "loss" in output.getvalue()
