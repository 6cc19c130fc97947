"""The classes of a column: from names that it declares, or from the values that occur."""

import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

__all__ = ["Categories", "make_categories", "read_categories"]


@dataclass(frozen=True)
class Categories:
    """The classes of a column: their names, and the index of each value where values are not indices."""

    names: tuple[str, ...]
    index_of: Mapping[Any, int] | None = None

    def index(self, value: Any) -> int:
        """The index of a value; -1 where it is missing, as in `datasets`."""
        if value is None or value != value:
            return -1
        return int(value) if self.index_of is None else self.index_of[value]


def read_categories(feature: Any) -> Categories | None:
    """The names that a column of categories declares; None where it declares none."""
    return Categories(tuple(feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def make_categories(values: Collection[Any]) -> Categories:
    """Categories from the values that occur; missing ones and negative numbers are none.

    Numbers are indices, from 0 on, where at least half of these occur; numbers with wider holes, as ids of products
    have, are one class per number, in their order. Other values are one class per text, in alphabetical order.

    Raises:
        ValueError: There are numbers with fractions, which are measurements.
    """
    present = {value for value in values if value is not None and value == value}
    if any(isinstance(value, float) and not value.is_integer() for value in present):
        example = next(value for value in present if isinstance(value, float) and not value.is_integer())
        raise ValueError(f"numbers with fractions, such as {example}, are no classes")
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        known = sorted({int(value) for value in present if value >= 0})
        if not known or known[-1] < 2 * len(known):
            return Categories(tuple(map(str, range(known[-1] + 1 if known else 0))))
        missing = {value: -1 for value in present if value < 0}
        return Categories(tuple(map(str, known)), missing | {number: index for index, number in enumerate(known)})
    text_of = {value: unicodedata.normalize("NFC", str(value)) for value in present}  # file systems decompose names
    names = sorted(set(text_of.values()))
    index_of = {name: index for index, name in enumerate(names)}
    return Categories(tuple(names), {value: index_of[text] for value, text in text_of.items()})
