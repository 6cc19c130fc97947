"""Handwritten digits of one colour: the 1,797 samples of 8x8 pixels that scikit-learn ships."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np

from hf_vlm.data.scenes.canvas import Shape
from hf_vlm.data.scenes.colors import LUMA, sample_brightness
from hf_vlm.data.scenes.splits import check_split, samples_of_split

__all__ = ["Digits"]

Array = np.ndarray[Any, Any]

CELL = 4  # pixels of a glyph per pixel of the 8x8 digit
GLYPH_SIZE = 10 * CELL  # the digit with an empty frame one cell wide


@dataclass(frozen=True)
class Digit:
    category: int
    glyph: Array  # (GLYPH_SIZE, GLYPH_SIZE) uint8 opacity

    def pose(self, size: float, angle: float, *, shift: Array | float = 0.0) -> Shape:
        """The digit, `size` pixels high when upright."""
        scale = size / (8 * CELL)
        radians = math.radians(angle)
        reach = GLYPH_SIZE * scale * (abs(math.cos(radians)) + abs(math.sin(radians))) / 2
        radius = math.ceil(reach) + 1
        center = (GLYPH_SIZE - 1) / 2
        matrix = cv2.getRotationMatrix2D((center, center), angle, scale)
        matrix[:, 2] = matrix[:, 2] + radius - center + shift
        return Shape(cv2.warpAffine(self.glyph, matrix, (2 * radius + 1, 2 * radius + 1), flags=cv2.INTER_LINEAR))


@dataclass(frozen=True)
class Uniform:
    """One colour, without a shadow."""

    color: Array  # (3,) float32 in 0..255
    shadow: ClassVar[float] = 0.0

    def colors(self, shape: Shape) -> Array:
        return self.color


class Digits:
    names: ClassVar = tuple("0123456789")
    origin: ClassVar = "handwritten digits that scikit-learn ships"
    max_extent: ClassVar = 1.8

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits  # slow to import: only where scenes are rendered

        check_split(split)
        images, classes = load_digits(return_X_y=True)
        self.glyphs = [
            [_glyph(image.reshape(8, 8)) for image in samples_of_split(images[classes == category], split)]
            for category in range(len(self.names))
        ]

    def sample(self, rng: np.random.Generator, num_classes: int) -> Digit:
        category = int(rng.integers(num_classes))
        samples = self.glyphs[category]
        return Digit(category, samples[rng.integers(len(samples))])

    def sample_finish(self, rng: np.random.Generator, below: Array, contrast: tuple[float, float]) -> Uniform:
        brightness = sample_brightness(rng, float(below @ LUMA), contrast)
        color = rng.uniform(-90, 90, 3)
        color += brightness - color @ LUMA
        return Uniform(np.minimum(np.maximum(color, 0), 255).astype(np.float32))

    def plain_finish(self, color: Array) -> Uniform:
        return Uniform(color)


def _glyph(image: Array) -> Array:
    """Opacity of a digit: the 8x8 greys (0..16) enlarged smoothly, with the stroke's edge made sharp again."""
    framed = np.pad(image / 16, 1).astype(np.float32)
    enlarged = cv2.resize(framed, (GLYPH_SIZE, GLYPH_SIZE), interpolation=cv2.INTER_CUBIC)
    return (np.clip((enlarged - 0.25) / 0.4, 0, 1) * 255).astype(np.uint8)
