"""Boxes with their names, rendered on images; Pillow only."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hf_vlm.viz.sheets import INK, PAPER, Color, class_color, load_font

__all__ = ["render_detections"]

Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last column and row included
SMALL = 320  # pixels of the longer side from which an image is not enlarged
MAX_COVERED = 0.3  # fraction of the picture that texts may cover, which else hide what is found


def render_detections(
    image: Image.Image | NDArray[Any],
    boxes: Any,
    names: Sequence[str],
    *,
    scores: Any = None,
    class_ids: Any = None,
    scale: int | None = None,
) -> Image.Image:
    """Render boxes with their names on a copy of an image.

    Args:
        image: A Pillow image, or an RGB or grey array of uint8.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        names: Text on each of the n boxes; none where it is empty, and on no box where all together would cover much
            of the picture.
        scores: (n,) numbers that follow the names.
        class_ids: (n,) integers that determine the colours; by default the names do.
        scale: Whole factor by which image and boxes are enlarged first; by default one that makes the longer side of
            a small image close to 320 pixels, and 1 for all others.

    Raises:
        ValueError: Boxes, names, scores and class_ids differ in number, or scale is not positive.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image).squeeze())
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    for option, values in (("names", names), ("scores", scores), ("class_ids", class_ids)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(values)} {option} for {len(boxes)} boxes.")
    picture, scale = _enlarged(picture.convert("RGB"), scale)
    canvas = ImageDraw.Draw(picture)
    line_width = max(2, round(max(picture.size) / 320))
    font = load_font(max(12, round(max(picture.size) / 48)))
    rectangles = [_pixels(box * scale, picture.size) for box in boxes]
    colors = [class_color(names[i] if class_ids is None else int(class_ids[i])) for i in range(len(boxes))]
    # Small boxes lie on large ones, and text on all boxes, so that none hides another.
    order = sorted(range(len(boxes)), key=lambda i: -_area(rectangles[i]))
    for i in order:
        canvas.rectangle(rectangles[i], outline=colors[i], width=line_width)
    texts = [name if scores is None else f"{name}: {scores[i]:.2f}".removeprefix(": ") for i, name in enumerate(names)]
    sizes = [_label_size(text, font) for text in texts if text]
    if sum(width * height for width, height in sizes) > MAX_COVERED * picture.width * picture.height:
        return picture
    taken: list[Rectangle] = []
    for i in order:
        if texts[i]:
            taken.append(_render_label(canvas, rectangles[i], texts[i], colors[i], font, picture.size, taken))
    return picture


def _label_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a text with its margin, in pixels."""
    margin = max(2, round(font.size / 5))
    return math.ceil(font.getlength(text)) + 2 * margin, round(font.size * 1.15) + margin


def _enlarged(picture: Image.Image, scale: int | None) -> tuple[Image.Image, int]:
    if scale is None:
        scale = max(1, SMALL // max(picture.size))
    if scale < 1:
        raise ValueError(f"scale is {scale}; pictures can be enlarged by 1, 2, ...")
    if scale == 1:
        return picture.copy(), 1
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC), scale


def _pixels(box: NDArray[np.float64], size: tuple[int, int]) -> Rectangle:
    """The pixels that a box covers: a box's x2 and y2 are the far edges of its last column and row."""
    width, height = size
    left, top = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    right, bottom = min(round(box[2]), width) - 1, min(round(box[3]), height) - 1
    return left, top, max(left, right), max(top, bottom)


def _area(rectangle: Rectangle) -> int:
    return (rectangle[2] - rectangle[0]) * (rectangle[3] - rectangle[1])


def _render_label(
    canvas: ImageDraw.ImageDraw,
    rectangle: Rectangle,
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Rectangle],
) -> Rectangle:
    """Write the text on its class's colour, at the first free position around the box."""
    width, height = _label_size(text, font)
    left, top, right, bottom = rectangle
    corners = [
        (left, top - height),
        (right + 1 - width, top - height),
        (left, bottom + 1),
        (right + 1 - width, bottom + 1),
        (left, top),
    ]
    positions = []
    for x, y in corners:
        x = min(max(x, 0), max(size[0] - width, 0))
        if y >= 0 and y + height <= size[1]:
            positions.append((x, y, x + width - 1, y + height - 1))
    free = [position for position in positions if not any(_overlap(position, other) for other in taken)]
    position = (free or positions or [(left, top, left + width - 1, top + height - 1)])[0]
    canvas.rectangle(position, fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    middle = ((position[0] + position[2] + 1) / 2, (position[1] + position[3] + 1) / 2)
    canvas.text(middle, text, fill=INK if luminance > 140 else PAPER, font=font, anchor="mm")
    return position


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
