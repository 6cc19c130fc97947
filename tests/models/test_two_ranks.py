"""Two gloo processes under DDP have the gradients of one process with the joined batch, for every objective."""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.modeling_detection import VLMViTDetectionConfig, VLMViTForObjectDetection
from hf_vlm.models.modeling_dinov2 import DINOv2Config, DINOv2ForPreTraining
from hf_vlm.models.modeling_distill import DistillConfig, DistillForPreTraining
from hf_vlm.models.modeling_ijepa import IJEPAConfig, IJEPAForPreTraining
from hf_vlm.models.modeling_lejepa import LeJEPAConfig, LeJEPAForPreTraining, sample_slices
from hf_vlm.models.modeling_mae import MAEConfig, MAEForPreTraining
from hf_vlm.models.modeling_moco_v3 import MoCoV3Config, MoCoV3ForPreTraining
from hf_vlm.models.modeling_simclr import SimCLRConfig, SimCLRForPreTraining
from hf_vlm.models.modeling_simmim import SimMIMConfig, SimMIMForPreTraining
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_layers import SyncedBatchNorm1d, flatten_views_view_major, gather_with_gradient
from hf_vlm.models.ssl_masks import context_and_targets

BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HEAD = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_decoder_layers": 1,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "num_queries": 5,
    "neck_num_blocks": 1,
    "num_labels": 3,
}
BATCH = 6
DINOV2 = {"num_prototypes": 16, "head_hidden_size": 32, "bottleneck_size": 16, "frozen_prototypes": 0.0}


def build_taught(backbone):
    """A model whose teacher is an encoder of the same shape, loaded from a folder that is not needed any more."""
    with tempfile.TemporaryDirectory() as folder:
        VLMViTModel(VLMViTConfig(**backbone)).save_pretrained(folder)
        statistics = {"teacher_mean": [0.4, 0.5, 0.6], "teacher_std": [0.2]}
        return DistillForPreTraining(DistillConfig(backbone_config=backbone, teacher=folder, **statistics)).train()


