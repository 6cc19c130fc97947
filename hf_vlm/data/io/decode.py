"""Encoded images to uint8 arrays: opencv where it reads them rightly, Pillow for the rest.

Whatever the file holds, the result is 8-bit RGB or grey, upright: the EXIF orientation is applied, 16-bit values are
scaled, palettes and CMYK are converted, and transparent images are laid on white, as a browser shows them.
"""

import os
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from hf_vlm.data.io.files import is_remote, read_bytes
from hf_vlm.data.io.image_header import BITS_TAG, ImageHeader, open_image, read_header, read_tiff_size
from hf_vlm.data.io.messages import error_text, shown_path
from hf_vlm.data.io.trust import redirects_are_allowed

__all__ = ["BadImageError", "decode_image", "decode_mask", "image_size", "read_image_bytes", "used_bits"]

Array = np.ndarray[Any, Any]

EncodedImage = dict[str, Any] | bytes | str | os.PathLike[str]

MAX_ENCODED_BYTES = 2**29  # of one image; a larger file is none, and would fill the memory of every worker
NUM_WAITS = 3  # for an image's own server: lists of URLs name many that are gone for good
IMAGE_SECONDS = 60.0  # after which nothing more is asked of it

# Modes that opencv decodes as Pillow does; it drops alpha and reads the colours of CMYK differently.
OPENCV_MODES = frozenset({"1", "L", "P", "RGB", "I;16", "I;16B"})
READ_FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}
REDUCED_FLAGS = {
    1: {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8},
    3: {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8},
}


class BadImageError(ValueError):
    """An image cannot be read; the message names it and gives the reason."""


def decode_image(
    image: EncodedImage, *, num_channels: int = 3, at_least: tuple[int, int] | None = None
) -> tuple[Array, tuple[int, int]]:
    """Decode an image.

    Args:
        image: Encoded bytes, a path or URL, or a dict of both as `datasets.Image(decode=False)` gives; its bytes are
            preferred.
        num_channels: Number of channels: 3 for RGB, 1 for grey.
        at_least: Sufficient height and width in pixels: a JPEG is then decoded at a half, a quarter or an eighth
            of its size where both sides stay at least that long, which is faster.

    Returns:
        The image (height, width, num_channels) uint8, and the height and width it has at full size, in pixels. Both
        are after the orientation is applied.

    Raises:
        BadImageError: The image is missing, empty, truncated, of an unknown format, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS`.
        ValueError: num_channels is neither 1 nor 3.
    """
    if num_channels not in READ_FLAGS:
        raise ValueError(f"num_channels={num_channels}: images are decoded to 3 channels (RGB) or 1 (grey)")
    data = read_image_bytes(image)
    try:
        array, size = _decode(data, num_channels, at_least)
    except Exception as error:  # decoders raise anything for broken files
        raise BadImageError(f"{_name(image)}: {error}") from error
    return np.ascontiguousarray(array).reshape(
        *array.shape[:2], num_channels
    ), size  # (H, W) or (H, W, C) to (H, W, C)


def decode_mask(mask: EncodedImage, *, as_colors: bool = False) -> Array:
    """The values of a mask (height, width) int32, as they are stored: of a palette the indices, not its colours.

    A mask in colours has the values 65536 red + 256 green + blue; with `as_colors` every mask has.

    Raises:
        BadImageError: As for `decode_image`.
    """
    data = read_image_bytes(mask)
    try:
        with open_image(data) as file:
            _check_size((file.height, file.width))
            if as_colors or file.mode == "LA":
                file = file.convert("RGB" if as_colors else "L")
            values = np.asarray(file).astype(np.int32)
    except Exception as error:  # Pillow raises anything for broken files
        raise BadImageError(f"{_name(mask)}: {error}") from error
    return values if values.ndim == 2 else (values[:, :, :3] * [1 << 16, 1 << 8, 1]).sum(axis=2, dtype=np.int32)


def read_image_bytes(image: EncodedImage) -> bytes:
    """The encoded bytes of an image, read from its file or URL where they are not given.

    A dict is a row of data: its server may redirect to others only where the source was opened with `allow_outside`.

    Raises:
        BadImageError: There are none, or more than `MAX_ENCODED_BYTES`.
    """
    is_row = isinstance(image, dict)  # of data, and not a URL that the user gives
    data = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if isinstance(data, str | os.PathLike):
        try:
            data = read_bytes(
                data,
                limit=MAX_ENCODED_BYTES,
                num_waits=NUM_WAITS,
                seconds=IMAGE_SECONDS,
                same_server=is_row and is_remote(data) and not redirects_are_allowed(data),
            )
        except Exception as error:  # file systems raise their own types
            raise BadImageError(f"{_name(image)}: {error_text(error)}") from error
    if not data:
        raise BadImageError(f"{_name(image)}: no bytes")
    return data


def image_size(image: EncodedImage) -> tuple[int, int] | None:
    """Height and width of an image in pixels, after its orientation is applied; None where its header is broken."""
    try:
        header = read_header(read_image_bytes(image))
    except Exception:  # Pillow raises anything for broken headers
        return None
    if header is None:
        return None
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


