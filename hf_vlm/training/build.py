"""Builds the encoder, the model and the image processor of a recipe; loads encoder weights with a report."""

import contextlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.io.messages import summarise
from hf_vlm.features.loading import quiet_transformers, read_own_config
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_model import SSLConfig
from hf_vlm.registry import MODELS, ModelEntry
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.finite import not_finite_weights
from hf_vlm.training.scaling import scaled_momentum

logger = logging.getLogger(__name__)

# Fields that must agree between a recipe's encoder and weights; the others concern training or follow from these.
ARCHITECTURE = (
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "use_gated_mlp",
    "hidden_act",
    "norm_type",
    "position_embedding_type",
    "use_class_token",
    "num_register_tokens",
    "use_qk_norm",
    "qkv_bias",
)

# Fields of encoder_config that affect training only.
REGULARISATION = ("drop_path_rate", "drop_path_uniform", "attention_dropout")


def build_encoder_config(args: VisionTrainingArguments) -> VLMViTConfig:
    """The encoder configuration of a recipe; ValueError names what is wrong with it."""
    fields = {"image_size": list(args.image_hw), **args.encoder_config}
    return _build(
        "encoder_config", lambda: VLMViTConfig.from_preset(args.encoder_preset, **fields), VLMViTConfig, fields
    )


