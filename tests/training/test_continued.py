"""Continued pretraining: heads first, then the encoder at a low rate; weight decay that grows."""

import math
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_vlm.deploy.next_steps import finetune_command
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_simclr import SimCLRForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.training.build import load_encoder
from hf_vlm.training.callbacks import read_log
from hf_vlm.training.recipe import load_recipe, parse_arguments
from hf_vlm.training.run import pretrain
from hf_vlm.training.trainer import VisionTrainer

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
CONTINUED = {
    "frozen_encoder_steps": 3,
    "layer_decay": 0.5,
    "encoder_lr_multiplier": 0.2,
    "patch_projection_lr_multiplier": 0.5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 1,
}


def weights(folder):
    """Of the encoder, and of what stands on it."""
    found = load_file(folder / "model.safetensors")
    encoder = {name for name in found if name.startswith("backbone.")}
    return {n: found[n] for n in encoder}, {n: found[n] for n in found.keys() - encoder if "running" not in n}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", [pytest.param("simclr", marks=pytest.mark.slow), "mae"])
def test_the_encoder_stays_as_it_is_in_the_frozen_steps_and_learns_afterwards(make_recipe, tmp_path, method):
    """Warm-up takes two steps: the first step of the heads has rate 0, and so has the encoder's fourth."""
    pretrain(make_recipe(method, max_steps=1, learning_rate=0.0))
    pretrain(make_recipe(method, encoder=str(tmp_path / method), output_dir=str(tmp_path / "run"), **CONTINUED))
    given = load_file(tmp_path / method / "model.safetensors")
    steps = {step: weights(tmp_path / "run" / f"checkpoint-{step}") for step in range(1, 9)}
    for step in (1, 2, 3, 4):
        encoder, heads = steps[step]
        assert not changed({f"backbone.{name}": value for name, value in given.items()}, encoder), step
        if step > 1:
            assert changed(steps[step - 1][1], heads) == heads.keys(), step
    for step in (5, 6, 7, 8):
        for before, after in zip(steps[step - 1], steps[step]):
            assert changed(before, after) == after.keys(), step


def test_images_are_normalised_as_the_encoder_was_trained(make_recipe, tmp_path, monkeypatch):
    pretrain(make_recipe("mae", max_steps=1))
    given = VLMViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1] * 3, image_std=[0.7] * 3)
    given.save_pretrained(tmp_path / "mae")
    batches = []
    forward = SimCLRForPreTraining.forward

    def watched(self, pixel_values, **kwargs):
        batches.append(pixel_values)
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(SimCLRForPreTraining, "forward", watched)
    for run, encoder in ("plain", None), ("continued", str(tmp_path / "mae")):
        pretrain(make_recipe("simclr", encoder=encoder, output_dir=str(tmp_path / run), max_steps=1))
    left = VLMViTImageProcessor.from_pretrained(tmp_path / "continued")
    assert (list(left.image_mean), list(left.image_std), left.size["height"]) == ([0.1] * 3, [0.7] * 3, 32)
    default = VLMViTImageProcessor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (default.image_mean, default.image_std))
    plain, continued = batches[0], batches[-1]  # the same views
    torch.testing.assert_close(continued, (plain * std + mean - 0.1) / 0.7, atol=1e-5, rtol=1e-5)


def test_an_encoder_keeps_its_positions_and_takes_the_recipes_regularisation(make_recipe, tmp_path):
    sincos = ENCODER | {"position_embedding_type": "sincos"}
    pretrain(make_recipe("mae", encoder_config=sincos | {"drop_path_rate": 0.3}, max_steps=1))
    trained = VLMViTModel.from_pretrained(tmp_path / "mae")
    for changes in ({}, {"num_register_tokens": 2}):  # one that fits, and one that does not all fit
        recipe = make_recipe("simclr", encoder=str(tmp_path / "mae"), image_size=64, resize_encoder=True)
        args = parse_arguments(recipe | {"encoder_config": sincos | {"attention_dropout": 0.1} | changes})
        encoder = load_encoder(args)
        assert (encoder.config.drop_path_rate, encoder.config.attention_dropout) == (0.0, 0.1)
        assert encoder.layers[-1].residual.rate == 0.0
        assert torch.equal(encoder.embeddings.positions((8, 8)), trained.embeddings.positions((8, 8)))


