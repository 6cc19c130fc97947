"""The recipe of `pretrain` and `finetune`: the one that is named, or else one that fits data, encoder and machine."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from hf_vlm.data.source import Source

# Keys that say which images are trained on, and what `open_source` calls them. Recipes to choose from leave them to
# the command, so that the images that they are chosen by are those of the run.
OPENED_BY = {
    "data": "source",
    "train_split": "split",
    "format": "format",
    "num_train_examples": "num_samples",
    "allow_outside": "allow_outside",
}


def help_if_asked(parser: argparse.ArgumentParser, argv: Sequence[str], *, example: str, fits: str) -> None:
    """Prints the help of a command that takes a recipe, and ends it, where it is asked for or nothing is given.

    Args:
        parser: Parser of the command, without arguments.
        argv: Words of the command.
        example: Name of a shipped recipe.
        fits: What the recipe is chosen by where none is named.
    """
    parser.add_argument(
        "recipe",
        nargs="?",
        help=f"a YAML file, or the name of a shipped recipe such as {example}; by default one that fits {fits}",
    )
    if not argv or {"-h", "--help"} & set(argv):
        _print_recipe_help(parser)


def _print_recipe_help(parser: argparse.ArgumentParser) -> NoReturn:
    from hf_vlm.training.recipe_help import format_keys

    parser.print_help()
    print(f"\nKeys of a recipe, each of which is an option too:\n\n{format_keys()}")
    raise SystemExit(0)


def split_recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, where the first word is one, and the other words, which override its keys."""
    words = list(argv)
    return (None, words) if not words or words[0].startswith("-") else (words[0], words[1:])


def read_recipe(argv: Sequence[str], *, command: str) -> "tuple[dict[str, Any], Source | None]":
    """The recipe that the words of a command name or, with `--data` alone, leave open, with their overrides.

    Returns:
        The recipe, and the images to train on where the recipe was chosen by them, opened as it says.

    Raises:
        ValueError: if the recipe cannot be read, or neither recipe nor data are named, or data to choose it by cannot
            be opened.
    """
    from accelerate import PartialState

    from hf_vlm.data.sources import open_source
    from hf_vlm.deploy.next_steps import finetuning_recipe, pretraining_recipe
    from hf_vlm.training.recipe import COMMAND_LINE, check_recipe, load_recipe, parse_overrides

    name, overrides = split_recipe(argv)
    if name is not None:
        return load_recipe(name, overrides), None
    given = {key: value for key, value in parse_overrides(overrides) if key in (*OPENED_BY, "encoder")}
    given = check_recipe(given, dict.fromkeys(given, COMMAND_LINE))
    if not given.get("data"):
        raise ValueError(f"Name images, or a recipe too: hf-vlm {command} --data ./my-images")
    source = open_source(**{OPENED_BY[key]: value for key, value in given.items() if key in OPENED_BY})
    choose = pretraining_recipe if command == "pretrain" else finetuning_recipe
    name, reason = choose(source, given.get("encoder"))
    PartialState().print(f"Recipe: {name}, as {reason}. Another: hf-vlm {command} RECIPE --data ...")
    return load_recipe(name, overrides), source
