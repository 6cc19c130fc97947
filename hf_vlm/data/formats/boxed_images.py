"""Sources of image files with boxes beside them: COCO, Pascal VOC and YOLO end here."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hf_vlm.data.formats.annotations import ObjectLists, check_boxes, select_objects
from hf_vlm.data.formats.box_conventions import XYWH
from hf_vlm.data.formats.fitted_boxes import Motion, fit_boxes
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.segmentations import orient_segmentation, scale_segmentation
from hf_vlm.data.source import Source

__all__ = ["BoxedImages", "boxed_images_source"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BoxedImages:
    """All objects of a source in one list, and the image of each.

    Args:
        class_names: Names of the categories.
        objects: The n objects, each category an index into class_names.
        rows: (n,), position of the image of each object.
        sizes: (images, 2), width and height of each image in pixels; infinity where they are not known.
        name_of: Name of the object at an index, for messages.
        are_measured: Whether the sizes are those of the files, and not what the annotations say.
        convention: Which of the conventions of `box_conventions` the format stores boxes by.
    """

    class_names: Sequence[str]
    objects: ObjectLists
    rows: Array
    sizes: Array
    name_of: Callable[[int], str]
    are_measured: bool = False
    convention: str = XYWH

    def fitted(self, paths: Sequence[Path], source: object) -> tuple["BoxedImages", Array]:
        """The objects as they lie in the files, and the images (len(paths),) bool of which that is clear.

        Raises:
            ValueError: See `fit_boxes`.
        """
        if self.are_measured:
            return self, np.ones(len(paths), dtype=bool)
        boxes = np.array(self.objects["bbox"], dtype=np.float64).reshape(-1, 4)
        fitted = fit_boxes(boxes, self.rows, self.sizes, paths, source)
        objects = self.objects
        if fitted.boxes is not boxes:
            with np.errstate(divide="ignore", invalid="ignore"):
                factors = fitted.boxes[:, 2:].prod(axis=1) / boxes[:, 2:].prod(axis=1)
            areas = np.array(objects["area"]) * np.where(np.isfinite(factors), factors, 1.0)
            objects = {**objects, "bbox": fitted.boxes.tolist(), "area": areas.tolist()}
        if "segmentation" in objects and fitted.motion is not None:
            objects = {**objects, "segmentation": self._moved_segmentations(fitted.motion)}
        return replace(self, objects=objects, sizes=fitted.sizes), fitted.is_clear[: len(paths)]

    def _moved_segmentations(self, motion: Motion) -> list[str]:
        texts = list(self.objects["segmentation"])
        is_moved = (motion.orientation != 1) | (motion.factors != 1).any(axis=1)  # (images,)
        for index, row in enumerate(self.rows.tolist()):
            if row < len(is_moved) and is_moved[row]:
                width, height = map(int, self.sizes[row].tolist())
                turned = orient_segmentation(texts[index], int(motion.orientation[row]), (width, height))
                texts[index] = scale_segmentation(turned, motion.factors[row].tolist())
        return texts

    def with_checked_masks(self, source: object) -> "BoxedImages":
        """The objects without `segmentation` where none has a mask; where some have, a warning names the others."""
        if "segmentation" not in self.objects:
            return self
        texts = self.objects["segmentation"]
        if not any(texts):
            return replace(self, objects=select_objects(self.objects, range(len(texts)), has_masks=False))
        missing = [index for index, text in enumerate(texts) if not text and not self.objects["iscrowd"][index]]
        if missing:
            logger.warning(
                "%s: %d of %d objects have no mask, or one that is empty or broken; instance segmentation takes them "
                "as crowds, which are neither trained on nor evaluated: %s",
                source,
                len(missing),
                len(texts),
                summarise(map(self.name_of, missing)),
            )
        return self

    def by_image(self, num_images: int, source: object) -> list[ObjectLists]:
        """The objects of each of the first images, without the boxes of which nothing remains in their image.

        Raises:
            ValueError: A category is out of range, or the boxes are of another convention.
        """
        width, height = self.sizes[self.rows].T
        keep = check_boxes(
            np.array(self.objects["bbox"], dtype=np.float64).reshape(-1, 4),
            np.array(self.objects["category"], dtype=np.int64),
            width=width,
            height=height,
            class_names=self.class_names,
            name_of=self.name_of,
            source=source,
            convention=self.convention,
        )
        indices: list[list[int]] = [[] for _ in range(num_images)]  # of the objects of each image
        for index in np.flatnonzero(keep & (self.rows < num_images)).tolist():
            indices[self.rows[index]].append(index)
        return [select_objects(self.objects, kept) for kept in indices]


def boxed_images_source(
    paths: Sequence[Path], image_ids: Sequence[int], boxes: BoxedImages | None, source: object
) -> Source:
    """The source of image files, with `objects` where there are boxes.

    Raises:
        ValueError: A category is out of range, the boxes are of another convention, or of images of another size.
    """
    features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
    columns: dict[str, Any] = {
        "image": [{"bytes": None, "path": str(path)} for path in paths],
        "image_id": list(image_ids),
    }
    annotated_sizes = None
    if boxes is not None:
        boxes, is_clear = boxes.with_checked_masks(source).fitted(paths, source)
        columns["objects"] = boxes.by_image(len(paths), source)
        features["objects"] = objects_feature(boxes.class_names, has_masks="segmentation" in boxes.objects)
        kept = np.flatnonzero(is_clear)
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
        annotated_sizes = None if boxes.are_measured else boxes.sizes[kept]
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return Source(
        dataset=indexed_stream(TableReader(table), len(table), features),
        num_examples=len(table),
        max_objects=None if boxes is None else max(len(objects["bbox"]) for objects in columns["objects"]),
        annotated_sizes=annotated_sizes,
    )
