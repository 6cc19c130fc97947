import copy
import math

import numpy as np
import pytest
import torch
import transformers

from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_mae_image_losses import MAEImageLossesConfig, MAEImageLossesForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.training.optim import late_schedule, layer_index, parameter_groups, weight_decay_at

ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_register_tokens": 1,
    "layerscale_value": 1e-5,
}


@pytest.fixture
def model():
    head = {"hidden_size": 32, "num_self_attention_heads": 4, "num_cross_attention_heads": 4}
    return VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=ENCODER, num_labels=2, **head))


def test_each_parameter_has_the_rate_of_its_layer(model):
    groups = parameter_groups(
        model,
        num_layers=3,
        learning_rate=1.0,
        weight_decay=0.1,
        no_decay=model.no_weight_decay(),
        layer_decay=0.5,
        encoder_lr_multiplier=0.8,
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    expected = {
        "backbone.embeddings.patch_projection.weight": (0.8 * 0.5**4, 0.1),
        "backbone.embeddings.class_token": (0.8 * 0.5**4, 0.0),
        "backbone.embeddings.register_tokens": (0.8 * 0.5**4, 0.0),
        "backbone.embeddings.position_embedding": (0.8 * 0.5**4, 0.0),
        "backbone.layers.0.attention.query.weight": (0.8 * 0.5**3, 0.1),
        "backbone.layers.2.mlp.up_projection.bias": (0.8 * 0.5, 0.0),
        "backbone.layers.2.layer_scale1.gain": (0.8 * 0.5, 0.0),
        "backbone.norm.weight": (0.8, 0.0),
        "class_head.weight": (1.0, 0.1),
    }
    parameters = dict(model.named_parameters())
    for name, values in expected.items():
        assert found[id(parameters[name])] == pytest.approx(values), name


def test_the_patch_projection_may_learn_at_a_rate_of_its_own(model):
    shape = {"num_layers": 3, "learning_rate": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    plain = {id(p): group for group in parameter_groups(model, **shape) for p in group["params"]}
    groups = parameter_groups(model, patch_projection_lr_multiplier=0.2, **shape)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        multiplier = 0.2 if "patch_projection" in name else 1.0
        group, expected = found[id(parameter)], plain[id(parameter)]
        assert group["lr"] == pytest.approx(expected["lr"] * multiplier), name
        assert all(group[key] == expected[key] for key in ("weight_decay", "in_encoder", "decays")), name
    assert found[id(model.backbone.embeddings.patch_projection.bias)]["lr"] == pytest.approx(0.2 * 0.5**4)
    assert groups[-1]["lr"] == 1.0  # the one that is logged


def test_layer_index_is_beits():
    """By `get_num_layer_for_vit` of BEiT and `get_vit_lr_decay_rate` of DINOv2, for 12 layers."""
    assert layer_index("backbone.layers.11.norm1.weight", 12) == 12
    assert layer_index("backbone.layers.0.norm1.weight", 12) == 1
    assert layer_index("backbone.embeddings.class_token", 12) == 0
    assert layer_index("mask_token", 12) == 0
    assert layer_index("backbone.norm.weight", 12) == 13
    assert layer_index("decoder.layers.1.norm1.weight", 12) == 13
    assert layer_index("decoder.mask_token", 12) == 13


def test_frozen_parameters_are_left_out(model):
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, num_layers=3, learning_rate=1.0, weight_decay=0.0)
    assert {g["lr"] for g in groups} == {1.0}


@pytest.mark.parametrize("kind", ["mae", "simclr"])
def test_rates_of_a_pretraining_method(kind):
    """The encoder is `backbone` there too; its decoder, though it has layers, and its heads learn at the full rate."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {
        "mae": lambda: MAEForPreTraining(MAEConfig(backbone_config=ENCODER, decoder_config=small)),
        "simclr": lambda: SimCLRForPreTraining(SimCLRConfig(backbone_config=ENCODER, projection_hidden_size=8)),
    }[kind]()
    groups = parameter_groups(
        model, num_layers=3, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5, encoder_lr_multiplier=0.8
    )
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["in_encoder"] == name.startswith("backbone."), name
        if not group["in_encoder"]:
            assert group["lr"] == 1.0, name
        elif ".layers." in name:
            assert group["lr"] == pytest.approx(0.8 * 0.5 ** (3 - int(name.split(".")[2]))), name
        assert group["weight_decay"] == (0.1 if group["decays"] else 0.0), name


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_discriminator_waits_and_does_not_shrink():
    config = MAEImageLossesConfig(
        backbone_config=ENCODER,
        decoder_config=SMALL,
        adversarial_weight=0.1,
        discriminator_size=8,
        norm_pix_loss=False,
    )
    model = MAEImageLossesForPreTraining(config)
    no_decay = model.no_weight_decay()
    groups = parameter_groups(model, num_layers=3, learning_rate=1.0, weight_decay=0.1, no_decay=no_decay)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert {decay[id(parameter)] for parameter in model.discriminator.parameters()} == {0.0}
    assert model.late_parameters() == {f"discriminator.{n}": 0.25 for n, _ in model.discriminator.named_parameters()}
    assert decay[id(model.backbone.embeddings.patch_projection.weight)] == 0.1


def test_a_teacher_without_gradients_is_in_no_group(model):
    model.teacher = copy.deepcopy(model.backbone).requires_grad_(False)
    found = {
        id(p)
        for group in parameter_groups(model, num_layers=3, learning_rate=1.0, weight_decay=0.1)
        for p in group["params"]
    }
    assert found == {id(p) for name, p in model.named_parameters() if not name.startswith("teacher.")}


def cosine(step, num_warmup, num_steps):
    if step < num_warmup:
        return step / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


@pytest.mark.parametrize(("num_frozen", "num_warmup"), [(4, 5), (4, 0), (7, 2)])
def test_the_encoder_starts_late_and_warms_up(model, num_frozen, num_warmup):
    groups = parameter_groups(
        model, num_layers=3, learning_rate=2.0, weight_decay=0.1, layer_decay=0.5, encoder_lr_multiplier=0.8
    )
    optimizer = torch.optim.AdamW(groups)
    stock = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=num_warmup, num_training_steps=20)
    scheduler = late_schedule(stock, 20, num_frozen_steps=num_frozen, num_warmup_steps=num_warmup)
    for step in range(20):
        whole = cosine(step, num_warmup, 20)
        ramp = 0 if step < num_frozen else 1 if num_warmup == 0 else min(1, (step - num_frozen) / num_warmup)
        for group, last in zip(optimizer.param_groups, scheduler.get_last_lr()):
            assert group["lr"] == last
            assert last == pytest.approx(group["initial_lr"] * whole * (ramp if group["in_encoder"] else 1)), step
        optimizer.step()
        scheduler.step()
    assert {round(g["initial_lr"], 6) for g in groups} == {2.0, 1.6, 0.8, 0.4, 0.2, 0.1}


def test_late_parameters_start_with_ready_averages(model):
    """After gradients of zero the second moment of AdamW would be small, and the first steps 3 to 5 times the rate."""
    torch.manual_seed(0)
    weight = model.class_head.weight
    groups = parameter_groups(
        model,
        num_layers=3,
        learning_rate=1e-3,
        weight_decay=0.1,
        late_parameters={"class_head.weight": 0.75, "class_head.bias": 0.0},
    )
    assert groups[-1]["starts_at"] == 0  # the last is the one that is logged
    optimizer = torch.optim.AdamW(groups)
    constant = transformers.get_scheduler("constant", optimizer)
    scheduler = late_schedule(constant, 40)
    steps = []
    for _ in range(40):
        before = weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step()
        steps.append((weight.detach() - before).abs().max().item())
    assert not any(steps[:30])
    assert all(step > 0 for step in steps[30:])
    assert max(steps[30:]) < 1.5e-3


@pytest.mark.parametrize(
    ("build", "late"),
    [
        (
            lambda: DINOv2ForPreTraining(
                DINOv2Config(backbone_config=ENCODER, num_prototypes=8, frozen_prototypes=0.1, separate_heads=True)
            ),
            {"head.prototypes.weight": 0.1, "patch_head.prototypes.weight": 0.1},
        ),
        (lambda: MAEForPreTraining(MAEConfig(backbone_config=ENCODER, decoder_config=SMALL)), {}),
    ],
)
def test_methods_name_their_late_parameters(build, late):
    model = build()
    assert model.late_parameters() == late
    assert set(late) <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_schedule_that_is_no_function_of_the_step_is_refused(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, num_layers=3, learning_rate=1.0, weight_decay=0.1))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="need an lr_scheduler_type that is a function of the step"):
        late_schedule(plateau, 10, num_frozen_steps=1)


def test_weight_decay_follows_dinos_schedule():
    steps = np.arange(100)
    schedule = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * steps / len(steps)))
    found = [weight_decay_at(step, 100, start=0.04, end=0.4) for step in range(100)]
    np.testing.assert_allclose(found, schedule)
    assert found[0] == pytest.approx(0.04)
    assert found[50] == pytest.approx(0.22)
