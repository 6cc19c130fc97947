"""Low-rank fine-tuning: it starts at the encoder, learns by updates of its rank, and leaves a plain model."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from killed_run import KillAt, KilledError
from safetensors.torch import load_file
from tiny import BACKBONE, batch, build, perturb, slow_but
from torch import nn

from hf_vlm.features.loading import load_model
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training.lora import ALPHA, LORA_FILE, LoRALinear, add_lora
from hf_vlm.training.optim import parameter_groups
from hf_vlm.training.run import finetune, pretrain
from hf_vlm.training.trainer import VisionTrainer

HEADS = ("classification", "detection", "semantic_segmentation", "instance_segmentation")
RANK = 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    VLMViTModel(VLMViTConfig(**BACKBONE)).save_pretrained(folder)
    VLMViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_for(make_recipe, encoder):
    """`recipe_for(method, **changes)`: a recipe of a few steps that adapts the encoder by low rank."""

    def make(method, **changes):
        return make_recipe(method, **{"encoder": str(encoder), "lora_rank": RANK, "encoder_config": {}, **changes})

    return make


def outputs(model, inputs):
    with torch.no_grad():
        found = model.eval()(pixel_values=inputs["pixel_values"])
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def rank(matrix):
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-4 * values[0]).sum()) if values[0] > 0 else 0


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_on_an_encoder_that_updates_of_low_rank_adapt(name):
    model = build(name, backbone={"use_gated_mlp": True}).double()
    perturb(model, 0.05)
    plain, inputs = copy.deepcopy(model), batch(name)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    add_lora(model, RANK)
    before, after = outputs(plain, inputs), outputs(model, inputs)
    assert all(torch.equal(after[key], value) for key, value in before.items())

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    with_gradient = {key for key, weight in model.named_parameters() if weight.grad is not None}
    adapters = {key for key, _ in model.named_parameters() if key.endswith(("lora_a", "lora_b"))}
    assert {key for key in with_gradient if key.startswith("backbone.")} == adapters
    assert len(adapters) == 2 * 7 * 2  # A and B of query, key, value, projection, gate, up and down in two blocks
    frozen, base = dict(model.named_parameters()), plain.state_dict()
    for key in (base.keys() & frozen.keys()) - with_gradient:
        assert torch.equal(frozen[key], base[key])

    merged = model.state_dict()
    assert merged.keys() == base.keys()
    updated = {key for key, weight in merged.items() if not torch.equal(weight, base[key])}
    assert {key for key in updated if key.startswith("backbone.")} == {
        key.replace("lora_a", "weight") for key in adapters if key.endswith("lora_a")
    }
    assert all(rank(merged[key] - base[key]) == RANK for key in updated if key.startswith("backbone."))
    plain.load_state_dict(merged)
    adapted, found = outputs(model, inputs), outputs(plain, inputs)
    for key, value in adapted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


def test_a_layer_is_the_formula_and_begins_again_with_the_weights_of_a_plain_one():
    torch.manual_seed(0)
    plain = nn.Linear(6, 5).double()
    layer = LoRALinear(copy.deepcopy(plain), rank=3)
    perturb(layer)
    images = torch.randn(4, 6, dtype=torch.double)
    weight = layer.weight + ALPHA / 3 * torch.einsum("or,ri->oi", layer.lora_b, layer.lora_a)
    torch.testing.assert_close(layer(images), images @ weight.T + layer.bias)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(images), plain(images))


def test_rates_fall_from_layer_to_layer_and_matrices_decay():
    model = build("classification")
    add_lora(model, RANK)
    groups = parameter_groups(model, num_layers=2, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    encoder = [group for group in groups if group["in_encoder"]]
    assert [(group["lr"], group["weight_decay"]) for group in encoder] == [(0.25, 0.1), (0.5, 0.1)]
    assert [len(group["params"]) for group in encoder] == [12, 12]


@pytest.mark.parametrize("head", slow_but(HEADS, "classification"))
def test_a_run_leaves_a_plain_model_and_resumes_exactly(recipe_for, encoder, head, monkeypatch, caplog):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
    if head == "classification":
        changes["activation_checkpointing"] = True
    recipe = recipe_for(head, **changes)
    whole, resumed = ({**recipe, "output_dir": f"{recipe['output_dir']}-{name}"} for name in ("whole", "resumed"))
    summary = finetune(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(KilledError):
            finetune(resumed)
    finetune({**resumed, "resume_from_checkpoint": "last"})
    assert "missing keys" not in caplog.text
    for file in ("model.safetensors", "checkpoint-4/model.safetensors", f"checkpoint-4/{LORA_FILE}"):
        first, second = (load_file(f"{run['output_dir']}/{file}") for run in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), file

    assert not (Path(whole["output_dir"]) / LORA_FILE).exists()
    saved, base = load_model(whole["output_dir"]).model.backbone.state_dict(), load_file(encoder / "model.safetensors")
    changed = {key for key, weight in base.items() if not torch.equal(saved[key], weight)}
    linear = ("query", "key", "value", "projection", "up_projection", "down_projection")
    assert changed == {f"{at}.weight" for at, _ in layers(saved) if at.endswith(linear)}
    assert all(1 <= rank(saved[key] - base[key]) <= RANK for key in changed)
    assert summary["finished"]


def layers(state):
    names = {key.rpartition(".")[0] for key in state if key.startswith("layers.")}
    return [(name, state.get(f"{name}.weight")) for name in names]


def kill_at(monkeypatch, step):
    original = VisionTrainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(KillAt(step))

    monkeypatch.setattr(VisionTrainer, "__init__", init)


@pytest.mark.slow
def test_the_best_model_is_kept(recipe_for):
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "top1", "load_best_model_at_end": True}
    recipe = recipe_for("classification", max_steps=4, save_strategy="steps", save_steps=2, **best)
    finetune(recipe)
    state = json.loads((Path(recipe["output_dir"]) / "checkpoint-4/trainer_state.json").read_text())
    files = (
        Path(recipe["output_dir"]) / "model.safetensors",
        Path(state["best_model_checkpoint"]) / "model.safetensors",
    )
    kept, best = map(load_file, files)
    assert all(torch.equal(weight, best[key]) for key, weight in kept.items())


@pytest.mark.slow
def test_two_processes_adapt_as_one(recipe_for, tmp_path):
    found = {}
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613")
    for name, launcher, size in (("one", (), 8), ("two", torchrun, 4)):
        changes = {"per_device_train_batch_size": size, "output_dir": str(tmp_path / name), "optim": "sgd"}
        recipe = recipe_for("classification", learning_rate=0.1, num_train_examples=25, **changes)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        words = [sys.executable, *launcher, "-m", "hf_vlm.cli", "finetune", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(tmp_path / name / "model.safetensors")
    base = load_file(f"{recipe['encoder']}/model.safetensors")
    for key, expected in found["one"].items():
        before = base.get(key.removeprefix("backbone."), torch.zeros_like(expected))
        assert (found["two"][key] - expected).norm() <= 0.001 * (expected - before).norm() + 1e-6, key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_rank": -1}, "lora_rank must be 0, for none, or more"),
        ({"encoder": None}, "name one with --encoder"),
        ({"model_config": {"freeze_encoder": True}}, "which model_config.freeze_encoder freezes"),
        ({"resize_encoder": True}, "lora_rank freezes the weights that resize_encoder initialises"),
        ({"lora_rank": 32}, "lora_rank is 32, but must be below 32"),
    ],
)
def test_what_cannot_be_adapted_is_refused(recipe_for, change, words):
    with pytest.raises(ValueError, match=words):
        finetune(recipe_for("classification", **change))


def test_pretraining_trains_the_whole_encoder(recipe_for):
    with pytest.raises(ValueError, match="lora_rank is for fine-tuning"):
        pretrain(recipe_for("simclr"))
