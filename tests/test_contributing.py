"""The method and the task in CONTRIBUTING.md train as they are there."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import hf_vlm.models
import hf_vlm.tasks
from hf_vlm import registry
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.run import finetune

ENCODER = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def import_block(tmp_path, monkeypatch):
    """`import_block(index, name)`: a block of Python, imported as if it were a file of the package."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3

    def load(index, name):
        path = tmp_path / f"{name}.py"
        path.write_text(blocks[index])
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def vicreg(import_block):
    return import_block(0, f"{hf_vlm.models.__name__}.modeling_vicreg")


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


def test_the_example_of_a_task_is_fine_tuned_and_evaluated(import_block, tmp_path, monkeypatch):
    heads = import_block(1, f"{hf_vlm.models.__name__}.modeling_counting")
    task = import_block(2, f"{hf_vlm.tasks.__name__}.counting").COUNTING
    row = registry.ModelEntry("counting", task.name, heads.CountingConfig, heads.VLMViTForCounting, AutoModel)
    AutoModel.register(heads.CountingConfig, heads.VLMViTForCounting, exist_ok=True)
    monkeypatch.setattr(registry, "MODELS", (*registry.MODELS, row))
    monkeypatch.setitem(hf_vlm.tasks.TASKS, task.name, task)
    monkeypatch.setattr("hf_vlm.training.run.TRAINABLE_TASKS", (task.name,))
    recipe = {
        "method": "counting",
        "output_dir": str(tmp_path / "run"),
        "data": "scenes:easy",
        "image_size": 32,
        "encoder_config": ENCODER | {"image_size": 32},
        "num_train_examples": 24,
        "num_eval_examples": 8,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "shuffle_block": 24,
    }
    summary = finetune(recipe)
    losses = [entry["loss"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

    model = heads.VLMViTForCounting.from_pretrained(tmp_path / "run").eval()
    processor = row.processor_class.from_pretrained(tmp_path / "run")
    errors = []
    for example in open_source("scenes:easy", "validation", num_samples=8):
        image, _ = decode_image(example["image"])
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            counts = model(**pixels).logits[0].numpy()
        errors.append(np.abs(counts - np.bincount(example["objects"]["category"], minlength=5)))
    assert summary["metrics"]["accuracy"] == pytest.approx(1 / (1 + np.mean(errors)), abs=0.01)