def objectives():
    """(model, batch of six) of each objective, the same in every process."""
    torch.manual_seed(0)
    labels = [
        {"class_labels": torch.randint(3, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.2} for n in (4, 1, 0, 0, 1, 0)
    ]
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks = dict(zip(("context_indices", "target_indices"), context_and_targets(BATCH, (4, 4)), strict=True))
    return {
        "simclr": (
            SimCLRForPreTraining(SimCLRConfig(backbone_config=BACKBONE, projection_hidden_size=32)),
            {"pixel_values": torch.randn(BATCH, 2, 3, 32, 32)},
        ),
        "moco_v3": (
            # In double: five batch norms of a fresh encoder's outputs, which hardly differ, are noisy in float32.
            MoCoV3ForPreTraining(
                MoCoV3Config(backbone_config=BACKBONE, projection_hidden_size=32, projection_size=16)
            ).double(),
            {"pixel_values": torch.randn(BATCH, 2, 3, 32, 32).double()},
        ),
        "mae": (
            MAEForPreTraining(MAEConfig(backbone_config=BACKBONE, decoder_config=decoder)),
            {"pixel_values": torch.randn(BATCH, 1, 3, 32, 32), "noise": torch.rand(BATCH, 16)},
        ),
        "mae_partial": (
            MAEForPreTraining(
                MAEConfig(
                    backbone_config=BACKBONE, decoder_config=decoder, use_cross_attention=True, prediction_ratio=0.5
                )
            ),
            {"pixel_values": torch.randn(BATCH, 1, 3, 32, 32), "noise": torch.rand(BATCH, 16)},
        ),
        "mae_losses": (
            MAEForPreTraining(
                MAEConfig(
                    backbone_config=BACKBONE,
                    decoder_config=decoder,
                    perceptual_weight=1.0,
                    adversarial_weight=0.1,
                    adversarial_start=0.0,
                    discriminator_size=8,
                )
            ),
            {"pixel_values": torch.randn(BATCH, 1, 3, 32, 32), "noise": torch.rand(BATCH, 16)},
        ),
        **{
            f"dinov2_{centering}": (
                DINOv2ForPreTraining(DINOv2Config(backbone_config=BACKBONE, centering=centering, **DINOV2)),
                {
                    "pixel_values": torch.randn(BATCH, 2, 3, 32, 32),
                    "local_pixel_values": torch.randn(BATCH, 2, 3, 16, 16),
                    # (batch, views, patches), as many in each half of the batch; `run` puts first views first.
                    "masked": torch.rand(BATCH, 2, 16).argsort(dim=2) < torch.tensor([5, 0])[None, :, None],
                },
            )
            for centering in ("sinkhorn", "centering")
        },
        **{
            f"lejepa, join_views {join_views}": (
                LeJEPAForPreTraining(
                    LeJEPAConfig(
                        backbone_config=BACKBONE, projection_hidden_size=32, num_slices=32, join_views=join_views
                    )
                ),
                {
                    "pixel_values": torch.randn(BATCH, 2, 3, 32, 32),
                    "local_pixel_values": torch.randn(BATCH, 2, 3, 16, 16),
                },
            )
            for join_views in (False, True)
        },
        "simmim": (
            SimMIMForPreTraining(SimMIMConfig(backbone_config=BACKBONE, mask_unit_size=16)),
            {"pixel_values": torch.randn(BATCH, 1, 3, 24, 40), "noise": torch.rand(BATCH, 6)},
        ),
        "ijepa": (
            IJEPAForPreTraining(IJEPAConfig(backbone_config=BACKBONE, predictor_config=decoder)),
            {"pixel_values": torch.randn(BATCH, 1, 3, 32, 32), **blocks},
        ),
        "distill": (build_taught(BACKBONE), {"pixel_values": torch.randn(BATCH, 1, 3, 32, 32)}),
        "detection": (
            VLMViTForObjectDetection(VLMViTDetectionConfig(backbone_config=BACKBONE, **HEAD)),
            {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": labels},
        ),
    }


def run(model, batch):
    torch.manual_seed(3)  # what the first rank draws for all is what one process draws
    if "masked" in batch:
        batch = batch | {"masked": flatten_views_view_major(batch["masked"])}
    return model(**batch)


def gradients_of_rank(rank, store):
    """Gradients after DDP's averaging, and running statistics, of each objective on this rank's half of the batch."""
    everything = objectives()  # before there are ranks, of which only the first would save a teacher
    """Gradients after DDP's averaging, and running statistics, of each objective on this rank's half of the batch.

    And LeJEPA's slices of two steps, those of both ranks (12, 4) each.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        found = {}
        for name, (model, batch) in everything.items():
            half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
            wrapped = DistributedDataParallel(model)  # held until the backward pass, whose gradients it averages
            run(wrapped, {key: value[half] for key, value in batch.items()}).loss.backward()
            found[name] = state_of(model)
        torch.manual_seed(rank)  # ranks draw different masks
        found["slices"] = [gather_with_gradient(sample_slices(6, 4, torch.device("cpu"))) for _ in range(2)]
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


def state_of(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | {
        name: buffer
        for name, buffer in model.named_buffers()
        if any(kind in name for kind in ("running", "center", "targets"))
    }


def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    store = str(tmp_path / "store")
    other = mp.get_context("spawn").Process(target=gradients_of_rank, args=(1, store), daemon=True)
    other.start()
    found = gradients_of_rank(0, store)
    other.join(timeout=120)
    assert other.exitcode == 0
    for slices in found["slices"]:
        assert torch.equal(*slices.chunk(2))
    assert not torch.equal(*found["slices"])
    for objective, (model, batch) in objectives().items():
        run(model, batch).loss.backward()
        for name, expected in state_of(model).items():
            torch.testing.assert_close(
                found[objective][name],
                expected,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda m, n=name, o=objective: f"{o} {n}: {m}",
            )


def test_batch_norm_equals_torchs_in_one_process():
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm1d(4), torch.nn.BatchNorm1d(4)
    inputs = torch.randn(8, 4)
    assert torch.equal(ours(inputs), theirs(inputs))
    assert torch.equal(ours.running_var, theirs.running_var)
