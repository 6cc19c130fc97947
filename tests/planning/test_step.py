"""The planner's step on tensors without values costs what a real one does."""

import math

import pytest
import torch
from tiny import PRETRAINING, TINY, batch, build, config_fields, slow_but

from hf_vlm.models.configuration_vlm_vit import PRESETS, VLMViTConfig
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.planning.step import LiveTensors, SavedTensors, fullest_moments, step_cost
from hf_vlm.registry import find_model
from hf_vlm.training.meters import FlopCounter

# Of what a step costs beside its images: discriminators that are trained now and then, sizes of masks by chance.
PLANNED = [name for name in PRETRAINING if TINY[name].frozen is None and name not in ("ijepa", "mae_image_losses")]
QUICK = ("simclr", "mae_sparse", "image_text")  # the steps of the others are made of the same parts


def inputs_of(name, num_images):
    """A batch without choices, its texts without padding, of which a plan knows nothing."""
    inputs = batch(name, num_images, with_choices=False)
    inputs.pop("attention_mask", None)
    return inputs


def real_step(model, inputs):
    """FLOPs, bytes that are kept for the backward pass, and the timeline of bytes, of a step with values."""
    saved = SavedTensors({weight.untyped_storage()._cdata for weight in model.parameters()})
    with FlopCounter() as counter, LiveTensors() as live, saved.watching(model):
        model(**inputs).loss.backward()
    timeline = live.timeline([weight.grad for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    return counter.get_total_flops(), saved, timeline


@pytest.mark.parametrize("name", slow_but(PLANNED, *QUICK))
def test_flops_and_activations_are_those_of_a_real_step(name, tmp_path):
    entry = find_model(TINY[name].row)
    config = entry.config_class(**config_fields(name, tmp_path))
    shapes = {key: tuple(value.shape[1:]) for key, value in inputs_of(name, 1).items()}
    cost = step_cost(entry.model_class, config, shapes, torch.float32)
    model = build(name)
    (few_flops, few, few_timeline), (many_flops, many, many_timeline) = (
        real_step(model, inputs_of(name, size)) for size in (2, 4)
    )
    assert cost.flops_per_image == pytest.approx((many_flops - few_flops) / 2, rel=1e-6)
    assert cost.activations_per_image == pytest.approx((many.total - few.total) / 2, rel=1e-6)
    moments = fullest_moments(few_timeline, many_timeline)
    if name.startswith(("mae", "image_text")):  # a real step frees some tensors later
        assert cost.moments[0] == pytest.approx(moments[0], rel=0.1)
    else:
        assert cost.moments == tuple(pytest.approx(moment, rel=1e-6) for moment in moments)
    assert cost.checkpointed_per_image < cost.activations_per_image
    assert cost.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    assert cost.num_active == cost.num_parameters - experts // 2  # a token passes two of four
    assert (cost.experts.num_parameters if cost.experts else 0) == experts
    if name == "mae_sparse":  # one of two layers, of 4 visible patches and the class token, there and back twice
        assert cost.experts.num_trained == cost.experts.num_layer_parameters == experts
        assert cost.experts.num_experts == 4
        assert cost.experts.routed_per_image == 4 * (4 + 1) * 2 * config.backbone_config.hidden_size


def test_activation_checkpointing_keeps_what_was_planned():
    torch.manual_seed(0)
    backbone = {"image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = build("simclr", backbone=backbone)
    images = torch.randn(4, 2, 3, 64, 64)
    _, saved, _ = real_step(model, {"pixel_values": images})
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    checkpointed = {storage._cdata: storage.nbytes() for storage in kept if storage._cdata not in weights}
    inputs = 6 * images.shape[0] * 2 * 65 * 32 * 4  # layers x views x tokens x width x bytes
    assert saved.into_layers == inputs
    assert saved.total - saved.in_layers + saved.into_layers == sum(checkpointed.values())
    assert 5 * saved.largest_layer < saved.in_layers <= 6 * saved.largest_layer  # the last needs the class token alone


@pytest.mark.parametrize("preset", slow_but(PRESETS, "nano"))
def test_a_plain_encoder_has_the_parameters_and_flops_of_the_formulas(preset):
    """A multiply-add of each weight per token, twice that in the backward pass, and two products of attention."""
    config = VLMViTConfig.from_preset(preset, image_size=56 if PRESETS[preset].get("patch_size") == 14 else 64)

    class Encoder(VLMViTModel):
        def forward(self, pixel_values):
            output = super().forward(pixel_values)
            return type("Loss", (), {"loss": output.last_hidden_state.mean()})

    cost = step_cost(Encoder, config, {"pixel_values": (3, *config.image_hw)}, torch.float32)
    rows, columns = config.grid_hw
    patches, tokens, dim = rows * columns, rows * columns + config.num_prefix_tokens, config.hidden_size
    mlp = (3 if config.use_gated_mlp else 2) * dim * config.intermediate_size
    products = config.num_hidden_layers * (4 * dim * dim + mlp)  # weights of matrix products
    attention = config.num_hidden_layers * 2 * tokens * tokens * dim
    embedding = config.patch_dim * dim * patches
    # The gradient of the images is not computed: of the first product there are two passes.
    flops = 2 * (3 * tokens * products + 3 * attention + 2 * embedding)
    assert cost.flops_per_image == pytest.approx(flops, rel=0.002)
    assert cost.num_parameters == pytest.approx(products + config.patch_dim * dim, rel=0.03)


@pytest.mark.slow
def test_products_of_fewer_bits_keep_fewer_bytes_and_copies_of_the_weights():
    config = MAEConfig(
        backbone_config={"image_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    )
    shapes = {"pixel_values": (1, 3, 64, 64)}
    full, half = (step_cost(MAEForPreTraining, config, shapes, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full.copies == 0
    assert half.copies == pytest.approx(2 * half.num_trained, rel=0.05)
    assert 0.4 < half.activations_per_image / full.activations_per_image < 0.75
    assert half.flops_per_image == full.flops_per_image


@pytest.mark.slow
def test_a_model_of_any_size_is_planned_without_memory():
    config = MAEConfig(backbone_config=VLMViTConfig.from_preset("7b", image_size=32).to_dict())
    cost = step_cost(MAEForPreTraining, config, {"pixel_values": (1, 3, 32, 32)}, torch.bfloat16)
    assert math.isclose(cost.num_parameters, 6.7e9, rel_tol=0.05)
