"""What a scene is, and the canvas that paints it and keeps the truth about every pixel."""

from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

__all__ = ["MIN_VISIBLE_FRACTION", "Canvas", "Finish", "Scene", "Shape"]

Array = np.ndarray[Any, Any]

SOLID = 128  # opacity from which a pixel belongs to the object
MIN_VISIBLE_FRACTION = 0.2  # of an object in a clip; what shows less is background
SHADOW_BLUR = 1.5  # pixels, the standard deviation
SHADOW_REACH = 5  # pixels beyond the object
SHADOW_OFFSET = 2  # pixels, to the right and down


@dataclass(frozen=True)
class Shape:
    """An object at its size and angle, before it has colours."""

    opacity: Array  # (height, width) uint8
    lines: Array | None = None  # (height, width) uint8, opacity of what is drawn on it: its outline and features

    def cropped(self) -> "Shape":
        """The shape without empty rows and columns around it."""
        left, top, width, height = cv2.boundingRect(self.opacity)
        rows, columns = slice(top, top + height), slice(left, left + width)
        return Shape(self.opacity[rows, columns], None if self.lines is None else self.lines[rows, columns])


@dataclass(frozen=True)
class Scene:
    """A rendered image and everything that is known about it; object i is the value i + 1 of `instance_mask`."""

    image: Array  # (height, width, 3) uint8 RGB
    boxes: Array  # (n, 4) float32, x, y, width, height in pixels, tight around the visible pixels
    categories: Array  # (n,) int64
    areas: Array  # (n,) int64, visible pixels
    track_ids: Array  # (n,) int64, the same for an object in all frames of its clip
    instance_mask: Array  # (height, width) uint8, 0 is background
    semantic_mask: Array  # (height, width) uint8, 0 is background, else 1 + category
    colors: Array  # (n,) int64, index of the object's colour among those that have names; -1 for others
    label: int  # category of the object with most visible pixels


class Finish(Protocol):
    """What the surface of an object looks like."""

    @property
    def shadow(self) -> float:
        """Opacity, 0..1, of the shadow that the object casts."""

    def colors(self, shape: Shape) -> Array:
        """The colours, float32 in 0..255, of a shape: (3,), or (height, width, 3)."""


class Canvas:
    """An image being painted, with the object that each pixel belongs to."""

    def __init__(self, background: Array) -> None:
        self.image = background  # (height, width, 3) float32 in 0..255
        self.owner = np.zeros(background.shape[:2], dtype=np.uint8)  # 1 + row of the object, 0 is background
        self.objects: list[tuple[int, int, int]] = []  # (category, track id, color)
        self.painted: list[int] = []  # pixels of each object when it was painted,
        self.visible: list[int] = []  # and those that later objects have left

    def mean_color(self, opacity: Array, x: int, y: int) -> Array:
        """Mean, (3,) in 0..255, of the part of the image below an object at this position."""
        return np.array(cv2.mean(_window(self.image, opacity, x, y))[:3])

    def is_free(self, opacity: Array, x: int, y: int, *, max_overlap: float) -> bool:
        """Whether an object at this position would leave enough of every other object visible."""
        covered = self._covered(_window(self.owner, opacity, x, y), opacity >= SOLID)
        return all(
            visible - lost >= (1 - max_overlap) * painted
            for visible, lost, painted in zip(self.visible, covered, self.painted, strict=True)
        )

    def paint(
        self, shape: Shape, x: int, y: int, *, finish: Finish, category: int, track_id: int, color: int = -1
    ) -> None:
        """Blend an object in, with its left upper corner at column x and row y; what lies outside is cut off."""
        if finish.shadow > 0:
            framed = np.pad(shape.opacity, SHADOW_REACH)
            soft = finish.shadow * cv2.GaussianBlur(framed, (0, 0), SHADOW_BLUR)
            start = SHADOW_OFFSET - SHADOW_REACH
            self._blend(soft, x + start, y + start, np.zeros(3, dtype=np.float32))
        self._blend(shape.opacity, x, y, finish.colors(shape))
        opacity, x, y = self._inside(shape.opacity, x, y)
        owner, solid = _window(self.owner, opacity, x, y), opacity >= SOLID
        covered = self._covered(owner, solid)
        self.visible = [pixels - lost for pixels, lost in zip(self.visible, covered, strict=True)]
        self.visible.append(int(np.count_nonzero(solid)))
        self.painted.append(self.visible[-1])
        self.objects.append((category, track_id, color))
        owner[solid] = len(self.objects)

    def scene(self) -> Scene:
        """The finished image, with the truth about every object of which enough is visible."""
        areas = np.array(self.visible)
        shown = np.flatnonzero(areas >= np.maximum(1, MIN_VISIBLE_FRACTION * np.array(self.painted)))
        categories, track_ids, colors = np.array(self.objects, dtype=np.int64)[shown].T
        row_of = np.zeros(len(self.objects) + 1, dtype=np.uint8)
        row_of[shown + 1] = np.arange(1, len(shown) + 1)
        instance_mask = row_of.take(self.owner)
        boxes = [cv2.boundingRect((instance_mask == row + 1).view(np.uint8)) for row in range(len(shown))]
        return Scene(
            image=(self.image + 0.5).astype(np.uint8),
            boxes=np.array(boxes, dtype=np.float32),
            categories=categories,
            areas=areas[shown],
            track_ids=track_ids,
            instance_mask=instance_mask,
            semantic_mask=np.array([0, *(categories + 1)], dtype=np.uint8).take(instance_mask),
            colors=colors,
            label=int(categories[areas[shown].argmax()]),
        )

    def _blend(self, opacity: Array, x: int, y: int, color: Array) -> None:
        if color.ndim > 1:
            color, _, _ = self._inside(color, x, y)
        opacity, x, y = self._inside(opacity, x, y)
        image = _window(self.image, opacity, x, y)
        image += (opacity * np.float32(1 / 255))[:, :, None] * (color - image)

    def _inside(self, array: Array, x: int, y: int) -> tuple[Array, int, int]:
        """The part of an object's array that is in the image, and where it begins."""
        height, width = self.owner.shape
        return array[max(0, -y) : height - y, max(0, -x) : width - x], max(0, x), max(0, y)

    def _covered(self, owner: Array, solid: Array) -> list[int]:
        """Pixels of each object below a new one."""
        return np.bincount((owner * solid).ravel(), minlength=len(self.objects) + 1)[1:].tolist()


def _window(array: Array, opacity: Array, x: int, y: int) -> Array:
    return array[y : y + opacity.shape[0], x : x + opacity.shape[1]]
