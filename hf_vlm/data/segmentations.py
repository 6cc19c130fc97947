"""Masks of objects in COCO's two forms, which a stream carries as JSON text, one per object.

Polygons are [[x1, y1, x2, y2, ...], ...] in pixels of the image as it is displayed. Run lengths are
{"size": [height, width], "counts": ...}, down the columns and beginning with the background, as a list of numbers or
as COCO's text; where their size is another one than the image's, they cover it scaled. Objects without a mask have "".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from hf_vlm.data.io.decode import decode_mask

__all__ = [
    "FramedMask",
    "box_of_segmentation",
    "encode_mask",
    "orient_segmentation",
    "read_segmentation",
    "scale_segmentation",
    "segmentation_text",
]

Array = np.ndarray[Any, Any]

MIN_POINTS = 3  # of a polygon; four numbers are a box for the reference implementation
NUM_DECIMALS = 3  # of a pixel
MAX_PIECES = 10  # of 5 bits in a number of COCO's text
MAX_PIXELS = 2**28  # of run lengths
MAX_PERIMETER = 2**21  # pixels along polygons; rasterising takes some 50 bytes for each


class FramedMask(NamedTuple):
    """The mask of an object, as the pixels of its bounding box."""

    frame: tuple[float, float, float, float]  # left, top, right, bottom of the pixels, 0 to 1 in the image
    pixels: Array  # (h, w) bool


def segmentation_text(segmentation: Any) -> str:
    """A segmentation as JSON text; "" where it is missing, empty or broken.

    Args:
        segmentation: Polygons or run lengths as above, also as JSON text; one polygon, also as a list of points; or
            the bytes of an encoded image, also as {"bytes", "path"}, that is not 0 where the object is.
    """
    try:
        if isinstance(segmentation, str):
            segmentation = json.loads(segmentation)
        elif isinstance(segmentation, Mapping) and "bytes" in segmentation:
            segmentation = segmentation["bytes"]  # a path may lead anywhere
        if isinstance(segmentation, bytes):
            pixels = decode_mask(segmentation) != 0
            segmentation = encode_mask(pixels, offset=(0, 0), size=pixels.shape)
        found = _checked_runs(segmentation) if isinstance(segmentation, Mapping) else _polygons(segmentation)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return ""
    return json.dumps(found, separators=(",", ":")) if found else ""


def _polygons(segmentation: Any) -> list[list[float]]:
    """The polygons with an inside; ValueError for an odd number of coordinates, TypeError for what is none."""
    if segmentation is None or not len(segmentation):
        return []
    first = segmentation[0]
    are_points = isinstance(first, Sequence) and len(first) == 2 and not isinstance(first[0], Sequence)
    polygons = segmentation if isinstance(first, Sequence) and not are_points else [segmentation]
    found = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    if not all(np.isfinite(points).all() for points in found):
        raise ValueError("a coordinate is not finite")
    return [points.round(NUM_DECIMALS).ravel().tolist() for points in found if len(points) >= MIN_POINTS]


def _checked_runs(segmentation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Run lengths that fit their size, None where they have no pixel; ValueError where they do not fit."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError("no size")
    runs = _runs(counts)
    num_pixels = size[0] * size[1]
    if num_pixels > MAX_PIXELS or (runs < 0).any() or runs.sum() > num_pixels:
        raise ValueError("runs that are negative, or longer than the image")
    counts = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": list(size), "counts": counts} if runs[1::2].any() else None


def _runs(counts: Any) -> Array:
    """Run lengths (n,) int64, from a list of them or from COCO's text; ValueError for what is neither."""
    if isinstance(counts, str | bytes):
        return _parse_runs(counts.encode("ascii") if isinstance(counts, str) else counts)
    runs = np.asarray(counts)
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer):
        raise ValueError("counts are whole numbers, or text")
    return runs.astype(np.int64)


