"""Colours of objects, at a contrast to what lies below them."""

import colorsys
from typing import Any

import numpy as np

__all__ = ["LUMA", "NAMED_COLORS", "hue_at", "hue_of", "sample_brightness"]

Array = np.ndarray[Any, Any]

NAMED_COLORS = {  # that people call by these names whatever lies beside them
    "red": (215, 35, 35),
    "green": (40, 165, 55),
    "blue": (45, 75, 225),
    "yellow": (245, 225, 50),
    "purple": (150, 55, 185),
    "white": (250, 250, 250),
}
LUMA = np.array([0.299, 0.587, 0.114])  # brightness of red, green, blue


def sample_brightness(
    rng: np.random.Generator, below: float, contrast: tuple[float, float], *, low: float = 0.0, high: float = 255.0
) -> float:
    """A brightness that differs from the one below by `contrast`, a range in 0..1.

    It is darker or brighter, either with probability 1/2 if both are in low..high, else where there is more room.
    """
    difference = 255 * rng.uniform(*contrast)
    darker, brighter = below - difference, below + difference
    both = darker >= low and brighter <= high
    is_dark = rng.random() < 0.5 if both else darker - low >= high - brighter
    return darker if is_dark else brighter


def hue_of(color: Array) -> float:
    """The hue in turns, 0 is red, of a colour (3,) in 0..255."""
    return colorsys.rgb_to_hsv(*color.tolist())[0]


def hue_at(hue: float, brightness: float) -> Array:
    """The most saturated colour, (3,) float32 in 0..255, of a hue in turns that is this bright.

    It is the pure hue, mixed with black or with white.
    """
    pure = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, 1.0, 1.0), dtype=np.float32)
    own, brightness = float(pure @ LUMA), min(max(brightness, 0.0), 255.0)
    if brightness < own:
        return pure * np.float32(brightness / own)
    return pure + (255 - pure) * np.float32((brightness - own) / (255 - own))
