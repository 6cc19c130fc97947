"""The known name that a mistyped one was meant to be."""

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(name: str, names: Iterable[str], *, offered: Callable[[str], str] = str) -> str:
    """The end of a sentence, a question that offers the most similar name; empty where none is similar.

    Args:
        name: What was typed.
        names: The known names.
        offered: Function from a known name to what is offered, such as a path.
    """
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {offered(matches[0])!r}?" if matches else ""


__all__ = ["did_you_mean"]