@pytest.mark.parametrize(("patch_size", "expected"), [(16, 512), (14, 518), (24, 504)])
def test_an_encoder_brings_its_architecture_and_images_fit_its_patches(patch_size, expected, tmp_path, caplog):
    """Whatever the file of the recipe says of the shape of a new encoder."""
    shape = ENCODER | {"patch_size": patch_size, "image_size": patch_size * 2, "drop_path_rate": 0.5}
    encoder = VLMViTModel(VLMViTConfig(**shape, position_embedding_type="learned"))
    encoder.save_pretrained(tmp_path / "encoder")
    words = shlex.split(finetune_command(DETECTION, encoder.config, str(tmp_path / "encoder"), "images"))
    assert words[:3] == ["hf-vlm", "finetune", "detection/vit_nano_cpu.yaml"]
    options = ["--use_cpu", "true", "--image_size", "512"]
    args = parse_arguments(load_recipe("detection/vit_small.yaml", [*words[3:], *options]))
    found = load_encoder(args)
    assert (found.config.patch_hw, found.config.position_embedding_type) == ((patch_size,) * 2, "learned")
    assert found.config.drop_path_rate == 0  # regularisation is the recipe's
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert args.image_hw == (expected, expected)
    assert ("is not of whole patches" in caplog.text) == (expected != 512)
    typed = ["--encoder_preset", "small", "--encoder_config.use_qk_norm", "true"]
    with pytest.raises(ValueError, match=r"(?s)hidden_size: its weights have 32, the recipe asks for 384.*qk_norm"):
        load_encoder(parse_arguments(load_recipe("detection/vit_small.yaml", [*words[3:], *options, *typed])))


def test_rates_and_weight_decay_of_every_step(make_recipe, tmp_path, monkeypatch):
    seen = []
    training_step = VisionTrainer.training_step

    def watched(self, *args, **kwargs):
        seen.append([dict(group, params=None) for group in self.optimizer.param_groups])
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(VisionTrainer, "training_step", watched)
    pretrain(make_recipe("simclr", **CONTINUED, gradient_accumulation_steps=2))
    assert len(seen) == 16  # two batches a step
    # patch projection, tokens, two layers, the final norm, heads
    rates = [0.2 * 0.5**4, 0.2 * 0.5**3, 0.2 * 0.5**2, 0.2 * 0.5, 0.2, 1.0]
    for index, groups in enumerate(seen):
        step = index // 2
        whole = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        late = 0 if step < 3 else min(1, (step - 3) / 2)
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 8)) / 2
        found = {(round(group["lr"], 12), round(group["weight_decay"], 12)) for group in groups}
        expected = {
            (round(1e-3 * rate * whole * (1 if rate == 1 else late), 12), round(weight_decay, 12))
            for rate in rates
            for weight_decay in (0.0, decay)
            if not (rate in (rates[1], rates[4]) and weight_decay)  # tokens and gains do not decay
        }
        assert found == expected, step
    logged = [entry["learning_rate"] for entry in read_log(tmp_path / "simclr" / "log.jsonl") if "loss" in entry]
    assert logged[:3] == pytest.approx([0.0, 5e-4, 1e-3])  # of the heads: the encoder's is 0


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(make_recipe, tmp_path, step):
    """From a checkpoint in the frozen steps, and from one in the encoder's warm-up."""
    recipe = make_recipe("simclr", **CONTINUED)
    pretrain(recipe)
    shutil.copytree(tmp_path / "simclr" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    pretrain(recipe | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "last"})
    for expected, found in zip(*(weights(tmp_path / run / "checkpoint-8") for run in ("simclr", "again"))):
        assert found.keys() == expected.keys()
        assert not changed(expected, found)


@pytest.mark.parametrize(
    ("steps", "expected"), [(0, 0), (3, 3), (0.25, 2), (0.3, 3)]
)  # a share is rounded up, as warm-up is
def test_frozen_steps_are_a_number_or_a_share(steps, expected):
    args = parse_arguments({"max_steps": 8, "use_cpu": True, "frozen_encoder_steps": steps})
    assert args.num_frozen_encoder_steps == expected


@pytest.mark.parametrize("steps", [8, -1])
def test_frozen_steps_that_leave_none_are_refused(steps):
    with pytest.raises(ValueError, match="fewer than the run's 8 steps, but is"):
        parse_arguments({"max_steps": 8, "frozen_encoder_steps": steps})
