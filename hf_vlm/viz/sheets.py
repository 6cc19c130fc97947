"""Grids of pictures with captions, and the colours of classes; Pillow only."""

import colorsys
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "INK",
    "PAPER",
    "Color",
    "captioned",
    "class_color",
    "contact_sheet",
    "in_colors",
    "legend",
    "load_font",
    "side_by_side",
    "stacked",
    "titled_rows",
]

Color = tuple[int, int, int]
INK, PAPER = (33, 33, 33), (255, 255, 255)


def in_colors(image: NDArray[Any]) -> NDArray[Any]:
    """An image (height, width, channels) as RGB; if it has other than three channels, the first one as grey."""
    return image if image.shape[2] == 3 else image[:, :, :1].repeat(3, axis=2)


def class_color(key: int | str) -> Color:
    """A class's colour, the same in every picture: neighbouring numbers get hues far apart."""
    number = key if isinstance(key, int) else zlib.crc32(key.encode())
    hue = (0.02 + number * (math.sqrt(5) - 1) / 2) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.56, 0.44, 0.68)[number // 8 % 3], 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def captioned(picture: Image.Image, caption: str, *, font_size: int | None = None) -> Image.Image:
    """A picture above a line of text, which is cut to its width; its size follows the width unless it is given."""
    font = load_font(font_size or max(12, round(picture.width / 24)))
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


def stacked(top: Image.Image, bottom: Image.Image) -> Image.Image:
    """Two pictures, one above the other, on white."""
    joined = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), PAPER)
    joined.paste(top)
    joined.paste(bottom, (0, top.height))
    return joined


def legend(names: Sequence[str], *, width: int, class_ids: Sequence[int] | None = None) -> Image.Image:
    """The names of classes beside their colours, wrapped to the width in pixels; the classes are 0, 1, ... if no
    others are given.
    """
    class_ids = range(len(names)) if class_ids is None else class_ids
    font = load_font(max(12, round(width / 100)))
    swatch = round(font.size)
    line, gap = round(1.6 * swatch), swatch // 2
    positions, left, top = [], gap, 0
    for name in names:
        extent = round(swatch + gap + font.getlength(name))
        if left + extent > width and left > gap:
            left, top = gap, top + line
        positions.append((left, top + line // 2))
        left += extent + 3 * gap
    picture = Image.new("RGB", (width, top + line), PAPER)
    canvas = ImageDraw.Draw(picture)
    for i, (x, y) in enumerate(positions):
        canvas.rectangle((x, y - swatch // 2, x + swatch - 1, y + swatch // 2 - 1), fill=class_color(class_ids[i]))
        canvas.text((x + swatch + gap, y), names[i], fill=INK, font=font, anchor="lm")
    return picture


def side_by_side(
    predicted: Image.Image, truth: Image.Image, *, captions: tuple[str, str] = ("predicted", "ground truth")
) -> Image.Image:
    """Two pictures side by side under their captions, resized to the height of the taller one."""
    height = max(predicted.height, truth.height)
    pictures = [
        picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.BICUBIC)
        for picture in (predicted, truth)
    ]
    font = load_font(max(12, round(height / 24)))
    band = round(1.8 * font.size)
    gap = max(4, height // 80)
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures) + gap, height + band), PAPER)
    canvas, left = ImageDraw.Draw(sheet), 0
    for picture, caption in zip(pictures, captions, strict=True):
        canvas.text((left + picture.width / 2, band / 2), caption, fill=INK, font=font, anchor="mm")
        sheet.paste(picture, (left, band))
        left += picture.width + gap
    return sheet


@lru_cache(maxsize=16)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all captions, in pixels."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels carry FreeType
    return font
