"""Runs killed or stopped at random moments, resumed and stopped again, train what an uninterrupted run trains."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import verify_checkpoint

PROGRAM = Path(__file__).with_name("traced_run.py")
NUM_IMAGES, NUM_STEPS, SAVE_STEPS = 52, 30, 4  # an epoch is 13 steps of one rank


def write_parquet(folder):
    scenes = list(scenes_source("easy", "train", num_samples=NUM_IMAGES, masks=False))
    for part in range(4):  # row groups of 5, so that blocks, shards and epochs end at odd places
        rows = Dataset.from_list([{"image": scene["image"]["bytes"]} for scene in scenes[part::4]])
        rows.to_parquet(folder / f"train-{part:05d}-of-00004.parquet", batch_size=5)


def write_webdataset(folder):
    scenes = list(scenes_source("easy", "train", num_samples=NUM_IMAGES, masks=False))
    for part in range(4):
        with tarfile.open(folder / f"train-{part:05d}.tar", "w") as tar:
            for index, scene in enumerate(scenes[part::4]):
                member = tarfile.TarInfo(f"{part}-{index:04d}.png")
                member.size = len(scene["image"]["bytes"])
                tar.addfile(member, io.BytesIO(scene["image"]["bytes"]))


WRITERS = {"parquet": write_parquet, "webdataset": write_webdataset}


class Run:
    """A recipe that is started again and again on the same folder."""

    def __init__(self, folder, recipe, num_ranks, popen):
        self.folder = folder
        self.popen = popen
        self.num_ranks = num_ranks
        folder.mkdir()
        self.recipe = folder / "recipe.json"
        self.recipe.write_text(json.dumps(recipe | {"output_dir": str(folder / "run")}))

    def start(self, **environment):
        words = [str(PROGRAM), str(self.recipe), str(self.folder)]
        if self.num_ranks > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.num_ranks), *words]
        with (self.folder / "output.txt").open("a") as output:
            return self.popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=os.environ | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def finish(self):
        assert self.start().wait(timeout=300) == 0, (self.folder / "output.txt").read_text()[-4000:]

    def start_for(self, num_lines, delay):
        """Starts, and waits until `delay` seconds after so many new lines in the trace; the process, or None."""
        wanted = len(self.trace(0)) + num_lines
        process = self.start()
        deadline = time.monotonic() + 300
        while len(self.trace(0)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline, (self.folder / "output.txt").read_text()[-4000:]
            time.sleep(0.005)
        time.sleep(delay)
        return process if process.poll() is None else None

    def kill_after(self, num_lines, delay):
        """Starts, and kills every process then; False if it had ended."""
        process = self.start_for(num_lines, delay)
        if process is None:
            return False
        parent = psutil.Process(process.pid)
        for each in [parent, *parent.children(recursive=True)]:  # ranks and data workers too, at once
            each.kill()
        process.wait()
        return True

    def stop_after(self, num_lines, delay, number, receivers):
        """Starts, and sends a signal then to some of its processes; the exit status."""
        process = self.start_for(num_lines, delay)
        assert process is not None, "it ended before"
        for pid in receivers(psutil.Process(process.pid)):
            os.kill(pid, number)
        return process.wait(timeout=120)

    def trace(self, rank):
        path = self.folder / f"{rank}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def weights(self):
        return load_file(self.folder / "run" / "pretraining_model" / "model.safetensors")


def traced_recipe(make_recipe, tmp_path, kind, num_workers, **changes):
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[kind](data)
    return make_recipe(
        "mae",
        data=str(data),
        num_train_examples=None,
        shuffle_block=8,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        dataloader_num_workers=num_workers,
        **{"max_steps": NUM_STEPS, **changes},
    )


def check_kills(make_recipe, tmp_path, popen, *, kind, num_ranks, num_workers, num_kills, seed, **changes):
    recipe = traced_recipe(make_recipe, tmp_path, kind, num_workers, **changes)
    whole, broken = (Run(tmp_path / name, recipe, num_ranks, popen) for name in ("whole", "broken"))
    whole.finish()
    generator = random.Random(seed)
    was_killed = [broken.kill_after(generator.randint(1, 10), generator.uniform(0, 0.05)) for _ in range(num_kills)]
    assert sum(was_killed) >= min(num_kills, 2)
    broken.finish()
    check_same(whole, broken, num_ranks)


def check_same(whole, broken, num_ranks):
    """Whatever was trained again was trained as the first time, and as in the run that nobody disturbed."""
    for rank in range(num_ranks):
        expected = {entry["step"]: entry for entry in whole.trace(rank)}
        assert sorted(expected) == list(range(NUM_STEPS))
        found = broken.trace(rank)
        assert len(found) > NUM_STEPS  # some steps were done again after a kill
        assert {entry["step"] for entry in found} == set(expected)
        assert all(entry == expected[entry["step"]] for entry in found)  # the first time and again
    logs = [read_log(run.folder / "run" / "log.jsonl") for run in (whole, broken)]
    losses = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, NUM_STEPS + 1))
    weights = whole.weights()
    assert all(torch.equal(value, weights[name]) for name, value in broken.weights().items())


def test_killed_twice_at_random_moments(make_recipe, tmp_path, fork_server):
    popen = fork_server.popen
    check_kills(make_recipe, tmp_path, popen, kind="parquet", num_ranks=1, num_workers=0, num_kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_many_times_at_random_moments(make_recipe, tmp_path, kind, num_ranks, num_workers):
    changes = {"kind": kind, "num_ranks": num_ranks, "num_workers": num_workers}
    check_kills(make_recipe, tmp_path, subprocess.Popen, **changes, num_kills=4, seed=1)


@pytest.mark.slow
def test_ranks_that_divide_the_model_are_killed_at_random_moments(make_recipe, tmp_path):
    changes = {"kind": "parquet", "num_ranks": 2, "num_workers": 0, "tp_size": 2}
    check_kills(make_recipe, tmp_path, subprocess.Popen, **changes, num_kills=4, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_where_one_rank_is_killed_all_end_and_nothing_is_lost(make_recipe, tmp_path, tp_size):
    recipe = traced_recipe(make_recipe, tmp_path, "parquet", 0, tp_size=tp_size)
    whole, broken = (Run(tmp_path / name, recipe, 2, subprocess.Popen) for name in ("whole", "broken"))
    whole.finish()
    assert broken.stop_after(11, 0.01, signal.SIGKILL, one_rank) == 1
    broken.finish()
    check_same(whole, broken, 2)


@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_all_with_the_last_checkpoint(make_recipe, tmp_path):
    """Of a model that ranks divide, each writes a part of the optimiser's state."""
    recipe = traced_recipe(make_recipe, tmp_path, "parquet", 0, tp_size=2, max_steps=2 * SAVE_STEPS)
    whole, broken = (Run(tmp_path / name, recipe, 2, subprocess.Popen) for name in ("whole", "broken"))
    whole.finish()
    assert broken.start(FULL_DISK="1").wait(timeout=300) == 1
    printed = (broken.folder / "output.txt").read_text()
    assert f"The checkpoint of step {2 * SAVE_STEPS} could not be written to" in printed, printed[-4000:]
    assert [path.name for path in (broken.folder / "run").glob("checkpoint-*")] == [f"checkpoint-{SAVE_STEPS}"]
    verify_checkpoint(broken.folder / "run" / f"checkpoint-{SAVE_STEPS}")
    broken.finish()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in broken.weights().items())


