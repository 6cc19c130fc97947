"""Suggested next commands, with all options that a shipped recipe needs for an encoder."""

import json
import math
import shlex
from collections.abc import Sequence

from hf_vlm.data.transforms.options import as_size
from hf_vlm.models.configuration_vlm_vit import VLMViTConfig
from hf_vlm.models.ssl_frozen import nearest_hw
from hf_vlm.registry import find_model
from hf_vlm.tasks import Task
from hf_vlm.training.build import architecture, fitting_encoder_config
from hf_vlm.training.recipe import load_recipe

__all__ = ["finetune_command", "next_command"]


def next_command(config: VLMViTConfig, recipe: str, options: Sequence[str]) -> str:
    """The command that starts a shipped recipe from an encoder, with its architecture where the recipe's differs."""
    values = load_recipe(recipe)
    preset, given = values["encoder_preset"], values.get("encoder_config", {})
    if architecture(config, unlike=preset) != architecture(VLMViTConfig.from_preset(preset, **given), unlike=preset):
        fitting = fitting_encoder_config(config, preset=preset, given=given)
        options = [*options, "--encoder_config", json.dumps(fitting)]
    size = as_size("image_size", values["image_size"])
    if (whole := nearest_hw(size, config.patch_hw)) != size:
        options = [*options, "--image_size", json.dumps(whole[0] if whole[0] == whole[1] else list(whole))]
    command = "pretrain" if find_model(values["method"]).task == "pretraining" else "finetune"
    return shlex.join(["hf-vlm", command, recipe, *options])


def finetune_command(task: Task, config: VLMViTConfig, encoder: str, data: str) -> str:
    """The command that fine-tunes an encoder for a task, with the recipe for encoders of the nearest width."""
    width = {preset: VLMViTConfig.from_preset(preset).hidden_size for preset in task.recipes}
    nearest = min(width, key=lambda preset: abs(math.log(config.hidden_size / width[preset])))
    return next_command(config, task.recipes[nearest], ["--data", data, "--encoder", encoder])
