"""Shipped recipes that fit data, encoder and machine, and suggested next commands with all options they need."""

import contextlib
import math
import shlex
from collections.abc import Mapping

import torch

from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE
from hf_vlm.data.source import Source
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.convert_vlm_vit import read_config
from hf_vlm.tasks import TASKS, TRAINABLE_TASKS, Task

__all__ = [
    "finetune_command",
    "finetuning_recipe",
    "fitting_preset",
    "fitting_tasks",
    "pretraining_recipe",
]

# By encoder preset: a detector's encoder and head together, or an encoder alone.
HEAD_RECIPES = {"nano": "region_detection/vit_nano_cpu.yaml", "small": "region_detection/vit_small.yaml"}
ENCODER_RECIPES = {"nano": "mae/vit_nano_cpu.yaml", "small": "mae/vit_small.yaml"}


def finetune_command(task: Task, config: VLMViTConfig, encoder: str, data: str) -> str:
    """The command that fine-tunes an encoder for a task, with the recipe for encoders of the nearest width."""
    preset, _ = fitting_preset(task.recipes, config.hidden_size)
    return shlex.join(["hf-vlm", "finetune", task.recipes[preset], "--data", data, "--encoder", encoder])


def fitting_preset(recipes: Mapping[str, str], encoder_width: int | None = None) -> tuple[str, str]:
    """The encoder preset among those that recipes are for which fits an encoder, or else this machine; and why."""
    if encoder_width is not None:
        width = {preset: VLMViTConfig.from_preset(preset).hidden_size for preset in recipes}
        nearest = min(width, key=lambda preset: abs(math.log(encoder_width / width[preset])))
        return nearest, f"the encoder is {encoder_width} wide"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("nano", "there is no accelerator") if accelerator is None else ("small", f"there is {accelerator.type}")


def pretraining_recipe(source: Source, encoder: str | None = None) -> tuple[str, str]:
    """The recipe to pretrain with where none is named, from an encoder if one is given; and why.

    What few labels are short of is the head, so that it is pretrained with the encoder, unless the labels are classes
    of whole images or of pixels.
    """
    others = source.label_names, source.mask_names
    alone = source.object_names is None and any(names is not None for names in others)
    recipes = ENCODER_RECIPES if alone else HEAD_RECIPES
    preset, reason = fitting_preset(recipes, _width(encoder))
    what = "classes of images or pixels need an encoder" if alone else "a detector needs an encoder and a head"
    return recipes[preset], f"{what} and {reason}"


def finetuning_recipe(source: Source, encoder: str | None = None) -> tuple[str, str]:
    """The recipe to fine-tune with where none is named, for the first task that the labels serve; and why.

    Raises:
        ValueError: if the source has labels for no task.
    """
    task = next(iter(fitting_tasks(source)), None)
    if task is None:
        raise ValueError(
            f"{source.name} has neither boxes nor labels in split {source.split!r}, and no masks with names of their "
            f"values ({MASK_CLASSES_FILE}): there is nothing to learn."
        )
    preset, reason = fitting_preset(task.recipes, _width(encoder))
    return task.recipes[preset], f"the labels serve {task.name} and {reason}"


def fitting_tasks(source: Source) -> list[Task]:
    """The tasks that a source has labels for, in the order of the table of tasks: boxes first."""
    tasks = []
    for task in (TASKS[name] for name in TRAINABLE_TASKS):
        with contextlib.suppress(ValueError):  # not labels for this task
            task.class_names(source)
            tasks.append(task)
    return tasks


def _width(encoder: str | None) -> int | None:
    if encoder is None:
        return None
    config = read_config(encoder)
    return (config.get("backbone_config") or config).get("hidden_size")
