"""Masks in the colours of their classes, over the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.viz.sheets import class_color

__all__ = ["render_mask", "render_objects"]

OPACITY = 0.45  # of the colours


def render_mask(picture: Image.Image, mask: NDArray[Any], *, background: int | None = None) -> Image.Image:
    """The picture tinted with the colours of its mask.

    Args:
        picture: An RGB picture.
        mask: (height, width) integers that determine the colours, resized to the picture.
        background: Value that is not tinted.
    """
    resized = np.asarray(Image.fromarray(mask.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST))
    found, index = np.unique(resized, return_inverse=True)  # (n,), and (H, W) positions in it
    colors = np.array([class_color(value) for value in found.tolist()])[index].reshape(*resized.shape, 3)
    opacity = OPACITY * (resized != background)[:, :, None]
    return Image.fromarray(np.round((1 - opacity) * np.asarray(picture) + opacity * colors).astype(np.uint8))


def render_objects(picture: Image.Image, masks: NDArray[Any], class_ids: Sequence[int]) -> Image.Image:
    """The picture with each object tinted in the colour of its class, and outlined in it.

    Args:
        picture: An RGB picture.
        masks: (n, height, width) of the picture's size, those first that are on top of others.
        class_ids: n integers that determine the colours.
    """
    canvas = np.asarray(picture).astype(np.float64)
    for mask, class_id in reversed(list(zip(np.asarray(masks, dtype=bool), class_ids, strict=True))):
        color, outline = np.array(class_color(class_id)), mask & ~_interior(mask)
        canvas[mask] = (1 - OPACITY) * canvas[mask] + OPACITY * color
        canvas[outline] = color
    return Image.fromarray(np.round(canvas).astype(np.uint8))


def _interior(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels whose four neighbours are all of the mask, which ends with the picture."""
    padded = np.pad(mask, 1)
    interior: NDArray[np.bool_] = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return interior
