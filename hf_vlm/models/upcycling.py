"""Sparse upcycling (arXiv 2212.05055): a trained dense encoder becomes a mixture of experts."""

from typing import Any

import torch
from torch import Tensor

from .configuration_vlm_vit import VLMViTConfig
from .modeling_vlm_vit import VLMViTModel
from .vit_layers import VLMViTMLP


def upcycle(encoder: VLMViTModel, **fields: Any) -> VLMViTModel:
    """A sparse encoder whose experts are copies of a dense one's MLPs; its routers are initialised.

    With `norm_topk_prob`, the default, its outputs are those of the dense encoder, whichever experts are chosen: their
    weights sum to 1. Without it the updates of sparse layers are scaled by the sum of the chosen probabilities.

    Args:
        encoder: A dense encoder, in the mode and precision that the sparse one will have.
        fields: Fields of [`VLMViTConfig`] to change: `num_experts`, `num_experts_per_tok`, `sparse_layers` and so on.

    Raises:
        ValueError: if the encoder is sparse, no experts are asked for, or the configuration is refused.
    """
    config = VLMViTConfig(**{**encoder.config.to_dict(), **fields})
    if encoder.config.num_experts or not config.num_experts:
        raise ValueError(
            f"upcycle makes a sparse encoder of a dense one, but they have {encoder.config.num_experts} and "
            f"{config.num_experts} experts: give a dense encoder and num_experts."
        )
    sparse = VLMViTModel(config)
    state = encoder.state_dict()
    for index in config.sparse_layer_indices:
        prefix = f"layers.{index}.mlp."
        mlp: Any = encoder.layers[index].mlp
        experts = expert_weights(mlp, config.num_experts)
        state = {name: value for name, value in state.items() if not name.startswith(prefix)}
        state |= {f"{prefix}experts.{name}": value for name, value in experts.items()}
        state[f"{prefix}router.weight"] = sparse.get_parameter(f"{prefix}router.weight")
    sparse.load_state_dict(state)
    return sparse.to(encoder.device, encoder.dtype).train(encoder.training)


def expert_weights(mlp: VLMViTMLP, num_experts: int) -> dict[str, Tensor]:
    """Weights of experts, by the names of transformers' interface, that are all copies of an MLP."""
    first = [mlp.gate_projection, mlp.up_projection] if mlp.use_gate else [mlp.up_projection]
    name = "gate_up_proj" if mlp.use_gate else "up_proj"
    weights = {
        name: torch.cat([layer.weight for layer in first]),
        f"{name}_bias": torch.cat([layer.bias for layer in first]),
        "down_proj": mlp.down_projection.weight,
        "down_proj_bias": mlp.down_projection.bias,
    }
    return {key: weight.expand(num_experts, *weight.shape) for key, weight in weights.items()}


__all__ = ["upcycle"]
