"""Images with the positions of their views, and the views beside them, on one picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_vlm.training.preview import SampledViews
from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.sheets import class_color, contact_sheet, in_colors, titled_rows

__all__ = ["view_sheet"]

Array = np.ndarray[Any, Any]

SIDE = 224  # pixels of a view's height up to which it is enlarged, by a whole number
MASKED = 226  # grey level of masked patches
GAP = 8
FRAME = 4  # pixels around a view, in the colour of its box


def view_sheet(sampled: Sequence[SampledViews]) -> Image.Image:
    """One row per image: the image with one box per view, then the views, framed in the colours of their boxes.

    Raises:
        ValueError: There is no image.
    """
    if not sampled:
        raise ValueError("There is no image to plot views of.")
    return titled_rows([_columns(image) for image in sampled], gap=GAP)


def _columns(sampled: SampledViews) -> list[tuple[str, Image.Image]]:
    """Titles and pictures of a row: the image, each view, each masked view, and all local views."""
    height, width = sampled.views[0].shape[:2]
    scale = max(SIDE // height, 1)  # for local views too: the model gets them smaller
    tiles = [_tile(view, index, scale) for index, view in enumerate(sampled.views)]
    columns = [("image", _with_boxes(sampled, tiles[0].height))]
    for index, tile in enumerate(tiles):
        number = f" {index + 1}" if len(tiles) > 1 else ""
        columns.append((f"view{number}, {width} x {height}", tile))
    for index, mask in enumerate(sampled.masks):
        masked = np.where(mask[:, :, None], np.uint8(MASKED), sampled.views[index])
        columns.append((f"{mask.mean():.0%} masked", _tile(masked, index, scale)))
    if sampled.local_views:
        height, width = sampled.local_views[0].shape[:2]
        columns.append((f"local views, {width} x {height}", _local_views(sampled, scale, tiles[0].height)))
    return columns


def _local_views(sampled: SampledViews, scale: int, height: int) -> Image.Image:
    """All local views in as few columns as the height allows."""
    tiles = [_tile(view, len(sampled.views) + index, scale) for index, view in enumerate(sampled.local_views)]
    in_column = max((height + GAP) // (tiles[0].height + GAP), 1)
    sheet = contact_sheet(tiles, columns=-(-len(tiles) // in_column), gap=GAP)
    return sheet.crop((GAP, GAP, sheet.width - GAP, sheet.height - GAP))


def _with_boxes(sampled: SampledViews, height: int) -> Image.Image:
    scale = height / sampled.image.shape[0]
    size = max(round(sampled.image.shape[1] * scale), 1), height
    picture = Image.fromarray(in_colors(sampled.image)).resize(size, Image.Resampling.BICUBIC)
    boxes = np.array([(left, top, left + width, top + height) for top, left, height, width in sampled.boxes])
    return render_detections(picture, boxes * scale, [""] * len(boxes), class_ids=range(len(boxes)), scale=1)


def _tile(view: Array, index: int, scale: int) -> Image.Image:
    """The view with each pixel as a square of scale x scale, in a frame of its box's colour."""
    enlarged = in_colors(view).repeat(scale, axis=0).repeat(scale, axis=1)
    return ImageOps.expand(Image.fromarray(enlarged), FRAME, class_color(index))
