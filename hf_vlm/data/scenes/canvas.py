"""What scenes are made of: the pictures of each split, a canvas that keeps the truth, resized and rotated digits."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

__all__ = [
    "DIGITS",
    "LUMA",
    "MIN_VISIBLE_FRACTION",
    "STRIP_WIDTH",
    "Canvas",
    "Pictures",
    "Scene",
    "load_pictures",
    "reflect",
    "rotate_and_resize",
]

Array = np.ndarray[Any, Any]

DIGITS = tuple("0123456789")
# The samples of each digit in a split, by position modulo 5, and the strips, of five, of each photograph.
SPLIT_DIGITS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
SPLIT_STRIPS = {
    "train": ((0, 1, 3), (0, 2, 4)),
    "validation": ((2,), (1,)),
    "test": ((4,), (3,)),
}
STRIP_WIDTH = 128  # pixels of the photograph
CELL = 4  # pixels of a glyph per pixel of the 8x8 digit
GLYPH_SIZE = 10 * CELL  # the digit with an empty frame one cell wide
SOLID = 128  # opacity from which a pixel belongs to the digit
MIN_VISIBLE_FRACTION = 0.2  # of a digit in a clip; what shows less is background
LUMA = np.array([0.299, 0.587, 0.114])  # brightness of red, green, blue


@dataclass(frozen=True)
class Scene:
    """A rendered image and everything that is known about it; object i is the value i + 1 of `instance_mask`."""

    image: Array  # (height, width, 3) uint8 RGB
    boxes: Array  # (n, 4) float32, x, y, width, height in pixels, tight around the visible pixels
    categories: Array  # (n,) int64, 0..9
    areas: Array  # (n,) int64, visible pixels
    track_ids: Array  # (n,) int64, the same for a digit in all frames of its clip
    instance_mask: Array  # (height, width) uint8, 0 is background
    semantic_mask: Array  # (height, width) uint8, index into SEMANTIC_CLASSES
    label: int  # category of the digit with most visible pixels


class Canvas:
    """An image being painted, with the digit that each pixel belongs to."""

    def __init__(self, background: Array) -> None:
        self.image = background  # (height, width, 3) float32 in 0..255
        self.owner = np.zeros(background.shape[:2], dtype=np.uint8)  # 1 + row of the digit, 0 is background
        self.digits: list[tuple[int, int]] = []  # (category, track id)
        self.painted: list[int] = []  # pixels of each digit when it was painted,
        self.visible: list[int] = []  # and those that later digits have left

    def brightness(self, opacity: Array, x: int, y: int) -> float:
        """Mean, 0..255, of the part of the image below a digit at this position."""
        return float(cv2.mean(_window(self.image, opacity, x, y))[:3] @ LUMA)

    def is_free(self, opacity: Array, x: int, y: int, *, max_overlap: float) -> bool:
        """Whether a digit at this position would leave enough of every other digit visible."""
        covered = self._covered(_window(self.owner, opacity, x, y), opacity >= SOLID)
        return all(
            visible - lost >= (1 - max_overlap) * painted
            for visible, lost, painted in zip(self.visible, covered, self.painted, strict=True)
        )

    def paint(self, opacity: Array, x: int, y: int, *, color: Array, category: int, track_id: int) -> None:
        """Blend a digit in; what lies outside the image is cut off."""
        height, width = self.owner.shape
        opacity = opacity[max(0, -y) : height - y, max(0, -x) : width - x]
        x, y = max(0, x), max(0, y)
        image, owner, solid = _window(self.image, opacity, x, y), _window(self.owner, opacity, x, y), opacity >= SOLID
        image += (opacity * np.float32(1 / 255))[:, :, None] * (color - image)
        covered = self._covered(owner, solid)
        self.visible = [pixels - lost for pixels, lost in zip(self.visible, covered, strict=True)]
        self.visible.append(int(np.count_nonzero(solid)))
        self.painted.append(self.visible[-1])
        self.digits.append((category, track_id))
        owner[solid] = len(self.digits)

    def scene(self) -> Scene:
        """The finished image, with the truth about every digit of which enough is visible."""
        areas = np.array(self.visible)
        shown = np.flatnonzero(areas >= np.maximum(1, MIN_VISIBLE_FRACTION * np.array(self.painted)))
        categories, track_ids = np.array(self.digits, dtype=np.int64)[shown].T
        row_of = np.zeros(len(self.digits) + 1, dtype=np.uint8)
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
            label=int(categories[areas[shown].argmax()]),
        )

    def _covered(self, owner: Array, solid: Array) -> list[int]:
        """Pixels of each digit below a new one."""
        return np.bincount((owner * solid).ravel(), minlength=len(self.digits) + 1)[1:].tolist()


@dataclass(frozen=True)
class Pictures:
    """What the scenes of one split are made of."""

    strips: tuple[Array, ...]  # each (427, STRIP_WIDTH, 3) uint8 RGB
    glyphs: tuple[Array, ...]  # one per class, (num_samples, GLYPH_SIZE, GLYPH_SIZE) uint8 opacity


@functools.cache
def load_pictures(split: str) -> Pictures:
    """The pictures of a split.

    Raises:
        ValueError: There is no such split.
    """
    if split not in SPLIT_DIGITS:
        raise ValueError(f"scenes have no split {split!r}; there are {', '.join(SPLIT_DIGITS)}")
    from sklearn.datasets import load_digits, load_sample_images  # slow to import: only where scenes are rendered

    strips = [
        np.ascontiguousarray(photo[:, number * STRIP_WIDTH : (number + 1) * STRIP_WIDTH])
        for photo, numbers in zip(load_sample_images().images, SPLIT_STRIPS[split], strict=True)
        for number in numbers
    ]
    images, classes = load_digits(return_X_y=True)
    glyphs = []
    for category in range(len(DIGITS)):
        samples = images[classes == category]
        chosen = np.isin(np.arange(len(samples)) % 5, SPLIT_DIGITS[split])
        glyphs.append(np.stack([_glyph(image.reshape(8, 8)) for image in samples[chosen]]))
    return Pictures(tuple(strips), tuple(glyphs))


def _glyph(image: Array) -> Array:
    """Opacity of a digit: the 8x8 greys (0..16) enlarged smoothly, with the stroke's edge made sharp again."""
    framed = np.pad(image / 16, 1).astype(np.float32)
    enlarged = cv2.resize(framed, (GLYPH_SIZE, GLYPH_SIZE), interpolation=cv2.INTER_CUBIC)
    return (np.clip((enlarged - 0.25) / 0.4, 0, 1) * 255).astype(np.uint8)


def rotate_and_resize(glyph: Array, size: float, angle: float, *, shift: Array | float = 0.0) -> Array:
    """The glyph at a size and angle in a square of odd side, `shift` pixels off its centre."""
    scale = size / (8 * CELL)
    radians = math.radians(angle)
    reach = GLYPH_SIZE * scale * (abs(math.cos(radians)) + abs(math.sin(radians))) / 2
    radius = math.ceil(reach) + 1
    center = (GLYPH_SIZE - 1) / 2
    matrix = cv2.getRotationMatrix2D((center, center), angle, scale)
    matrix[:, 2] = matrix[:, 2] + radius - center + shift
    return cv2.warpAffine(glyph, matrix, (2 * radius + 1, 2 * radius + 1), flags=cv2.INTER_LINEAR)


def reflect(position: Array, length: Array | float) -> Array:
    """Fold positions into 0..length as if they were reflected at both ends."""
    return length - np.abs(position % (2 * length) - length)


def _window(array: Array, opacity: Array, x: int, y: int) -> Array:
    return array[y : y + opacity.shape[0], x : x + opacity.shape[1]]
