"""Boxes that were annotated in images of another size than the files have.

Annotations say how large their images are. Files of another size are scaled copies, or stored turned (EXIF), or other
pictures. Boxes are fitted to the first two where it is clear how; what is not clear is left out, and refused where it
is much.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_vlm.data.formats.image_sizes import FileSizes, read_file_sizes, sample_images
from hf_vlm.data.io.messages import summarise

__all__ = ["FittedBoxes", "Motion", "fit_boxes"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

MAX_UNCLEAR = 0.01  # fraction of the images that are left out rather than refused
MIN_FIT, MAX_MISFIT = 0.99, 0.95  # fraction of boxes in a frame, from which on it is theirs, below which it is not
SLACK = 1.0  # pixels that boxes may stick out: annotation tools round


class Motion(NamedTuple):
    """How what is annotated in images is moved into these as they are shown: turned first, then scaled."""

    orientation: Array  # (images,), EXIF's, 1 where nothing is turned
    factors: Array  # (images, 2), of width and height


class FittedBoxes(NamedTuple):
    """Boxes in the images as they are shown."""

    boxes: Array  # (n, 4), x, y, width, height in pixels
    sizes: Array  # (images, 2), width and height; infinity where they are not known
    is_clear: Array  # (images,) bool, false for those whose boxes may be of another picture
    motion: Motion | None = None  # of the first images; None where all boxes stay as they are


def fit_boxes(boxes: Array, rows: Array, annotated: Array, images: Sequence[Path], source: object) -> FittedBoxes:
    """Boxes in the images as they are shown, and what is known of the sizes of these.

    The headers of a sample of the images are read; where one differs from its annotation or this gives no size, those
    of all.

    Args:
        boxes: (n, 4), x, y, width, height in pixels of the annotated images.
        rows: (n,), index of the image of each box.
        annotated: (images, 2), width and height that the annotations give; infinity where they give none.
        images: Files of the first images; the other ones and their boxes are left as they are.
        source: Name of the source, for messages.

    Raises:
        ValueError: It is not clear how the boxes of more than `MAX_UNCLEAR` of the images lie in them.
    """
    number, sample = len(images), sample_images(images)
    are_known = np.isfinite(annotated[:number]).all()
    if are_known and not _differ(annotated[sample], read_file_sizes([images[row] for row in sample]).shown).any():
        return FittedBoxes(boxes, annotated, np.ones(len(annotated), dtype=bool))
    files = read_file_sizes(images)
    sizes = annotated.copy()
    sizes[:number] = np.where(np.isfinite(files.shown), files.shown, annotated[:number])
    is_of_images = rows < number
    motion, unclear = _motion(boxes[is_of_images], rows[is_of_images], annotated[:number], files, images, source)
    is_clear = np.ones(len(annotated), dtype=bool)
    is_clear[:number] = ~unclear
    boxes = boxes.copy()
    boxes[is_of_images] = _move(boxes[is_of_images], rows[is_of_images], motion, annotated)
    return FittedBoxes(boxes, sizes, is_clear, motion)


def _motion(
    boxes: Array, rows: Array, annotated: Array, files: FileSizes, images: Sequence[Path], source: object
) -> tuple[Motion, Array]:
    """How boxes are moved, and the images (images,) bool of which it is not clear how theirs lie in them."""
    differ = _differ(annotated, files.shown)
    is_scaled = differ & _have_equal_shape(annotated, files.shown)
    is_turned = differ & ~is_scaled & (annotated == files.shown[:, ::-1]).all(axis=1)
    has_boxes = np.bincount(rows, minlength=len(images)) > 0
    unclear = differ & ~is_scaled & ~is_turned & has_boxes
    motion = Motion(np.ones(len(images), dtype=np.int64), np.ones((len(images), 2)))
    findings = []
    frame = _frame(boxes[is_turned[rows]], rows[is_turned[rows]], annotated, files.shown)
    if frame is None:
        unclear |= is_turned & has_boxes
    elif frame is annotated:
        unclear |= is_turned & has_boxes & (files.orientation < 5)
        # Turning by a half leaves the size as it is, but who ignores one orientation ignores all.
        is_turned = (files.orientation > 1) & (annotated == files.stored).all(axis=1)
        motion = motion._replace(orientation=np.where(is_turned, files.orientation, 1))
        findings.append(_describe("their boxes are turned as EXIF says", is_turned, annotated, files, images))
    else:
        findings.append(_describe("their boxes fit the image as it is shown", is_turned, annotated, files, images))
    if is_scaled.any():
        motion = motion._replace(factors=np.where(is_scaled[:, None], files.shown / annotated, 1.0))
        findings.append(_describe("their boxes are scaled to the file", is_scaled, annotated, files, images))
    if unclear.any():
        findings.append(_describe(_remedy(files, unclear), unclear, annotated, files, images))
        if unclear.sum() > MAX_UNCLEAR * len(images):
            raise ValueError(f"{source}: {findings[-1]}")
        findings.append("the last of these are left out")
    if findings:
        logger.warning("%s: %s", source, "; ".join(findings))
    return motion, unclear


def _move(boxes: Array, rows: Array, motion: Motion, annotated: Array) -> Array:
    turned = _turn(boxes, motion.orientation[rows], annotated[rows])
    moved: Array = turned * np.tile(motion.factors[rows], 2)
    return moved


def _differ(annotated: Array, shown: Array) -> Array:
    known = np.isfinite(annotated).all(axis=1) & np.isfinite(shown).all(axis=1)
    differ: Array = known & (annotated != shown).any(axis=1)
    return differ


def _have_equal_shape(annotated: Array, shown: Array) -> Array:
    """(images,) bool, whether one size is the other one scaled, but for rounding to whole pixels."""
    larger, smaller = np.maximum(annotated, shown), np.minimum(annotated, shown)
    with np.errstate(invalid="ignore"):  # unknown sizes
        ratio = larger / smaller  # (images, 2)
        error = np.abs(ratio[:, 0] - ratio[:, 1])
        is_ordered = (annotated >= shown).all(axis=1) | (annotated <= shown).all(axis=1)
        equal: Array = is_ordered & (error <= ratio.max(axis=1) / smaller.min(axis=1))
    return equal


def _frame(boxes: Array, rows: Array, annotated: Array, shown: Array) -> Array | None:
    """Which of the two sizes of the images the boxes belong to, as one of the arguments; None where both may be."""
    if not len(boxes):
        return None
    fits = [float(_fit(boxes, sizes[rows]).mean()) for sizes in (annotated, shown)]
    if fits[0] >= MIN_FIT and fits[1] < MAX_MISFIT:
        return annotated
    return shown if fits[1] >= MIN_FIT and fits[0] < MAX_MISFIT else None


def _fit(boxes: Array, sizes: Array) -> Array:
    return np.asarray((boxes[:, :2] + boxes[:, 2:] <= sizes + SLACK).all(axis=1))


def _turn(boxes: Array, orientation: Array, stored: Array) -> Array:
    """Boxes in images of a stored size (n, 2), after an EXIF orientation (n,) is applied to these."""
    low, sides = boxes[:, :2], boxes[:, 2:]
    far = stored - low - sides  # distances from the right and from the lower edge
    x = np.where(np.isin(orientation, (2, 3, 7, 8)), far[:, 0], low[:, 0])
    y = np.where(np.isin(orientation, (3, 4, 6, 7)), far[:, 1], low[:, 1])
    turned = np.column_stack([x, y, sides])
    return np.where(orientation[:, None] >= 5, turned[:, [1, 0, 3, 2]], turned)


def _describe(what: str, chosen: Array, annotated: Array, files: FileSizes, images: Sequence[Path]) -> str:
    examples = summarise(
        f"{images[row].name} (annotated {_size(annotated[row])}, shown {_size(files.shown[row])})"
        for row in np.flatnonzero(chosen).tolist()
    )
    return f"{chosen.sum()} of {len(images)} images are not of the size that their annotation says; {what}: {examples}"


def _size(size: Array) -> str:
    return f"{size[0]:g} x {size[1]:g}"


def _remedy(files: FileSizes, unclear: Array) -> str:
    if (files.orientation[unclear] >= 5).mean() < 0.5:
        return (
            "their boxes may be of another picture. Give the images that were annotated, or scale the boxes and "
            "correct width and height in the annotations"
        )
    return (
        "they are stored turned (EXIF orientation), and their boxes fit both the stored pixels and the image as it is "
        "shown. If they were drawn on the stored pixels, remove the orientation from the files "
        "(exiftool -Orientation= FILES); else exchange width and height in the annotations"
    )
