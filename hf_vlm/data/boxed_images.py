"""What sources share that list image files with boxes: checks, the column `objects`, the stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hf_vlm.data.checks import check_boxes
from hf_vlm.data.indexed import TableReader, indexed_stream
from hf_vlm.data.schema import image_feature, objects_feature

__all__ = ["Boxes", "labelled_stream"]

Array = np.ndarray[Any, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Boxes:
    """All boxes of a source, (n,) each.

    Args:
        class_names: Of the categories.
        rows: The image that each is in, by its position.
        boxes: (n, 4), x, y, width, height in pixels.
        categories: Index into class_names.
        sizes: (n, 2), width and height of the image of each box in pixels; infinity where they are not known.
        name_of: Names the box at an index, for messages.
        areas: In square pixels; None for those of the boxes.
        crowds: 1 for boxes that evaluation ignores; None where there are none.
    """

    class_names: Sequence[str]
    rows: Array
    boxes: Array
    categories: Array
    sizes: Array
    name_of: Callable[[int], str]
    areas: Array | None = None
    crowds: Array | None = None

    def objects(self, num_images: int, source: object) -> list[Record]:
        """The column `objects` of the first images, without the boxes of which nothing remains in their image.

        Raises:
            ValueError: A category is out of range.
        """
        keep = check_boxes(
            self.boxes,
            self.categories,
            width=self.sizes[:, 0],
            height=self.sizes[:, 1],
            class_names=self.class_names,
            name_of=self.name_of,
            source=source,
        )
        objects: list[Record] = [{"bbox": [], "category": [], "area": [], "iscrowd": []} for _ in range(num_images)]
        for index in np.flatnonzero(keep & (self.rows < num_images)).tolist():
            target, box = objects[self.rows[index]], self.boxes[index]
            target["bbox"].append(box.tolist())
            target["category"].append(int(self.categories[index]))
            target["area"].append(float(box[2] * box[3] if self.areas is None else self.areas[index]))
            target["iscrowd"].append(0 if self.crowds is None else int(self.crowds[index]))
        return objects


def labelled_stream(
    paths: Sequence[object], image_ids: Sequence[int], boxes: Boxes | None, source: object
) -> datasets.IterableDataset:
    """The stream of image files, with `objects` where there are boxes.

    Raises:
        ValueError: A category is out of range.
    """
    features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
    columns: dict[str, Any] = {
        "image": [{"bytes": None, "path": str(path)} for path in paths],
        "image_id": list(image_ids),
    }
    if boxes is not None:
        columns["objects"] = boxes.objects(len(paths), source)
        features["objects"] = objects_feature(boxes.class_names)
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return indexed_stream(TableReader(table), len(table), features)