def used_bits(data: bytes) -> int | None:
    """Bits of the largest value of a PNG or TIFF whose values have 16, of its colours; None of other images.

    Values of 12 bits in such a file, as cameras and microscopes write them, are decoded by the range of 16, to nearly
    black: a single image does not show that they are not dark.
    """
    try:
        header = read_header(data)
        if header is None or header.num_bits != 16:
            return None
        _check_size((header.height, header.width))
        array = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except Exception:  # Pillow raises anything for broken headers, and opencv its own error for broken images
        return None
    if array is None or array.dtype != np.uint16:
        return None
    return int((array[..., :3] if array.ndim == 3 else array).max()).bit_length()


def _decode(data: bytes, num_channels: int, at_least: tuple[int, int] | None) -> tuple[Array, tuple[int, int]]:
    header = read_header(data)
    if header is None:  # opencv alone knows some TIFFs, as with colours of 32 bits
        size = read_tiff_size(data)
        if size is not None:
            _check_size(size)
        # Of other formats, as HDR and PFM, a header of a few bytes would make opencv take gigabytes.
        array = None if size is None else _read_with_opencv(data, READ_FLAGS[num_channels])
        if array is None:
            raise BadImageError("not an image of a known format")
        _check_size(array.shape[:2])
        return array, array.shape[:2]
    _check_size((header.height, header.width))
    # libtiff turns some TIFFs by itself, depending on how they are stored.
    is_turned_tiff = header.format == "TIFF" and header.orientation != 1
    is_read_by_opencv = header.mode in OPENCV_MODES and not header.has_alpha and not is_turned_tiff
    if is_read_by_opencv and header.format != "PPM":  # of which opencv ignores the largest value
        array = _decode_with_opencv(data, header, num_channels, at_least)
        if array is not None:
            return array, (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)
    array = _decode_with_pillow(data, num_channels)
    if header.format == "JPEG2000":
        array = _oriented(array, header.orientation)
    return array, array.shape[:2]


def _check_size(size: tuple[int, ...]) -> None:
    height, width = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise BadImageError(
            f"{width}x{height} pixels are more than the {limit} that PIL.Image.MAX_IMAGE_PIXELS allows"
        )


def _decode_with_opencv(
    data: bytes, header: ImageHeader, num_channels: int, at_least: tuple[int, int] | None
) -> Array | None:
    reduction = _reduction(header, at_least)
    flags = READ_FLAGS[num_channels] if reduction == 1 else REDUCED_FLAGS[num_channels][reduction]
    array = _read_with_opencv(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    # A damaged file may give its size twice, and boxes are relative to the size that the header gives.
    if array is None or array.shape[:2] != (-(-header.height // reduction), -(-header.width // reduction)):
        return None
    if reduction > 1 and num_channels == 3:  # there are no reduced flags for RGB
        array = cv2.cvtColor(array, cv2.COLOR_BGR2RGB)
    return _oriented(array, header.orientation)


def _read_with_opencv(data: bytes, flags: int) -> Array | None:
    try:
        array = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:  # most broken images give None, some this
        return None
    return array if array is not None and array.dtype == np.uint8 else None


def _reduction(header: ImageHeader, at_least: tuple[int, int] | None) -> int:
    """By how much the sides can be divided; a reduced JPEG has its sides rounded up."""
    if at_least is None or header.format != "JPEG":
        return 1
    height, width = at_least[::-1] if header.orientation >= 5 else at_least
    fitting = [by for by in (8, 4, 2) if -(-header.height // by) >= height and -(-header.width // by) >= width]
    return max(fitting, default=1)


def _oriented(array: Array, orientation: int) -> Array:
    """Turn upright what is stored with an EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = cv2.transpose(array)
    # Horizontally, vertically or both ways.
    flip_code = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return array if flip_code is None else cv2.flip(array, flip_code)


def _decode_with_pillow(data: bytes, num_channels: int) -> Array:
    with open_image(data) as file:
        file.load()  # before the transposition: it turns a TIFF itself
        num_bits = _num_bits(file)
        image: Image.Image = ImageOps.exif_transpose(file)
    if num_bits is not None:
        image = Image.fromarray((np.asarray(image) >> (num_bits - 8)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImageError("pixels of 32 bits have no known range; store them as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("L" if num_channels == 1 else "RGB"))  # a copy, which may be written to


def _num_bits(image: Image.Image) -> int | None:
    """Bits of the values of a grey image as Pillow gives them; None where they are none of 9 to 16 bits."""
    if image.mode == "I":  # scaled to 16 bits in PGM, unknown elsewhere
        return 16 if image.format == "PPM" else None
    if not image.mode.startswith("I;16"):
        return None
    stored: tuple[int, ...] = getattr(image, "tag_v2", {}).get(BITS_TAG, (16,))
    return stored[0]  # TIFFs of 12 bits are not scaled


def _name(image: object) -> str:
    """Path of an image for messages, or its first bytes where it has no path."""
    if isinstance(image, dict):
        return shown_path(image["path"]) if image.get("path") else _name(image.get("bytes"))
    if isinstance(image, bytes):
        return f"image of {len(image)} bytes beginning with {image[:8]!r}"
    return "image without bytes and path" if image is None else shown_path(image)
