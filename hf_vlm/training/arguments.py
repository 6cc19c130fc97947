"""A recipe: flat YAML whose keys are TrainingArguments' names and ours, read strictly."""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from hf_vlm.training import scaling

RUN_LENGTHS = ("max_steps", "images_to_see")
RENAMED_KEYS = {"data_kind": "format", "max_bad_share": "max_bad_fraction"}  # of recipes of version 0.1


@dataclass
class VisionTrainingArguments(TrainingArguments):
    """TrainingArguments and what a vision run needs besides: the model, the data and the optimiser's groups.

    Raises:
        ValueError: if a run is given neither a number of steps nor something to read.
    """

    output_dir: str = field(default="runs/run", metadata={"help": "Folder of the run."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew in a folder that holds a run; its checkpoints are deleted."}
    )
    method: str = field(default="", metadata={"help": "Row of the registry: simclr, mae, detection, ..."})
    encoder_preset: str = field(default="small", metadata={"help": "Named size of the encoder."})
    encoder_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "VLMViTConfig fields to override."})
    model_config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of the method's config."})
    encoder: str | None = field(default=None, metadata={"help": "Folder or Hub id of encoder weights to start from."})
    resize_encoder: bool = field(default=False, metadata={"help": "Accept encoder weights that do not all fit."})
    data: Any = field(
        default="", metadata={"help": "Source of images: folder, file, URL, Hub id, scenes, or {source: weight, ...}."}
    )
    format: str | None = field(default=None, metadata={"help": "Format of the source; guessed when not given."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    num_train_examples: int | None = field(
        default=None, metadata={"help": "Use only so many images: the first, of class folders evenly spread ones."}
    )
    num_eval_examples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many images, chosen likewise."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    image_size: Any = field(default=224, metadata={"help": "Pixels that enter the model: size or [height, width]."})
    views: dict[str, Any] = field(default_factory=dict, metadata={"help": "Changes to the method's default views."})
    views_on: str = field(
        default="auto",
        metadata={"help": "Where views are made: device, workers, or auto: the device where it is an accelerator."},
    )
    augmentation: dict[str, Any] = field(default_factory=dict, metadata={"help": "Detection augmentation."})
    shuffle_block: int = field(default=1024, metadata={"help": "Encoded examples that are shuffled together."})
    approximate_resume: bool = field(
        default=False, metadata={"help": "Resume on another number of processes or workers, from the next epoch on."}
    )
    max_bad_fraction: float = field(default=0.01, metadata={"help": "Share of unreadable images that stops the run."})
    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a layer relative to the one above."})
    encoder_lr_multiplier: float = field(default=1.0, metadata={"help": "Learning rate of the encoder's top layer."})
    patch_projection_lr_multiplier: float = field(
        default=1.0, metadata={"help": "Learning rate of the patch projection relative to that of its depth."}
    )
    frozen_encoder_steps: float = field(
        default=0, metadata={"help": "Steps, or a share of them below 1, before the encoder learns and warms up."}
    )
    images_to_see: Any = field(
        default=None, metadata={"help": "In place of max_steps: images seen in the run, or auto, by the data's size."}
    )
    reference_batch_size: int | None = field(
        default=None, metadata={"help": "Batch for which learning rate and momentum are meant; others are scaled."}
    )
    batch_scaling: str = field(default="sqrt", metadata={"help": "How the learning rate is scaled: sqrt or linear."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end, reached along a cosine; constant by default."}
    )
    probe_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between probes of the features; 0: none; not given: ten in a run, fewer if dear."},
    )
    probe_data: str | None = field(
        default=None, metadata={"help": "Images to probe on, labelled or not; those of eval_split when not given."}
    )
    num_probe_examples: int = field(default=256, metadata={"help": "Images to probe on."})
    on_collapse: str = field(
        default="warn", metadata={"help": "When features collapse in pretraining: warn, stop or ignore."}
    )

    # Streams have no columns to remove and carry their own position; every parameter is used in every step.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep all columns of a batch."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "The stream resumes by its state, not by replay."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "No parameter is ever unused."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is logged so."})

    def __post_init__(self) -> None:
        if (self.max_steps > 0) == (self.images_to_see is not None):
            raise ValueError(
                "A recipe needs max_steps, a positive number of optimiser steps, or else images_to_see, and not both."
            )
        if self.batch_scaling not in scaling.SCALING_RULES:
            raise ValueError(f"batch_scaling must be sqrt or linear, but is {self.batch_scaling!r}.")
        if self.views_on not in ("auto", "device", "workers"):
            raise ValueError(f"views_on must be auto, device or workers, but is {self.views_on!r}.")
        if self.on_collapse not in ("warn", "stop", "ignore"):
            raise ValueError(f"on_collapse must be warn, stop or ignore, but is {self.on_collapse!r}.")
        if (self.probe_steps or 0) < 0 or self.num_probe_examples < 2:
            raise ValueError(
                "probe_steps must be 0 or more and num_probe_examples 2 or more, but are "
                f"{self.probe_steps} and {self.num_probe_examples}."
            )
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else accelerate makes each process a training of its own, silently
        super().__post_init__()
        if self.world_size != num_processes:
            raise ValueError(
                f"The launcher started {num_processes} processes, but training would use {self.world_size}: check the "
                "launcher's configuration."
            )
        if self.images_to_see is not None and self.images_to_see != "auto":
            self._set_steps(self.images_to_see)
        if self.images_to_see != "auto":  # then the steps are not known yet
            self._settle_steps()

    def see_images_of(self, num_images: int | None) -> None:
        """Sets the number of steps by the size of the data, where the recipe leaves it to that.

        Raises:
            ValueError: if the size is not known.
        """
        if self.images_to_see != "auto":
            return
        if num_images is None:
            raise ValueError(
                f"images_to_see: auto needs the number of images, which {self.data} does not say without being read. "
                "Give images_to_see as a number, or max_steps."
            )
        self._set_steps(scaling.images_to_see(num_images))
        self._settle_steps()

    def _set_steps(self, num_seen: Any) -> None:
        if isinstance(num_seen, bool) or not isinstance(num_seen, int | float) or num_seen < 1:
            raise ValueError(f"images_to_see must be auto or a positive number, but is {num_seen!r}.")
        self.max_steps = math.ceil(num_seen / self.total_batch_size)

    def _settle_steps(self) -> None:
        """Makes numbers of steps of shares of the run, as those that a checkpoint keeps, and checks what is frozen."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if (steps := getattr(self, name)) is not None and 0 < steps < 1:
                setattr(self, name, math.ceil(self.max_steps * steps))
        if not 0 <= self.frozen_encoder_steps < self.max_steps:
            raise ValueError(
                f"frozen_encoder_steps must be a share of the steps below 1, or fewer than the run's {self.max_steps} "
                f"steps, but is {self.frozen_encoder_steps:g}."
            )

    @property
    def total_batch_size(self) -> int:
        """Images of an optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate for the batch of this run."""
        if self.reference_batch_size is None:
            return self.learning_rate
        return scaling.scaled_learning_rate(
            self.learning_rate, self.total_batch_size, self.reference_batch_size, self.batch_scaling
        )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the images that enter the model."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def num_frozen_encoder_steps(self) -> int:
        """Optimiser steps in which the encoder does not learn; a share of the run is rounded up as warm-up is."""
        steps = self.frozen_encoder_steps
        return int(steps) if steps >= 1 else math.ceil(self.max_steps * steps)

    @property
    def makes_views_on_device(self) -> bool:
        """Whether views are made in batches on the device rather than one by one in the data workers."""
        return self.views_on == "device" or (self.views_on == "auto" and self.device.type != "cpu")


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: PyYAML takes 1e-4 for a string, and `save_strategy: no` for false."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|[Ff]alse)$"), list("TtFf"))
_RecipeLoader.add_implicit_resolver(  # after int, whose pattern this one matches as well
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a recipe and applies `--key value` overrides (`--key.sub value` inside a dictionary).

    Raises:
        ValueError: if the file is missing or not flat YAML, a key is unknown (the nearest one is named), or a value
            has the wrong type.
    """
    path = find_recipe(path)
    try:
        recipe = yaml.load(path.read_text(), _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {path} must be a mapping of keys to values.")
    for key, value in parse_overrides(overrides):
        name, _, sub_key = key.partition(".")
        if sub_key:
            if not isinstance(recipe.get(name) or {}, dict):
                raise ValueError(f"--{key}: {name} is no mapping in {path}, but {recipe[name]!r}.")
            recipe[name] = {**(recipe.get(name) or {}), sub_key: value}
        else:
            if name in RUN_LENGTHS:  # one replaces the other
                recipe = {key: kept for key, kept in recipe.items() if key not in RUN_LENGTHS}
            recipe[name] = value
    return check_recipe(recipe, str(path))


def find_recipe(path: str | Path) -> Path:
    """A recipe's file: as given, or among the recipes that come with the package."""
    path = Path(path)
    shipped = shipped_folder("recipes")
    for candidate in (path, shipped / path, shipped.parent / path):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped)) for p in shipped.glob("*/*.yaml") if p.parent.name != "accelerate")
    raise ValueError(f"There is no recipe {path}. Give a YAML file or one of: {', '.join(known)}.")


