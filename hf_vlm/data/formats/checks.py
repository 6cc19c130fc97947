"""What is wrong with the labels of a source, found when it is opened and said once."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_vlm.data.boxes import MIN_BOX_SIDE, clean_boxes
from hf_vlm.data.io.messages import summarise

__all__ = ["check_boxes"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

TOLERANCE = 0.5  # pixels that a box may stick out: annotation tools round


def check_boxes(
    boxes: Array,
    categories: Array,
    *,
    width: Array | float,
    height: Array | float,
    class_names: Sequence[str],
    name_of: Callable[[int], str],
    source: object,
) -> Array:
    """Check all boxes of a source, and log one warning that sums up what was found.

    Args:
        boxes: (n, 4), x, y, width, height in pixels.
        categories: (n,), index into class_names.
        width: Of the image of each box, (n,), or infinity where that is not known.
        height: Likewise.
        name_of: Names the box at an index, for messages.
        source: Named in messages.

    Returns:
        (n,) bool, false for the boxes of which nothing remains in their image.

    Raises:
        ValueError: A category is out of range.
    """
    unknown = np.flatnonzero((categories < 0) | (categories >= len(class_names)))
    if len(unknown):
        examples = summarise(f"{categories[index]} of {name_of(index)}" for index in unknown.tolist())
        raise ValueError(
            f"{source}: {len(unknown)} boxes have a category outside 0..{len(class_names) - 1}, which number the "
            f"{len(class_names)} classes: {examples}"
        )
    _, keep = clean_boxes(boxes, width=width, height=height)
    with np.errstate(invalid="ignore"):  # boxes that are not finite are dropped anyway
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        size = np.stack([width, height], axis=-1) + TOLERANCE
        outside = keep & ((low < -TOLERANCE).any(axis=1) | (high > size).any(axis=1))
    findings = []
    if not keep.all():
        examples = summarise(f"{name_of(index)} {boxes[index].tolist()}" for index in np.flatnonzero(~keep).tolist())
        findings.append(
            f"{np.count_nonzero(~keep)} of {len(boxes)} boxes are dropped, with a side below {MIN_BOX_SIDE} pixels or "
            f"outside their image: {examples}"
        )
    if outside.any():
        examples = summarise(f"{name_of(index)} {boxes[index].tolist()}" for index in np.flatnonzero(outside).tolist())
        findings.append(f"{np.count_nonzero(outside)} boxes stick out of their image and will be clipped: {examples}")
        if outside.sum() > 0.5 * len(boxes):
            findings.append("so many that they may be corners; a bbox must be [x, y, width, height] in pixels")
    empty = [name for index, name in enumerate(class_names) if not (categories[keep] == index).any()]
    if empty:
        findings.append(f"{len(empty)} of {len(class_names)} classes have no box: {summarise(empty)}")
    if findings:
        logger.warning("%s: %s", source, "; ".join(findings))
    return keep
