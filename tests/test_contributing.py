"""The method in CONTRIBUTING.md is one that trains, as it stands there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import hf_vlm.models

ENCODER = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def vicreg(tmp_path, monkeypatch):
    """The module of the first block of Python, imported as if it stood beside the other methods."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "modeling_vicreg.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location(f"{hf_vlm.models.__name__}.modeling_vicreg", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_method_trains(vicreg):
    torch.manual_seed(0)
    config = vicreg.VICRegConfig(backbone_config=ENCODER, projection_size=8)
    model = vicreg.VICRegForPreTraining(config).train()
    images = torch.randn(16, 1, 3, 16, 16)
    assert model(images.expand(-1, 2, -1, -1, -1)).invariance == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        output = model(images + 0.1 * torch.randn(16, 2, 3, 16, 16))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_covariance_is_that_of_pairs(vicreg):
    features = torch.randn(30, 4).double()
    centred = features - features.mean(0)
    expected = sum(((centred[:, i] * centred[:, j]).sum() / 29) ** 2 for i in range(4) for j in range(4) if i != j)
    torch.testing.assert_close(vicreg.covariance(features), expected / 4)
