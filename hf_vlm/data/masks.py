"""Reads the classes of pixels out of the column `mask`."""

from typing import Any

import numpy as np

from hf_vlm.data.io.decode import decode_mask

__all__ = ["IGNORED", "read_classes"]

IGNORED = 255  # of pixels without a class, which neither loss nor metrics count


def read_classes(example: dict[str, Any], num_classes: int) -> np.ndarray[Any, Any]:
    """The class of each pixel (height, width) uint8, from 0; 255 where there is none.

    Raises:
        BadImageError: The mask cannot be decoded.
        ValueError: There is no mask, or it has values that are no class.
    """
    if example.get("mask") is None:
        raise ValueError(
            f"Image {example.get('image_id')} has no mask: semantic segmentation needs one of each image."
        )
    values = decode_mask(example["mask"])
    is_class = (values >= 0) & (values < num_classes) | (values == IGNORED)
    if not is_class.all():
        advice = "Compare the names of the source's classes with the mask's values."
        if values.max() > IGNORED:
            advice = "If these are colours, name them in a labelmap.txt or a class_dict.csv in the folder of the data."
        raise ValueError(
            f"The mask of image {example.get('image_id')} has the value {values[~is_class][0]}, but there are "
            f"{num_classes} classes, 0 to {num_classes - 1}, and {IGNORED} for pixels without one. {advice}"
        )
    return values.astype(np.uint8)
