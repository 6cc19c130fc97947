"""One line of the report of `hf-vlm doctor`."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        level: `wrong` for what makes hf_vlm fail, `warning` for what may.
        text: What was found.
        advice: What to type, or do.
    """

    level: Literal["ok", "warning", "wrong"]
    text: str
    advice: str = ""
