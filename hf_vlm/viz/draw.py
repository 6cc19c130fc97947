"""Boxes drawn on images, and such images side by side and on sheets; Pillow only."""

import colorsys
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "captioned",
    "class_color",
    "contact_sheet",
    "in_colors",
    "legend",
    "render_detections",
    "side_by_side",
    "titled_rows",
]

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last column and row included
SMALL = 320  # pixels of the longer side from which an image can be looked at as it is
INK, PAPER = (33, 33, 33), (255, 255, 255)


def render_detections(
    image: Image.Image | NDArray[Any],
    boxes: Any,
    names: Sequence[str],
    *,
    scores: Any = None,
    class_ids: Any = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw boxes with their names on a copy of an image.

    Args:
        image: A Pillow image, or an RGB or grey array of uint8.
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image.
        names: Text on each of the n boxes; none where it is empty.
        scores: (n,) numbers that follow the names.
        class_ids: (n,) integers that choose the colours; the names choose them otherwise.
        scale: Whole factor by which image and boxes are enlarged first; by default one that makes the longer side of
            a small image close to 320 pixels, and 1 for all others.

    Raises:
        ValueError: Where boxes, names, scores and class_ids are not equally many, or scale is not positive.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image).squeeze())
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    for what, values in (("names", names), ("scores", scores), ("class_ids", class_ids)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(values)} {what} for {len(boxes)} boxes.")
    picture, scale = _enlarged(picture.convert("RGB"), scale)
    canvas = ImageDraw.Draw(picture)
    line_width = max(2, round(max(picture.size) / 320))
    font = _font(max(12, round(max(picture.size) / 48)))
    rectangles = [_pixels(box * scale, picture.size) for box in boxes]
    colors = [class_color(names[i] if class_ids is None else int(class_ids[i])) for i in range(len(boxes))]
    # Small boxes lie on large ones, and text on all boxes, so that none hides another.
    order = sorted(range(len(boxes)), key=lambda i: -_area(rectangles[i]))
    for i in order:
        canvas.rectangle(rectangles[i], outline=colors[i], width=line_width)
    taken: list[Rectangle] = []
    for i in order:
        text = names[i] if scores is None else f"{names[i]}: {float(scores[i]):.2f}".removeprefix(": ")
        if text:
            taken.append(_render_label(canvas, rectangles[i], text, colors[i], font, picture.size, taken))
    return picture


def in_colors(image: NDArray[Any]) -> NDArray[Any]:
    """An image (height, width, channels) with three channels; of other numbers than three the first, as grey."""
    return image if image.shape[2] == 3 else image[:, :, :1].repeat(3, axis=2)


def class_color(key: int | str) -> Color:
    """A class's colour, the same in every picture: neighbouring numbers get hues far apart."""
    number = key if isinstance(key, int) else zlib.crc32(key.encode())
    hue = (0.02 + number * (math.sqrt(5) - 1) / 2) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.56, 0.44, 0.68)[number // 8 % 3], 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def side_by_side(
    predicted: Image.Image, truth: Image.Image, *, captions: tuple[str, str] = ("predicted", "ground truth")
) -> Image.Image:
    """Two pictures beside each other under their captions, brought to the height of the taller one."""
    height = max(predicted.height, truth.height)
    pictures = [
        picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.BICUBIC)
        for picture in (predicted, truth)
    ]
    font = _font(max(12, round(height / 24)))
    band = round(1.8 * font.size)
    gap = max(4, height // 80)
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures) + gap, height + band), PAPER)
    canvas, left = ImageDraw.Draw(sheet), 0
    for picture, caption in zip(pictures, captions, strict=True):
        canvas.text((left + picture.width / 2, band / 2), caption, fill=INK, font=font, anchor="mm")
        sheet.paste(picture, (left, band))
        left += picture.width + gap
    return sheet