def main_process(parent):
    return [parent.pid]


def all_processes(parent):
    """As a scheduler signals a job, or Ctrl-C in a terminal what runs in it; a launcher passes it on once more."""
    return [each.pid for each in (parent, *parent.children(recursive=True))]


def one_rank(parent):
    return [next(each.pid for each in parent.children() if each.environ().get("RANK") == "1")]


def check_stops(make_recipe, tmp_path, popen, *, num_ranks, num_workers, stops, seed):
    """A stopped run is saved at the end of its step: no step is trained twice, and none is left out."""
    recipe = traced_recipe(make_recipe, tmp_path, "parquet", num_workers)
    whole, broken = (Run(tmp_path / name, recipe, num_ranks, popen) for name in ("whole", "broken"))
    whole.finish()
    generator = random.Random(seed)
    for number, receivers in stops:
        status = broken.stop_after(generator.randint(1, 6), generator.uniform(0, 0.05), number, receivers)
        printed = (broken.folder / "output.txt").read_text()
        assert status == (128 + number if num_ranks == 1 else 1), printed[-4000:]  # torchrun's own status
        step = len(broken.trace(0))
        assert f"Stopped by {number.name} at step {step} of {NUM_STEPS}" in printed, printed[-4000:]
        assert [path.name for path in (broken.folder / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
        assert not (broken.folder / "run" / "model.safetensors").exists()
    broken.finish()
    for rank in range(num_ranks):
        assert broken.trace(rank) == whole.trace(rank)
        assert [entry["step"] for entry in broken.trace(rank)] == list(range(NUM_STEPS))
    weights = whole.weights()
    assert all(torch.equal(value, weights[name]) for name, value in broken.weights().items())


@pytest.mark.slow
def test_stopped_twice_at_random_moments(make_recipe, tmp_path, fork_server):
    stops = [(signal.SIGTERM, main_process), (signal.SIGINT, main_process)]
    check_stops(make_recipe, tmp_path, fork_server.popen, num_ranks=1, num_workers=0, stops=stops, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stopped_many_times_at_random_moments(make_recipe, tmp_path, num_ranks, num_workers):
    receivers = [main_process, all_processes, *([one_rank] if num_ranks == 2 else [])]
    stops = [(number, each) for each in receivers for number in (signal.SIGTERM, signal.SIGINT)][:5]
    options = {"num_ranks": num_ranks, "num_workers": num_workers, "seed": 1}
    check_stops(make_recipe, tmp_path, subprocess.Popen, stops=stops, **options)
