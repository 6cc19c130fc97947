"""Images and their nearest neighbours on one picture."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hf_vlm.data.images import ImageLike, examples_at, expand_images, load_image
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.source import Source
from hf_vlm.features.embedding import embed_images
from hf_vlm.features.neighbors import Neighbors, evenly_spaced, find_neighbors, search_file
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.viz.sheets import PAPER, captioned, class_color, in_colors, titled_rows

__all__ = ["GAP", "SIDE", "image_tile", "neighbor_sheet", "plot_neighbors", "plot_stored_neighbors"]

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
    """One row per query: the query, then the images most similar to it, the most similar first.

    Each neighbour has its rank above it, the similarity and the index below it. Where there are labels, their names
    are there too, and frames have the colours of the classes.

    Args:
        neighbors: Result of `find_neighbors` or `search_file`.
        images: Images by index, (height, width, channels) uint8, of any size.
        labels: Labels by index; numbers that are no class stand for no label.
        class_names: Names of the labels.
    """
    rows = []
    for query, indices, similarities in zip(neighbors.queries, neighbors.indices, neighbors.similarities):
        captions = [f"#{query}", *(f"{value:.4f}   #{index}" for value, index in zip(similarities, indices))]
        pictures = [
            image_tile(images[index], caption, _label(index, labels, class_names))
            for index, caption in zip([query, *indices], captions)
        ]
        pictures[0] = ImageOps.expand(pictures[0], (0, 0, 2 * GAP, 0), PAPER)  # a gap after the query
        titles = ["image", *(str(rank) for rank in range(1, len(indices) + 1))]
        rows.append(list(zip(titles, pictures)))
    return titled_rows(rows, gap=GAP)


def _label(index: int, labels: Mapping[int, int] | None, class_names: Sequence[str]) -> tuple[int, str] | None:
    """Number and name of a label; none for sources without labels."""
    if labels is None:
        return None
    label = labels[index]
    return (label, class_names[label]) if 0 <= label < len(class_names) else (-1, "no label")


def image_tile(image: Array, caption: str, label: tuple[int, str] | None = None) -> Image.Image:
    """The image at the bottom of a square, in a frame, above its caption and the name of its label."""
    picture = ImageOps.contain(Image.fromarray(in_colors(image)), (SIDE, SIDE), Image.Resampling.BICUBIC)
    number, name = label or (-1, None)
    picture = ImageOps.expand(picture, FRAME, class_color(number) if number >= 0 else PAPER)
    square = Image.new("RGB", (SIDE + 2 * FRAME, SIDE + 2 * FRAME), PAPER)
    square.paste(picture, ((square.width - picture.width) // 2, square.height - picture.height))
    square = captioned(square, caption, font_size=FONT_SIZE)
    return square if name is None else captioned(square, name, font_size=FONT_SIZE)


def plot_neighbors(
    encoder: VLMViTModel,
    images: ImageLike | Iterable[ImageLike],
    processor: VLMViTImageProcessor,
    *,
    queries: Sequence[int] | None = None,
    num_neighbors: int = 8,
    pooling: str = "mean",
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """A picture of some images, each beside those that are nearest by the cosine similarity of their features.

    Args:
        queries: Positions among the images; by default 8, evenly spaced.
        labels: Class of each image, shown below it.
        class_names: Names of the labels; by default their numbers.

    Raises:
        ValueError: There is no image, no such query, an image cannot be read, or the number of labels differs.
    """
    everything = list(expand_images(images))
    if not everything or (labels is not None and len(labels) != len(everything)):
        raise ValueError(f"There are {len(everything)} images and {0 if labels is None else len(labels)} labels.")
    features = embed_images(encoder, everything, processor, pooling=pooling)
    queries = evenly_spaced(len(everything), 8) if queries is None else queries
    neighbors = find_neighbors(features, queries, num_neighbors=num_neighbors)
    shown = {*neighbors.queries, *itertools.chain(*neighbors.indices)}
    names = class_names or [str(label) for label in range(max(labels or [0]) + 1)]
    return neighbor_sheet(
        neighbors,
        {index: load_image(everything[index], num_channels=encoder.config.num_channels) for index in shown},
        labels=None if labels is None else dict(enumerate(labels)),
        class_names=names,
    )


def plot_stored_neighbors(
    path: Path, source: Source, queries: Sequence[int], *, num_neighbors: int = 8
) -> Image.Image:
    """The picture of `plot_neighbors` for features in a file of `write_features`; the source is read again.

    Args:
        queries: Values of the column `index`.

    Raises:
        ValueError: There is no such image.
    """
    neighbors = search_file(path, queries, num_neighbors=num_neighbors)
    examples = examples_at(source, {*neighbors.queries, *itertools.chain(*neighbors.indices)})
    label = source.features.get("label")
    return neighbor_sheet(
        neighbors,
        {index: decode_image(example["image"], at_least=(SIDE, SIDE))[0] for index, example in examples.items()},
        labels=None if label is None else {index: example["label"] for index, example in examples.items()},
        class_names=() if label is None else label.names,
    )
