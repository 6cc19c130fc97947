"""What an encoder makes of images: features, nearest neighbours, and maps of the patches.

The functions take an encoder with its image processor, as `load_frozen_encoder` gives them, and images from anywhere:
paths (of files, of folders, or with wildcards), Pillow images or uint8 arrays.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.deploy.predict import ImageLike, expand_images, load_image
from hf_vlm.features.extraction import encode, feature_size
from hf_vlm.features.maps import feature_maps
from hf_vlm.features.neighbors import evenly_spaced, find_neighbors, search_file
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor
from hf_vlm.models.modeling_vlm_vit import VLMViTModel
from hf_vlm.training.build import load_frozen_encoder
from hf_vlm.viz.map_sheet import map_sheet
from hf_vlm.viz.neighbor_sheet import SIDE, neighbor_sheet

__all__ = [
    "embed_images",
    "first_images",
    "images_at",
    "load_frozen_encoder",
    "plot_feature_maps",
    "plot_neighbors",
    "plot_stored_neighbors",
]

Array = np.ndarray[Any, Any]


def embed_images(
    encoder: VLMViTModel,
    images: ImageLike | Iterable[ImageLike],
    processor: VLMViTImageProcessor,
    *,
    pooling: str = "mean",
    batch_size: int = 32,
) -> Tensor:
    """Features (images, features) float32 of images; see `encode`.

    Raises:
        ValueError: An image cannot be read, a path matches none, or the encoder has no such pooling.
    """
    everything = expand_images(images)
    features = []
    while batch := list(itertools.islice(everything, batch_size)):
        features.append(encode(encoder, _pixel_values(encoder, batch, processor), pooling=pooling))
    return torch.cat(features) if features else torch.empty(0, feature_size(encoder, pooling))


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
        labels: A class of each image, to be drawn.
        class_names: Of the labels; by default their numbers.

    Raises:
        ValueError: There is no image, no such query, an image cannot be read, or there are not as many labels.
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
    """The picture of `draw_neighbors` for features that `write_features` made of a source, which is read again.

    Args:
        queries: Values of the column `index`.

    Raises:
        ValueError: There is no such image.
    """
    neighbors = search_file(path, queries, num_neighbors=num_neighbors)
    examples = _examples_at(source, {*neighbors.queries, *itertools.chain(*neighbors.indices)})
    label = source.features.get("label")
    return neighbor_sheet(
        neighbors,
        {index: decode_image(example["image"], at_least=(SIDE, SIDE))[0] for index, example in examples.items()},
        labels=None if label is None else {index: example["label"] for index, example in examples.items()},
        class_names=() if label is None else label.names,
    )


def plot_feature_maps(
    encoder: VLMViTModel,
    images: ImageLike | Iterable[ImageLike],
    processor: VLMViTImageProcessor,
    *,
    patch: tuple[int, int] | None = None,
    foreground: bool = False,
) -> Image.Image:
    """A picture of images with maps of their patches: principal components as colours, and attention.

    Args:
        patch: Row and column of a patch; see `feature_maps`, as for `foreground`.

    Raises:
        ValueError: There is no image, one cannot be read, or there is no such patch.
    """
    arrays = [load_image(image, num_channels=encoder.config.num_channels) for image in expand_images(images)]
    if not arrays:
        raise ValueError("There is no image to draw maps of.")
    pixel_values = _pixel_values(encoder, arrays, processor)
    return map_sheet(arrays, feature_maps(encoder, pixel_values, patch=patch, foreground=foreground))


def images_at(source: Source, indices: Sequence[int], *, num_channels: int = 3) -> list[Array]:
    """The images of a source at some positions, (height, width, num_channels) uint8.

    Raises:
        ValueError: The source ends before one of them, or one cannot be read.
    """
    examples = _examples_at(source, indices)
    return [decode_image(examples[index]["image"], num_channels=num_channels)[0] for index in indices]


def first_images(source: Source, num_images: int, *, num_channels: int = 3) -> list[Array]:
    """The first images of a source that can be read, (height, width, num_channels) uint8.

    Raises:
        ValueError: There is none, or too many cannot be read.
    """

    def decoded(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {"image": decode_image(example["image"], num_channels=num_channels)[0]}

    stream = ExampleStream(source.dataset, decoded, shuffle=False, repeat=False, block_size=num_images)
    return [example["image"] for example in itertools.islice(stream, num_images)]


def _examples_at(source: Source, indices: Collection[int]) -> dict[int, dict[str, Any]]:
    """The examples of a source at some positions, by position; it is read from its beginning, the others not decoded.

    So pictures of a few of a million images cost time alone. Which they are is known when all have been compared, and
    to keep thumbnails of all until then would fill memory or disk.
    """
    wanted = set(indices)
    examples = itertools.islice(source, max(wanted) + 1)
    bar = tqdm(examples, desc="Finding images", total=max(wanted) + 1, leave=False, disable=None)
    found = {index: example for index, example in enumerate(bar) if index in wanted}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"queries: there is no image {', '.join(map(str, missing))}; the data ends before.")
    return found


def _pixel_values(encoder: VLMViTModel, images: Sequence[ImageLike], processor: VLMViTImageProcessor) -> Tensor:
    arrays = [load_image(image, num_channels=encoder.config.num_channels) for image in images]
    return processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
