"""Pseudo-labels: boxes, and masks, that were found in images, not annotated; a table by `image_id`, kept in a file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.data.io.durable import replaced_file
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.source import Source

__all__ = ["LabelsOfImage", "PseudoLabels"]

Array = np.ndarray[Any, Any]
CLASS_NAMES_KEY, ORIGIN_KEY = b"class_names", b"origin"  # in the metadata of the file


class LabelsOfImage(NamedTuple):
    """What was found in one image."""

    image_id: int
    boxes: Array  # (n, 4) float32 x, y, width, height in pixels of the image as it is displayed
    labels: Array  # (n,) int64
    scores: Array  # (n,) float32
    segmentations: Sequence[str] | None = None  # masks as text, see `hf_vlm.data.segmentations`


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """The pseudo-labels of many images, those of one beside each other.

    Args:
        image_ids: (images,) int64, ascending.
        starts: (images + 1,) int64, where the boxes of each image begin, and where the last ones end.
        boxes: (objects, 4) float32, x, y, width, height in pixels of the image as it is displayed.
        labels: (objects,) int64 indices into `class_names`.
        scores: (objects,) float32; a detector's are comparable among images, those of regions are not.
        class_names: Names of the classes.
        segmentations: (objects,) masks as text; None for boxes alone.
    """

    image_ids: Array
    starts: Array
    boxes: Array
    labels: Array
    scores: Array
    class_names: tuple[str, ...]
    segmentations: Array | None = None

    @classmethod
    def collect(cls, found: Iterable[LabelsOfImage], class_names: Sequence[str]) -> "PseudoLabels":
        """The table of images in any order; of those that come again, as in mixtures, the first counts."""
        by_id: dict[int, LabelsOfImage] = {}
        for image in found:
            by_id.setdefault(image.image_id, image)
        images = [by_id[image_id] for image_id in sorted(by_id)]
        counts = [len(image.boxes) for image in images]
        has_masks = bool(images) and all(image.segmentations is not None for image in images)
        texts = [text for image in images for text in image.segmentations or ()]
        return cls(
            image_ids=np.array([image.image_id for image in images], dtype=np.int64),
            starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in images)]),
            labels=np.concatenate([np.zeros(0, np.int64), *(image.labels for image in images)]),
            scores=np.concatenate([np.zeros(0, np.float32), *(image.scores for image in images)]),
            class_names=tuple(class_names),
            segmentations=np.array(texts, dtype=object) if has_masks else None,
        )

    def num_scored(self, score: float) -> int:
        """Number of objects with at least this score."""
        return int((self.scores >= score).sum())

    def best(self, num_objects: int) -> "PseudoLabels":
        """The objects with the best scores over all images; of equal ones, all or none."""
        if num_objects >= len(self.scores):
            return self
        kept = self.scores > np.sort(self.scores)[-num_objects - 1]
        before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])  # number of kept objects before each
        names = ("boxes", "labels", "scores", *(() if self.segmentations is None else ("segmentations",)))
        return replace(self, starts=before[self.starts], **{name: getattr(self, name)[kept] for name in names})

    def label(self, source: Source) -> Source:
        """The images of a source in which something was found, with that as their `objects` and nothing else."""
        counts = np.diff(self.starts)
        features = datasets.Features(
            {
                "image": image_feature(),
                "image_id": datasets.Value("int64"),
                "objects": objects_feature(self.class_names, has_masks=self.segmentations is not None),
            }
        )
        images = source.unlabelled().dataset.filter(_Has(self.image_ids[counts > 0]), input_columns=["image_id"])
        return replace(
            source,
            dataset=images.map(_Attach(self), features=features),
            num_examples=None if source.num_examples is None else int((counts > 0).sum()),
            max_objects=int(counts.max(initial=0)),
            mask_class_names=None,
            annotated_sizes=None,
        )

    def of(self, image_id: int) -> slice:
        """Where the boxes of an image are; ValueError for an image that is not in the table."""
        position = int(np.searchsorted(self.image_ids, image_id))
        if position == len(self.image_ids) or self.image_ids[position] != image_id:
            raise ValueError(f"No objects were looked for in image {image_id}")
        return slice(int(self.starts[position]), int(self.starts[position + 1]))

    def save(self, path: Path, origin: str) -> None:
        """Writes the table as Parquet, one row per image; the file is there whole or not at all.

        Args:
            origin: What the boxes depend on, for `load` to compare.
        """
        offsets = pa.array(self.starts, type=pa.int64())
        boxes = pa.FixedSizeListArray.from_arrays(pa.array(self.boxes.ravel()), 4)
        columns = {"bbox": boxes, "category": pa.array(self.labels), "score": pa.array(self.scores)}
        if self.segmentations is not None:
            columns["segmentation"] = pa.array(self.segmentations, type=pa.large_string())
        table = pa.table(
            {"image_id": self.image_ids}
            | {name: pa.LargeListArray.from_arrays(offsets, values) for name, values in columns.items()}
        )
        metadata = {CLASS_NAMES_KEY: json.dumps(self.class_names).encode(), ORIGIN_KEY: origin.encode()}
        with replaced_file(path) as file:
            pq.write_table(table.replace_schema_metadata(metadata), file)

    @classmethod
    def load(cls, path: Path, origin: str) -> "PseudoLabels | None":
        """The table in a file; None where there is no file, it is damaged, or is of another origin."""
        try:
            table = pq.read_table(path).combine_chunks()
        except (OSError, pa.ArrowInvalid):
            return None
        metadata = table.schema.metadata or {}
        if metadata.get(ORIGIN_KEY) != origin.encode():
            return None
        lists = {name: table[name].combine_chunks() for name in table.column_names if name != "image_id"}
        texts = lists.get("segmentation")
        return cls(
            image_ids=table["image_id"].to_numpy(),
            starts=lists["score"].offsets.to_numpy(),
            boxes=lists["bbox"].values.values.to_numpy().reshape(-1, 4),
            labels=lists["category"].values.to_numpy(),
            scores=lists["score"].values.to_numpy(),
            class_names=tuple(json.loads(metadata[CLASS_NAMES_KEY])),
            segmentations=None if texts is None else np.array(texts.values.to_pylist(), dtype=object),
        )


@dataclass(frozen=True)
class _Has:
    image_ids: Array  # ascending

    def __call__(self, image_id: int) -> bool:
        position = np.searchsorted(self.image_ids, image_id)
        return bool(position < len(self.image_ids) and self.image_ids[position] == image_id)


@dataclass(frozen=True)
class _Attach:
    found: PseudoLabels

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        here = self.found.of(example["image_id"])
        boxes = self.found.boxes[here]
        objects = {
            "bbox": boxes.tolist(),
            "category": self.found.labels[here].tolist(),
            "area": (boxes[:, 2] * boxes[:, 3]).tolist(),
            "iscrowd": [0] * len(boxes),
        }
        if self.found.segmentations is not None:
            objects["segmentation"] = self.found.segmentations[here].tolist()
        return {**example, "objects": objects}
