"""What is wrong with images, labels and boxes, by the statistics of each image that `inspect_source` keeps."""

from typing import Any

import numpy as np

from hf_vlm.data.boxes import MIN_BOX_SIDE, clean_boxes
from hf_vlm.data.formats.annotations import TOLERANCE
from hf_vlm.data.formats.box_conventions import check_convention
from hf_vlm.data.inspection.pixel_range import MAX_DARK_BITS
from hf_vlm.data.inspection.report import BoxReport, Issue
from hf_vlm.data.source import Source

__all__ = ["box_convention", "box_issues", "image_issues", "label_issues", "size_issues"]

Array = np.ndarray[Any, Any]

DARK_LEVELS = 64  # of 256; an image that uses fewer is stored in a part of its range
TINY_SIDE = 2.0  # pixels


def image_issues(images: Array, names: list[str], bad_masks: list[str]) -> list[Issue]:
    """Images of one colour or of few dark levels, and those whose masks do not fit."""
    # Few levels may look like one colour, but where there are 16 bits these show.
    is_dark = (images["used_bits"] > 0) & (images["used_bits"] <= MAX_DARK_BITS)
    is_dark |= ~images["is_blank"] & (images["used_bits"] == 0) & (images["largest"] < DARK_LEVELS)
    blank = [names[index] for index in np.flatnonzero(images["is_blank"] & ~is_dark).tolist()]
    levels = int(images["largest"][is_dark].max(initial=0)) + 1
    dark = (
        f"images that use the darkest {levels} of 256 levels, as 12 bits stored in 16 do and masks; scale their "
        "values to the whole range of the file's type"
    )
    found = {
        dark: [names[index] for index in np.flatnonzero(is_dark).tolist()],
        "images of one colour": blank,
        "images whose mask is not of their size, or cannot be read": bad_masks,
    }
    return [Issue(what, len(where), where) for what, where in found.items() if where]


def size_issues(images: Array, source: Source, names: list[str]) -> list[Issue]:
    """Images of another size than their annotation says; opening a source looks at a sample alone."""
    if source.annotated_sizes is None:
        return []
    annotated = source.annotated_sizes[images["position"]]  # (images, 2)
    differs = np.isfinite(annotated).all(axis=1) & (
        annotated != np.column_stack([images["width"], images["height"]])
    ).any(1)
    where = [
        f"{names[index]}: annotated {annotated[index, 0]:g} x {annotated[index, 1]:g}, "
        f"the file {images['width'][index]} x {images['height'][index]}"
        for index in np.flatnonzero(differs).tolist()
    ]
    return [Issue("images of another size than their annotation says", len(where), where)] if where else []


def label_issues(images: Array, counts: dict[str, int], names: list[str]) -> list[Issue]:
    """Images without a label, and classes without an image."""
    missing = np.flatnonzero((images["label"] < 0) | (images["label"] >= len(counts))).tolist()
    empty = [name for name, count in counts.items() if not count]
    issues = [
        Issue("images without a label", len(missing), [names[index] for index in missing]),
        Issue("classes without an image", len(empty), empty),
    ]
    return [issue for issue in issues if issue.count]


def box_convention(images: Array, boxes: Array, source: str) -> tuple[str | None, bool]:
    """What boxes look like where they seem to be of another convention, as corners, and whether they certainly are.

    Opening a source may have known the size of few images or of none.
    """
    height, width = (images[side][boxes["image"]].astype(np.float64) for side in ("height", "width"))
    try:
        return check_convention(boxes["box"], width=width, height=height, source=source), False
    except ValueError as error:
        return str(error), True


def box_issues(images: Array, boxes: Array, report: BoxReport, names: list[str]) -> list[Issue]:
    """Boxes that make no sense in the image as it is decoded, whatever its annotation says of its size."""
    box, shown_in = boxes["box"], images[boxes["image"]]
    height, width = (shown_in[side].astype(np.float64) for side in ("height", "width"))
    clipped, keep = clean_boxes(box, width=width, height=height)
    with np.errstate(invalid="ignore"):
        is_thin = ~np.isfinite(box).all(axis=1) | (box[:, 2:] < MIN_BOX_SIDE).any(axis=1)
        high = box[:, :2] + box[:, 2:]
        beyond = np.maximum(-box[:, :2], high - np.stack([width, height], axis=1)).max(axis=1) > TOLERANCE
    sticks_out = keep & beyond
    known = (boxes["category"] >= 0) & (boxes["category"] < len(report.class_counts))
    turned = "; most of these images are stored turned (EXIF), their boxes perhaps annotated before they were"
    found = {
        "boxes without a class": ~known,
        "boxes without a width or a height": is_thin,
        "boxes outside their image": ~keep & ~is_thin,
        "boxes that stick out of their image"
        + turned * bool(shown_in["is_turned"][sticks_out].sum() > 0.5 * sticks_out.sum()): sticks_out,
        f"boxes with a side below {TINY_SIDE:g} px": keep & (clipped[:, 2:].min(axis=1) < TINY_SIDE),
        "boxes annotated twice": _repeated(boxes),
    }
    issues = []
    for what, mask in found.items():
        where = [names[index] for index in np.unique(boxes["image"][mask]).tolist()]
        issues.append(Issue(what, int(mask.sum()), where))
    empty = [name for name, count in report.class_counts.items() if not count]
    issues.append(Issue("classes without a box", len(empty), empty))
    return [issue for issue in issues if issue.count]


def _repeated(boxes: Array) -> Array:
    """(n,) bool, which boxes are in their image a second time, with the same class."""
    rows = np.column_stack([boxes["image"], boxes["category"], boxes["box"]])
    order = np.lexsort(rows.T)
    repeated = np.zeros(len(boxes), dtype=bool)
    repeated[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return repeated
