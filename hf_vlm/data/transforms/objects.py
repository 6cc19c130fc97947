"""The objects of an image, and what turning, mirroring and cropping the image does to them.

Boxes are relative to the image, (left, top, right, bottom) in 0 to 1, so that nothing depends on the size at which the
image was decoded.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

__all__ = ["Objects", "Span"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Span:
    """One axis of a window: which pixels of the image are shown at which pixels of the output."""

    length: int  # pixels of the image
    source: tuple[int, int]  # first pixel, and the one after the last
    target: tuple[int, int]
    output: int  # pixels of the output

    @classmethod
    def of_window(cls, length: int, output: int, fraction: float, position: float) -> Self:
        """The window whose length is `fraction` of the image's, at `position` (0 to 1) in its free range.

        A window larger than the image (`fraction` above 1) shows all of it on a part of the output.
        """
        extent = max(round(length * fraction), 1)
        start = round(position * (length - extent))  # negative where the window is larger than the image
        source = max(start, 0), min(start + extent, length)
        low, high = (round((edge - start) * output / extent) for edge in source)
        low = min(low, output - 1)
        return cls(length, source, (low, max(high, low + 1)), output)

    def map(self, positions: Array) -> Array:
        """Relative positions in the image to those in the output, 0 to 1; what is not shown stays outside."""
        scale = (self.target[1] - self.target[0]) / (self.source[1] - self.source[0])
        return (self.target[0] + (positions * self.length - self.source[0]) * scale) / self.output

    @property
    def shown(self) -> tuple[float, float]:
        """The part of the output that shows the image: its two ends, 0 to 1."""
        return self.target[0] / self.output, self.target[1] / self.output


@dataclass(frozen=True)
class Objects:
    """The objects of one image, one row each."""

    boxes: Array  # (n, 4) left, top, right, bottom relative to the image
    class_labels: Array  # (n,) int64
    area: Array  # (n,) float32, pixels of the original image
    iscrowd: Array  # (n,) int64

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, keep: Array) -> "Objects":
        """Those where `keep` (n,) is true."""
        return Objects(self.boxes[keep], self.class_labels[keep], self.area[keep], self.iscrowd[keep])

    def turn(self, quarter_turns: int) -> "Objects":
        """Turn counterclockwise."""
        boxes = self.boxes
        for _ in range(quarter_turns):  # (x, y) goes to (y, 1 - x)
            boxes = np.stack([boxes[:, 1], 1 - boxes[:, 2], boxes[:, 3], 1 - boxes[:, 0]], axis=1)
        return dataclasses.replace(self, boxes=boxes)

    def flip(self, *, horizontal: bool, vertical: bool) -> "Objects":
        """Mirror left and right, top and bottom, or both."""
        left, top, right, bottom = self.boxes.T
        if horizontal:
            left, right = 1 - right, 1 - left
        if vertical:
            top, bottom = 1 - bottom, 1 - top
        return dataclasses.replace(self, boxes=np.stack([left, top, right, bottom], axis=1))

    def crop(self, rows: Span, columns: Span, *, min_visible: float) -> "Objects":
        """Clip to a window, now relative to its output, and keep those that show enough of their area."""
        left, top, right, bottom = self.boxes.T
        boxes = np.stack([columns.map(left), rows.map(top), columns.map(right), rows.map(bottom)], axis=1)
        low = np.array([columns.shown[0], rows.shown[0]] * 2)
        high = np.array([columns.shown[1], rows.shown[1]] * 2)
        clipped = np.clip(boxes, low, high)
        visible = _areas(clipped)
        keep = (visible > 0) & (visible >= min_visible * _areas(boxes))
        return dataclasses.replace(self, boxes=clipped).select(keep)


def _areas(boxes: Array) -> Array:
    areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas
