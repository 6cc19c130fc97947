"""By which convention boxes are stored, judged by all boxes of a source together.

One box that sticks out of its image is a slip; if half of them do, and all lie inside when their four numbers are read
as corners, they are corners. Read as what they are not, they would teach wrong boxes without an error.
"""

import logging
from typing import Any

import numpy as np

__all__ = ["CENTERS", "CORNERS", "XYWH", "as_stored", "as_xywh", "check_convention", "warn_of_convention"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

XYWH, CORNERS, CENTERS = "x, y, width, height", "corners x1, y1, x2, y2", "centre x, centre y, width, height"

MIN_CERTAIN = 10  # boxes; of fewer ones chance may decide
MIN_MISFIT, CERTAIN_MISFIT = 0.05, 0.3  # fraction of the boxes that leave their image as what they should be
# Boxes that do, where the others differ by half a side, as centres from low corners: only those near an edge leave
# their image then (11 % of nuclei, 29 % of blood cells), but right boxes near the other edges would not fit as those.
CERTAIN_SHIFTED = 3
MIN_FIT = 0.99  # fraction of the boxes that lie in their image as something else, or are fractions of it
SLACK = 0.01  # of a side of the image, by which boxes may leave it: tools round
MIN_SCALED, MAX_SCALE = 20, 0.55  # boxes, and fraction of the sides that all keep to, in images of another size


def check_convention(
    values: Array, *, width: Array | float, height: Array | float, source: object, declared: str = XYWH
) -> str | None:
    """What boxes look like, in words, where most of them make no sense as what they should be; None where they do.

    Args:
        values: (n, 4), the four numbers of each box as they are stored.
        width: Width of the image of each box, (n,) or one number, in the unit of the boxes: 1 where these are
            fractions of it; infinity where it is not known. Boxes of unknown images show only whether they are
            fractions.
        height: Likewise, its height.
        source: Name of the source, for messages.
        declared: What the four numbers should be: `XYWH`, `CORNERS` or `CENTERS`.

    Raises:
        ValueError: They certainly are something else.
    """
    size = np.stack(np.broadcast_arrays(width, height, values[:, 0])[:2], axis=-1).astype(np.float64)  # (n, 2)
    finite = np.isfinite(values).all(axis=1)
    in_pixels = (size != 1).any()
    if in_pixels and _are_fractions(values[finite]):
        raise ValueError(
            f"{source}: all coordinates of its {len(values)} boxes lie in 0 to 1: they are normalised by the sides of "
            f"their image, but must be {declared} in pixels; multiply them by its width and height"
        )
    known = finite & np.isfinite(size).all(axis=1)
    values, size = values[known], size[known]
    if not len(values):
        return None
    fits = {name: _fit(_as_corners(values, name), size, in_pixels) for name in (declared, CORNERS, XYWH, CENTERS)}
    num_misfits = np.count_nonzero(~fits[declared])
    likely = [name for name in fits if name != declared and fits[name].mean() >= MIN_FIT]  # of few boxes, several
    if num_misfits < MIN_MISFIT * len(values) or not likely:
        return _scale_finding(_as_corners(values, declared), size)
    finding = (
        f"{num_misfits} of {len(values)} boxes do not lie in their image as {declared}, while "
        f"{max(fits[name].mean() for name in likely):.0%} do as {' or '.join(likely)}"
    )
    num_certain = CERTAIN_SHIFTED if {declared, *likely} == {XYWH, CENTERS} else CERTAIN_MISFIT * len(values)
    if num_misfits >= num_certain and len(values) >= MIN_CERTAIN:
        raise ValueError(f"{source}: {finding}, which they therefore are; convert them to {declared}")
    return f"{finding}: if they are that, convert them to {declared}"


def as_stored(boxes: Array, convention: str) -> Array:
    """The numbers (n, 4) by which a convention stores boxes x, y, width, height (n, 4)."""
    if convention == XYWH:
        return boxes
    low, sides = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([low, low + sides] if convention == CORNERS else [low + sides / 2, sides], axis=1)


def warn_of_convention(boxes: Array, sizes: Array, source: object) -> None:
    """Log what `check_convention` finds of boxes whose images have known sizes (2, n), width and height, in a sample.

    Raises:
        ValueError: They certainly are of another convention.
    """
    finding = check_convention(boxes, width=sizes[0], height=sizes[1], source=source)
    if finding is not None:
        logger.warning("%s: %s", source, finding)


def as_xywh(values: Array, convention: str) -> Array:
    """Boxes (n, 4) of a convention as x, y, width, height."""
    first, second = values[:, :2], values[:, 2:]
    low = first - second / 2 if convention == CENTERS else first
    return np.concatenate([low, second - first if convention == CORNERS else second], axis=1)


def _are_fractions(values: Array) -> bool:
    return bool(values.any()) and bool((np.abs(values) <= 1 + SLACK).all(axis=1).mean() >= MIN_FIT)


def _as_corners(values: Array, convention: str) -> Array:
    """Left, top, right and bottom (n, 4) of boxes of a convention."""
    if convention == CORNERS:
        return values
    first, sides = values[:, :2], values[:, 2:]
    low = first - sides / 2 if convention == CENTERS else first
    return np.concatenate([low, low + sides], axis=1)


def _fit(corners: Array, size: Array, in_pixels: bool) -> Array:
    """(n,) bool, which boxes have an area and lie in their image."""
    low, high = corners[:, :2], corners[:, 2:]
    slack = SLACK * size + in_pixels
    return np.asarray(((high >= low) & (low >= -slack) & (high <= size + slack)).all(axis=1))


def _scale_finding(corners: Array, size: Array) -> str | None:
    reach = (corners[:, 2:] / size).max(axis=0)  # (2,)
    if len(corners) < MIN_SCALED or (reach > MAX_SCALE).any():
        return None
    return (
        f"all {len(corners)} boxes lie in the upper left {reach[0]:.0%} x {reach[1]:.0%} of their images: see whether "
        "they were annotated in images of another size"
    )
