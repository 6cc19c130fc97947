"""Two processes that divide an encoder by its plan compute what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

PROGRAM = Path(__file__).with_name("tensor_parallel_run.py")
SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES = {
    "plain": {},
    "all": {
        "use_qk_norm": True,
        "layerscale_value": 0.1,
        "position_embedding_type": "rope",
        "num_register_tokens": 2,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "norm_type": "rmsnorm",
        "intermediate_size": 128,
    },
}


@pytest.mark.slow
def test_output_and_all_gradients_are_those_of_one_process(tmp_path):
    for name, changes in CASES.items():
        torch.manual_seed(0)
        model = VLMViTModel(VLMViTConfig(**SHAPE, **changes))
        with torch.no_grad():
            for weight in model.parameters():  # none that others do not depend on, as gains of 1
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(tmp_path / name)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29623", str(PROGRAM)]
    done = subprocess.run([sys.executable, *words, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in CASES:
        assert found[name]["shard"] == [32, 64]
        assert found[name]["output"] < 1e-4
        assert not {key: error for key, error in found[name]["gradients"].items() if not error < 1e-4}, name
