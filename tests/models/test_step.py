"""What keeps a step fast, counted rather than timed: no graph break, no recompilation, no wait for the device."""

import tempfile
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining
from hf_vlm.models.modeling_distill import DistillConfig, DistillForPreTraining
from hf_vlm.models.modeling_ijepa import IJEPAConfig, IJEPAForPreTraining
from hf_vlm.models.modeling_lejepa import LeJEPAConfig, LeJEPAForPreTraining
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_moco_v3 import MoCoV3Config, MoCoV3ForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.models.modeling_simmim import SimMIMConfig, SimMIMForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_masks import context_and_targets

DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Their results have sizes or values that the host must know before it can go on.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave", "is_nonzero", "equal")


def build_taught(name, backbone):
    """A model with a frozen encoder of the same shape, loaded from a folder that is not needed any more."""
    with tempfile.TemporaryDirectory() as folder:
        VLMViTModel(VLMViTConfig(**backbone)).save_pretrained(folder)
        if name == "distill":
            statistics = {"teacher_mean": [0.4, 0.5, 0.6], "teacher_std": [0.2]}
            return DistillForPreTraining(DistillConfig(backbone_config=backbone, teacher=folder, **statistics)).train()
        options = {
            "perceptual_weight": 1.0,
            "perceptual_encoder": folder,
            "perceptual_encoder_mean": [0.4, 0.5, 0.6],
            "perceptual_encoder_std": [0.2],
        }
        return MAEForPreTraining(MAEConfig(backbone_config=backbone, decoder_config=DECODER, **options)).train()


def build(name, num_layers=2):
    torch.manual_seed(0)
    backbone = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "position_embedding_type": "sincos",
    }
    if name == "simclr":
        return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, projection_hidden_size=32)).train()
    if name == "moco_v3":
        return MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, projection_hidden_size=32)).train()
    if name == "dinov2":
        options = {"num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 16}
        return DINOv2ForPreTraining(DINOv2Config(backbone_config=backbone, **options)).train()
    if name == "lejepa":
        options = {"projection_hidden_size": 32, "num_slices": 16}
        return LeJEPAForPreTraining(LeJEPAConfig(backbone_config=backbone, **options)).train()
    if name == "simmim":
        return SimMIMForPreTraining(SimMIMConfig(backbone_config=backbone, mask_unit_size=16)).train()
    if name in ("distill", "mae_perceptual"):
        return build_taught(name, backbone)
    if name == "ijepa":
        return IJEPAForPreTraining(IJEPAConfig(backbone_config=backbone, predictor_config=DECODER)).train()
    options = {
        "mae_partial": {"use_cross_attention": True, "prediction_ratio": 0.5},
        "mae_losses": {"perceptual_weight": 1.0, "adversarial_weight": 0.1, "discriminator_size": 8},
    }.get(name, {})
    return MAEForPreTraining(MAEConfig(backbone_config=backbone, decoder_config=DECODER, **options)).train()


def batch_of(name):
    views = torch.randn(4, 2 if name in ("simclr", "moco_v3", "dinov2", "lejepa") else 1, 3, 32, 32)
    local_views = {"local_pixel_values": torch.randn(4, 3, 3, 16, 16)} if name in ("dinov2", "lejepa") else {}
    return {"pixel_values": views, **local_views}


class Operators(TorchDispatchMode):
    """Counts what a device would be asked to run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if not function.is_view:
            self.counts["index of a mask" if has_mask else name] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(name, num_layers=2):
    model, batch = build(name, num_layers), batch_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with Operators() as operators:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in ("zeros", "zeros_like"):  # made by the optimiser in its first step
        operators.counts.pop(state)
    return operators.counts


METHODS = pytest.mark.parametrize(
    "name",
    [
        *("mae", "mae_partial", "mae_losses", "mae_perceptual", "simclr", "simmim"),
        *("dinov2", "lejepa", "ijepa", "distill", "moco_v3"),
    ],
)


@METHODS
def test_a_step_never_waits_for_the_device(name):
    counts = operators_of_a_step(name)
    assert counts["_fused_adamw_"] == 1
    assert not {operator for operator in counts if operator in (*WAITING, "index of a mask")}


@pytest.mark.parametrize(
    ("name", "has_teacher"),
    [
        *(("mae", 0), ("mae_partial", 0), ("simclr", 0), ("simmim", 0)),
        *(("ijepa", 1), ("distill", 1), ("moco_v3", 1)),
    ],
)
def test_a_layer_asks_for_few_operators(name, has_teacher):
    """Forward and backward: 2 norms, 6 products with their biases, attention, GELU, 2 sums, and no copies between.

    A teacher's layer runs forward alone.
    """
    counts = operators_of_a_step(name, 5)
    counts.subtract(operators_of_a_step(name, 4))
    assert counts["copy_"] == counts["clone"] == counts["cat"] == 0
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 * has_teacher
    assert sum(counts.values()) <= 38 + 12 * has_teacher


@pytest.mark.parametrize(("name", "has_teacher"), [("dinov2", 1), ("lejepa", 0)])
def test_packed_crops_share_a_layers_products(name, has_teacher):
    """As many as crops of one size need, 18, and a teacher's 6; attention alone is computed for each size."""
    counts = operators_of_a_step(name, 5)
    counts.subtract(operators_of_a_step(name, 4))
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 * has_teacher
    assert counts["_scaled_dot_product_flash_attention_for_cpu"] == 2 + has_teacher
    assert counts["cat"] == 1 + 3  # the outputs, and backwards the gradients of queries, keys and values
    assert sum(counts.values()) <= 48 + 12 * has_teacher


@pytest.mark.parametrize("name", ["mae_losses", "mae_perceptual"])
def test_a_perceptual_loss_asks_for_no_gradient_of_weights(name):
    """18 products of the model's own layer; of the encoder that judges 6 for the original, 6 + 6 for the painted."""
    counts = operators_of_a_step(name, 5)
    counts.subtract(operators_of_a_step(name, 4))
    assert counts["copy_"] == counts["clone"] == counts["cat"] == 0
    assert counts["mm"] + counts["addmm"] + counts["bmm"] == 18 + 6 + 12


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself
@METHODS
def test_compiles_whole_and_once(name):
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = batch_of(name)
    if name == "ijepa":  # their sizes vary, so it draws them outside its graph
        batch |= dict(zip(("context_indices", "target_indices"), context_and_targets(4, (4, 4)), strict=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            losses, before = [], [buffer.clone() for buffer in model.buffers()]
            for run in (model, compiled):
                torch.manual_seed(seed)  # masks are drawn within
                for buffer, value in zip(model.buffers(), before, strict=True):  # which a step may move
                    buffer.copy_(value)
                losses.append(run(**batch).loss)
            torch.testing.assert_close(*losses)
            losses[1].backward()
            batch = {key: value + 1 if value.is_floating_point() else value for key, value in batch.items()}
    torch._dynamo.reset()
