"""Options that several commands share."""

import argparse

__all__ = ["add_allow_outside", "as_bool"]


def add_allow_outside(parser: argparse.ArgumentParser) -> None:
    """Adds `--allow_outside true`, as recipes have it."""
    parser.add_argument(
        "--allow_outside",
        nargs="?",
        const=True,
        default=False,
        type=as_bool,
        metavar="true",
        help="follow what annotations and tables name outside of the source's folder or host",
    )


def as_bool(text: str) -> bool:
    """The value of an option that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"
