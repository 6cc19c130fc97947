"""Encoders of transformers as [`VLMViTModel`], and back, through the tables of names of their families.

Outputs equal the original's in evaluation mode: `last_hidden_state`, in the order class, register, patch tokens. What
belongs to training is not carried over: dropout, stochastic depth, and DINOv3's random scaling of positions.

Positions of another image size are interpolated as in transformers, with antialiasing for DINOv2 with registers. The
official DINOv2 without registers differs from transformers there: set `position_interpolation` of the configuration to
`"bicubic_offset"` for its outputs. DINOv3's rotary positions are computed for any size.

Images must consist of whole patches. The originals leave out what is over at the lower and right edge, so that
SigLIP's 384 pixels with patches of 14 are 378 here.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTImageProcessorPil
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .configuration_vlm_vit import VLMViTConfig
from .convert_families import CLASS_TOKEN, POSITIONS, REGISTERS, SHARED_FIELDS, Family, find_family
from .convert_image_processor import load_our_processor, load_processor, whole_patches
from .image_processing_vlm_vit import VLMViTImageProcessor
from .model_source import check_source
from .modeling_vlm_vit import VLMViTModel


@dataclass
class Conversion:
    """A converted encoder, and what became of the weights by their names in transformers."""

    model: PreTrainedModel
    loaded: str
    folded: list[str] = field(default_factory=list)  # added to other weights
    filled: list[str] = field(default_factory=list)  # not in the original, and set so that they change nothing
    dropped: list[str] = field(default_factory=list)
    images: str = ""  # what the image processor does, where one was converted

    def rows(self) -> dict[str, str]:
        """The table of a report, without empty rows."""
        lists = {"folded": self.folded, "filled": self.filled, "dropped": self.dropped}
        rows = {"loaded": self.loaded} | {name: ", ".join(names) for name, names in lists.items()}
        return {name: text for name, text in (rows | {"images": self.images}).items() if text}


def convert_checkpoint(source: str, output_dir: str | Path, *, to: str | None = None) -> Conversion:
    """Converts a checkpoint and writes encoder and image processor into a folder.

    Args:
        source: Folder or Hub id of a checkpoint in safetensors: of transformers, or of ours where `to` is given.
        to: Family of transformers whose layout is to be written; by default ours is.

    Raises:
        ValueError: for what [`load_transformers`] and [`load_ours`] refuse.
    """
    processor: VLMViTImageProcessor | ViTImageProcessorPil | None
    if to is None:
        conversion = load_transformers(source)
        processor, conversion.images = load_processor(source, conversion.model.config)
    else:
        conversion = load_ours(source, to)
        processor, conversion.images = load_our_processor(source)
    conversion.model.save_pretrained(output_dir)
    if processor is not None:
        processor.save_pretrained(output_dir)
    return conversion


def load_transformers(source: str) -> Conversion:
    """Converts a checkpoint (a folder or a Hub id, safetensors only) of a family's encoder or of a model around it.

    Raises:
        ValueError: if nothing can be loaded there, its family is not known or weights of the encoder are missing.
    """
    config = read_config(source)
    if is_ours(config):
        raise ValueError(f"{source} is an encoder of hf_vlm already.")
    family = find_family(str(config.get("model_type")))
    model, left_out = _load(family.model_class, source, dtype=torch.float32, **family.options)
    conversion = from_transformers(model)
    conversion.dropped = sorted({*conversion.dropped, *left_out})
    return conversion


def load_ours(source: str, model_type: str) -> Conversion:
    """Converts an encoder of ours (a run's folder, any checkpoint, a Hub id) to a family's layout.

    Raises:
        ValueError: if no encoder of ours is there, or it does not fit (see [`to_transformers`]).
    """
    config = read_config(source)
    if not is_ours(config):
        raise ValueError(f"{source} is no encoder of hf_vlm, but of type {config.get('model_type')!r}.")
    model, left_out = _load(VLMViTModel, source)
    conversion = to_transformers(model, model_type)
    conversion.dropped += left_out
    return conversion


def read_config(source: str) -> dict[str, Any]:
    """The configuration of a folder or a Hub id as it is written; ValueError where there is none."""
    check_source(source)
    try:
        config = PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        raise ValueError(f"{source!r} is neither a folder with a model nor one on the Hub: {_first(error)}") from error
    if not config:
        inside = sorted(str(path.parent) for path in Path(source).glob("*/config.json"))  # as of an earlier round
        where = f" There are models in {', '.join(inside)}." if inside else ""
        raise ValueError(f"{source} holds no model: there is no config.json.{where}")
    return dict(config)


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a configuration is of our encoder, or of a model that is built on it."""
    encoder = config.get("backbone_config") or config
    return bool(encoder.get("model_type") == VLMViTConfig.model_type)


def _load(model_class: type[PreTrainedModel], source: str, **options: Any) -> tuple[Any, list[str]]:
    """A model, and the parts of the checkpoint that do not fit into it."""
    try:
        model, report = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{source} cannot be loaded: {_first(error)}") from error
    missing = [name for name in report["missing_keys"] if not name.endswith("mask_token")]
    if missing:
        raise ValueError(f"{source} lacks weights of the encoder: {', '.join(_without_layers(sorted(missing)))}.")
    return model, _parts(report["unexpected_keys"])


@torch.no_grad()
def from_transformers(model: PreTrainedModel) -> Conversion:
    """Converts an encoder of transformers (a `ViTModel`, `Dinov2Model`, ... without a head) to a [`VLMViTModel`].

    Weights become float32. A position of the class token is folded into the token. DeiT's distillation token becomes a
    register token. Biases that the family lacks (DINOv3's keys) become zeros.

    Raises:
        ValueError: if the model is not the encoder of a family in `FAMILIES`.
    """
    family = find_family(model.config.model_type)
    if not isinstance(model, family.model_class):
        raise ValueError(f"Give the encoder alone, a {family.model_class.__name__}, not a {type(model).__name__}.")
    theirs = {name: value.float() for name, value in model.state_dict().items() if value.numel()}
    use_gated_mlp = any(".gate_proj." in name for name in theirs)
    names = family.names(model.config.num_hidden_layers, use_gated_mlp=use_gated_mlp)
    encoder = VLMViTModel(_encoder_config(family, model.config, theirs, names))
    placed, folded = _fold_positions(family, theirs)
    state, filled = {}, []
    for name, value in encoder.state_dict().items():
        if names[name] in theirs:
            state[name] = placed.get(name, theirs[names[name]]).reshape(value.shape)
        else:
            state[name] = torch.zeros_like(value)
            filled.append(f"{names[name]} = 0")
    encoder.load_state_dict(state)
    return Conversion(
        encoder,
        loaded=f"{len(state) - len(filled)} of {len(state)} weights",
        folded=folded,
        filled=_without_layers(filled),
        dropped=_parts(theirs.keys() - names.values()),
    )


def _encoder_config(
    family: Family, config: PreTrainedConfig, theirs: dict[str, Tensor], names: dict[str, str]
) -> VLMViTConfig:
    """Our configuration, read from the weights wherever these determine it."""
    use_gated_mlp = "layers.0.mlp.gate_projection.weight" in names
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["image_size"] = whole_patches(config.image_size, config.patch_size)
    if use_gated_mlp and family.gated_act:
        fields["hidden_act"] = family.gated_act
    if POSITIONS not in family.tokens:
        fields |= {"position_embedding_type": "rope", "rope_theta": config.rope_theta}
    registers = theirs.get(family.tokens.get(REGISTERS, ""))
    return VLMViTConfig(
        **fields,
        intermediate_size=len(theirs[names["layers.0.mlp.up_projection.weight"]]),
        use_gated_mlp=use_gated_mlp,
        use_class_token=CLASS_TOKEN in family.tokens,
        num_register_tokens=0 if registers is None else registers.shape[1],
        layerscale_value=config.layerscale_value if family.scales else None,
        position_interpolation=family.position_interpolation,
        qkv_bias=any(names[f"layers.0.attention.{part}.bias"] in theirs for part in ("query", "key", "value")),
    )


def _fold_positions(family: Family, theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """By our names: tokens with their positions added, and the positions of the patches alone; and what was added."""
    if not family.num_placed_tokens:
        return {}, []
    positions = family.tokens[POSITIONS]
    table = theirs[positions]  # (1, placed tokens + patches, hidden_size)
    placed, folded = {POSITIONS: table[:, family.num_placed_tokens :]}, []
    for index, name in enumerate((CLASS_TOKEN, REGISTERS)[: family.num_placed_tokens]):
        placed[name] = theirs[family.tokens[name]] + table[:, index : index + 1]
        folded.append(f"{positions}[{index}] into {family.tokens[name]}")
    return placed, folded


@torch.no_grad()
def to_transformers(encoder: VLMViTModel, model_type: str) -> Conversion:
    """Converts an encoder to the layout of a family; back again by [`from_transformers`] it is the same, bit for bit.

    Tokens get positions of zero, an absent LayerScale becomes ones, a mask token zeros. Sin-cos positions are written
    as a table, which the original interpolates for images of another size.

    Raises:
        ValueError: if there is no such family, or something of the encoder does not fit into it, which is named.
    """
    family, config = find_family(model_type), encoder.config
    misfits = _misfits(family, config)
    if not misfits:
        sizes = {name: pair[0] if pair[0] == pair[1] else list(pair) for name, pair in _sizes(config).items()}
        fields = {name: getattr(config, name) for name in SHARED_FIELDS} | sizes | family.fields(encoder)
        model = family.model_class(family.model_class.config_class(**fields), **family.options)
        names = family.names(config.num_hidden_layers, use_gated_mlp=config.use_gated_mlp)
        if len(model.state_dict()[names["layers.0.mlp.up_projection.weight"]]) != config.intermediate_size:
            misfits = [f"intermediate_size {config.intermediate_size}"]
    if misfits:
        raise ValueError(f"The encoder does not fit the layout of {model_type}: {', '.join(misfits)}.")
    ours = encoder.state_dict()
    if POSITIONS in family.tokens:
        positions = encoder.embeddings.positions(config.grid_hw)  # (1, patches, hidden_size)
        assert positions is not None
        before = positions.new_zeros(1, family.num_placed_tokens, config.hidden_size)
        ours[POSITIONS] = torch.cat([before, positions], dim=1)
    sources = {theirs: ours[name] for name, theirs in names.items() if name in ours}
    state, filled = {}, []
    for name, value in model.state_dict().items():
        if name in sources:
            state[name] = sources[name].reshape(value.shape)
        else:
            fill = 1 if name.endswith(".lambda1") else 0
            state[name] = torch.full_like(value, fill)
            filled += [f"{name} = {fill}"] if value.numel() else []
    model.load_state_dict(state)
    lost = [name for name in ours if names[name] not in state]
    assert not any(ours[name].any() for name in lost)  # biases of zero
    dropped = _without_layers(f"{name} = 0" for name in lost)
    if config.position_embedding_type == "learned" and config.position_interpolation != family.position_interpolation:
        dropped.append(f"position_interpolation {config.position_interpolation}")
    return Conversion(
        model,
        loaded=f"{len(ours) - len(lost)} of {len(ours)} weights",
        filled=_without_layers(filled),
        dropped=dropped,
    )


def _sizes(config: VLMViTConfig) -> dict[str, tuple[int, int]]:
    return {"image_size": config.image_hw, "patch_size": config.patch_hw}


def _misfits(family: Family, config: VLMViTConfig) -> list[str]:
    """Parts of an encoder that do not fit into a family."""
    (rows, columns), (ph, pw), registers = config.grid_hw, config.patch_hw, config.num_register_tokens
    is_rotary, needs_rotary = config.position_embedding_type == "rope", POSITIONS not in family.tokens
    needs_act = family.gated_act if config.use_gated_mlp else None
    checks = {
        f"norm_type {config.norm_type}": config.norm_type != "layernorm",
        "use_qk_norm": config.use_qk_norm,
        f"num_experts {config.num_experts}": bool(config.num_experts),
        "use_gated_mlp": config.use_gated_mlp and family.gated_mlp is None,
        f"hidden_act {config.hidden_act} of a gated MLP": needs_act not in (None, config.hidden_act),
        f"layerscale_value {config.layerscale_value}": config.layerscale_value is not None and not family.scales,
        f"position_embedding_type {config.position_embedding_type}": is_rotary != needs_rotary,
        f"use_class_token {config.use_class_token}": config.use_class_token != (CLASS_TOKEN in family.tokens),
        f"num_register_tokens {registers}": family.num_registers not in (None, registers),
        f"a grid of {rows} x {columns} patches": family.square_grid and rows != columns,
        f"patches of {ph} x {pw} pixels": family.square_patches and ph != pw,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def _without_layers(names: Iterable[str]) -> list[str]:
    """The same parameter of all layers is named once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _parts(names: Iterable[str]) -> list[str]:
    """Parts of a model that weights belong to: classifier, decoder, pooler, ..."""
    return sorted({"mask_token" if name.endswith("embeddings.mask_token") else name.split(".")[0] for name in names})


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]


__all__ = [
    "Conversion",
    "convert_checkpoint",
    "from_transformers",
    "is_ours",
    "load_ours",
    "load_transformers",
    "read_config",
    "to_transformers",
]
