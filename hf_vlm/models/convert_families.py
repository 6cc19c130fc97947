"""Families of encoders in transformers: how each names and stores what [`VLMViTModel`] holds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
)
from transformers.modeling_utils import PreTrainedModel

from .modeling_vlm_vit import VLMViTModel

CLASS_TOKEN, REGISTERS, POSITIONS = (
    f"embeddings.{name}" for name in ("class_token", "register_tokens", "position_embedding")
)
SHARED_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
)


def _weights_and_biases(modules: dict[str, str]) -> dict[str, str]:
    """Names of modules, ours to theirs, as names of their two parameters each."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}


def _attention(folder: str, projection: str) -> dict[str, str]:
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": projection}
    return {f"attention.{ours}": f"{folder}.{theirs}" for ours, theirs in parts.items()}


def _mlp(up: str, down: str, **gate: str) -> dict[str, str]:
    return {f"mlp.{name}_projection": f"mlp.{theirs}" for name, theirs in {"up": up, "down": down, **gate}.items()}


@dataclass(frozen=True)
class Family:
    """How a family of transformers stores what [`VLMViTModel`] holds; all names are ours to theirs."""

    model_class: type[PreTrainedModel]
    tokens: dict[str, str]  # class token, registers, table of positions: parameters that the family has
    patches: str
    norm: str
    layers: str
    layer: dict[str, str]  # modules of a layer, without its MLP
    mlp: dict[str, str]
    gated_mlp: dict[str, str] | None = None
    gated_act: str | None = None  # where gated layers have one activation, whatever the configuration says
    num_registers: int | None = 0  # None: any number
    num_placed_tokens: int = 0  # tokens before the patches that have a row in the table of positions
    scales: dict[str, str] = field(default_factory=dict)
    square_grid: bool = True  # whether the table of positions must be of a square
    square_patches: bool = False
    position_interpolation: str = "bicubic"
    options: dict[str, Any] = field(default_factory=dict)  # of the model's constructor
    fields: Callable[[VLMViTModel], dict[str, Any]] = lambda encoder: {}  # of its configuration, besides the shared

    def names(self, num_layers: int, *, use_gated_mlp: bool) -> dict[str, str]:
        """Every parameter, ours to theirs."""
        outside = {"embeddings.patch_projection": self.patches, "norm": self.norm}
        mlp = (self.gated_mlp or {}) if use_gated_mlp else self.mlp
        layer = _weights_and_biases(self.layer | mlp) | self.scales
        return (
            self.tokens
            | _weights_and_biases(outside)
            | {
                f"layers.{index}.{ours}": f"{self.layers}.{index}.{theirs}"
                for index in range(num_layers)
                for ours, theirs in layer.items()
            }
        )


def _vit_fields(encoder: VLMViTModel) -> dict[str, Any]:
    return {"intermediate_size": encoder.config.intermediate_size, "qkv_bias": encoder.config.qkv_bias}


def _dino_fields(encoder: VLMViTModel) -> dict[str, Any]:
    scale = encoder.config.layerscale_value
    return {"layerscale_value": 1.0 if scale is None else scale}


def _dinov2_fields(encoder: VLMViTModel) -> dict[str, Any]:
    config = encoder.config
    inner = config.intermediate_size * (1.5 if config.use_gated_mlp else 1)  # a gated MLP keeps two thirds
    return _dino_fields(encoder) | {
        "mlp_ratio": round(inner / config.hidden_size),
        "use_swiglu_ffn": config.use_gated_mlp,
        "qkv_bias": config.qkv_bias,
    }


def _registers_fields(encoder: VLMViTModel) -> dict[str, Any]:
    return _dinov2_fields(encoder) | {"num_register_tokens": encoder.config.num_register_tokens}


def _dinov3_fields(encoder: VLMViTModel) -> dict[str, Any]:
    config, weights = encoder.config, encoder.state_dict()
    key_biases = [value for name, value in weights.items() if name.endswith("attention.key.bias")]
    return _dino_fields(encoder) | {
        "intermediate_size": config.intermediate_size,
        "use_gated_mlp": config.use_gated_mlp,
        "query_bias": config.qkv_bias,
        "key_bias": any(bool(bias.any()) for bias in key_biases),  # the published ones have none
        "value_bias": config.qkv_bias,
        "rope_theta": float(config.rope_theta),
        "num_register_tokens": config.num_register_tokens,
    }


