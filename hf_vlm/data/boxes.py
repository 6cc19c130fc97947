"""The one rule by which boxes are clipped to their image or dropped."""

from typing import Any

import numpy as np

Size = float | np.ndarray[Any, Any]

__all__ = ["MIN_BOX_SIDE", "clean_boxes"]

# Pixels: above the rounding of float32 coordinates in images up to 8192 px, below any side somebody annotated.
MIN_BOX_SIDE = 1e-3


def clean_boxes(
    boxes: np.ndarray[Any, Any], *, width: Size, height: Size
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Clip boxes to their image and find those of which something remains.

    Args:
        boxes: (n, 4), x, y, width, height in absolute pixels.
        width: Width of the image in pixels; one number, or (n,) where the boxes are of several images.
        height: Height of the image in pixels; one number, or (n,).

    Returns:
        The clipped boxes (n, 4) float32, x, y, width, height, and the mask (n,) bool of those to keep. A box is not
        kept when a coordinate is not finite, when a side is shorter than `MIN_BOX_SIDE` or negative, or when it lies
        outside the image; its row is zero.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1, keepdims=True)  # (n, 1)
    boxes = np.where(finite, boxes, 0.0)
    size = np.stack([width, height], axis=-1).astype(np.float64)  # (2,) or (n, 2)
    # Negative sides would otherwise turn into a box on the other side of the corner.
    sides = np.maximum(boxes[:, 2:], 0.0)
    low = np.clip(boxes[:, :2], 0.0, size)
    high = np.clip(boxes[:, :2] + sides, 0.0, size)
    keep = (finite & (high - low >= MIN_BOX_SIDE)).all(axis=1)
    clipped = np.concatenate([low, high - low], axis=1) * keep[:, None]  # (n, 4)
    return clipped.astype(np.float32), keep
