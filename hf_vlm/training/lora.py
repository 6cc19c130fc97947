"""Low-rank adaptation (LoRA): an encoder is fine-tuned by small matrices, merged into it when it is saved."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.training.sharded import ShardedTrainer

__all__ = ["LORA_FILE", "LoRALinear", "LoRATrainer", "add_lora"]

LORA_FILE = "lora.safetensors"  # in a checkpoint, whose model holds the merged weights
ALPHA = 16  # updates are scaled by ALPHA / rank, so that a learning rate suits all ranks (section 4.1 of the paper)


class LoRALinear(nn.Linear):
    """A linear layer whose weight W (out, in) is frozen and learns as W + ALPHA / rank x B A.

    LoRA, arXiv 2106.09685: A (rank, in) is random, B (out, rank) starts at zero, and so the layer as it was. Its state
    dict is that of a plain layer with the merged weight: whatever saves the model saves one that loads everywhere. A
    plain layer's weights load as W, with B = 0.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = ALPHA / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the official code does

    def forward(self, input: Tensor) -> Tensor:
        update = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * update

    def merged_weight(self) -> Tensor:
        """The weight (out, in) of a plain layer with the same output."""
        return self.weight.detach() + self.scale * (self.lora_b.detach() @ self.lora_a.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.merged_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict.setdefault(f"{prefix}lora_a", self.lora_a)
            state_dict.setdefault(f"{prefix}lora_b", torch.zeros_like(self.lora_b))
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_lora(model: PreTrainedModel, rank: int) -> None:
    """Freezes the encoder in `model.backbone` and makes each linear layer of its blocks a [`LoRALinear`].

    Raises:
        ValueError: if the rank is no smaller than the sides of a layer's weight.
    """
    model.backbone.requires_grad_(False)
    for block in model.backbone.layers.modules():
        for name, linear in list(block.named_children()):
            if type(linear) is nn.Linear:
                smallest = min(linear.weight.shape)
                if rank >= smallest:
                    raise ValueError(f"lora_rank is {rank}, but must be below {smallest}, the width of the encoder.")
                setattr(block, name, LoRALinear(linear, rank))


class LoRATrainer(ShardedTrainer):
    """A Trainer that adapts the encoder by low rank where its arguments have a `lora_rank`.

    Raises:
        ValueError: if the rank is too large, or the weights are sharded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.lora_rank:
            if self.is_sharded or self.is_deepspeed_enabled:
                raise ValueError(
                    "lora_rank needs whole weights on each process: leave it out with FSDP and DeepSpeed."
                )
            add_lora(self.model, self.args.lora_rank)

    def _save_rng_state(self, output_dir: str) -> None:
        """The stock method, called for each checkpoint; adds the weights that the model's are merged of."""
        super()._save_rng_state(output_dir)
        if self.args.lora_rank and self.args.should_save:
            layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoRALinear)}
            parts = {f"{at}.{name}": part for at, layer in layers.items() for name, part in layer.named_parameters()}
            save_file({name: part.detach().contiguous() for name, part in parts.items()}, Path(output_dir) / LORA_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_rank:
            self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / LORA_FILE), strict=False)