def shipped_folder(name: str) -> Path:
    """A folder that comes with the package: inside an installed one, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Turns `--key value` and `--key=value` words into pairs; values are read as YAML, or else are plain text.

    Raises:
        ValueError: A value is missing, or is no YAML though its key takes no text.
    """
    pairs = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"Expected --key value, but found {word!r}.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"--{key} needs a value.")
            value = remaining.pop(0)
        key = key.replace("-", "_")
        pairs.append((key, _read_value(key, value)))
    return pairs


def _read_value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:  # as of *.parquet, where YAML takes the star for a sign of its own
        hint = typing.get_type_hints(VisionTrainingArguments).get(key, Any)  # Any for what a dictionary holds
        options = (hint,) if isinstance(hint, types.GenericAlias) else (hint, *typing.get_args(hint))
        if Any in options or str in options:
            return text
        raise ValueError(f"--{key} takes no text, and {text!r} is not valid YAML: {error}") from error


def check_recipe(recipe: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks keys and value types of a recipe and returns it with numbers of the declared type."""
    hints = typing.get_type_hints(VisionTrainingArguments)
    known = [f.name for f in fields(VisionTrainingArguments) if f.init]
    for key in recipe:
        if key not in known:
            if key in RENAMED_KEYS:
                raise ValueError(f"The key {key!r} in {where} is now called {RENAMED_KEYS[key]!r}.")
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Unknown key {key!r} in {where}.{hint}")
    return {key: _checked(key, value, hints[key], where) for key, value in recipe.items()}


def _checked(key: str, value: Any, hint: Any, where: str) -> Any:
    """Checks plain types and ours: what TrainingArguments declares as richer, it checks itself."""
    if key == "data" and isinstance(value, int | float):  # a folder named by a year
        return str(value)
    if typing.get_origin(hint) is dict and key in VisionTrainingArguments.__annotations__:
        if not isinstance(value, dict):
            raise ValueError(f"{key} in {where} must be a mapping, but is {value!r}.")
        return value
    if key == "image_size":
        sides = [value] if isinstance(value, int) else value
        if not isinstance(sides, list | tuple) or len(sides) not in (1, 2) or not all(map(_is_size, sides)):
            raise ValueError(f"image_size in {where} must be a number of pixels or [height, width], but is {value!r}.")
        return value if len(sides) == 2 else sides[0]
    options = set(typing.get_args(hint)) - {type(None)} or {hint}
    plain = options & {int, float, bool, str}
    if value is None or plain != options:
        return value
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return value if int in plain else float(value)
    if type(value) in plain:
        return value
    names = " or ".join(sorted(option.__name__ for option in plain))
    raise ValueError(f"{key} in {where} must be {names}, but is {value!r}.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def parse_arguments(recipe: dict[str, Any]) -> VisionTrainingArguments:
    """Builds the arguments of a checked recipe; a value that TrainingArguments refuses is a ValueError."""
    try:
        return VisionTrainingArguments(**recipe)
    except (TypeError, ImportError) as error:
        raise ValueError(f"The recipe cannot be used: {error}") from error


__all__ = [
    "VisionTrainingArguments",
    "check_recipe",
    "find_recipe",
    "load_recipe",
    "parse_arguments",
    "shipped_folder",
]
