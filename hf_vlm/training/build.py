"""Builds the encoder, the model and the image processor of a recipe; loads encoder weights with a report."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.io.messages import summarise
from hf_vlm.features.loading import (
    find_encoder,
    find_head,
    image_statistics,
    quiet_transformers,
    refuse_missing,
    shared_head_shape,
)
from hf_vlm.models.configuration_vlm_vit import PRESETS, VLMViTConfig
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_frozen import nearest_hw
from hf_vlm.models.ssl_model import SSLConfig
from hf_vlm.registry import MODELS, ModelEntry, find_model_type
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.finite import not_finite_weights
from hf_vlm.training.scaling import scaled_momentum

logger = logging.getLogger(__name__)

DEFAULT_PRESET = "small"

# Fields of encoder_config that affect training only.
REGULARISATION = (
    *("drop_path_rate", "drop_path_uniform", "attention_dropout"),
    *("expert_capacity_factor", "router_noise", "router_aux_loss_coef", "router_z_loss_coef"),
)
# Fields of encoder_config that a dense encoder takes on where the first of them is given: its MLPs become experts.
EXPERTS = ("num_experts", "num_experts_per_tok", "sparse_layers", "norm_topk_prob")


def build_encoder_config(args: VisionTrainingArguments) -> VLMViTConfig:
    """The configuration of a new encoder by a recipe; ValueError names what is wrong with it."""
    fields = {"image_size": list(args.image_hw), **args.encoder_config}
    preset = args.encoder_preset or DEFAULT_PRESET
    return _build("encoder_config", lambda: VLMViTConfig.from_preset(preset, **fields), VLMViTConfig, fields)


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
    if args.lora_rank and issubclass(entry.config_class, SSLConfig):
        raise ValueError(f"lora_rank is for fine-tuning: {args.method} trains the whole encoder. Leave it out.")
    encoder = load_encoder(args) if args.encoder else None
    trained = load_head(args, entry)
    if trained is not None:
        head_fields = {**(head_fields or {}), **_head_shape(args, entry, trained.config)}
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
        if trained is not None:
            _copy_head(args, trained, model)
        model.after_encoder_loaded()
    return model


def load_head(args: VisionTrainingArguments, entry: ModelEntry) -> PreTrainedModel | None:
    """Loads the model that `args.encoder` is part of, where a model of the row takes over its head; else None.

    Raises:
        ValueError: if weights are missing or not finite.
    """
    source = find_head(str(args.encoder), entry.model_class) if args.encoder and args.load_head else None
    if source is None:
        return None
    with quiet_transformers():
        trained, report = source.model_class.from_pretrained(args.encoder, output_loading_info=True)
    refuse_missing(str(args.encoder), report, "head")
    _refuse_not_finite(args, trained)
    return trained  # type: ignore[no-any-return]


def _head_shape(args: VisionTrainingArguments, entry: ModelEntry, saved: Any) -> dict[str, Any]:
    """Fields of the configuration that a trained head brings; ValueError where the recipe contradicts them."""
    source = find_model_type(saved.model_type)
    assert source is not None  # it was loaded by its row
    shape = {name: getattr(saved, name) for name in shared_head_shape(source.model_class, entry.model_class)}
    wrong = [name for name, value in shape.items() if _plain(args.model_config.get(name, value)) != _plain(value)]
    if wrong:
        raise ValueError(
            f"encoder: {args.encoder} comes with a head whose {wrong[0]} is {shape[wrong[0]]}, but model_config asks "
            f"for {args.model_config[wrong[0]]}: leave that out, or start from the encoder alone with --load_head "
            "false."
        )
    return shape


def _copy_head(args: VisionTrainingArguments, trained: PreTrainedModel, model: PreTrainedModel) -> None:
    """Gives a model the weights of a trained head but its class layers, and those that a resized encoder reshapes."""
    own, theirs, of_classes = model.state_dict(), trained.state_dict(), model.class_layers()
    head = [name for name in own if not name.startswith("backbone.")]
    wanted = [name for name in head if name not in of_classes]
    missing = [name for name in wanted if name not in theirs]
    reshaped = [name for name in wanted if name in theirs and theirs[name].shape != own[name].shape]
    fitting = {name: theirs[name] for name in wanted if name not in (*missing, *reshaped)}
    model.load_state_dict(fitting, strict=False)
    layers = sorted({name.rpartition(".")[0] for name in of_classes})
    rows = {
        "loaded": f"{len(fitting)} of {len(head)} weights",
        "class layers (random)": f"{', '.join(layers)}: not taken over, even if the classes are the same",
        "missing (random)": ", ".join(sorted({name.split(".")[0] for name in missing})),
        "other shape (random)": ", ".join(reshaped),
    }
    logger.info("Head from %s%s", args.encoder, _table(rows))


def _table(rows: Mapping[str, str]) -> str:
    """The rows that say something, each on a line of its own."""
    return "".join(f"\n  {name:<30} {value}" for name, value in rows.items() if value)


def _refuse_not_finite(args: VisionTrainingArguments, model: PreTrainedModel) -> None:
    if names := not_finite_weights(model):
        raise ValueError(f"encoder: {args.encoder} has weights that are not finite: {summarise(names)}.")


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
        if not _agrees(args.model_config.get(name, value), value):
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


def load_encoder(args: VisionTrainingArguments) -> VLMViTModel:
    """Loads `args.encoder`, with a report of its weights: a folder or Hub id, of ours or of a family of transformers.

    It brings its architecture; what the recipe says of the encoder must agree with it. Where the recipe's images are
    not of whole patches, `args.image_size` becomes the nearest size that is.

    Raises:
        ValueError: if nothing is there, or, without `resize_encoder`, its architecture is not the one that
            `encoder_preset` and `encoder_config` ask for, or weights are missing.
    """
    try:
        source = find_encoder(str(args.encoder))
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from error
    wanted = _wanted_architecture(args)
    is_upcycled = bool(wanted.get("num_experts")) and not source.config.num_experts
    differences = [
        f"{name}: its weights have {_plain(getattr(source.config, name))}, the recipe asks for {_plain(value)}"
        for name, value in wanted.items()
        if _plain(getattr(source.config, name)) != _plain(value) and not (is_upcycled and name in EXPERTS)
    ]
    if differences and not args.resize_encoder:
        raise ValueError(
            f"encoder: {args.encoder} is another than encoder_preset and encoder_config ask for.\n  "
            + "\n  ".join(differences)
            + "\nLeave them out to train it as it is, or load the weights that fit, with --resize_encoder true."
        )
    defaults = VLMViTConfig.__dataclass_fields__
    regularisation = {name: args.encoder_config.get(name, defaults[name].default) for name in REGULARISATION}
    fields = source.config.to_dict() | regularisation | wanted
    if wanted.get("hidden_size", source.config.hidden_size) != source.config.hidden_size:
        fields["intermediate_size"] = wanted.get("intermediate_size", 0)  # follows from the width
    config = _build("encoder_config", lambda: VLMViTConfig(**fields), VLMViTConfig, wanted)
    if config.patch_hw != source.config.patch_hw:  # else positions belong to the grid that they were trained for
        config.image_size = list(args.image_hw)
    encoder, report = source.load(config, resize=bool(differences))
    _report(args, encoder, report)
    if is_upcycled:
        layers = ", ".join(map(str, sorted(config.sparse_layer_indices)))
        logger.info("The MLPs of layers %s became %d experts each; routers are new.", layers, config.num_experts)
    _refuse_not_finite(args, encoder)
    _fit_image_size(args, config.patch_hw)
    return encoder


def _wanted_architecture(args: VisionTrainingArguments) -> dict[str, Any]:
    """What a recipe that starts from an encoder says of its architecture."""
    if args.encoder_preset is not None and args.encoder_preset not in PRESETS:
        VLMViTConfig.from_preset(args.encoder_preset)  # says which there are
    fields = {**PRESETS.get(args.encoder_preset or "", {}), **args.encoder_config}
    one_patch = {"image_size": fields.get("patch_size", 16), **fields}
    _build("encoder_config", lambda: VLMViTConfig(**one_patch), VLMViTConfig, one_patch)
    return {name: value for name, value in fields.items() if name not in (*REGULARISATION, "image_size")}


def _fit_image_size(args: VisionTrainingArguments, patch_hw: tuple[int, int]) -> None:
    if (fitting := nearest_hw(args.image_hw, patch_hw)) != args.image_hw:
        logger.warning(
            "image_size: %d x %d is not of whole patches of %d x %d pixels; %d x %d is used.",
            *args.image_hw,
            *patch_hw,
            *fitting,
        )
        args.image_size = list(fitting)


def _report(args: VisionTrainingArguments, encoder: VLMViTModel, report: dict[str, Any]) -> None:
    """Reports in one table which weights were loaded; refuses an encoder with missing ones."""
    missing = sorted(report["missing_keys"])
    reshaped = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    num_weights = len(encoder.state_dict())
    rows = {
        "loaded": f"{num_weights - len(missing) - len(reshaped)} of {num_weights} weights",
        "missing (random)": ", ".join(missing),
        "other shape (random)": ", ".join(reshaped),
        "unknown, left out": ", ".join(sorted(report["unexpected_keys"])),
    }
    table = _table(rows)
    if (missing or reshaped) and not args.resize_encoder:
        raise ValueError(f"encoder: {args.encoder} lacks weights of the encoder.{table}")
    logger.info("Encoder from %s%s", args.encoder, table)


def _agrees(wanted: Any, decided: Any) -> bool:
    """Whether what a recipe says is so; of a dictionary it may say a part."""
    if isinstance(wanted, dict) and isinstance(decided, dict):
        return decided == {**decided, **wanted}
    return bool(wanted == decided)


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
    ImageNet's for colour images, and 0.5 for others. `processor_config` may give others, and what is the task's own.

    Raises:
        ValueError: if `processor_config` has another field, which training would not follow, or a value that the image
            processor refuses.
    """
    known = processor_class.recipe_fields
    if unknown := [name for name in args.processor_config if name not in known]:
        raise ValueError(
            f"processor_config: {unknown[0]!r} is no field of {processor_class.__name__} that a recipe sets: these "
            f"are {', '.join(sorted(known))}; its size follows image_size."
        )
    height, width = args.image_hw
    statistics: dict[str, Any] = {}
    if num_channels != 3:
        statistics = {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}
    if args.encoder:
        given = image_statistics(args.encoder, num_channels)
        if given is not None and np.size(given["image_mean"]) == num_channels:
            statistics = given
    return processor_class(**{"size": {"height": height, "width": width}, **statistics, **args.processor_config})


__all__ = [
    "build_config",
    "build_encoder_config",
    "build_model",
    "build_processor",
    "load_encoder",
]
