"""A recipe: flat YAML with the fields of VisionTrainingArguments as keys, read strictly."""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hf_vlm.features.loading import find_head, shared_head_shape
from hf_vlm.models.nearest_name import did_you_mean
from hf_vlm.registry import find_model
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.build import REGULARISATION

__all__ = [
    "COMMAND_LINE",
    "LAUNCHERS",
    "check_recipe",
    "find_recipe",
    "load_recipe",
    "parse_arguments",
    "shipped_folder",
]

COMMAND_LINE = "the command line"  # the place of a key, for messages
LAUNCHERS = ("accelerate", "launch")  # folders of recipes/ with files of launchers
RUN_LENGTHS = ("max_steps", "images_to_see", "budget")
RENAMED_KEYS = {"data_kind": "format", "max_bad_share": "max_bad_fraction"}  # in recipes of version 0.1


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans: PyYAML reads 1e-4 as a string, and `save_strategy: no` as false."""

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
    text = path.read_text()
    try:
        recipe = yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {path} must be a mapping of keys to values.")
    mapping: Any = yaml.compose(text, _RecipeLoader)
    places = {key.value: f"{path}, line {key.start_mark.line + 1}" for key, _ in mapping.value}
    given = parse_overrides(overrides)
    places |= {key.partition(".")[0]: COMMAND_LINE for key, _ in given}
    typed = dict(given)
    if encoder := typed.get("encoder"):
        load_head = bool(typed.get("load_head", recipe.get("load_head", True)))
        recipe = _without_architecture(recipe, str(encoder), load_head=load_head)
    for key, value in given:
        name, _, sub_key = key.partition(".")
        if sub_key:
            if not isinstance(recipe.get(name) or {}, dict):
                raise ValueError(f"--{key}: {name} is no mapping in {path}, but {recipe[name]!r}.")
            recipe[name] = {**(recipe.get(name) or {}), sub_key: value}
        else:
            if name in RUN_LENGTHS:  # one replaces the other
                recipe = {key: kept for key, kept in recipe.items() if key not in RUN_LENGTHS}
            recipe[name] = value
    return check_recipe(recipe, places)


def _without_architecture(recipe: dict[str, Any], encoder: str, *, load_head: bool) -> dict[str, Any]:
    """A recipe without what its file says of shapes that the encoder of the command line, and its head, have."""
    encoder_config, model_config = (recipe.get(key) or {} for key in ("encoder_config", "model_config"))
    rest = {key: value for key, value in recipe.items() if key != "encoder_preset"}
    if encoder_config:
        rest["encoder_config"] = {name: value for name, value in encoder_config.items() if name in REGULARISATION}
    if model_config:
        model_class = find_model(str(recipe.get("method"))).model_class
        head = find_head(encoder, model_class) if load_head else None
        brought = () if head is None else shared_head_shape(head.model_class, model_class)
        rest["model_config"] = {name: value for name, value in model_config.items() if name not in brought}
    return rest


def find_recipe(path: str | Path) -> Path:
    """Path of a recipe: as given, or among the recipes shipped with the package."""
    path = Path(path)
    shipped = shipped_folder("recipes")
    for candidate in (path, shipped / path, shipped.parent / path):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped)) for p in shipped.glob("*/*.yaml") if p.parent.name not in LAUNCHERS)
    near = did_you_mean(str(path), known) or "."
    raise ValueError(f"There is no recipe {path}{near} Give a YAML file or one of: {', '.join(known)}.")


def shipped_folder(name: str) -> Path:
    """A folder shipped with the package: inside an installed package, or next to it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def parse_overrides(argv: Sequence[str]) -> list[tuple[str, Any]]:
    """Turns `--key value` and `--key=value` into pairs; values are read as YAML, or else are plain text.

    Raises:
        ValueError: A value is missing, or is not valid YAML and its key takes no text.
    """
    pairs = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"Expected --key value, but found {argument!r}.")
        key, equals, value = argument[2:].partition("=")
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
    except yaml.YAMLError as error:  # such as *.parquet: YAML reads the star as an alias
        hint = typing.get_type_hints(VisionTrainingArguments).get(key, Any)  # Any for values inside a dictionary
        options = (hint,) if isinstance(hint, types.GenericAlias) else (hint, *typing.get_args(hint))
        if Any in options or str in options:
            return text
        raise ValueError(f"--{key} takes no text, and {text!r} is not valid YAML: {error}") from error


def check_recipe(recipe: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Checks keys and value types of a recipe and returns it with numbers converted to the declared type.

    Args:
        places: Where each key is, for messages.

    Raises:
        ValueError: A key is unknown (the nearest one is named), or a value has the wrong type.
    """
    hints = typing.get_type_hints(VisionTrainingArguments)
    known = [f.name for f in fields(VisionTrainingArguments) if f.init]
    checked = {}
    for key, value in recipe.items():
        where = places.get(key, "the recipe")
        if key in RENAMED_KEYS:
            raise ValueError(f"The key {key!r} in {where} is now called {RENAMED_KEYS[key]!r}.")
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in {where}{did_you_mean(str(key), known) or '.'}")
        checked[key] = _checked(key, value, hints[key], where)
    return checked


def _checked(key: str, value: Any, hint: Any, where: str) -> Any:
    """Checks plain types and our own keys; TrainingArguments checks its other types itself."""
    if key in ("data", "unlabelled_data") and isinstance(value, int | float):  # a folder named 2024
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