def _siglip_fields(encoder: VLMViTModel) -> dict[str, Any]:
    return {"intermediate_size": encoder.config.intermediate_size, "vision_use_head": False}


_VIT: dict[str, Any] = {
    "tokens": {CLASS_TOKEN: "embeddings.cls_token", POSITIONS: "embeddings.position_embeddings"},
    "patches": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "layers": "layers",
    "layer": {"norm1": "layernorm_before", "norm2": "layernorm_after"} | _attention("attention", "o_proj"),
    "mlp": _mlp("fc1", "fc2"),
    "num_placed_tokens": 1,
    "square_grid": False,
    "fields": _vit_fields,
}
_DINOV2: dict[str, Any] = _VIT | {
    "layers": "encoder.layer",
    "layer": {"norm1": "norm1", "norm2": "norm2"} | _attention("attention", "o_proj"),
    "gated_mlp": _mlp("up_proj", "down_proj", gate="gate_proj"),
    "gated_act": "silu",
    "scales": {f"layer_scale{index}.gain": f"layer_scale{index}.lambda1" for index in (1, 2)},
    "square_grid": True,
    "fields": _dinov2_fields,
}
FAMILIES: dict[str, Family] = {
    "vit": Family(ViTModel, **_VIT | {"options": {"add_pooling_layer": False}}),
    "deit": Family(
        DeiTModel,
        **_VIT
        | {
            "tokens": _VIT["tokens"] | {REGISTERS: "embeddings.distillation_token"},
            "num_registers": 1,
            "num_placed_tokens": 2,
            "options": {"add_pooling_layer": False},
        },
    ),
    "vit_mae": Family(ViTMAEModel, **_VIT),
    "dinov2": Family(Dinov2Model, **_DINOV2),
    "dinov2_with_registers": Family(
        Dinov2WithRegistersModel,
        **_DINOV2
        | {
            "tokens": _DINOV2["tokens"] | {REGISTERS: "embeddings.register_tokens"},
            "num_registers": None,
            "fields": _registers_fields,
            "position_interpolation": "bicubic_antialias",
        },
    ),
    "dinov3_vit": Family(
        DINOv3ViTModel,
        **_DINOV2
        | {
            "tokens": {CLASS_TOKEN: "embeddings.cls_token", REGISTERS: "embeddings.register_tokens"},
            "patches": "embeddings.patch_embeddings",
            "norm": "norm",
            "layers": "model.layer",
            "mlp": _mlp("up_proj", "down_proj"),
            "gated_act": None,
            "num_registers": None,
            "num_placed_tokens": 0,
            "square_grid": False,
            "fields": _dinov3_fields,
        },
    ),
    "siglip_vision_model": Family(
        SiglipVisionModel,
        tokens={POSITIONS: "embeddings.position_embedding.weight"},
        patches="embeddings.patch_embedding",
        norm="post_layernorm",
        layers="encoder.layers",
        layer={"norm1": "layer_norm1", "norm2": "layer_norm2"} | _attention("self_attn", "out_proj"),
        mlp=_mlp("fc1", "fc2"),
        square_patches=True,
        fields=_siglip_fields,
    ),
}
# Checkpoints of a whole model whose encoder is one of these. SigLIP 2 of a fixed size is stored as SigLIP.
ALIASES = {"siglip": "siglip_vision_model"}


def find_family(model_type: str) -> Family:
    """The family of a `model_type`; ValueError names those there are."""
    name = ALIASES.get(model_type, model_type)
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, *ALIASES])
        raise ValueError(f"A model of type {model_type!r} cannot be converted. There are: {known}.")
    return FAMILIES[name]


__all__ = ["ALIASES", "CLASS_TOKEN", "FAMILIES", "POSITIONS", "REGISTERS", "SHARED_FIELDS", "Family", "find_family"]
