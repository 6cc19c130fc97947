"""Pascal VOC: one xml file per image."""

import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_vlm.data.formats.annotations import MASK_FIELDS, normalise_objects
from hf_vlm.data.formats.box_conventions import CORNERS
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.splits import choose_split
from hf_vlm.data.formats.voc_files import find_splits, looks_like_voc, pair_images
from hf_vlm.data.formats.voc_masks import read_object_masks
from hf_vlm.data.io.files import map_files, read_bytes
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.source import Source

__all__ = ["looks_like_voc", "open_voc"]

logger = logging.getLogger(__name__)

CORNER_TAGS = ("xmin", "ymin", "xmax", "ymax")
MIN_ZEROS = 0.1  # near corners at 0 per one at 1, below which they are slips in a set that counts from 1


class VocObject(NamedTuple):
    """An object of an xml file."""

    name: str
    corners: tuple[float, float, float, float]  # as stored
    is_difficult: bool


class VocImage(NamedTuple):
    """The content of an xml file."""

    size: tuple[float, float]  # width, height; infinity where it is not given
    objects: list[VocObject]
    file_name: str  # of the image; empty where it is not given


def open_voc(source: Path, split: str, *, num_samples: int | None = None, object_masks: bool = True) -> Source:
    """Stream the images and boxes of Pascal VOC annotations, in the order of their names.

    Layouts: `Annotations/.../*.xml` beside `JPEGImages` or `images`, with the splits in `ImageSets/Main/<split>.txt`,
    also in a folder `VOC20xx` or several of them; or xml files beside their images, in one folder per split or one for
    all. An xml file belongs to the image of its path there, else to the one that it names.
    Corners are pixels counted from 1 and belong to the box: x = xmin - 1, width = xmax - xmin + 1. Sets whose
    corners count from 0, as some tools write them, are recognised and named in a warning. Objects marked as difficult
    have `iscrowd` 1: evaluation ignores them. Classes are in alphabetical order, those of all splits.

    So difficult objects are neither trained on nor counted as errors. With `object_masks`, an image of the same name
    in `SegmentationObject` holds the masks of the objects. Images without an xml file are left out; xml files without
    an image stay, as images that cannot be read.

    Raises:
        ValueError: There are no xml files, no such split or no images; a file cannot be read, may belong to several
            images, or has a box that is not four numbers; or the boxes are of another convention or of other images.
    """
    splits = find_splits(source)
    files = choose_split(splits, split, source)
    every = sorted({file for group in splits.values() for file in group})
    parsed = _parse_all(every, source)
    names = sorted({item.name for image in parsed.values() for item in image.objects})
    paths = pair_images({file: image.file_name for file, image in parsed.items()}, files, source)[:num_samples]
    found = [(row, file, item) for row, file in enumerate(files) for item in parsed[file].objects]
    index_of = {name: index for index, name in enumerate(names)}
    first, last = _counting(parsed.values(), source)
    stored: list[dict[str, Any]] = [
        {
            "bbox": (left - first, top - first, right - left + last, bottom - top + last),
            "category": index_of[item.name],
            "iscrowd": item.is_difficult,
        }
        for _, _, item in found
        for left, top, right, bottom in [item.corners]
    ]
    if object_masks:
        masks = read_object_masks(files, [len(parsed[file].objects) for file in files])
        stored = [item | {"segmentation": text} for item, text in zip(stored, chain.from_iterable(masks))]
    boxes = BoxedImages(
        class_names=names,
        objects=normalise_objects(stored, MASK_FIELDS, source, has_masks=object_masks),
        rows=np.array([row for row, _, _ in found], dtype=np.int64),
        sizes=np.array([parsed[file].size for file in files], dtype=np.float64).reshape(-1, 2),
        name_of=lambda index: f"{found[index][2].name} of {found[index][1].name}",
        convention=CORNERS,
    )
    return boxed_images_source(paths, range(len(paths)), boxes if names else None, source)


class _Builder(ET.TreeBuilder):
    """Refuses what could declare entities, in any encoding."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which annotations have no need of")


def _parse_all(files: list[Path], source: Path) -> dict[Path, VocImage]:
    parsed = dict(zip(files, map_files(_try_parse, files, "Reading xml")))
    problems = [str(result) for result in parsed.values() if isinstance(result, ValueError)]
    if problems:
        raise ValueError(f"{source}: {len(problems)} of {len(files)} xml files make no sense: {summarise(problems)}")
    return {file: result for file, result in parsed.items() if isinstance(result, VocImage)}


def _try_parse(file: Path) -> VocImage | ValueError:
    try:
        return _parse(file)
    except (ET.ParseError, OSError, ValueError) as error:
        return ValueError(f"{file} cannot be read as an annotation of Pascal VOC: {error}")


def _parse(file: Path) -> VocImage:
    root = ET.fromstring(read_bytes(file), ET.XMLParser(target=_Builder()))
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>, not <annotation>")
    width, height = (_side(root.findtext(f"size/{side}")) for side in ("width", "height"))
    objects = [parsed for item in root.iter("object") for parsed in _parse_object(item)]
    return VocImage((width, height), objects, (root.findtext("filename") or "").strip())


def _side(text: str | None) -> float:
    """Width or height of an image; infinity where it is not given: zero is what tools write that do not know it."""
    side = float((text or "").strip() or 0)
    return side if 0 < side < np.inf else np.inf


def _parse_object(item: ET.Element) -> list[VocObject]:
    """An object of each box of an xml object; it has several where a tool joins those of a class."""
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    is_difficult = (item.findtext("difficult") or "0").strip() == "1"
    found = []
    for texts in [[box.findtext(corner) for corner in CORNER_TAGS] for box in item.findall("bndbox")] or [[None] * 4]:
        try:
            left, top, right, bottom = (float(text or "") for text in texts)
        except ValueError:
            raise ValueError(f"the bndbox of {name} needs {', '.join(CORNER_TAGS)}, has {texts}") from None
        found.append(VocObject(name, (left, top, right, bottom), is_difficult))
    return found


def _counting(images: Iterable[VocImage], source: Path) -> tuple[int, int]:
    """How corners count: the number of the first pixel, and 1 where far corners are pixels of the box, 0 where edges.

    Counted from 1 no coordinate is 0, and boxes that are cut off by an edge begin at 1. Counted from 0, no pixel has
    the width or height of its image as its number: a far corner that has is an edge.

    Args:
        images: Those of all splits, for a few boxes may not show it.
        source: Name of the source, for messages.
    """
    found = [(item.corners, image.size) for image in images for item in image.objects]
    corners = np.array([corners for corners, _ in found], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([size for _, size in found], dtype=np.float64).reshape(-1, 2)
    zeros, ones = (int((corners[:, :2] == value).sum()) for value in (0, 1))
    if not zeros or zeros < MIN_ZEROS * ones:
        return 1, 1
    are_edges = bool((corners[:, 2:] == sizes).any())
    logger.warning(
        "%s: corners of boxes are read as counted from 0, and not from 1 as in Pascal VOC: %d of %d xmin and ymin are "
        "0; xmax and ymax are taken as %s",
        source,
        zeros,
        2 * len(corners),
        "edges, since some are the width or height of their image" if are_edges else "pixels of the box",
    )
    return 0, 0 if are_edges else 1
