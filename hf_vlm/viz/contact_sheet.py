"""Examples of a stream on one picture, with their labels, boxes and masks."""

import contextlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_vlm.data.inspection.inspect import image_name
from hf_vlm.data.io.decode import BadImageError, decode_image, decode_mask
from hf_vlm.data.segmentations import FramedMask, read_segmentation
from hf_vlm.data.source import Source
from hf_vlm.data.transforms.objects import Masks
from hf_vlm.viz.detections import render_detections
from hf_vlm.viz.masks import render_mask, render_objects
from hf_vlm.viz.sheets import captioned, contact_sheet, legend, stacked

__all__ = ["Reservoir", "example_sheet", "render_example", "render_pseudo_labels"]

Array = np.ndarray[Any, Any]
Example = dict[str, Any]

logger = logging.getLogger(__name__)

PICTURE = "pseudo_labels.png"
NUM_SHOWN = 24  # images on that picture
SIDE = 320  # pixels of the longer side of each picture
MAX_IN_LEGEND = 20  # classes; with more, the names are on the boxes
MAX_NAMED = 10  # boxes on one picture; the names of more would hide it


class Reservoir:
    """Reservoir sampling: keeps some examples of a stream of unknown length, all equally likely, in their order.

    Args:
        size: Number of examples to keep.
        seed: Seed of the choice.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self._generator = np.random.default_rng(seed)
        self._kept: dict[int, Example] = {}  # by position
        self._num_seen = 0

    @property
    def examples(self) -> list[Example]:
        return [self._kept[position] for position in sorted(self._kept)]

    def add(self, example: Example) -> None:
        """Keep the next example, or leave it."""
        position, self._num_seen = self._num_seen, self._num_seen + 1
        if len(self._kept) >= self.size:
            slot = int(self._generator.integers(self._num_seen))
            if slot >= self.size:
                return
            del self._kept[list(self._kept)[slot]]
        self._kept[position] = example


def example_sheet(examples: Sequence[Example], features: datasets.Features, *, columns: int = 6) -> Image.Image:
    """Renders examples in rows, each with its masks and boxes, above its label and its name; a legend is on top.

    Args:
        examples: Examples of a source, with images that can be decoded.
        features: Features of the source; they name the classes.

    Raises:
        ValueError: There is no example, or columns is not positive.
    """
    sheet = contact_sheet([render_example(example, features) for example in examples], columns=columns)
    if not _has_legend(features):
        return sheet
    return stacked(legend(_class_names(features), width=sheet.width), sheet)


def render_pseudo_labels(source: Source, folder: Path) -> None:
    """Renders the first images of a source with the pseudo-labels found in them, as `pseudo_labels.png`."""
    examples = list(itertools.islice(source, NUM_SHOWN))
    example_sheet(examples, source.features).save(folder / PICTURE)
    logger.info("Look at what is taken for objects: %s", folder / PICTURE)


def render_example(example: Example, features: datasets.Features) -> Image.Image:
    """Renders one example, its longer side 320 pixels, above its label and its name."""
    array, (height, width) = decode_image(example["image"], at_least=(SIDE, SIDE))
    scale = SIDE / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    picture = Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
    masks = [example[name] for name in ("instance_mask", "mask") if name in example]
    if masks:
        with contextlib.suppress(BadImageError):
            picture = render_mask(picture, decode_mask(masks[0]), background=0)
    if "segmentation" in example.get("objects", {}):
        picture = _with_object_masks(picture, example["objects"], (height, width))
    if "objects" in example:
        picture = _with_boxes(picture, example["objects"], features, (size[0] / width, size[1] / height))
    caption = PurePath(image_name(example)).name
    if "label" in example:
        names, label = features["label"].names, example["label"]
        caption = f"{names[label] if 0 <= label < len(names) else 'no label'}  |  {caption}"
    return captioned(picture, caption)


def _class_names(features: datasets.Features) -> list[str]:
    return list(features["objects"]["category"].feature.names)


def _has_legend(features: datasets.Features) -> bool:
    return "objects" in features and 0 < len(_class_names(features)) <= MAX_IN_LEGEND


def _with_object_masks(picture: Image.Image, objects: dict[str, Any], image_size: tuple[int, int]) -> Image.Image:
    """The picture with the masks of the objects of an image (height, width), but for those that do not fit it."""
    masks = Masks.of([_read_mask(text, image_size) for text in objects["segmentation"]])
    return render_objects(picture, masks.rasterise((picture.height, picture.width)), objects["category"])


def _read_mask(text: str, image_size: tuple[int, int]) -> FramedMask | None:
    try:
        return read_segmentation(text, *image_size)
    except ValueError:  # of an image of another shape
        return None


def _with_boxes(
    picture: Image.Image, objects: dict[str, Any], features: datasets.Features, scale: tuple[float, float]
) -> Image.Image:
    boxes = np.asarray(objects["bbox"], dtype=np.float64).reshape(-1, 4)
    is_finite = np.isfinite(boxes).all(axis=1)  # others have no position
    boxes, categories = boxes[is_finite], np.asarray(objects["category"], dtype=np.int64)[is_finite].tolist()
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) * [*scale, *scale]
    class_names = _class_names(features)
    names = [class_names[index] if 0 <= index < len(class_names) else "?" for index in categories]
    if _has_legend(features) or len(names) > MAX_NAMED:
        names = [""] * len(names)
    return render_detections(picture, boxes, names, class_ids=categories, scale=1)
