"""AdamW with averages in 8 bits, by torchao (the extra `optim`)."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm.training.run import pretrain


@pytest.mark.slow  # torchao compiles its step
@pytest.mark.filterwarnings("ignore")  # of torch and torchao about each other
def test_it_trains_as_in_full_precision_resumes_exactly_and_takes_a_quarter_of_the_state(make_recipe, tmp_path):
    pytest.importorskip("torchao")
    recipe = make_recipe("mae", save_strategy="steps", save_steps=4, save_total_limit=5)
    recipe["encoder_config"] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
    }  # torchao leaves tensors of fewer than 4,096 values as they are

    def losses(name):
        entries = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [entry["loss"] for entry in entries if "loss" in entry]

    def run(name, **changes):
        pretrain(recipe | {"output_dir": str(tmp_path / name), **changes})
        return losses(name)

    full, eight = run("full"), run("eight", optim="adamw_torch_8bit")
    assert eight == pytest.approx(full, rel=1e-2)
    assert eight != full
    sizes = [(tmp_path / name / "checkpoint-4" / "optimizer.pt").stat().st_size for name in ("full", "eight")]
    assert sizes[1] < 0.5 * sizes[0]
    weights = load_file(tmp_path / "eight" / "model.safetensors")
    run("again", optim="adamw_torch_8bit", resume_from_checkpoint=str(tmp_path / "eight" / "checkpoint-4"))
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    assert losses("again") == eight[4:]


def test_without_the_package_it_is_named(make_recipe):
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed")
    with pytest.raises(ValueError, match=r"optim adamw_torch_8bit: .*torchao"):
        pretrain(make_recipe("mae", optim="adamw_torch_8bit"))
