"""A kill at any change of a file: what the disk holds at that moment is resumed as if there had been none."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm.features.loading import load_model
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import last_checkpoint, verify_checkpoint
from hf_vlm.training.run import pretrain

RECIPE = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 1, "probe_steps": 0}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


class Snapshots:
    """Copies of a folder before every n-th change of a file, from its first checkpoint on.

    Python reports the changes itself; what Rust and C++ write is seen at the next of them. Data that a process has
    written outlives it, so that a copy is what a kill would leave.
    """

    def __init__(self, folder, copies, every):
        self.folder, self.copies, self.every = folder, copies, every
        self.states, self.folders, self.is_copying = set(), [], False

    def __call__(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if self.is_copying or not (writes or event in EVENTS):
            return
        self.is_copying = True
        try:
            if self.states or (self.folder / "checkpoint-2").exists():
                self.copy()
        finally:
            self.is_copying = False

    def copy(self):
        if (state := tree(self.folder)) in self.states:
            return
        if len(self.states) % self.every == 0:
            self.folders.append(self.copies / str(len(self.states)))
            shutil.copytree(self.folder, self.folders[-1])
        self.states.add(state)


def tree(folder):
    """Names, sizes and times of all files of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


listeners = []
sys.addaudithook(lambda event, arguments: listeners and listeners[-1](event, arguments))


@pytest.fixture(scope="module", params=[45, pytest.param(1, marks=pytest.mark.slow)])
def killed(make_recipe_in, tmp_path_factory, request):
    """A finished run, its recipe, and folders that a kill would have left, in their order."""
    recipe = make_recipe_in(tmp_path_factory.mktemp("whole"), "mae", **RECIPE)
    snapshots = Snapshots(Path(recipe["output_dir"]), tmp_path_factory.mktemp("killed"), request.param)
    listeners.append(snapshots)
    try:
        pretrain(recipe)
    finally:
        listeners.clear()
    assert len(snapshots.states) > 100
    return recipe, snapshots.folders


def weights(folder):
    return load_file(folder / "model.safetensors")


def is_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_checkpoint_is_always_whole_and_the_model_too_where_there_is_one(killed):
    recipe, folders = killed
    whole = Path(recipe["output_dir"])
    steps = []
    for folder in folders:
        checkpoint = last_checkpoint(folder)
        verify_checkpoint(checkpoint)
        steps.append(int(checkpoint[-1]))
        if (folder / "config.json").exists():
            assert is_same(weights(folder), weights(whole))
            assert is_same(weights(folder / "pretraining_model"), weights(whole / "pretraining_model"))
            assert (folder / "run.json").read_text() == (whole / "run.json").read_text()
        else:
            with pytest.raises(ValueError, match=r"holds no finished model.*or finish it with --resume_from_chec"):
                load_model(folder)
    assert steps == sorted(steps)
    assert set(steps) == {2, 4}


def test_a_run_killed_there_is_resumed_or_is_finished_and_untouched(killed, tmp_path):
    recipe, folders = killed
    whole = Path(recipe["output_dir"])
    expected = [(entry["step"], entry["loss"]) for entry in read_log(whole / "log.jsonl") if "loss" in entry]
    for folder in (*folders, whole):
        run = tmp_path / folder.name
        shutil.copytree(folder, run)
        before = tree(run)
        pretrain(recipe | {"output_dir": str(run), "resume_from_checkpoint": "auto"})
        if folder == whole:
            assert tree(run) == before
        assert is_same(weights(run), weights(whole))
        assert is_same(weights(run / "pretraining_model"), weights(whole / "pretraining_model"))
        assert last_checkpoint(run) == str(run / "checkpoint-4")
        verify_checkpoint(run / "checkpoint-4")
        assert [(entry["step"], entry["loss"]) for entry in read_log(run / "log.jsonl") if "loss" in entry] == expected
        shutil.rmtree(run)
