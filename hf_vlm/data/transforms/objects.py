"""The objects of an image, and what turning, mirroring and cropping the image does to them.

Boxes are relative to the image, (left, top, right, bottom) in 0 to 1, so that nothing depends on the size at which the
image was decoded. So are the frames of masks, whose pixels stay as they were annotated until they are rasterised.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Self

import numpy as np

from hf_vlm.data.segmentations import FramedMask, encode_mask

__all__ = ["Masks", "Objects", "Span"]

Array = np.ndarray[Any, Any]

ROUNDING = 1e-6  # of a pixel


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
class Masks:
    """The masks of the objects of one image; an object of which nothing is left has no pixels."""

    frames: Array  # (n, 4) left, top, right, bottom of the pixels, relative to the image
    pixels: tuple[Array, ...]  # (h, w) bool each

    @classmethod
    def of(cls, masks: Sequence[FramedMask | None]) -> "Masks":
        """One row per object, without pixels for those that have no mask."""
        frames = [(0.0,) * 4 if mask is None else mask.frame for mask in masks]
        nothing = np.zeros((0, 0), dtype=bool)
        pixels = tuple(nothing if mask is None else mask.pixels for mask in masks)
        return cls(np.array(frames, dtype=np.float64).reshape(-1, 4), pixels)

    @property
    def are_there(self) -> Array:
        """(n,) bool, which objects have pixels."""
        return np.array([pixels.size > 0 for pixels in self.pixels], dtype=bool)

    def select(self, keep: Array) -> "Masks":
        """Those where `keep` (n,) is true."""
        return Masks(self.frames[keep], tuple(compress(self.pixels, keep)))

    def turn(self, quarter_turns: int) -> "Masks":
        """Turn counterclockwise."""
        return Masks(_turn(self.frames, quarter_turns), tuple(np.rot90(m, quarter_turns) for m in self.pixels))

    def flip(self, *, horizontal: bool, vertical: bool) -> "Masks":
        """Mirror left and right, top and bottom, or both."""
        steps = slice(None, None, -1 if vertical else 1), slice(None, None, -1 if horizontal else 1)
        return Masks(
            _flip(self.frames, horizontal=horizontal, vertical=vertical), tuple(m[steps] for m in self.pixels)
        )

    def crop(self, rows: Span, columns: Span) -> "Masks":
        """Cut to a window, now relative to its output; frames enclose the pixels that are left."""
        frames = _map(self.frames, rows, columns)
        masks = [FramedMask(tuple(frame), pixels) for frame, pixels in zip(frames.tolist(), self.pixels)]
        return Masks.of([_cut(mask, clipped) for mask, clipped in zip(masks, _clip(frames, rows, columns))])

    def shrink(self, shown: tuple[float, float]) -> "Masks":
        """Those of the fraction `shown` (height, width) of a larger image, which begins with this one."""
        return Masks(_shrink(self.frames, shown), self.pixels)

    def rasterise(self, size: tuple[int, int]) -> Array:
        """The masks (n, height, width) bool at a size: what lies at the centres of its pixels."""
        masks = np.zeros((len(self.pixels), *size), dtype=bool)
        for mask, frame, pixels in zip(masks, self.frames.tolist(), self.pixels):
            if pixels.size:
                top, left, sampled = _sample(frame, pixels, size)
                mask[top : top + sampled.shape[0], left : left + sampled.shape[1]] = sampled
        return masks

    def encode(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The masks at a size (height, width) as COCO's run lengths {"size", "counts"}, the counts as text."""
        encoded = []
        for frame, pixels in zip(self.frames.tolist(), self.pixels):
            top, left, sampled = _sample(frame, pixels, size) if pixels.size else (0, 0, pixels)
            encoded.append(encode_mask(sampled, offset=(top, left), size=size))
        return encoded