def build_model(
    args: VisionTrainingArguments,
    entry: ModelEntry,
    *,
    class_names: Sequence[str] | None = None,
    head_fields: Mapping[str, Any] | None = None,
    minimum_fields: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """The model of a recipe's row, its encoder loaded from `args.encoder` where one is given.

    Args:
        class_names: Names of the classes of a model with a head for classes.
        head_fields: Configuration fields that depend on the data.
        minimum_fields: Lowest values of configuration fields that suffice for the data; lower ones are raised.

    Raises:
        ValueError: if its configuration is refused or contradicts the data, or the encoder does not fit.
    """
    encoder = load_encoder(args) if args.encoder else None
    config = build_config(args, entry, None if encoder is None else encoder.config, class_names, head_fields)
    for name, value in (minimum_fields or {}).items():
        if getattr(config, name) < value:
            logger.warning(
                "model_config: %s is %d; the data need %d, which is used.", name, getattr(config, name), value
            )
            setattr(config, name, value)
    options = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    model = _build(
        "attn_implementation", lambda: entry.auto_class.from_config(config, **options), entry.config_class, {}
    )
    if encoder is not None:
        model.backbone.load_state_dict(encoder.state_dict())
        model.after_encoder_loaded()
    return model


def build_config(
    args: VisionTrainingArguments,
    entry: ModelEntry,
    encoder: VLMViTConfig | None = None,
    class_names: Sequence[str] | None = None,
    head_fields: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a recipe's model; `encoder` defaults to the recipe's."""
    encoder = encoder or build_encoder_config(args)
    decided = dict(head_fields or {})
    if class_names is not None:
        decided["id2label"] = dict(enumerate(class_names))
        decided["label2id"] = {name: index for index, name in enumerate(class_names)}
    for name, value in decided.items():
        if args.model_config.get(name, value) != value:
            raise ValueError(
                f"model_config: {name} is {args.model_config[name]!r}, but the data make it {value!r}: leave it out."
            )
    fields = {"backbone_config": encoder.to_dict(), **args.model_config, **decided}
    contract = entry.config_class if issubclass(entry.config_class, SSLConfig) else SSLConfig
    if contract.needs_image_statistics:
        processor = build_processor(args, entry.processor_class, encoder.num_channels)
        fields = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std), **fields}
    if args.reference_batch_size is not None:
        for name in contract.batch_scaled_momentum:
            momentum = fields.get(name, contract.__dataclass_fields__[name].default)
            fields[name] = scaled_momentum(momentum, args.total_batch_size, args.reference_batch_size)
    return _build("model_config", lambda: entry.config_class(**fields), entry.config_class, fields)


def _build(key: str, construct: Any, config_class: Any, fields: dict[str, Any]) -> Any:
    """Constructs a configuration; unknown fields, which transformers would keep silently, are errors."""
    renamed = getattr(config_class, "renamed_fields", {})
    if old := [name for name in fields if name in renamed]:
        raise ValueError(f"{key}: the field {old[0]!r} is now called {renamed[old[0]]!r}.")
    known = set(config_class.__dataclass_fields__) | {"out_features", "out_indices", "transformers_version"}
    unknown = [name for name in fields if name not in known and name not in ("id2label", "label2id")]
    if unknown:
        owners = [row.name for row in MODELS if unknown[0] in row.config_class.__dataclass_fields__]
        hint = f" Methods with a field {unknown[0]!r}: {', '.join(owners)}." if owners else ""
        raise ValueError(f"{key}: {config_class.__name__} has no field {', '.join(map(repr, unknown))}.{hint}")
    try:
        return construct()
    except ValueError:
        raise
    except Exception as error:  # the strict dataclasses of huggingface_hub raise types of their own
        raise ValueError(f"{key}: {error}") from error


def architecture(config: VLMViTConfig, *, unlike: str) -> dict[str, Any]:
    """The `encoder_config` that turns the preset `unlike` into an encoder of this configuration."""
    preset = VLMViTConfig.from_preset(unlike)
    fields = {name: _plain(getattr(config, name)) for name in ARCHITECTURE}
    return {name: value for name, value in fields.items() if value != _plain(getattr(preset, name))}


def fitting_encoder_config(config: VLMViTConfig, *, preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The `encoder_config` that, with `preset`, builds an encoder like `config` and keeps other fields of `given`."""
    kept = {name: value for name, value in given.items() if name not in ARCHITECTURE}
    return kept | architecture(config, unlike=preset)


def load_encoder(args: VisionTrainingArguments) -> VLMViTModel:
    """Loads `args.encoder` (a run's folder, any checkpoint of ours, a Hub id), with a report of its weights.

    Raises:
        ValueError: if nothing is there, it is one of transformers, or, without `resize_encoder`, its architecture
            differs from the recipe's or weights are missing.
    """
    assert args.encoder is not None
    wanted = build_encoder_config(args)
    try:
        read_own_config(args.encoder)
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from error
    found = VLMViTConfig.from_pretrained(args.encoder)
    differences = [
        f"{name}: weights have {_plain(getattr(found, name))}, the recipe has {_plain(getattr(wanted, name))}"
        for name in ARCHITECTURE
        if _plain(getattr(found, name)) != _plain(getattr(wanted, name))
    ]
    if differences and not args.resize_encoder:
        fitting = fitting_encoder_config(found, preset=args.encoder_preset, given=args.encoder_config)
        raise ValueError(
            f"encoder: {args.encoder} does not fit the recipe.\n  "
            + "\n  ".join(differences)
            + f"\nBuild the encoder of the weights, with --encoder_config {shlex.quote(json.dumps(fitting))}\n"
            "or load the weights that fit, with --resize_encoder true."
        )
    if wanted.patch_hw == found.patch_hw:  # positions belong to the grid that they were trained for
        wanted.image_size = found.image_size
    config = wanted if differences else found
    for name in REGULARISATION:
        setattr(config, name, getattr(wanted, name))
    with quiet_transformers():
        encoder, report = VLMViTModel.from_pretrained(
            args.encoder,
            config=config,
            ignore_mismatched_sizes=bool(differences),
            output_loading_info=True,
        )
    _report(args, encoder, report)
    if names := not_finite_weights(encoder):
        raise ValueError(f"encoder: {args.encoder} has weights that are not finite: {summarise(names)}.")
    return encoder


def _report(args: VisionTrainingArguments, encoder: VLMViTModel, report: dict[str, Any]) -> None:
    """Reports in one table which weights were loaded; refuses an encoder with missing ones."""
    missing = sorted(report["missing_keys"])
    reshaped = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    left_out = sorted({key.split(".")[0] for key in report["unexpected_keys"]})
    num_weights = len(encoder.state_dict())
    rows = {
        "loaded": f"{num_weights - len(missing) - len(reshaped)} of {num_weights} weights",
        "missing (random)": ", ".join(missing),
        "other shape (random)": ", ".join(reshaped),
        "not of the encoder, left out": ", ".join(left_out),
    }
    table = "".join(f"\n  {name:<30} {value}" for name, value in rows.items() if value)
    if (missing or reshaped) and not args.resize_encoder:
        raise ValueError(f"encoder: {args.encoder} lacks weights of the encoder.{table}")
    logger.info("Encoder from %s%s", args.encoder, table)


def _plain(value: Any) -> Any:
    """A size in one form: 16, (16, 16) and [16, 16] are the same."""
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def build_processor(
    args: VisionTrainingArguments, processor_class: type[VLMViTImageProcessor], num_channels: int
) -> VLMViTImageProcessor:
    """The image processor that prepares images as training does.

    Mean and standard deviation are those of the encoder's own image processor where there is one; else
    ImageNet's for colour images, and 0.5 for others.
    """
    height, width = args.image_hw
    statistics: dict[str, Any] = {}
    if num_channels != 3:
        statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}
    if args.encoder:
        with contextlib.suppress(OSError):  # weights without an image processor
            given = VLMViTImageProcessor.from_pretrained(args.encoder)
            if np.size(given.image_mean) == num_channels:
                statistics = {"image_mean": given.image_mean, "image_std": given.image_std}
    return processor_class(size={"height": height, "width": width}, **statistics)


__all__ = [
    "architecture",
    "build_config",
    "build_encoder_config",
    "build_model",
    "build_processor",
    "fitting_encoder_config",
    "load_encoder",
]
