"""Masks of the objects of Pascal VOC: images in `SegmentationObject` that number the objects of an xml file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.io.decode import BadImageError, decode_mask
from hf_vlm.data.io.files import map_files
from hf_vlm.data.segmentations import encode_mask

__all__ = ["read_object_masks"]

Array = np.ndarray[Any, Any]

FOLDER = "SegmentationObject"
BORDER = 255  # around objects, of none


def read_object_masks(files: Sequence[Path], num_objects: Sequence[int]) -> list[list[str]]:
    """The segmentations of the objects of xml files in `Annotations`, as text, "" where they have none.

    The first object of an xml file has the value 1, as an index or as the colour of that index in VOC's palette. Where
    an image has more values than there are objects, it is not known which is whose, and none has a mask.
    """
    paths = [file.parent.parent / FOLDER / f"{file.stem}.png" for file in files]
    if not any(folder.is_dir() for folder in {path.parent for path in paths}):
        return [[""] * number for number in num_objects]
    return map_files(_segmentations, list(zip(paths, num_objects)), "Reading masks")


def _segmentations(image: tuple[Path, int]) -> list[str]:
    """The segmentations of a number of objects, from an image of their masks."""
    path, number = image
    values = _read_values(path)
    if values is None or values[values != BORDER].max(initial=0) > number:
        return [""] * number
    texts = []
    for index in range(1, number + 1):
        pixels = values == index
        x, y, width, height = cv2.boundingRect(pixels.view(np.uint8))
        part = pixels[y : y + height, x : x + width]
        texts.append(json.dumps(encode_mask(part, offset=(y, x), size=pixels.shape)) if part.size else "")
    return texts


def _read_values(path: Path) -> Array | None:
    try:
        values = decode_mask(str(path))
    except BadImageError:
        return None
    if values.max(initial=0) <= BORDER:
        return values
    palette = voc_palette()
    order = palette.argsort()
    positions = order[np.searchsorted(palette[order], values).clip(max=BORDER)]
    return positions if (palette[positions] == values).all() else None


def voc_palette() -> Array:
    """The colours (256,) of VOC's palette, as 65536 red + 256 green + blue: bits of the index, by turns."""
    index = np.arange(256)
    colors = np.zeros(256, dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colors |= (index >> 3 * bit + channel & 1) << (7 - bit) + 8 * (2 - channel)
    return colors
