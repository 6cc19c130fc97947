"""What a pretraining leaves is whole where its model was sharded."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm.data.io.durable import PARTIAL_FOLDER
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.checkpoints import verify_checkpoint
from hf_vlm.training.sharded import ShardedTrainer

PROGRAM = Path(__file__).with_name("sharded_run.py")
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def launch(recipe, config):
    """Runs a recipe in two processes; the weights of its encoder, of its objective, and its log."""
    folder = Path(recipe["output_dir"])
    folder.mkdir(exist_ok=True)
    (folder / "given.json").write_text(json.dumps(recipe))
    words = ["accelerate.commands.launch", "--config_file", str(RECIPES / config), "--num_processes", "2"]
    words += ["--mixed_precision", "no", str(PROGRAM), str(folder / "given.json")]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    encoder, objective = (load_file(place / "model.safetensors") for place in (folder, folder / "pretraining_model"))
    return encoder, objective, read_log(folder / "log.jsonl")


@pytest.mark.slow
def test_a_sharded_run_leaves_what_one_of_copies_does(make_recipe, tmp_path):
    """I-JEPA's encoder is a teacher, which moves without gradients."""
    recipe = make_recipe("ijepa", max_steps=3, warmup_steps=0)
    sharded, objective, log = launch(recipe | {"output_dir": str(tmp_path / "sharded")}, "fsdp2.yaml")
    copied, _, expected_log = launch(recipe | {"output_dir": str(tmp_path / "copied")}, "ddp.yaml")
    assert sharded.keys() == copied.keys()
    for name, weights in sharded.items():
        assert torch.equal(weights, objective[f"teacher.backbone.{name}"]), name
        torch.testing.assert_close(weights, copied[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(sharded["norm.weight"], torch.ones(32))  # as it began
    losses, expected = ([e["loss"] for e in entries if "loss" in e] for entries in (log, expected_log))
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-5)
    assert any("mfu" in entry for entry in log)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2.yaml", "ddp.yaml"])
def test_the_checkpoints_of_two_ranks_are_committed_as_one_and_resumed_exactly(make_recipe, tmp_path, config):
    recipe = make_recipe("ijepa", max_steps=4, warmup_steps=0, save_strategy="steps", save_steps=2)
    whole, _, _ = launch(recipe | {"output_dir": str(tmp_path / "whole")}, config)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    written = set(json.loads((checkpoint / "manifest.json").read_text())["files"])
    assert {"data_state_0.pt", "data_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"} < written
    verify_checkpoint(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-2")
    again, _, _ = launch(recipe | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last"}, config)
    assert all(torch.equal(again[name], weights) for name, weights in whole.items())
    assert not (tmp_path / "again" / PARTIAL_FOLDER).exists()


def test_the_optimiser_state_of_a_whole_model_is_given_to_groups_that_are_divided_further():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    names, weights = (list(part) for part in zip(*model.named_parameters()))
    whole = torch.optim.AdamW([{"params": weights[:3], "lr": 0.1}, {"params": weights[3:], "lr": 0.2}])
    model(torch.randn(3, 4)).square().sum().backward()
    whole.step()
    whole.zero_grad()
    saved = copy.deepcopy(whole.state_dict())
    divided = torch.optim.AdamW([{"params": [weight], "lr": 0.0, "weight_decay": 7.0} for weight in weights])
    trainer = SimpleNamespace(model=model, _plain_optimizer=divided, optimizer_names=lambda: names)
    ShardedTrainer._divide_optimizer_state(trainer, saved)
    assert [group["lr"] for group in divided.param_groups] == [0.1, 0.1, 0.1, 0.2]
    assert {group["weight_decay"] for group in divided.param_groups} == {whole.defaults["weight_decay"]}
    for weight in weights:
        assert divided.state[weight].keys() == whole.state[weight].keys()
        assert all(torch.equal(value, divided.state[weight][key]) for key, value in whole.state[weight].items())
