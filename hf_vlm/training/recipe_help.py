"""The keys of a recipe by group, with their help texts, for `--help`."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from hf_vlm.training.arguments import VisionTrainingArguments

__all__ = ["GROUPS", "format_keys"]

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("method", "encoder", "encoder_preset", "encoder_config", "model_config", "resize_encoder", "load_head"),
        *("processor_config", "attn_implementation", "text_encoder", "text_length"),
    ),
    "Data": (
        *(
            "data",
            "format",
            "train_split",
            "eval_split",
            "holdout",
            "allow_outside",
            "num_train_examples",
            "num_eval_examples",
            "image_size",
        ),
        *("labels_from", "labels_per_image", "rounds", "unlabelled_data", "num_unlabelled_examples"),
        "unlabelled_fraction",
        *("views", "views_on", "augmentation", "shuffle_block", "max_bad_fraction", "dataloader_num_workers"),
    ),
    "Length and batch": (
        *("max_steps", "images_to_see", "budget", "per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "reference_batch_size", "batch_scaling"),
    ),
    "Optimiser": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "weight_decay_end", "max_grad_norm"),
        *("optim", "adam_beta1", "adam_beta2", "layer_decay", "encoder_lr_multiplier"),
        *("patch_projection_lr_multiplier", "frozen_encoder_steps", "lora_rank", "ema_decay"),
    ),
    "Evaluation, probes and logs": (
        *("eval_strategy", "eval_steps", "metric_for_best_model", "load_best_model_at_end", "probe_steps"),
        "early_stopping_patience",
        *("probe_data", "num_probe_examples", "on_collapse", "logging_steps", "report_to"),
    ),
    "Run and checkpoints": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "rewind_to", "restart_schedule"),
        *("approximate_resume", "save_strategy"),
        *("save_steps", "save_total_limit", "seed", "data_seed"),
    ),
    "Machine": ("use_cpu", "bf16", "fp16", "tf32", "torch_compile", "activation_checkpointing", "tp_size", "ep_size"),
    "Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"),
}
FIXED = ("remove_unused_columns", "ignore_data_skip", "ddp_find_unused_parameters", "logging_nan_inf_filter")
OTHERS = "Others of transformers' TrainingArguments"


def format_keys(width: int = 100) -> str:
    """Every key of a recipe, as an option of the command, with its default and the first sentence of its help."""
    known = {field.name: field for field in fields(VisionTrainingArguments) if field.init}
    named = {name for names in GROUPS.values() for name in names}
    others = [name for name in known if name not in named and name not in FIXED]
    lines = []
    for group, names in GROUPS.items():
        lines += [f"{group}:", *(line for name in names for line in _describe(known[name], width)), ""]
    remaining = textwrap.wrap(", ".join(others), width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, f"{OTHERS}:", *remaining])


def _describe(field: "Field[Any]", width: int) -> Iterator[str]:
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    text = re.split(r"(?<=[.;:])\s+(?=[A-Z'])", text)[0]
    text = text if text.endswith("...") else text.rstrip(".;: ")
    default = field.default
    if default is not MISSING and default not in (None, "", False):
        text += f" (default {getattr(default, 'value', default)})"
    head = f"  --{field.name}"
    yield from textwrap.wrap(text, width, initial_indent=f"{head:<36}", subsequent_indent=" " * 36) or [head]
