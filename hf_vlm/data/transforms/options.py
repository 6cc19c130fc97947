"""Reads the options of a data transform from the plain values of a recipe."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from hf_vlm.models.nearest_name import did_you_mean

__all__ = ["as_jitter", "as_probability", "as_range", "as_size", "build_settings", "check_keys"]

Settings = TypeVar("Settings")

# Options of recipes of version 0.1, and their present names.
RENAMED_OPTIONS = {
    "flip": "flip_probability",
    "vertical_flip": "vertical_flip_probability",
    "quarter_turns": "quarter_turn_probability",
    "grey": "grayscale_probability",
    "blur": "blur_probability",
    "solarize": "solarize_probability",
}


def check_keys(values: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Refuse unknown names, with the nearest known one.

    Raises:
        ValueError: for a key of `values` that is not in `known`.
    """
    known = list(known)
    for key in values:
        if key not in known:
            if (renamed := RENAMED_OPTIONS.get(key)) in known:
                raise ValueError(f"The option {key!r} of {where} is now called {renamed!r}.")
            near = did_you_mean(str(key), known) or "."
            raise ValueError(f"Unknown option {key!r} of {where}{near} Known: {', '.join(known)}.")


def build_settings(cls: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """Build the dataclass `cls` from plain values.

    Raises:
        ValueError: for an unknown name, a missing value, or a value that `cls` refuses.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    check_keys(values, [field.name for field in fields], where=where)
    for field in fields:
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"The option {field.name!r} of {where} is missing.")
    return cls(**values)


def as_size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) in pixels from one whole number or a pair of them."""
    pair = (value, value) if isinstance(value, int) else value
    if not _is_numbers(pair, 2) or any(side != int(side) or side < 1 for side in pair):
        raise ValueError(f"{name} must be a number of pixels or a pair [height, width], got {value!r}.")
    return int(pair[0]), int(pair[1])


def as_range(name: str, value: Any, *, low: float, high: float) -> tuple[float, float]:
    """(from, to) with `low < from <= to <= high`."""
    if not _is_numbers(value, 2) or not low < value[0] <= value[1] <= high:
        raise ValueError(f"{name} must be a pair [from, to] above {low:g} and up to {high:g}, got {value!r}.")
    return float(value[0]), float(value[1])


def as_probability(name: str, value: Any) -> float:
    """A number of 0 to 1."""
    if not _is_numbers([value], 1) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}.")
    return float(value)


def as_jitter(name: str, value: Any) -> tuple[float, float, float, float]:
    """Strengths of brightness, contrast, saturation (0 to 1) and hue (0 to 0.5)."""
    limits = (1.0, 1.0, 1.0, 0.5)
    if not _is_numbers(value, 4) or any(not 0.0 <= strength <= limit for strength, limit in zip(value, limits)):
        raise ValueError(
            f"{name} must be four strengths [brightness, contrast, saturation, hue] of 0 to 1 (hue: 0 to 0.5), "
            f"got {value!r}."
        )
    brightness, contrast, saturation, hue = map(float, value)
    return brightness, contrast, saturation, hue


def _is_numbers(value: Any, length: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == length
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
    )
