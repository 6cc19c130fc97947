"""What the masks of a source hold: pixels of each class, and values that are no class."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vlm.data.inspection.report import Issue, MaskReport
from hf_vlm.data.io.decode import BadImageError, decode_mask
from hf_vlm.data.masks import IGNORED

__all__ = ["PixelCounts", "count_values"]

NUM_VALUES_SHOWN = 5


def count_values(mask: Any) -> dict[int, int] | None:
    """Number of pixels of each value of an encoded mask; None where it cannot be read."""
    try:
        values = decode_mask(mask)
    except BadImageError:
        return None
    if values.min(initial=0) < 0 or values.max(initial=0) > IGNORED:  # colours, or more bits
        found, counts = np.unique(values, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist()))
    counts = np.bincount(values.ravel())
    return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}


@dataclass
class PixelCounts:
    """Pixels by value, over the masks of images."""

    pixels: Counter[int] = field(default_factory=Counter)
    images: dict[int, list[str]] = field(default_factory=dict)  # names of those that have a value

    def add(self, name: str, counts: dict[int, int]) -> None:
        """Add the values of the mask of an image."""
        self.pixels.update(counts)
        for value in counts:
            self.images.setdefault(value, []).append(name)

    def report(self, names: list[str] | None) -> MaskReport | None:
        """The pixels of each class, by its name or else by its value; None where no mask was read."""
        if not self.pixels:
            return None
        values = range(len(names)) if names is not None else sorted(self.pixels.keys() - {IGNORED})
        labels = names if names is not None else [str(value) for value in values]
        return MaskReport(
            class_pixels={label: self.pixels[value] for label, value in zip(labels, values)},
            class_images={label: len(self.images.get(value, [])) for label, value in zip(labels, values)},
            pixels_without_class=self.pixels[IGNORED],
        )

    def issues(self, names: list[str] | None) -> list[Issue]:
        """Values that are no class, and classes that no mask shows."""
        if names is None or not self.pixels:
            return []
        unknown = [value for value, _ in self.pixels.most_common() if not 0 <= value < len(names) and value != IGNORED]
        where = list(dict.fromkeys(name for value in unknown for name in self.images[value]))
        shown = ", ".join(map(str, unknown[:NUM_VALUES_SHOWN])) + ", ..." * (len(unknown) > NUM_VALUES_SHOWN)
        empty = [name for value, name in enumerate(names) if not self.pixels[value]]
        found = [
            Issue(
                f"pixels of masks with values that are none of the {len(names)} classes: {shown}",
                sum(self.pixels[value] for value in unknown),
                where,
            ),
            Issue("classes without a pixel", len(empty), empty),
        ]
        return [issue for issue in found if issue.count]