def _parse_runs(text: bytes) -> Array:
    """Run lengths of COCO's text: numbers in pieces of 5 bits, from the fourth on differences to the last but one."""
    pieces = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(pieces & 32 == 0)  # of the numbers
    if not len(pieces):
        return pieces
    if (pieces < 0).any() or (pieces > 63).any() or not len(ends) or ends[-1] != len(pieces) - 1:
        raise ValueError("no run lengths of COCO")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MAX_PIECES:
        raise ValueError("a number of more than 50 bits")
    shifts = 5 * (np.arange(len(pieces)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((pieces & 31) << shifts, starts)
    runs -= (pieces[ends] >> 4 & 1) << 5 * lengths  # of negative numbers
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def box_of_segmentation(text: str) -> list[float] | None:
    """The bounding box x, y, width, height of a segmentation in its pixels; None where there is none."""
    if not text:
        return None
    segmentation = json.loads(text)
    if isinstance(segmentation, dict):
        left, top, right, bottom = map(float, _box_of_runs(_runs(segmentation["counts"]), segmentation["size"][0]))
    else:
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
        (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [left, top, right - left, bottom - top]


def _box_of_runs(runs: Array, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels of runs, of which there are some."""
    stops = runs.cumsum()[1::2]  # of the runs of ones, which are every second one
    starts = stops - runs[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    left, right = int(starts[0]) // height, (int(stops[-1]) - 1) // height + 1
    # A run that continues in the next column reaches the lower edge of its first one and the upper edge of that.
    if (starts // height != (stops - 1) // height).any():
        return left, 0, right, height
    return left, int((starts % height).min()), right, int(((stops - 1) % height).max()) + 1


def read_segmentation(text: str, height: int, width: int) -> FramedMask | None:
    """The mask of an object in an image of this size; None where it has no pixel there.

    Only the pixels of its bounding box are rasterised, by the rule of COCO's reference implementation.

    Raises:
        ValueError: Run lengths are of an image of another shape.
    """
    segmentation = json.loads(text) if text else None
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        own_height, own_width = segmentation["size"]
        _check_shape((own_height, own_width), (height, width))
        return _framed(_runs(segmentation["counts"]), (own_height, own_width))
    polygons = [np.reshape(polygon, (-1, 2)) for polygon in segmentation]
    points = np.concatenate(polygons)
    edges = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0))
    low, high = (np.clip(edge, 0, [width, height]).astype(int) for edge in edges)
    if (high <= low).any() or np.abs(np.diff(points, axis=0)).sum() > MAX_PERIMETER:
        return None
    (left, top), (own_width, own_height) = low.tolist(), (high - low).tolist()
    runs = coco_mask.frPyObjects([(polygon - low).ravel().tolist() for polygon in polygons], own_height, own_width)
    counts = _runs(coco_mask.merge(runs)["counts"])
    return _framed(counts, (own_height, own_width), offset=(top, left), image_size=(height, width))


def _check_shape(own: tuple[int, int], image: tuple[int, int]) -> None:
    """Refuse sizes of which one is not the other one scaled, but for rounding to whole pixels."""
    ratios = own[0] / image[0], own[1] / image[1]
    if abs(ratios[0] - ratios[1]) * min(image) > max(1.0, *ratios):
        raise ValueError(f"has run lengths of {own[1]} x {own[0]} pixels, but its image is {image[1]} x {image[0]}")


def _framed(
    runs: Array, size: tuple[int, int], *, offset: tuple[int, int] = (0, 0), image_size: tuple[int, int] | None = None
) -> FramedMask | None:
    """The pixels of runs in an area of `size`, which lies at an offset in the image; None where there are none."""
    if not runs[1::2].any():
        return None
    left, top, right, bottom = _box_of_runs(runs, size[0])
    start, stop = left * size[0], right * size[0]  # of the columns
    edges = np.concatenate([[start], runs.cumsum().clip(start, stop), [stop]])
    is_object = np.arange(len(runs) + 1) % 2 == 1
    is_object[-1] = False  # what the last run leaves
    columns = np.repeat(is_object, np.diff(edges)).reshape(right - left, size[0])
    (y, x), (height, width) = offset, image_size or size
    frame = (x + left) / width, (y + top) / height, (x + right) / width, (y + bottom) / height
    return FramedMask(frame, columns.T[top:bottom])


def encode_mask(pixels: Array, *, offset: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """COCO's run lengths {"size", "counts"} of a mask, the counts as text.

    Args:
        pixels: (h, w) bool, a part of the image beyond which nothing belongs to the object.
        offset: First row and column of that part.
        size: Height and width of the image.
    """
    height, width = size
    columns = np.zeros((pixels.shape[1], height), dtype=bool)
    columns[:, offset[0] : offset[0] + pixels.shape[0]] = pixels.T
    flat = np.concatenate([[False], columns.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + offset[1] * height
    runs = np.diff(changes, prepend=0, append=height * width)
    runs = runs[:-1] if runs[-1] == 0 else runs
    counts = coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    return {"size": [height, width], "counts": counts.decode()}


def scale_segmentation(text: str, factors: Sequence[float]) -> str:
    """A segmentation in an image whose width and height are multiplied by factors."""
    segmentation = json.loads(text) if text else None
    if not isinstance(segmentation, list):  # run lengths cover an image of any size
        return text
    return segmentation_text([(np.reshape(polygon, (-1, 2)) * factors).ravel().tolist() for polygon in segmentation])


def orient_segmentation(text: str, orientation: int, size: tuple[int, int]) -> str:
    """A segmentation in an image of a stored size (width, height), after EXIF's orientation, 1 to 8, is applied."""
    segmentation = json.loads(text) if text else None
    if not segmentation or orientation == 1:
        return text
    mirrors_x, mirrors_y, transposes = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7), orientation >= 5
    if isinstance(segmentation, list):
        return segmentation_text([_orient_points(p, mirrors_x, mirrors_y, transposes, size) for p in segmentation])
    height, width = segmentation["size"]
    mask = read_segmentation(text, height, width)
    assert mask is not None
    left, top, right, bottom = (round(edge * side) for edge, side in zip(mask.frame, (width, height) * 2))
    left, top = width - right if mirrors_x else left, height - bottom if mirrors_y else top
    pixels = mask.pixels[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1]
    if transposes:
        return segmentation_text(encode_mask(pixels.T, offset=(left, top), size=(width, height)))
    return segmentation_text(encode_mask(pixels, offset=(top, left), size=(height, width)))


def _orient_points(
    polygon: Sequence[float], mirrors_x: bool, mirrors_y: bool, transposes: bool, size: tuple[int, int]
) -> list[float]:
    x, y = np.reshape(polygon, (-1, 2)).T
    x, y = size[0] - x if mirrors_x else x, size[1] - y if mirrors_y else y
    points: list[float] = np.stack([y, x] if transposes else [x, y], axis=1).ravel().tolist()
    return points