@dataclass(frozen=True)
class Objects:
    """The objects of one image, one row each."""

    boxes: Array  # (n, 4) left, top, right, bottom relative to the image
    class_labels: Array  # (n,) int64
    area: Array  # (n,) float32, pixels of the original image
    iscrowd: Array  # (n,) int64
    masks: Masks | None = None  # where they are asked for

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, keep: Array) -> "Objects":
        """Those where `keep` (n,) is true."""
        masks = None if self.masks is None else self.masks.select(keep)
        return Objects(self.boxes[keep], self.class_labels[keep], self.area[keep], self.iscrowd[keep], masks)

    def turn(self, quarter_turns: int) -> "Objects":
        """Turn counterclockwise."""
        masks = None if self.masks is None else self.masks.turn(quarter_turns)
        return dataclasses.replace(self, boxes=_turn(self.boxes, quarter_turns), masks=masks)

    def flip(self, *, horizontal: bool, vertical: bool) -> "Objects":
        """Mirror left and right, top and bottom, or both."""
        boxes = _flip(self.boxes, horizontal=horizontal, vertical=vertical)
        masks = None if self.masks is None else self.masks.flip(horizontal=horizontal, vertical=vertical)
        return dataclasses.replace(self, boxes=boxes, masks=masks)

    def shrink(self, shown: tuple[float, float]) -> "Objects":
        """Those of the fraction `shown` (height, width) of a larger image, which begins with this one."""
        masks = None if self.masks is None else self.masks.shrink(shown)
        return dataclasses.replace(self, boxes=_shrink(self.boxes, shown), masks=masks)

    def crop(self, rows: Span, columns: Span, *, min_visible: float) -> "Objects":
        """Clip to a window, now relative to its output, and keep those that show enough of their area.

        An object with a mask has to show some of its pixels too, and its box, where the window cuts it, becomes that
        of these.
        """
        boxes = _map(self.boxes, rows, columns)
        clipped = _clip(boxes, rows, columns)
        visible = _areas(clipped)
        keep = (visible > 0) & (visible >= min_visible * _areas(boxes))
        cropped = dataclasses.replace(self, boxes=clipped).select(keep)
        if cropped.masks is None:
            return cropped
        masks = cropped.masks.crop(rows, columns)
        is_cut = (clipped != boxes)[keep].any(axis=1)
        boxes = np.where(is_cut[:, None], masks.frames, cropped.boxes)
        return dataclasses.replace(cropped, boxes=boxes, masks=masks).select(masks.are_there)


def _turn(boxes: Array, quarter_turns: int) -> Array:
    for _ in range(quarter_turns):  # (x, y) goes to (y, 1 - x)
        boxes = np.stack([boxes[:, 1], 1 - boxes[:, 2], boxes[:, 3], 1 - boxes[:, 0]], axis=1)
    return boxes


def _flip(boxes: Array, *, horizontal: bool, vertical: bool) -> Array:
    left, top, right, bottom = boxes.T
    if horizontal:
        left, right = 1 - right, 1 - left
    if vertical:
        top, bottom = 1 - bottom, 1 - top
    return np.stack([left, top, right, bottom], axis=1)


def _shrink(boxes: Array, shown: tuple[float, float]) -> Array:
    shrunk: Array = boxes * [shown[1], shown[0], shown[1], shown[0]]
    return shrunk


def _map(boxes: Array, rows: Span, columns: Span) -> Array:
    """Boxes relative to the output of a window, beyond which they may reach."""
    left, top, right, bottom = boxes.T
    return np.stack([columns.map(left), rows.map(top), columns.map(right), rows.map(bottom)], axis=1)


def _clip(boxes: Array, rows: Span, columns: Span) -> Array:
    """The parts of boxes, relative to the output of a window, that show the image."""
    low = np.array([columns.shown[0], rows.shown[0]] * 2)
    high = np.array([columns.shown[1], rows.shown[1]] * 2)
    clipped: Array = np.clip(boxes, low, high)
    return clipped


def _areas(boxes: Array) -> Array:
    areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _cut(mask: FramedMask, clipped: Array) -> FramedMask | None:
    """The pixels of a mask in the part `clipped` (4,) of its frame, to whole pixels; None where there are none."""
    if not mask.pixels.size:
        return None
    (left, top, right, bottom), (height, width) = mask.frame, mask.pixels.shape
    x0, x1 = (round((edge - left) / (right - left) * width) for edge in clipped[::2].tolist())
    y0, y1 = (round((edge - top) / (bottom - top) * height) for edge in clipped[1::2].tolist())
    shown = mask.pixels[y0:y1, x0:x1]
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    if not len(rows):
        return None
    x0, x1, y0, y1 = x0 + columns[0], x0 + columns[-1] + 1, y0 + rows[0], y0 + rows[-1] + 1
    x, y = np.linspace(left, right, width + 1), np.linspace(top, bottom, height + 1)  # edges of the pixels
    # A pixel at the window's edge may stick out of it, by less than a half.
    frame = np.clip([x[x0], y[y0], x[x1], y[y1]], clipped[[0, 1, 0, 1]], clipped[[2, 3, 2, 3]])
    return FramedMask(tuple(frame.tolist()), mask.pixels[y0:y1, x0:x1])


def _sample(frame: Sequence[float], pixels: Array, size: tuple[int, int]) -> tuple[int, int, Array]:
    """What a mask shows at the centres of an image's pixels: first row and column, and the values from there on."""
    top, rows = _nearest(frame[1], frame[3], pixels.shape[0], size[0])
    left, columns = _nearest(frame[0], frame[2], pixels.shape[1], size[1])
    return top, left, pixels[rows[:, None], columns]


def _nearest(low: float, high: float, number: int, output: int) -> tuple[int, Array]:
    """The first of an axis's output pixels whose centre is between two ends, and at which of a number of parts of the
    range its centre and those of the following ones lie."""
    first, stop = (math.ceil(edge * output - 0.5 - ROUNDING) for edge in (low, high))
    centres = np.arange(first, stop) + 0.5
    indices = (centres - low * output) * (number / ((high - low) * output)) + ROUNDING
    return first, indices.astype(np.int64).clip(0, number - 1)
