"""The recipe of `pretrain` and `finetune`: the one that is named, or else one that fits data, encoder and machine."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


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


def read_recipe(argv: Sequence[str], *, command: str) -> dict[str, Any]:
    """The recipe that the words of a command name or, with `--data` alone, leave open, with their overrides.

    Raises:
        ValueError: if the recipe cannot be read, or neither recipe nor data are named.
    """
    from accelerate import PartialState

    from hf_vlm.deploy.next_steps import finetuning_recipe, pretraining_recipe
    from hf_vlm.training.recipe import load_recipe, parse_overrides

    name, overrides = split_recipe(argv)
    if name is None:
        given = dict(parse_overrides(overrides))
        if not given.get("data"):
            raise ValueError(f"Name images, or a recipe too: hf-vlm {command} --data ./my-images")
        if command == "pretrain":
            name, reason = pretraining_recipe(given.get("encoder"))
        else:
            name, reason = finetuning_recipe(
                given["data"],
                given.get("train_split", "train"),
                **{name: given[name] for name in ("format", "allow_outside", "encoder") if name in given},
            )
        PartialState().print(f"Recipe: {name}, as {reason}. Another: hf-vlm {command} RECIPE --data ...")
    return load_recipe(name, overrides)
