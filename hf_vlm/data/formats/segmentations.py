"""Bounding boxes of COCO's segmentations: polygons and run lengths."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["box_of_segmentation"]

Array = np.ndarray[Any, Any]


def box_of_segmentation(segmentation: Any) -> list[float] | None:
    """The bounding box x, y, width, height of a segmentation; None where it is empty, broken or none.

    Args:
        segmentation: Polygons, each a list x1, y1, x2, y2, ..., or run lengths {"size": [height, width], "counts"},
            down the columns, as numbers or as COCO's text.
    """
    if isinstance(segmentation, Mapping):
        return _box_of_runs(segmentation.get("size"), segmentation.get("counts"))
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str | bytes) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], Sequence) else [segmentation]
    try:
        points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
    except (ValueError, TypeError):  # an odd number, or no numbers
        return None
    if not len(points) or not np.isfinite(points).all():
        return None
    low = points.min(axis=0)
    return [*low.tolist(), *(points.max(axis=0) - low).tolist()]


def _box_of_runs(size: Any, counts: Any) -> list[float] | None:
    if not (
        isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
    ):
        return None
    height, width = size
    try:
        runs = np.asarray(_parse_runs(counts) if isinstance(counts, str) else counts)
    except ValueError:  # broken text, or lists of unequal lengths
        return None
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer) or (runs < 0).any() or runs.sum() > height * width:
        return None
    stops = runs.cumsum()[1::2]  # of the runs of ones, which are every second one
    starts = stops - runs[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    if not len(starts):
        return None
    left, right = starts[0] // height, (stops[-1] - 1) // height
    # A run that continues in the next column reaches the lower edge of its first one and the upper edge of that.
    is_whole = starts // height != (stops - 1) // height
    top = 0 if is_whole.any() else (starts % height).min()
    bottom = height - 1 if is_whole.any() else ((stops - 1) % height).max()
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]


def _parse_runs(text: str) -> list[int]:
    """Run lengths of COCO's text: numbers in pieces of 5 bits, from the fourth on differences to the last but one.

    Raises:
        ValueError: The text is broken.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for byte in text.encode("ascii"):
        piece = byte - 48
        if not 0 <= piece < 64 or shift > 50:
            raise ValueError("no run lengths of COCO")
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            if piece & 16:  # negative
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs
