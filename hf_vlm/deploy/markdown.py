"""Text of others in Markdown, shown as it is: names of classes and runs are no headings, links, pictures or code."""

import re

from hf_vlm.data.io.messages import printable

__all__ = ["code_span", "fence_of", "markdown"]

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What makes formatting, formulas, cells of tables or links; underscores do between words alone.
SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")


def markdown(text: object) -> str:
    """A text for one line of Markdown that is shown as it is."""
    line = " ".join(printable(str(text)).split())
    return SPECIAL.sub(r"\\\g<0>", re.sub("[&<>]", lambda found: ENTITIES[found[0]], line))


def code_span(text: object) -> str:
    """A text as code within a line, whatever backticks it has."""
    line = " ".join(printable(str(text)).split())
    ticks = "`" * (1 + _longest_run(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fence_of(text: str) -> str:
    """The backticks before and after a block of code, more than it has in a row."""
    return "`" * max(3, 1 + _longest_run(text))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
