"""Sizes of image files, read from their headers."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_vlm.data.io.files import is_remote, map_files, read_beginning, read_bytes
from hf_vlm.data.io.image_header import ImageHeader, read_header
from hf_vlm.data.io.messages import UnreachableError
from hf_vlm.data.io.trust import outside_is_allowed

__all__ = ["FileSizes", "read_file_sizes", "sample_images"]

Array = np.ndarray[Any, Any]

HEADER_BYTES = 2**16  # hold the size of nearly every image
NUM_SAMPLED, NUM_SAMPLED_REMOTE = 256, 16  # images; a request for each takes longer


class FileSizes(NamedTuple):
    """Sizes of n image files."""

    shown: Array  # (n, 2), width and height in pixels after the orientation is applied; infinity where unreadable
    orientation: Array  # (n,), EXIF's, 1..8

    @property
    def stored(self) -> Array:
        """Width and height (n, 2) before the orientation is applied."""
        return np.where(self.orientation[:, None] >= 5, self.shown[:, ::-1], self.shown)


def sample_images(images: Sequence[Path]) -> list[int]:
    """Indices of some images, evenly spread."""
    number = min(NUM_SAMPLED_REMOTE if images and is_remote(images[0]) else NUM_SAMPLED, len(images))
    return [index * len(images) // number for index in range(number)]


def read_file_sizes(images: Sequence[Path]) -> FileSizes:
    """The sizes of image files, from their headers.

    Raises:
        UnreachableError: A server did not answer; without its size, an image could lose its boxes.
    """
    read = functools.partial(_read_header, same_server=not outside_is_allowed())  # asked here, not in the threads
    headers = map_files(read, images, "Reading sizes")
    shown = [(np.inf, np.inf) if header is None else _shown_size(header) for header in headers]
    orientation = [1 if header is None else header.orientation for header in headers]
    return FileSizes(np.array(shown, dtype=np.float64).reshape(-1, 2), np.array(orientation, dtype=np.int64))


def _shown_size(header: ImageHeader) -> tuple[int, int]:
    return (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)


def _read_header(image: Path, same_server: bool) -> ImageHeader | None:
    """None for what cannot be read: the stream will name the image and skip it."""
    try:
        beginning = read_beginning(image, HEADER_BYTES, same_server=same_server)
        return _parse(beginning) or _parse(read_bytes(image, same_server=same_server))
    except UnreachableError:
        raise
    except OSError:
        return None


def _parse(data: bytes) -> ImageHeader | None:
    try:
        return read_header(data)
    except Exception:  # decoders raise anything for broken files
        return None
