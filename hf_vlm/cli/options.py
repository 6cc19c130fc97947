"""Options that several commands share, and the parser of those whose options are all known."""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_vlm.models.nearest_name import did_you_mean

if TYPE_CHECKING:
    from hf_vlm.data.tiles import Tiling

__all__ = ["Parser", "add_allow_outside", "add_bool", "add_tiling", "as_bool", "check_positive", "tiling_of"]


class Parser(argparse.ArgumentParser):
    """A parser that offers the nearest option for one that it does not know."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed


def add_allow_outside(parser: argparse.ArgumentParser) -> None:
    """Adds `--allow_outside true`, as recipes have it."""
    follows = "follow what annotations and tables name outside of the source's folder or host"
    add_bool(parser, "--allow_outside", help=follows)


def add_bool(parser: argparse.ArgumentParser, name: str, *, help: str) -> None:
    """Adds an option that is false unless it is given, alone or with `true`."""
    parser.add_argument(name, nargs="?", const=True, default=False, type=as_bool, metavar="true", help=help)


def add_tiling(parser: argparse.ArgumentParser) -> None:
    """Adds `--tile` and `--overlap`."""
    parser.add_argument("--tile", type=int, help="side in pixels of tiles to look for objects in, for large images")
    parser.add_argument("--overlap", type=float, default=0.2, help="fraction of a tile that the next one repeats")


def tiling_of(arguments: argparse.Namespace) -> "Tiling | None":
    """The tiles that `--tile` and `--overlap` ask for; ValueError where there are no such ones."""
    from hf_vlm.data.tiles import Tiling

    return None if arguments.tile is None else Tiling(arguments.tile, arguments.overlap)


def as_bool(text: str) -> bool:
    """The value of an option that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def check_positive(arguments: argparse.Namespace, *names: str, most: float = math.inf) -> None:
    """ValueError for numbers that are given and not above 0, not finite, or above `most`."""
    for name in names:
        number = getattr(arguments, name)
        if number is not None and not (0 < number < math.inf and number <= most):
            limit = "" if most == math.inf else f", and at most {most:g}"
            raise ValueError(f"--{name} {number}: it must be above 0{limit}")