def captioned(picture: Image.Image, caption: str, *, font_size: int | None = None) -> Image.Image:
    """A picture above a line of text, which is cut to its width; its size follows the width unless it is given."""
    font = _font(font_size or max(12, round(picture.width / 24)))
    shown = caption
    while shown and font.getlength(shown) > picture.width:
        caption = caption[:-1]
        shown = caption + "..." if caption else ""
    sheet = Image.new("RGB", (picture.width, picture.height + round(1.5 * font.size)), PAPER)
    sheet.paste(picture)
    ImageDraw.Draw(sheet).text((0, picture.height + 0.75 * font.size), shown, fill=INK, font=font, anchor="lm")
    return sheet


def contact_sheet(images: Sequence[Image.Image], *, columns: int, gap: int = 12) -> Image.Image:
    """Pictures in rows of `columns`, each centred in a cell of the largest one's size, on white.

    Raises:
        ValueError: Where there is no picture or columns is not positive.
    """
    if not images or columns < 1:
        raise ValueError(f"A sheet needs at least one picture and one column, not {len(images)} and {columns}.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (max(sizes) for sizes in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for i, image in enumerate(images):
        left = gap + i % columns * (width + gap) + (width - image.width) // 2
        top = gap + i // columns * (height + gap) + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet


def titled_rows(rows: Sequence[Sequence[tuple[str, Image.Image]]], *, gap: int = 8) -> Image.Image:
    """Rows of (title, picture), the pictures in columns below the titles of the first row, on white."""
    widths = [max(picture.width for _, picture in column) for column in zip(*rows)]
    names = [name for name, _ in rows[0]]
    titles = [captioned(Image.new("RGB", (width, 1), PAPER), name, font_size=13) for name, width in zip(names, widths)]
    height = max(picture.height for row in rows for _, picture in row)
    top = titles[0].height
    size = sum(widths) + gap * (len(widths) + 1), top + len(rows) * (height + gap)
    sheet = Image.new("RGB", size, PAPER)
    lefts = [gap * (index + 1) + sum(widths[:index]) for index in range(len(widths))]
    for left, title in zip(lefts, titles):
        sheet.paste(title, (left, 0))
    for index, row in enumerate(rows):
        for left, (_, picture) in zip(lefts, row):
            sheet.paste(picture, (left, top + index * (height + gap)))
    return sheet


def legend(names: Sequence[str], *, width: int) -> Image.Image:
    """The names of classes 0, 1, ... beside their colours, in as many lines as the width, in pixels, needs."""
    font = _font(max(12, round(width / 100)))
    swatch = round(font.size)
    line, gap = round(1.6 * swatch), swatch // 2
    places, left, top = [], gap, 0
    for name in names:
        extent = round(swatch + gap + font.getlength(name))
        if left + extent > width and left > gap:
            left, top = gap, top + line
        places.append((left, top + line // 2))
        left += extent + 3 * gap
    picture = Image.new("RGB", (width, top + line), PAPER)
    canvas = ImageDraw.Draw(picture)
    for i, (x, y) in enumerate(places):
        canvas.rectangle((x, y - swatch // 2, x + swatch - 1, y + swatch // 2 - 1), fill=class_color(i))
        canvas.text((x + swatch + gap, y), names[i], fill=INK, font=font, anchor="lm")
    return picture


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels carry FreeType
    return font


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
    """Write the text on its class's colour, at the first place around the box that no other text has taken."""
    margin = max(2, round(font.size / 5))
    width = math.ceil(font.getlength(text)) + 2 * margin
    height = round(font.size * 1.15) + margin
    left, top, right, bottom = rectangle
    corners = [
        (left, top - height),
        (right + 1 - width, top - height),
        (left, bottom + 1),
        (right + 1 - width, bottom + 1),
        (left, top),
    ]
    places = []
    for x, y in corners:
        x = min(max(x, 0), max(size[0] - width, 0))
        if y >= 0 and y + height <= size[1]:
            places.append((x, y, x + width - 1, y + height - 1))
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    place = (free or places or [(left, top, left + width - 1, top + height - 1)])[0]
    canvas.rectangle(place, fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    middle = ((place[0] + place[2] + 1) / 2, (place[1] + place[3] + 1) / 2)
    canvas.text(middle, text, fill=INK if luminance > 140 else PAPER, font=font, anchor="mm")
    return place


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
