"""Images from anywhere: paths, folders, wildcards, Pillow images, arrays, and positions of a source."""

import glob
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, find_images
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.io.messages import shown_path
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream

__all__ = ["ImageLike", "examples_at", "expand_images", "first_images", "image_paths", "images_at", "load_image"]

Array = np.ndarray[Any, Any]
ImageLike = str | os.PathLike[str] | Image.Image | NDArray[Any]


def image_paths(path: str | os.PathLike[str]) -> list[str]:
    """The image files of a folder (and those below it) or of wildcards, by name; a file or a URL is returned as it is.

    Raises:
        ValueError: Where there are none, or a URL is none of a web server.
    """
    text = os.fspath(path)
    if "://" in text and not text.startswith(("http://", "https://")):
        raise ValueError(f"{shown_path(text)} is no URL of an image: give one of http:// or https://, or a path.")
    if "://" in text or os.path.isfile(text):
        return [text]
    if os.path.isdir(text):
        found = [str(file) for file in find_images(Path(text))]
    else:
        names = sorted(glob.glob(text, recursive=True))
        found = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
    if not found:
        raise ValueError(f"There are no images at {text!r}: give an image file, a folder of some, or wildcards.")
    return found


def expand_images(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """One image or several; paths of folders and with wildcards become those of their files, by name.

    Raises:
        ValueError: Where a path matches none.
    """
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
        images = [images]
    for image in images:
        if isinstance(image, str | os.PathLike):
            yield from image_paths(image)
        else:
            yield image


def load_image(image: ImageLike, *, num_channels: int) -> NDArray[Any]:
    """An image as (height, width, num_channels) uint8; only grey and RGB are turned into each other.

    Raises:
        ValueError: Where it cannot be read, or is an array of another type or of other channels.
    """
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim != 3 or array.dtype != np.uint8:
            raise ValueError(
                f"An image array has shape {image.shape} and type {image.dtype}; expected (height, width) or "
                "(height, width, channels) of uint8."
            )
        if array.shape[2] == num_channels:
            return array
        if array.shape[2] not in (1, 3) or num_channels not in (1, 3):
            raise ValueError(f"An image array has {array.shape[2]} channels, but the model takes {num_channels}.")
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    if isinstance(image, Image.Image):
        mode = "L" if num_channels == 1 else "RGB"
        array = np.array(ImageOps.exif_transpose(image).convert(mode))
        return array.reshape(*array.shape[:2], -1)
    return decode_image(os.fspath(image), num_channels=num_channels)[0]


def images_at(source: Source, indices: Sequence[int], *, num_channels: int = 3) -> list[Array]:
    """The images of a source at some positions, (height, width, num_channels) uint8.

    Raises:
        ValueError: The source ends before one of them, or one cannot be read.
    """
    examples = examples_at(source, indices)
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


def examples_at(source: Source, indices: Collection[int]) -> dict[int, dict[str, Any]]:
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
