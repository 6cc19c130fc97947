"""Pictograms like stickers: the symbols of DejaVu Sans, which matplotlib ships, in two colours and their outlines.

Each symbol is its silhouette, a little larger than the glyph, and the lines drawn on it. A surface is a gradient of
two colours, some with the texture of a photograph or terrain of the same split. Of classes with at least
`MIN_SAMPLES_TO_SPLIT` glyphs no split shares a glyph with another; the splits share the few glyphs of other classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_vlm.data.scenes.backgrounds import STRIP_WIDTH, Strips, landscapes
from hf_vlm.data.scenes.canvas import Shape
from hf_vlm.data.scenes.colors import LUMA, hue_at, hue_of, sample_brightness
from hf_vlm.data.scenes.splits import check_split, samples_of_split

__all__ = ["Symbols"]

Array = np.ndarray[Any, Any]

SYMBOLS = {
    "cat": "🐱😸😹😺😻😼😽😾😿🙀",
    "chess piece": "♔♕♖♗♘♙♚♛♜♝♞♟",
    "flower": "✿❀❁❃✾⚘",
    "heart": "♥♡❤❥",
    "music note": "♩♪♫♬",
    "smiley": "☺☻☹😀😁😂😃😄😅😆😉😊😋😌😍😎😏😐😑😒😓😔😕😖😗😘😙😚😛😜😝😞😟😠😡😢😣😥😦😧",
    "star": "★☆✩✫✬✭✮✯✰",
    "umbrella": "☂☔",
}
MIN_SAMPLES_TO_SPLIT = 5
RADIUS = 56  # pixels, half the side of a glyph's square
CORNERS = RADIUS * np.array([[[-1.0, -1]], [[-1, 1]], [[1, -1]], [[1, 1]]])
GLYPH_LENGTH = 96  # pixels, the longer side of the glyph in its square
OUTLINE = 5  # pixels, the width
MAX_SHEAR = 0.15  # horizontal and vertical, relative
MAX_PERSPECTIVE = 0.12  # change of scale from the centre of the square to a side
MIN_BRIGHTNESS, MAX_BRIGHTNESS = 45.0, 230.0  # of 0..255: where hues still differ
MAX_HUE_CHANGE = 0.12  # turns, from one end of a gradient to the other
MAX_STEP = 30.0  # of brightness, from the middle of a gradient to an end
SHADOW_FRACTION = 0.6  # of the symbols
TEXTURE_FRACTION = 0.3  # of the symbols
TEXTURE_STRENGTH = 0.7  # of its own contrast: it stays within white and black on most surfaces
TEXTURE_SIZE = 48  # pixels of the strip


@dataclass(frozen=True)
class Symbol:
    category: int
    layers: Array  # (2, 2 * RADIUS, 2 * RADIUS) uint8, opacity and lines
    distortion: Array  # (3, 3), shear and perspective about the centre of the square

    def pose(self, size: float, angle: float, *, shift: Array | float = 0.0) -> Shape:
        """The symbol, its longer side `size` pixels when it is upright and not distorted.

        It is warped at a multiple of its resolution near that of the glyph, and reduced by area: edges are smooth.
        """
        scale, radians = size / GLYPH_LENGTH, math.radians(angle)
        cos, sin = scale * math.cos(radians), scale * math.sin(radians)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ self.distortion
        side = 2 * math.ceil(np.abs(cv2.perspectiveTransform(CORNERS, turn)).max()) + 3
        factor = max(1, round(1 / scale))
        # Between pixels and coordinates that are continuous lies half a pixel.
        matrix = _move(-0.5) @ np.diag((factor, factor, 1)) @ _move(side / 2 + shift) @ turn @ _move(0.5 - RADIUS)
        opacity, lines = (
            cv2.resize(
                cv2.warpPerspective(layer, matrix, (factor * side, factor * side), flags=cv2.INTER_LINEAR),
                (side, side),
                interpolation=cv2.INTER_AREA,
            )
            for layer in self.layers
        )
        return Shape(opacity, lines)


@dataclass(frozen=True)
class Surface:
    """A gradient of two colours, a texture on it, and the colour of lines, all in 0..255."""

    start: Array  # (3,)
    end: Array  # (3,)
    direction: float  # radians
    texture: Array | None  # (TEXTURE_SIZE, TEXTURE_SIZE, 3) float32 of zero mean
    line: Array  # (3,)
    shadow: float

    def colors(self, shape: Shape) -> Array:
        assert shape.lines is not None
        height, width = shape.opacity.shape
        across = (np.arange(width, dtype=np.float32) / width - 0.5) * math.cos(self.direction)
        down = (np.arange(height, dtype=np.float32) / height - 0.5) * math.sin(self.direction)
        position = (0.5 + across + down[:, None])[:, :, None]  # (height, width, 1), in 0..1 but for corners
        color = self.start + position * (self.end - self.start)
        if self.texture is not None:
            color += cv2.resize(self.texture, (width, height), interpolation=cv2.INTER_AREA)
        color += (shape.lines * np.float32(1 / 255))[:, :, None] * (self.line - color)
        return np.clip(color, 0, 255, out=color)


class Symbols:
    names: ClassVar = tuple(SYMBOLS)
    origin: ClassVar = "symbols of DejaVu Sans, which matplotlib ships,"
    max_extent: ClassVar = 2.0

    def __init__(self, split: str) -> None:
        self.strips: Strips = landscapes(check_split(split))
        self.glyphs = [_glyphs(symbols_of_split(name, split)) for name in self.names]

    def sample(self, rng: np.random.Generator, num_classes: int) -> Symbol:
        category = int(rng.integers(num_classes))
        samples = self.glyphs[category]
        layers = samples[rng.integers(len(samples))]
        distortion = np.eye(3)
        distortion[[0, 1], [1, 0]] = rng.uniform(-MAX_SHEAR, MAX_SHEAR, 2)
        distortion[2, :2] = rng.uniform(-MAX_PERSPECTIVE, MAX_PERSPECTIVE, 2) / RADIUS
        return Symbol(category, layers, distortion)

    def sample_finish(self, rng: np.random.Generator, below: Array, contrast: tuple[float, float]) -> Surface:
        """A surface of another hue than what lies below."""
        brightness = sample_brightness(rng, float(below @ LUMA), contrast, low=MIN_BRIGHTNESS, high=MAX_BRIGHTNESS)
        hue = hue_of(below) + rng.uniform(0.15, 0.85)
        bend, step = rng.uniform(-MAX_HUE_CHANGE, MAX_HUE_CHANGE), rng.uniform(-MAX_STEP, MAX_STEP)
        line = 0.2 * brightness if brightness > 110 else 255 - 0.2 * (255 - brightness)
        return Surface(
            start=hue_at(hue, brightness + step),
            end=hue_at(hue + bend, brightness - step),
            direction=rng.uniform(0, 2 * math.pi),
            texture=self._sample_texture(rng) if rng.random() < TEXTURE_FRACTION else None,
            line=hue_at(hue, line),
            shadow=rng.uniform(0.3, 0.6) if rng.random() < SHADOW_FRACTION else 0.0,
        )

    def plain_finish(self, color: Array) -> Surface:
        line = np.float32(0.2) * color if color @ LUMA > 110 else 255 - np.float32(0.2) * (255 - color)
        return Surface(start=color, end=color, direction=0.0, texture=None, line=line, shadow=0.4)

    def _sample_texture(self, rng: np.random.Generator) -> Array:
        strip = self.strips[rng.integers(len(self.strips))]
        y, x = (int(rng.integers(side - TEXTURE_SIZE)) for side in (strip.shape[0], STRIP_WIDTH))
        texture = strip[y : y + TEXTURE_SIZE, x : x + TEXTURE_SIZE].astype(np.float32)
        return TEXTURE_STRENGTH * (texture - texture.mean(axis=(0, 1)))


def symbols_of_split(name: str, split: str) -> Sequence[str]:
    """The characters that a split has of a class: its own, or all where there are too few to split."""
    symbols = SYMBOLS[name]
    return symbols if len(symbols) < MIN_SAMPLES_TO_SPLIT else samples_of_split(symbols, split)


def _move(offset: Array | float) -> Array:
    matrix = np.eye(3)
    matrix[:2, 2] = offset
    return matrix


def _glyphs(symbols: Sequence[str]) -> list[Array]:
    """The layers of symbols, each (2, 2 * RADIUS, 2 * RADIUS) uint8: the silhouette, and the lines on it.

    Where a glyph is drawn in lines, these are the lines; where it is solid, its outline and its holes are.
    """
    import matplotlib

    large = 4 * GLYPH_LENGTH
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), large)
    glyphs = []
    for symbol in symbols:
        page = Image.new("L", (2 * large, 2 * large))
        ImageDraw.Draw(page).text((large, large), symbol, fill=255, font=font, anchor="mm")
        left, top, width, height = cv2.boundingRect(np.asarray(page))
        glyphs.append(_layers(np.asarray(page)[top : top + height, left : left + width]))
    return glyphs


def _layers(glyph: Array) -> Array:
    """The layers of a large glyph (height, width) uint8."""
    scale = GLYPH_LENGTH / max(glyph.shape)
    size = [round(scale * side) for side in glyph.shape[::-1]]
    framed = np.zeros((2 * RADIUS, 2 * RADIUS), dtype=np.uint8)
    left, top = (RADIUS - side // 2 for side in size)
    framed[top : top + size[1], left : left + size[0]] = cv2.resize(glyph, size, interpolation=cv2.INTER_AREA)
    contours, _ = cv2.findContours((framed > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.maximum(cv2.drawContours(np.zeros_like(framed), contours, -1, 255, cv2.FILLED), framed)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * OUTLINE + 1, 2 * OUTLINE + 1))
    silhouette = cv2.GaussianBlur(cv2.dilate(filled, disk), (0, 0), 0.8)
    is_line_art = 2 * float(framed.sum()) < float(filled.sum())
    lines = np.maximum(framed, silhouette - np.minimum(silhouette, filled)) if is_line_art else 255 - framed
    return np.stack([silhouette, lines])
