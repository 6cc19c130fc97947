"""Builds what a recipe names: encoder, method, image processor; loads encoder weights and says what became of them."""

import contextlib
import json
import logging
import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_vlm.data.transforms.options import as_size
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_families import ALIASES, FAMILIES
from hf_vlm.models.convert_vlm_vit import is_ours, read_config
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.models.ssl_frozen import nearest_hw
from hf_vlm.models.ssl_model import SSLConfig
from hf_vlm.registry import ModelEntry, find_model
from hf_vlm.training.arguments import VisionTrainingArguments, load_recipe
from hf_vlm.training.scaling import scaled_momentum

logger = logging.getLogger(__name__)

# What must agree between a recipe's encoder and weights; all else is how they are trained, or follows from these.
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

REGULARISATION = ("drop_path_rate", "attention_dropout")  # what a recipe's encoder_config says of training alone
DETECTION_RECIPES = {"nano": "detection/vit_nano_cpu.yaml", "small": "detection/vit_small.yaml"}  # by preset


def build_encoder_config(args: VisionTrainingArguments) -> VLMViTConfig:
    """The encoder that a recipe describes; ValueError names what is wrong with it."""
    fields = {"image_size": list(args.image_hw), **args.encoder_config}
    return _build(
        "encoder_config", lambda: VLMViTConfig.from_preset(args.encoder_preset, **fields), VLMViTConfig, fields
    )


def build_model(
    args: VisionTrainingArguments, *, task: str, class_names: Sequence[str] | None = None
) -> PreTrainedModel:
    """The model of a recipe, its encoder loaded from `args.encoder` where one is given.

    Raises:
        ValueError: if the method is no row of the registry for the task, its configuration is refused, or the encoder
            does not fit.
    """
    entry = find_model(args.method, task)
    encoder = load_encoder(args) if args.encoder else None
    config = build_config(args, entry, None if encoder is None else encoder.config, class_names)
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
) -> Any:
    """The configuration of a recipe's model; its encoder as the recipe describes it where none is given."""
    encoder = encoder or build_encoder_config(args)
    fields = {"backbone_config": encoder.to_dict(), **args.model_config}
    contract = entry.config_class if issubclass(entry.config_class, SSLConfig) else SSLConfig
    if contract.needs_image_statistics:
        processor = build_processor(args, encoder.num_channels)
        fields = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std), **fields}
    if args.reference_batch_size is not None:
        for name in contract.batch_scaled_momentum:
            momentum = fields.get(name, contract.__dataclass_fields__[name].default)
            fields[name] = scaled_momentum(momentum, args.total_batch_size, args.reference_batch_size)
    if class_names is not None:
        fields["id2label"] = dict(enumerate(class_names))
        fields["label2id"] = {name: index for index, name in enumerate(class_names)}
    return _build("model_config", lambda: entry.config_class(**fields), entry.config_class, fields)


def _build(key: str, construct: Any, config_class: Any, fields: dict[str, Any]) -> Any:
    """Constructs a configuration; unknown fields, which transformers would keep silently, are errors."""
    known = set(config_class.__dataclass_fields__) | {"out_features", "out_indices", "transformers_version"}
    unknown = [name for name in fields if name not in known and name not in ("id2label", "label2id")]
    if unknown:
        raise ValueError(f"{key}: {config_class.__name__} has no field {', '.join(map(repr, unknown))}.")
    try:
        return construct()
    except ValueError:
        raise
    except Exception as error:  # the strict dataclasses of huggingface_hub raise types of their own
        raise ValueError(f"{key}: {error}") from error


def architecture(config: VLMViTConfig, *, unlike: str) -> dict[str, Any]:
    """What `encoder_config` must say for an encoder of this configuration, beside the preset `unlike`."""
    preset = VLMViTConfig.from_preset(unlike)
    fields = {name: _plain(getattr(config, name)) for name in ARCHITECTURE}
    return {name: value for name, value in fields.items() if value != _plain(getattr(preset, name))}


