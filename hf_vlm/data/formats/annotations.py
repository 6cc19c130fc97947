"""The normaliser of objects, one for all formats; and what is wrong with labels and boxes, reported once on opening.

Whatever a format reads becomes one dict per image with lists of equal lengths: `bbox`, `category`, `area`, `iscrowd`,
and where it has masks `segmentation`. What exporters leave out or write as null is filled in the same way everywhere;
what cannot be filled is refused, with its location.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from hf_vlm.data.boxes import MIN_BOX_SIDE, clean_boxes
from hf_vlm.data.formats.box_conventions import XYWH, as_stored, check_convention
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.segmentations import box_of_segmentation, segmentation_text

__all__ = [
    "MASK_FIELDS",
    "OBJECT_FIELDS",
    "TOLERANCE",
    "ObjectLists",
    "check_boxes",
    "check_labels",
    "normalise_captions",
    "normalise_objects",
    "select_objects",
]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

OBJECT_FIELDS = {name: name for name in ("bbox", "category", "area", "iscrowd")}  # stored under their own names
MASK_FIELDS = {**OBJECT_FIELDS, "segmentation": "segmentation"}
OPTIONAL = ("bbox", "area", "iscrowd", "segmentation")  # lists that may be empty; a box needs a segmentation then
SEQUENCES, NUMBERS, CATEGORIES = (list, tuple), (int, float), (str, int, float)  # types; a union would be slower
MAX_INTEGER = 2**1000  # larger ones are beyond float64
TOLERANCE = 0.5  # pixels that a box may stick out: annotation tools round


class ObjectLists(TypedDict):
    """Objects as lists of equal lengths, with one entry per object."""

    bbox: list[list[float]]  # x, y, width, height
    category: list[Any]  # as the source has it: a number or a name
    area: list[float]
    iscrowd: list[int]
    segmentation: NotRequired[list[str]]  # see `hf_vlm.data.segmentations`


def normalise_captions(value: Any) -> list[str]:
    """The captions of an image, from one text or a list of them; what is missing or blank is left out."""
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def normalise_objects(
    stored: Any,
    fields: Mapping[str, str],
    location: object,
    *,
    name_of: Callable[[int], str] = "object {}".format,
    has_masks: bool = False,
) -> ObjectLists:
    """Objects in the one form, from a list with one dict per object, or a dict with one list per field.

    Args:
        stored: What a format reads; None for no objects.
        fields: Names in `stored` of `bbox` and `category`, and where they occur of `area`, `iscrowd` and
            `segmentation`. A box that is missing becomes that of the segmentation; an area that is missing, null, not
            positive or not finite that of the box; a missing or null iscrowd 0.
        location: File, row or example of the objects, for messages.
        name_of: Name of the object at an index, for messages.
        has_masks: Whether to keep the segmentation; it becomes "" where it is missing, empty or broken.

    Raises:
        ValueError: An object has no category or no bbox of four numbers, its area is no number, its iscrowd neither
            0 nor 1, or the lists are not equally long.
    """
    columns = _as_columns(stored or [], fields, location)
    objects: ObjectLists = {"bbox": [], "category": [], "area": [], "iscrowd": []}
    problems, texts = [], []
    for index, (box, category, area, crowd, segmentation) in enumerate(zip(*columns)):
        has_box = box is not None and box != []
        text = segmentation_text(segmentation) if has_masks or not has_box else ""
        if text and not has_box:
            box = box_of_segmentation(text)
        problem = _problem(box, category, area, crowd)
        if problem is not None:
            problems.append(f"{name_of(index)} {problem}")
            continue
        box = [float(value) for value in box]
        objects["bbox"].append(box)
        objects["category"].append(category)
        objects["area"].append(float(area) if area is not None and 0 < area < math.inf else box[2] * box[3])
        objects["iscrowd"].append(0 if _is_null(crowd) else int(crowd))
        texts.append(text)
    if problems:
        raise ValueError(f"{location}: {len(problems)} objects make no sense: {summarise(problems)}")
    if has_masks:
        objects["segmentation"] = texts
    return objects


def _as_columns(stored: Any, fields: Mapping[str, str], location: object) -> list[list[Any]]:
    """The fields of the objects, None where a value is missing."""
    if isinstance(stored, Mapping):
        found = {name: _as_list(stored.get(fields.get(name))) for name in MASK_FIELDS}
        if not all(isinstance(values, list) for values in found.values()):
            raise ValueError(f"{location}: objects must be lists of their fields, or a list of dicts")
        number = len(found["bbox"] or found["segmentation"])
        counts = {fields[name]: len(values) for name, values in found.items() if name in fields}
        optional = {fields[name] for name in OPTIONAL if name in fields and not found[name]}
        if any(count != number for name, count in counts.items() if name not in optional):
            raise ValueError(f"{location}: an object needs one value of each field; there are {counts}")
        return [values or [None] * number for values in found.values()]
    if not isinstance(stored, list) or not all(isinstance(item, Mapping) for item in stored):
        raise ValueError(f"{location}: objects must be lists of their fields, or a list of dicts")
    return [[item.get(fields.get(name)) for item in stored] for name in MASK_FIELDS]


def _as_list(values: Any) -> Any:
    """The values of a field; of structs, as run lengths are, from a struct of lists."""
    if isinstance(values, Mapping) and all(isinstance(inner, list) for inner in values.values()):
        return [dict(zip(values, items)) for items in zip(*values.values())]
    return values or []


def _problem(box: Any, category: Any, area: Any, crowd: Any) -> str | None:
    """What cannot be filled of an object, in words; None where nothing is wrong."""
    if not (isinstance(box, SEQUENCES) and len(box) == 4 and all(map(_is_number, box))):
        found = "no bbox" if box is None else f"the bbox {box}"
        return f"has {found}; it needs four numbers, x, y, width, height"
    if _is_null(category):
        return "has no category"
    if not isinstance(category, CATEGORIES):
        return f"has the category {category}, neither a number nor a name"
    if area is not None and not _is_number(area):
        return f"has the area {area!r}, which is no number"
    if not (_is_null(crowd) or crowd in (0, 1)):
        return f"has the iscrowd {crowd!r}, which is neither 0 nor 1"
    return None


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; infinity and NaN are."""
    return type(value) is float or (
        isinstance(value, NUMBERS)
        and not isinstance(value, bool)
        and not (isinstance(value, int) and abs(value) > MAX_INTEGER)
    )


