"""Images with the places of their views, and the views beside them, on one picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_vlm.training.preview import SampledViews
from hf_vlm.viz.draw import class_color, contact_sheet, in_colors, render_detections, titled_rows

__all__ = ["view_sheet"]

Array = np.ndarray[Any, Any]

SIDE = 224  # pixels of a view's height up to which it is enlarged, by a whole number
HIDDEN = 226  # grey level of masked patches
GAP = 8
FRAME = 4  # pixels around a view, in the colour of its box


def view_sheet(drawn: Sequence[SampledViews]) -> Image.Image:
    """A row an image: the image with a box a view, then the views, framed in the colours of their boxes.

    Raises:
        ValueError: There is no image.
    """
    if not drawn:
        raise ValueError("There is no image to draw views of.")
    return titled_rows([_columns(image) for image in drawn], gap=GAP)


def _columns(drawn: SampledViews) -> list[tuple[str, Image.Image]]:
    """Titles and pictures of a row: the image, each view, what is masked of each, and all local views."""
    height, width = drawn.views[0].shape[:2]
    scale = max(SIDE // height, 1)  # of local views too: the model gets them smaller
    tiles = [_tile(view, index, scale) for index, view in enumerate(drawn.views)]
    columns = [("image", _with_boxes(drawn, tiles[0].height))]
    for index, tile in enumerate(tiles):
        number = f" {index + 1}" if len(tiles) > 1 else ""
        columns.append((f"view{number}, {width} x {height}", tile))
    for index, hidden in enumerate(drawn.hidden):
        masked = np.where(hidden[:, :, None], np.uint8(HIDDEN), drawn.views[index])
        columns.append((f"{hidden.mean():.0%} masked", _tile(masked, index, scale)))
    if drawn.local_views:
        height, width = drawn.local_views[0].shape[:2]
        columns.append((f"local views, {width} x {height}", _local_views(drawn, scale, tiles[0].height)))
    return columns


def _local_views(drawn: SampledViews, scale: int, height: int) -> Image.Image:
    """All local views in as few columns as the height allows."""
    tiles = [_tile(view, len(drawn.views) + index, scale) for index, view in enumerate(drawn.local_views)]
    in_column = max((height + GAP) // (tiles[0].height + GAP), 1)
    sheet = contact_sheet(tiles, columns=-(-len(tiles) // in_column), gap=GAP)
    return sheet.crop((GAP, GAP, sheet.width - GAP, sheet.height - GAP))


def _with_boxes(drawn: SampledViews, height: int) -> Image.Image:
    scale = height / drawn.image.shape[0]
    size = max(round(drawn.image.shape[1] * scale), 1), height
    picture = Image.fromarray(in_colors(drawn.image)).resize(size, Image.Resampling.BICUBIC)
    boxes = np.array([(left, top, left + width, top + height) for top, left, height, width in drawn.boxes])
    return render_detections(picture, boxes * scale, [""] * len(boxes), class_ids=range(len(boxes)), scale=1)


def _tile(view: Array, index: int, scale: int) -> Image.Image:
    """The view with each pixel as a square of scale x scale, in a frame of its box's colour."""
    enlarged = in_colors(view).repeat(scale, axis=0).repeat(scale, axis=1)
    return ImageOps.expand(Image.fromarray(enlarged), FRAME, class_color(index))