def fitting_encoder_config(config: VLMViTConfig, *, preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `encoder_config`, `given` beside `preset`, changed such that its encoder is built as `config` is."""
    kept = {name: value for name, value in given.items() if name not in ARCHITECTURE}
    return kept | architecture(config, unlike=preset)


def next_command(config: VLMViTConfig, recipe: str, words: Sequence[str]) -> str:
    """A command to type that gives an encoder to a shipped recipe, which is told how it is built where they differ."""
    values = load_recipe(recipe)
    preset, given = values["encoder_preset"], values.get("encoder_config", {})
    if architecture(config, unlike=preset) != architecture(VLMViTConfig.from_preset(preset, **given), unlike=preset):
        words = [*words, "--encoder_config", json.dumps(fitting_encoder_config(config, preset=preset, given=given))]
    size = as_size("image_size", values["image_size"])
    if (whole := nearest_hw(size, config.patch_hw)) != size:
        words = [*words, "--image_size", json.dumps(_plain(whole))]
    command = "finetune" if values["method"] == "detection" else "pretrain"
    return shlex.join(["hf-vlm", command, recipe, *words])


def detection_command(config: VLMViTConfig, encoder: str, data: str) -> str:
    """The command that makes a detector of an encoder, by the recipe for encoders of about its width."""
    width = {preset: VLMViTConfig.from_preset(preset).hidden_size for preset in DETECTION_RECIPES}
    nearest = min(width, key=lambda preset: abs(math.log(config.hidden_size / width[preset])))
    return next_command(config, DETECTION_RECIPES[nearest], ["--data", data, "--encoder", encoder])


def load_encoder(args: VisionTrainingArguments) -> VLMViTModel:
    """Loads `args.encoder` (a run's folder, any checkpoint of ours, a Hub id) loudly.

    Raises:
        ValueError: if nothing is there, it is one of transformers, its architecture is not the recipe's, or weights
            are missing, unless `resize_encoder` asks to take what fits.
    """
    assert args.encoder is not None
    wanted = build_encoder_config(args)
    _read_origin(args.encoder)
    found = VLMViTConfig.from_pretrained(args.encoder)
    differences = [
        f"{name}: weights have {_plain(getattr(found, name))}, the recipe says {_plain(getattr(wanted, name))}"
        for name in ARCHITECTURE
        if _plain(getattr(found, name)) != _plain(getattr(wanted, name))
    ]
    if differences and not args.resize_encoder:
        fitting = fitting_encoder_config(found, preset=args.encoder_preset, given=args.encoder_config)
        raise ValueError(
            f"encoder: {args.encoder} does not fit the recipe.\n  "
            + "\n  ".join(differences)
            + f"\nBuild it as they are, with --encoder_config {shlex.quote(json.dumps(fitting))}\nor take what fits, "
            "with --resize_encoder true."
        )
    if wanted.patch_hw == found.patch_hw:  # positions are of the grid that they were trained for
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
    return encoder


def load_frozen_encoder(run_dir: str | Path) -> tuple[VLMViTModel, VLMViTImageProcessor]:
    """The encoder of a folder or of the Hub, also out of a detector or a pretraining model, and its image processor.

    Raises:
        ValueError: if there is none, it has to be converted first, or weights are missing.
    """
    if not is_ours(config := _read_origin(str(run_dir))):
        raise ValueError(
            f"{run_dir} holds no encoder of hf_vlm, but a model of the type {config.get('model_type')!r}."
        )
    try:
        with quiet_transformers():
            encoder, report = VLMViTModel.from_pretrained(run_dir, output_loading_info=True)
        processor = VLMViTImageProcessor.from_pretrained(run_dir)
    except OSError as error:
        raise ValueError(f"{run_dir} holds no encoder: {str(error).splitlines()[0]}") from error
    refuse_missing(run_dir, report, "encoder")
    return encoder.eval(), processor


def refuse_missing(source: str | Path, report: dict[str, Any], what: str) -> None:
    """ValueError where transformers' report of a loaded model names weights that the checkpoint lacks."""
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} of the {what}'s weights, such as {missing[0]}.")


def _read_origin(source: str) -> dict[str, Any]:
    """A checkpoint's configuration; ValueError where there is none, or one that has to be converted first."""
    try:
        config = read_config(source)
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from error
    if (model_type := config.get("model_type")) in {**FAMILIES, **ALIASES}:
        folder = f"runs/{Path(source).name}"
        raise ValueError(
            f"encoder: {source} is a checkpoint of transformers ({model_type}). Convert it, and give what comes out:\n"
            f"  {shlex.join(['hf-vlm', 'convert', source, folder])}\n  --encoder {shlex.quote(folder)}"
        )
    return config


def _report(args: VisionTrainingArguments, encoder: VLMViTModel, report: dict[str, Any]) -> None:
    """Says in one table which weights were loaded; refuses an encoder that is only partly there."""
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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Our report replaces the one that transformers prints, whose every head weight looks like a fault."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def build_processor(args: VisionTrainingArguments, num_channels: int) -> VLMViTImageProcessor:
    """The image processor that prepares images as training does.

    Mean and standard deviation are those that the encoder's weights were trained with, where these say it; else
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
    return VLMViTImageProcessor(size={"height": height, "width": width}, **statistics)


__all__ = [
    "build_config",
    "build_encoder_config",
    "build_model",
    "build_processor",
    "detection_command",
    "load_encoder",
    "load_frozen_encoder",
    "next_command",
    "quiet_transformers",
    "refuse_missing",
]
