"""Each image of a shard: whether it passes the filters, a digest of its pixels, and the features it is compared by."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from hf_vlm.curation.shards import EncodedImage, check_columns, read_images
from hf_vlm.curation.work import CurationOptions, Work
from hf_vlm.data.inspection.duplicates import image_digest
from hf_vlm.data.io.decode import BadImageError, decode_image

__all__ = ["NUM_BUCKETS", "REASONS", "Reason", "measure_shard", "pixel_features", "priority"]

Array = np.ndarray[Any, Any]


class Reason:
    """Why an image is dropped, as numbers of `REASONS`; 0 is kept."""

    UNREADABLE, SMALL, ASPECT, BLANK, BLURRED, EXACT, NEAR, BALANCE = range(1, 9)


REASONS = (
    "kept",
    "unreadable",
    "small",
    "elongated",
    "blank",
    "blurred",
    "exact duplicate",
    "near duplicate",
    "surplus",
)

NUM_BUCKETS = 256  # of digests, by their first byte
BATCH_SIZE = 32  # images described at a time
SHARPNESS_SIDE = 256  # pixels, for the sharpness of a picture to be that of its smaller copies too
THUMBNAIL_SIDE = 32
NUM_LUMA, NUM_CHROMA = 8, 4  # frequencies of either axis
ROW = np.dtype(
    [
        ("reason", "u1"),
        ("digest", "u8"),
        ("height", "i4"),
        ("width", "i4"),
        ("num_bytes", "i8"),
        ("entropy", "f4"),
        ("sharpness", "f4"),
    ]
)


class Describer(NamedTuple):
    """How features are made.

    Attributes:
        prepare: From a decoded image (height, width, 3) uint8 what is held of it until its batch is full.
        describe: From a batch of these, features (batch, num_features) float32 of length 1.
        num_features: Number of features.
    """

    prepare: Callable[[Array], Any]
    describe: Callable[[Sequence[Any]], Array]
    num_features: int


class Measured(NamedTuple):
    """A row of `ROW`, and what a describer has prepared of an image that passes."""

    row: tuple[Any, ...]
    prepared: Any = None


def measure_shard(work: Work, unit: int) -> None:
    """Write the table of a shard.

    Its columns are those of `ROW` and, float16, `features` (rows, D) of length 1, zero of images that do not pass.
    For `exact`, the images that pass are listed again in the order of their digests: `order` (passing,) their rows,
    `sorted_digest` and `sorted_priority`, and `bucket_starts` (NUM_BUCKETS + 1,) where each bucket begins.

    Raises:
        ValueError: The shard cannot be read, or has other columns than the first; or the encoder is damaged.
    """
    if work.format == "parquet":
        check_columns(work.shards[unit], work.shards[0])
    describer = _encoder_describer(work.options.encoder) if work.options.encoder else PIXELS
    rows, features = [np.zeros(0, ROW)], [np.zeros((0, describer.num_features), np.float16)]
    for batch in _batches(read_images(work.shards[unit], work.format)):
        measured = [_measure(image, work.options, describer) for image in batch]
        rows.append(np.array([entry.row for entry in measured], dtype=ROW))
        passes = rows[-1]["reason"] == 0
        features.append(np.zeros((len(batch), describer.num_features), np.float16))
        if passes.any():
            features[-1][passes] = describer.describe(
                [entry.prepared for entry, passed in zip(measured, passes) if passed]
            )
    table = np.concatenate(rows)
    arrays = {name: table[name] for name in ROW.names or ()}
    work.save("measure", unit, arrays | {"features": np.concatenate(features)} | _by_digest(table))


def _batches(images: Iterator[EncodedImage]) -> Iterator[list[EncodedImage]]:
    batch: list[EncodedImage] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _measure(encoded: EncodedImage, options: CurationOptions, describer: Describer) -> Measured:
    num_bytes = len(encoded.data)
    try:
        image, (height, width) = decode_image(encoded.data)
    except BadImageError:
        return Measured((Reason.UNREADABLE, 0, 0, 0, num_bytes, 0, 0))
    digest = image_digest(np.array(image.shape, "<i8").tobytes() + image.tobytes())
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    entropy, sharpness = _entropy(gray), _sharpness(gray)
    reason = _first_reason(height, width, entropy, sharpness, options)
    row = (reason, digest, height, width, num_bytes, entropy, sharpness)
    return Measured(row) if reason else Measured(row, describer.prepare(image))


def _first_reason(height: int, width: int, entropy: float, sharpness: float, options: CurationOptions) -> int:
    if min(height, width) < options.min_side:
        return Reason.SMALL
    if max(height, width) > options.max_aspect * min(height, width):
        return Reason.ASPECT
    if entropy < options.min_entropy:
        return Reason.BLANK
    return Reason.BLURRED if sharpness < options.min_sharpness else 0


def _entropy(gray: Array) -> float:
    """Bits of the histogram of grey levels (height, width) uint8."""
    counts = np.bincount(gray.ravel(), minlength=256)
    fractions = counts[counts > 0] / gray.size
    return float(-(fractions * np.log2(fractions)).sum()) + 0.0  # no negative zero


def _sharpness(gray: Array) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., 2000), in levels squared."""
    scale = SHARPNESS_SIDE / max(gray.shape)
    if scale < 1:
        size = max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return float(cv2.meanStdDev(cv2.Laplacian(gray, cv2.CV_32F))[1][0, 0] ** 2)


