"""What sources share that list image files with boxes: checks, the column `objects`, the stream."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from hf_vlm.data.formats.checks import check_boxes
from hf_vlm.data.io.files import can_list
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.source import Source

__all__ = ["Boxes", "boxed_images_source", "existing_paths", "map_files"]

Array = np.ndarray[Any, Any]
Record = dict[str, Any]

Item = TypeVar("Item")
Result = TypeVar("Result")

NUM_THREADS = 8  # they wait for disks and servers
BATCH_SIZE = 32  # files that a thread reads at a time
MIN_FILES_FOR_BAR = 5000  # files; fewer are read in a moment


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


def boxed_images_source(
    paths: Sequence[object], image_ids: Sequence[int], boxes: Boxes | None, source: object
) -> Source:
    """The source of image files, with `objects` where there are boxes.

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
    return Source(dataset=indexed_stream(TableReader(table), len(table), features), num_examples=len(table))


def existing_paths(paths: Iterable[Path]) -> set[Path]:
    """Those of the paths that are there, by listing each folder once; web servers cannot list and have all."""
    paths = set(paths)
    folders = {path.parent for path in paths}
    unlisted = {folder for folder in folders if not can_list(folder)}
    there = {path for folder in folders - unlisted if folder.is_dir() for path in folder.iterdir()}
    return {path for path in paths if path in there or path.parent in unlisted}


def map_files(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """Results of a function that reads files, in order; a bar shows when it takes long."""
    batches = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    results: list[Result] = []
    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(desc=description, total=len(items), disable=len(items) < MIN_FILES_FOR_BAR) as bar,
    ):
        for batch in threads.map(lambda batch: [function(item) for item in batch], batches):
            results += batch
            bar.update(len(batch))
    return results
