"""Images and their nearest neighbours on one picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_vlm.features.neighbors import Neighbors
from hf_vlm.viz.draw import PAPER, captioned, class_color, in_colors, titled_rows

__all__ = ["SIDE", "neighbor_sheet"]

Array = np.ndarray[Any, Any]

SIDE = 128  # pixels of the longer side of a picture
FRAME = 4  # pixels around it, in the colour of its class
GAP = 8
FONT_SIZE = 13


def neighbor_sheet(
    neighbors: Neighbors,
    images: Mapping[int, Array],
    *,
    labels: Mapping[int, int] | None = None,
    class_names: Sequence[str] = (),
) -> Image.Image:
    """A row a query: the query, then the images most similar to it, the most similar first.

    Above each neighbour stands its rank, below it the similarity and the index. Where there are labels, their names
    stand there too, and frames have the colours of the classes.

    Args:
        neighbors: Of `find_neighbors` or `search_file`.
        images: By index, (height, width, channels) uint8, of any size.
        labels: By index; numbers that are no class stand for no label.
        class_names: Of the labels.
    """
    rows = []
    for query, indices, similarities in zip(neighbors.queries, neighbors.indices, neighbors.similarities):
        captions = [f"#{query}", *(f"{value:.4f}   #{index}" for value, index in zip(similarities, indices))]
        pictures = [
            _tile(images[index], caption, _label(index, labels, class_names))
            for index, caption in zip([query, *indices], captions)
        ]
        pictures[0] = ImageOps.expand(pictures[0], (0, 0, 2 * GAP, 0), PAPER)  # sets it apart
        titles = ["image", *(str(rank) for rank in range(1, len(indices) + 1))]
        rows.append(list(zip(titles, pictures)))
    return titled_rows(rows, gap=GAP)


def _label(index: int, labels: Mapping[int, int] | None, class_names: Sequence[str]) -> tuple[int, str] | None:
    """Number and name of a label; none for sources without labels."""
    if labels is None:
        return None
    label = labels[index]
    return (label, class_names[label]) if 0 <= label < len(class_names) else (-1, "no label")


def _tile(image: Array, caption: str, label: tuple[int, str] | None) -> Image.Image:
    """The image at the bottom of a square, in a frame, above its caption and the name of its label."""
    picture = ImageOps.contain(Image.fromarray(in_colors(image)), (SIDE, SIDE), Image.Resampling.BICUBIC)
    number, name = label or (-1, None)
    picture = ImageOps.expand(picture, FRAME, class_color(number) if number >= 0 else PAPER)
    square = Image.new("RGB", (SIDE + 2 * FRAME, SIDE + 2 * FRAME), PAPER)
    square.paste(picture, ((square.width - picture.width) // 2, square.height - picture.height))
    square = captioned(square, caption, font_size=FONT_SIZE)
    return square if name is None else captioned(square, name, font_size=FONT_SIZE)