def _by_digest(table: Array) -> dict[str, Array]:
    passing = np.flatnonzero(table["reason"] == 0)
    order = passing[np.argsort(table["digest"][passing], kind="stable")]
    digests = table["digest"][order]
    return {
        "order": order.astype(np.int32),
        "sorted_digest": digests,
        "sorted_priority": priority(table["height"], table["width"], table["num_bytes"])[order],
        "bucket_starts": np.searchsorted(digests >> np.uint64(56), np.arange(NUM_BUCKETS + 1)),
    }


def priority(height: Array, width: Array, num_bytes: Array) -> Array:
    """Which of several copies is kept (n,) int64: that of most pixels, and then of most bytes."""
    pixels = np.minimum(height.astype(np.int64) * width, 2**31 - 1)
    return pixels << 32 | np.minimum(num_bytes, 2**32 - 1)


# ---- features


def pixel_features(image: Array) -> Array:
    """The coarse layout of a picture (96,) float32 of length 1, hardly changed by compression, resizing and a small
    crop: its low frequencies without the mean, by a cosine transform, their magnitudes rooted so that the lowest do
    not decide alone.

    Args:
        image: (height, width, 3) uint8.
    """
    small = cv2.resize(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    channels = cv2.split(cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float32))
    parts = [
        cv2.dct(channel)[:count, :count].ravel()
        for channel, count in zip(channels, (NUM_LUMA, NUM_CHROMA, NUM_CHROMA))
    ]
    for part in parts:
        part[0] = 0
    features = np.concatenate(parts)
    features = np.sign(features) * np.sqrt(np.abs(features))
    return features / max(float(np.linalg.norm(features)), 1e-6)  # type: ignore[no-any-return]


PIXELS = Describer(pixel_features, np.stack, NUM_LUMA**2 + 2 * NUM_CHROMA**2)


@functools.lru_cache(maxsize=1)
def _encoder_describer(source: str) -> Describer:
    """The describer of an encoder, which a process loads once."""
    import torch
    import torch.nn.functional as F

    from hf_vlm.features.device import to_best_device
    from hf_vlm.features.embedding import prepare_images
    from hf_vlm.features.extraction import encode
    from hf_vlm.features.loading import load_frozen_encoder

    encoder, processor = load_frozen_encoder(source)
    to_best_device(encoder)

    def describe(pixel_values: Sequence[torch.Tensor]) -> Array:
        features = F.normalize(encode(encoder, torch.cat(list(pixel_values))), dim=1)
        if not features.isfinite().all():
            raise ValueError(f"{source}: features of an image are not finite; the encoder is damaged")
        return features.numpy()  # type: ignore[no-any-return]

    return Describer(
        lambda image: prepare_images(encoder, [image], processor), describe, int(encoder.config.hidden_size)
    )
