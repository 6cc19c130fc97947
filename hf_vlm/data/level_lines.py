"""Region proposals: boxes around what looks like an object, found without labels in the level lines of an image.

A level line is the outline of what is brighter than a level, in one channel. Those along which the image changes
everywhere are outlines of objects (Desolneux, Moisan and Morel 2001, Edge detection by Helmholtz principle); the
boxes around the strongest teach a detector what an object is, as DETReg's of selective search do (arXiv 2106.04550).
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

__all__ = ["Regions", "find_regions"]

Array = np.ndarray[Any, Any]

NUM_LEVELS = 12  # of each channel, evenly spread over its quantiles
MIN_RANGE = 8  # of a channel's values, 0 to 255, to be looked at
MIN_AREA, MAX_AREA = 0.0015, 0.45  # of a box, relative to the image
MIN_SIDE = 4  # pixels
MIN_FILL = 0.15  # area within the outline, relative to its box
WEAKEST = 0.25  # fraction of an outline that may be weaker than its strength
BORDER_FACTOR = 0.6  # of the score, for each side of the image that a box touches
MIN_RELATIVE_SCORE = 0.5  # of the best region of the image
MAX_IOU = 0.6  # of two boxes: the lower scored one is left out
MAX_INSIDE = 0.9  # fraction of a box that lies within a better one
SUBPIXELS = 4  # of a side, on which outlines are traced around pixels
TOLERANCE = 0.5  # pixels that an outline may be off where its points are thinned out


class Regions(NamedTuple):
    """What looks like an object in an image, best first; all coordinates are relative to the image."""

    boxes: Array  # (n, 4) float32 left, top, right, bottom
    scores: Array  # (n,) float32, not comparable among images
    outlines: list[Array]  # of each region, (points, 2) float32 x, y; its holes belong to it


def find_regions(image: Array, *, max_regions: int = 30) -> Regions:
    """The regions of an image that look most like objects.

    The score of an outline is the gradient magnitude that three quarters of it exceed, relative to the image's mean,
    times the square root of its length: of two outlines that are as sharp, a whole object's and one of its parts', the
    longer one is the less likely to be there by chance. Outlines that fill little of their box, or are cut off by the
    border of the image, score less.

    Args:
        image: (height, width, channels) uint8; three channels are RGB.
        max_regions: Most regions.

    Returns:
        The regions, but for those that score less than half of the best.
    """
    height, width = image.shape[:2]
    channels = cv2.cvtColor(image, cv2.COLOR_RGB2LAB) if image.shape[2] == 3 else image
    channels = cv2.GaussianBlur(channels, (3, 3), 0).reshape(height, width, -1)
    outlines = _level_lines(channels, min_length=max(8, int(2 * np.sqrt(MIN_AREA * height * width))))
    if not outlines:
        return Regions(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [])
    lengths = np.array([len(outline) for outline in outlines])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    points = np.concatenate(outlines)  # (points, 2) x, y
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts) + 1  # (n, 2) pixels
    sides, limits = high - low, np.array([width, height])
    area, fill = sides.prod(1), _enclosed_areas(points, starts) / sides.prod(1)
    magnitude = _gradient_magnitude(channels)
    inside = ((points > 0) & (points < limits - 1)).all(1)  # where an image is cut off there is no outline
    visible = np.add.reduceat(inside, starts, dtype=int)  # (n,) points
    values = np.where(inside, magnitude[points[:, 1], points[:, 0]], np.inf)
    strength = _weak_quantile(values, starts, visible) / (magnitude.mean() + 1e-3)
    borders = ((low == 0).astype(int) + (high == limits)).sum(1)
    scores = strength * np.sqrt(fill * visible / (height + width)) * BORDER_FACTOR**borders
    fits = (area >= MIN_AREA * height * width) & (area <= MAX_AREA * height * width)
    fits &= (sides.min(1) >= MIN_SIDE) & (fill >= MIN_FILL)
    fits &= scores >= MIN_RELATIVE_SCORE * scores[fits].max(initial=0)
    candidates = np.flatnonzero(fits)
    boxes = (np.concatenate([low, high], axis=1) / np.tile(limits, 2)).astype(np.float32)
    kept = candidates[_keep_best(boxes[candidates], scores[candidates], max_regions)]
    traced = [(_trace(outlines[index]) / limits).astype(np.float32) for index in kept]
    return Regions(boxes[kept], scores[kept].astype(np.float32), traced)


def _level_lines(channels: Array, *, min_length: int) -> list[Array]:
    """Closed outlines (points, 2), x and y, of all level sets of the channels, but for those of fewer points."""
    outlines: list[Array] = []
    for channel in np.moveaxis(channels, 2, 0):
        if int(channel.max()) - int(channel.min()) < MIN_RANGE:
            continue
        for level in np.unique(np.quantile(channel, np.linspace(0.03, 0.97, NUM_LEVELS)).astype(int)):
            above = (channel > level).astype(np.uint8)
            # Outlines of holes are those of what is darker than the level.
            found, _ = cv2.findContours(above, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            outlines += [outline[:, 0] for outline in found if len(outline) >= min_length]
    return outlines


def _trace(points: Array) -> Array:
    """The polygon (n, 2) x, y around the pixels on and within a closed chain of pixels (points, 2)."""
    low = points.min(0)
    pixels = np.zeros((points.max(0) - low + 1)[::-1], np.uint8)
    cv2.drawContours(pixels, [points - low], -1, 1, cv2.FILLED)
    fine = cv2.resize(pixels, None, fx=SUBPIXELS, fy=SUBPIXELS, interpolation=cv2.INTER_NEAREST)
    (outline, *_), _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    thinned = cv2.approxPolyDP(outline, SUBPIXELS * TOLERANCE, closed=True)[:, 0]
    return np.asarray(low + (thinned + 0.5) / SUBPIXELS)


def _gradient_magnitude(channels: Array) -> Array:
    """Norm of the gradients of all channels at each pixel (height, width)."""
    values = channels.astype(np.float32)
    along = [cv2.Sobel(values, cv2.CV_32F, dx, 1 - dx, ksize=3).reshape(values.shape) for dx in (0, 1)]
    return np.sqrt(sum(np.square(gradient).sum(2) for gradient in along)) / 8


def _enclosed_areas(points: Array, starts: Array) -> Array:
    """Areas (n,) in pixels that closed outlines enclose, their own pixels counted by half."""
    following = np.roll(points, -1, axis=0)
    following[np.append(starts[1:], len(points)) - 1] = points[starts]
    signed = np.add.reduceat(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0], starts)
    return np.abs(signed) / 2


def _weak_quantile(values: Array, starts: Array, counts: Array) -> Array:
    """The value (n,) that all but the `WEAKEST` part of each outline's `counts` finite values reach; 0 without any."""
    lengths = np.diff(np.append(starts, len(values)))
    ordered = values[np.lexsort((values, np.repeat(np.arange(len(lengths)), lengths)))]
    return np.where(counts > 0, ordered[starts + (WEAKEST * (counts - 1)).clip(min=0).astype(int)], 0)


def _keep_best(boxes: Array, scores: Array, max_regions: int) -> list[int]:
    """Indices of the best boxes, best first, that are neither much the same as a better one nor within one."""
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in np.argsort(-scores, kind="stable"):
        low = np.maximum(boxes[kept, :2], boxes[index, :2])
        high = np.minimum(boxes[kept, 2:], boxes[index, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        same = shared > MAX_IOU * (areas[kept] + areas[index] - shared)
        if not (same | (shared > MAX_INSIDE * areas[index])).any():
            kept.append(int(index))
        if len(kept) == max_regions:
            break
    return kept
