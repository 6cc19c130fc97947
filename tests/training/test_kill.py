"""Runs killed with SIGKILL at random moments, resumed and killed again, train what an uninterrupted run trains."""

import io
import json
import random
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

    def start(self):
        words = [str(PROGRAM), str(self.recipe), str(self.folder)]
        if self.num_ranks > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.num_ranks), *words]
        with (self.folder / "output.txt").open("a") as output:
            return self.popen(
                [sys.executable, *words], cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self):
        assert self.start().wait(timeout=300) == 0, (self.folder / "output.txt").read_text()[-4000:]

    def kill_after(self, num_lines, delay):
        """Starts, and kills every process `delay` seconds after so many new lines in the trace; False if it ended."""
        wanted = len(self.trace(0)) + num_lines
        process = self.start()
        deadline = time.monotonic() + 300
        while len(self.trace(0)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline, (self.folder / "output.txt").read_text()[-4000:]
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is not None:
            return False
        parent = psutil.Process(process.pid)
        for each in [parent, *parent.children(recursive=True)]:  # ranks and data workers too, at once
            each.kill()
        process.wait()
        return True

    def trace(self, rank):
        path = self.folder / f"{rank}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def weights(self):
        return load_file(self.folder / "run" / "pretraining_model" / "model.safetensors")


def check_kills(make_recipe, tmp_path, popen, *, kind, num_ranks, num_workers, num_kills, seed):
    data = tmp_path / "data"
    data.mkdir()
    WRITERS[kind](data)
    recipe = make_recipe(
        "mae",
        data=str(data),
        num_train_examples=None,
        shuffle_block=8,
        max_steps=NUM_STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        dataloader_num_workers=num_workers,
    )
    whole, broken = (Run(tmp_path / name, recipe, num_ranks, popen) for name in ("whole", "broken"))
    whole.finish()
    generator = random.Random(seed)
    was_killed = [broken.kill_after(generator.randint(1, 10), generator.uniform(0, 0.05)) for _ in range(num_kills)]
    assert sum(was_killed) >= min(num_kills, 2)
    broken.finish()

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
