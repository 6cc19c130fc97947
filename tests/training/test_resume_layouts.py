"""A checkpoint of one layout is resumed in others: the same images in each step, and the same losses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.training.callbacks import read_log

PROGRAM = Path(__file__).with_name("traced_run.py")
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"
TOTAL_BATCH, NUM_STEPS, CHECKPOINT = 8, 14, 4
# Ranks, recipe keys and launcher of each layout.
LAYOUTS = {
    "one": (1, {}, None),
    "ddp": (2, {}, None),
    "fsdp": (4, {}, "fsdp2.yaml"),
    "tp": (2, {"tp_size": 2}, None),
    "fsdp x tp": (4, {"tp_size": 2}, None),
    "launched fsdp x tp": (4, {"tp_size": 2}, "tensor_parallel.yaml"),
    "ep": (2, {"ep_size": 2}, None),
}


def launch(folder, recipe, layout, checkpoint=None):
    """Trains a recipe in a layout; the images of each step and the losses of the log."""
    num_ranks, keys, config = LAYOUTS[layout]
    batch = TOTAL_BATCH * keys.get("tp_size", 1) // num_ranks
    recipe = recipe | keys | {"output_dir": str(folder / "run"), "per_device_train_batch_size": batch}
    folder.mkdir()
    if checkpoint is not None:
        shutil.copytree(checkpoint, folder / "run" / checkpoint.name)
    if config == "tensor_parallel.yaml":
        del recipe["tp_size"]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    if config is not None:
        words = ["accelerate.commands.launch", "--config_file", str(RECIPES / config), "--mixed_precision", "no"]
        words += ["--num_processes", str(num_ranks)]
        words += ["--parallelism_config_dp_shard_size", "2"] if config == "tensor_parallel.yaml" else []
    words += [str(PROGRAM), str(folder / "recipe.json"), str(folder)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    images = {}
    for rank in range(0, num_ranks, keys.get("tp_size", 1)):
        for entry in map(json.loads, (folder / f"{rank}.jsonl").read_text().splitlines()):
            images.setdefault(entry["step"], []).extend(entry["pixels"])
    log = read_log(folder / "run" / "log.jsonl")
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    for place in ("run", "run/pretraining_model"):
        weights = load_file(folder / place / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    assert "distributed_config" not in json.loads((folder / "run" / "config.json").read_text())
    return {step: sorted(pixels) for step, pixels in images.items()}, losses


def recipe_of(make_recipe, tmp_path, **changes):
    """A recipe on 52 images in 3 files, which no number of ranks here divides."""
    data = tmp_path / "data"
    data.mkdir()
    scenes = [scene["image"]["bytes"] for scene in scenes_source("easy", "train", num_samples=52, masks=False)]
    for part in range(3):
        rows = Dataset.from_dict({"image": scenes[part::3]})
        rows.to_parquet(data / f"train-{part:05d}-of-00003.parquet")
    fields = {"data": str(data), "num_train_examples": None, "shuffle_block": 8, "learning_rate": 1e-4}
    fields |= {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": CHECKPOINT, "probe_steps": 5}
    return make_recipe("simclr", **{**fields, **changes})


def check_same(found, expected, start):
    """Every step has the images of the same step of the run that was not stopped, and its loss."""
    images, losses = found
    assert images == {step: pixels for step, pixels in expected[0].items() if step >= start}
    later = {step: loss for step, loss in expected[1].items() if step > start}
    assert {step: loss for step, loss in losses.items() if step > start} == pytest.approx(later, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fsdp", "one", "fsdp x tp"])
def test_a_checkpoint_resumes_in_other_layouts(make_recipe, tmp_path, first):
    recipe = recipe_of(make_recipe, tmp_path)
    whole = launch(tmp_path / "whole", recipe, "one")
    started = launch(tmp_path / "started", recipe, first)
    check_same(started, whole, 0)
    checkpoint = tmp_path / "started" / "run" / f"checkpoint-{CHECKPOINT}"
    for layout in ("one", "ddp", "fsdp", "fsdp x tp"):
        check_same(launch(tmp_path / layout, recipe, layout, checkpoint), whole, CHECKPOINT)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp", "launched fsdp x tp", "ep"])
def test_pretraining_divided_by_a_recipe_or_a_launcher_is_that_of_one_process(make_recipe, tmp_path, layout):
    recipe = recipe_of(make_recipe, tmp_path, max_steps=6)
    if layout == "ep":
        recipe["encoder_config"] |= {"num_experts": 4, "num_experts_per_tok": 2}
    whole, divided = (launch(tmp_path / name, recipe, name) for name in ("one", layout))
    check_same(divided, whole, 0)
