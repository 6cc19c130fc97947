"""How ranks divide a model by the engine of transformers, and ways that training here would get wrong in silence."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.distributed import DistributedConfig

from hf_vlm.models.ssl_teacher import TeacherMixin
from hf_vlm.models.vit_layers import VLMViTAttention
from hf_vlm.registry import ModelEntry
from hf_vlm.training.arguments import VisionTrainingArguments

__all__ = ["check_divisible", "check_layout", "divide"]


def check_divisible(args: VisionTrainingArguments, entry: ModelEntry) -> None:
    """ValueError where `tp_size` or `ep_size` asks for a head to be divided, whose evaluation needs it whole."""
    if args.layout is not None and entry.task != "pretraining":
        raise ValueError(
            f"tp_size and ep_size divide encoders while they are pretrained, but {args.method} trains a head: leave "
            "them out, and shard the model with recipes/accelerate/fsdp2.yaml."
        )


def divide(model: Any, layout: DistributedConfig) -> None:
    """Divides a model, whose weights are the same on all ranks, among them by transformers' engine, in place.

    Raises:
        ValueError: if the model cannot be divided so: it has no plan for that, or fewer heads or experts than ranks.
    """
    _check_divides(model, layout)
    layout, _, meshes = model.prepare_distribute_model(layout)
    model.maybe_distribute_model(model, layout, meshes)


def _check_divides(model: Any, layout: DistributedConfig) -> None:
    for name, module in model.named_modules():
        heads = module.config.num_attention_heads if isinstance(module, VLMViTAttention) else 0
        if heads % layout.tp_size:
            raise ValueError(
                f"tp_size is {layout.tp_size}, but {name} has {heads} heads, which ranks share evenly: choose a "
                "divisor of that."
            )
    encoder = getattr(model.config, "backbone_config", model.config)
    if layout.ep_size > 1 and not encoder.num_experts:
        raise ValueError(f"ep_size is {layout.ep_size}, but the encoder is dense: set num_experts, or leave it out.")
    if encoder.num_experts % layout.ep_size:
        raise ValueError(
            f"ep_size is {layout.ep_size}, but the encoder has {encoder.num_experts} experts per layer, which ranks "
            "share evenly: choose a divisor of that."
        )


def check_layout(model: nn.Module, accelerator: Accelerator) -> None:
    """Checks that training supports how the launcher divides the model.

    Raises:
        ValueError: It asks for context or sequence parallelism, for tensor parallelism of a model that is not divided
            so, or for DeepSpeed's ZeRO 3 with a teacher.
    """
    sizes = accelerator.parallelism_config
    asked = [] if sizes is None else sizes.non_dp_dim_names
    if unmet := [name for name in asked if name != "tp" or (getattr(model, "tp_size", None) or 1) != sizes.tp_size]:
        raise ValueError(
            f"The launcher's configuration asks for {', '.join(unmet)} parallelism, by which several processes train "
            "on the same images. That is supported for tp, in pretraining an encoder: divide the model by "
            "recipes/accelerate/fsdp2.yaml or hsdp.yaml."
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED or not isinstance(model, TeacherMixin):
        return
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            f"{type(model).__name__} has a teacher that follows the weights of its student, which ZeRO 3 leaves "
            "empty between steps: use recipes/accelerate/fsdp2.yaml, which shards the same."
        )
