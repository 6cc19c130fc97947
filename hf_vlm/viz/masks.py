"""Masks in the colours of their classes, over the image."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_vlm.viz.sheets import class_color

__all__ = ["render_mask"]

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