def _is_null(value: Any) -> bool:
    """Whether a value is missing; tables of numbers have NaN for that."""
    return value is None or value != value


def select_objects(objects: ObjectLists, kept: Sequence[int], *, has_masks: bool = True) -> ObjectLists:
    """The objects at some indices, with their masks where they have and should have them."""
    selected: ObjectLists = {
        "bbox": [objects["bbox"][index] for index in kept],
        "category": [objects["category"][index] for index in kept],
        "area": [objects["area"][index] for index in kept],
        "iscrowd": [objects["iscrowd"][index] for index in kept],
    }
    if has_masks and "segmentation" in objects:
        selected["segmentation"] = [objects["segmentation"][index] for index in kept]
    return selected


def check_labels(
    is_known: Array, *, class_names: Sequence[str], name_of: Callable[[int], str], column: str, source: object
) -> bool:
    """Whether a source has labels: false, with a warning, where none is known, as in test splits with hidden labels.

    Args:
        is_known: (n,) bool, whether the label of each example is one of the classes.
        class_names: Names of the classes.
        name_of: Label and location of the example at an index, for messages.
        column: Name of the column, for messages.
        source: Name of the source, for messages.

    Raises:
        ValueError: Some labels are known and others are not.
    """
    unknown = np.flatnonzero(~is_known).tolist()
    if len(unknown) == len(is_known):
        logger.warning("%s: no row has a label in the column %r; it is left out", source, column)
        return False
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} labels are none of the {len(class_names)} classes: "
            f"{summarise(map(name_of, unknown))}"
        )
    return True


def check_boxes(
    boxes: Array,
    categories: Array,
    *,
    width: Array | float,
    height: Array | float,
    class_names: Sequence[str],
    name_of: Callable[[int], str],
    source: object,
    convention: str = XYWH,
) -> Array:
    """Check all boxes of a source, and log one warning that sums up what was found.

    Args:
        boxes: (n, 4), x, y, width, height in pixels.
        categories: (n,), index into class_names.
        width: (n,), width of the image of each box in pixels; infinity where it is not known.
        height: (n,), height of the image of each box in pixels; infinity where it is not known.
        class_names: Names of the categories.
        name_of: Name of the box at an index, for messages.
        source: Name of the source, for messages.
        convention: Which of the conventions of `box_conventions` the format stores boxes by.

    Returns:
        (n,) bool, false for the boxes of which nothing remains in their image.

    Raises:
        ValueError: A category is out of range, or the boxes are certainly of another convention, as corners are.
    """
    unknown = np.flatnonzero((categories < 0) | (categories >= len(class_names)))
    if len(unknown):
        examples = summarise(f"{categories[index]} of {name_of(index)}" for index in unknown.tolist())
        raise ValueError(
            f"{source}: {len(unknown)} boxes have a category outside 0..{len(class_names) - 1}, which number the "
            f"{len(class_names)} classes: {examples}"
        )
    stored = as_stored(boxes, convention)
    doubt = check_convention(stored, width=width, height=height, source=source, declared=convention)
    _, keep = clean_boxes(boxes, width=width, height=height)
    with np.errstate(invalid="ignore"):  # boxes that are not finite are dropped anyway
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        size = np.stack([width, height], axis=-1) + TOLERANCE
        outside = keep & ((low < -TOLERANCE).any(axis=1) | (high > size).any(axis=1))
    findings = [] if doubt is None else [doubt]
    if not keep.all():
        examples = summarise(f"{name_of(index)} {boxes[index].tolist()}" for index in np.flatnonzero(~keep).tolist())
        findings.append(
            f"{np.count_nonzero(~keep)} of {len(boxes)} boxes are dropped, with a side below {MIN_BOX_SIDE} pixels or "
            f"outside their image: {examples}"
        )
    if outside.any():
        examples = summarise(f"{name_of(index)} {boxes[index].tolist()}" for index in np.flatnonzero(outside).tolist())
        findings.append(f"{np.count_nonzero(outside)} boxes stick out of their image and will be clipped: {examples}")
    empty = [name for index, name in enumerate(class_names) if not (categories[keep] == index).any()]
    if empty:
        findings.append(f"{len(empty)} of {len(class_names)} classes have no box: {summarise(empty)}")
    if findings:
        logger.warning("%s: %s", source, "; ".join(findings))
    return keep
