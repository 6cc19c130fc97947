"""Which columns of a table are what, and its rows in the form of the schema."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from hf_vlm.data.boxes import clean_boxes
from hf_vlm.data.formats.annotations import ObjectLists, normalise_objects, select_objects
from hf_vlm.data.io.files import join
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.trust import check_inside, outside_is_allowed
from hf_vlm.data.schema import image_feature, objects_feature

__all__ = [
    "POSITION",
    "Categories",
    "ColumnMap",
    "RowReader",
    "find_columns",
    "make_categories",
    "object_fields",
    "read_categories",
]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

MAX_CLASSES = 2**20  # of labels that are numbers alone: a wrong number would fill the memory with names
POSITION = "__position__"  # column that a reader adds to its rows, where it knows their position

# Names that the columns of the schema have in sources, the likeliest first.
IMAGE_NAMES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "image_bytes",
    "image_path",
    "file_name",
    "path",
)
COLUMN_NAMES = {
    "label": ("label", "labels", "fine_label", "class"),
    "objects": ("objects", "annotations"),
    "mask": ("mask", "semantic_mask", "annotation"),
    "instance_mask": ("instance_mask",),
    "image_id": ("image_id", "id"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
}
OBJECT_NAMES = {
    "bbox": ("bbox", "bboxes", "boxes"),
    "category": ("category", "categories", "category_id", "label", "labels"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
}


@dataclass(frozen=True)
class Categories:
    """The classes of a column: their names, and the index of each value where values are not indices."""

    names: tuple[str, ...]
    index_of: Mapping[Any, int] | None = None

    def index(self, value: Any) -> int:
        """The index of a value; -1 where it is missing, as in `datasets`."""
        if value is None:
            return -1
        return int(value) if self.index_of is None else self.index_of[value]


@dataclass(frozen=True)
class ColumnMap:
    """Names in the source of the columns of the schema, and of the fields of `objects`."""

    columns: Mapping[str, str]
    objects: Mapping[str, str] = field(default_factory=dict)

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.columns.values()))


def find_columns(features: Mapping[str, Any], source: object) -> ColumnMap:
    """Find the columns of the schema among those of a source, by name and type.

    Raises:
        ValueError: None of the columns holds images, or objects have no boxes or no categories.
    """
    masks = {*COLUMN_NAMES["mask"], *COLUMN_NAMES["instance_mask"]}
    candidates = [
        *(name for name in IMAGE_NAMES if _holds_bytes(features.get(name))),
        *(name for name, feature in features.items() if _holds_files(feature) and name not in masks),
        *(name for name in IMAGE_NAMES if _is_text(features.get(name))),
    ]
    if not candidates:
        raise ValueError(
            f"{source} has no column of images; its columns are {summarise(features, num_shown=20)}. Name it 'image', "
            f"holding encoded bytes, {{'bytes', 'path'}}, or a path"
        )
    columns = {"image": candidates[0]}
    if "objects" in features and not _is_objects(features["objects"]):
        logger.warning(
            "%s: the column 'objects' is left out: an object needs a bbox and a category, these have %s",
            source,
            summarise(object_fields(features["objects"])) or "neither",
        )
    accepted = {"label": _is_category, "mask": _holds_files, "instance_mask": _holds_files, "objects": _is_objects}
    for column, names in COLUMN_NAMES.items():
        fits = accepted.get(column, _is_integer)
        found = [name for name in names if fits(features.get(name)) and name not in columns.values()]
        if found:
            columns[column] = found[0]
    unused = [name for name in COLUMN_NAMES["label"] if name in features and name not in columns.values()]
    if "label" not in columns and unused:
        logger.warning(
            "%s: the column %r is left out: a label is one integer or text per image, these are %s",
            source,
            unused[0],
            features[unused[0]],
        )
    if "objects" not in columns:
        return ColumnMap(columns)
    fields = object_fields(features[columns["objects"]])
    objects = {name: next(alias for alias in OBJECT_NAMES[name] if alias in fields) for name in _known_fields(fields)}
    return ColumnMap(columns, objects)


def object_fields(feature: Any) -> dict[str, Any]:
    """Features of one object, stored as a list of structs or as a struct of lists; empty where it is neither."""
    lists = datasets.List | datasets.LargeList
    if isinstance(feature, lists):
        return dict(feature.feature) if isinstance(feature.feature, dict) else {}
    fields = feature.items() if isinstance(feature, dict) else ()
    return {name: inner.feature for name, inner in fields if isinstance(inner, lists)}


def _known_fields(fields: Mapping[str, Any]) -> list[str]:
    return [name for name, aliases in OBJECT_NAMES.items() if not fields.keys().isdisjoint(aliases)]


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Brings the rows of a source into the form of the schema."""

    map: ColumnMap
    label: Categories | None = None
    category: Categories | None = None
    source: str = "the source"  # for messages
    folder: str | None = None  # base of relative paths of images
    cleans_boxes: bool = False
    allow_outside: bool = field(default_factory=outside_is_allowed)

    @property
    def features(self) -> datasets.Features:
        features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
        if self.label is not None:
            features["label"] = datasets.ClassLabel(names=list(self.label.names))
        if self.category is not None:
            features["objects"] = objects_feature(self.category.names)
        for name in ("mask", "instance_mask"):
            if name in self.map.columns:
                features[name] = image_feature()
        return features

    def __call__(self, row: Row) -> Row:
        columns = self.map.columns
        example: Row = {"image": self._encoded(row[columns["image"]])}
        example["image_id"] = int(row[columns["image_id"]]) if "image_id" in columns else self._position(row, example)
        if self.label is not None:
            example["label"] = self.label.index(row[columns["label"]])
        if self.category is not None:
            example["objects"] = self._objects(row, example["image_id"])
        for name in ("mask", "instance_mask"):
            if name in columns:
                example[name] = self._encoded(row[columns[name]])
        return example

    def _encoded(self, value: Any) -> Row:
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        else:
            data, path = (None, value) if isinstance(value, str) else (value, None)
        if data is None and path is not None and self.folder is not None:
            path = join(self.folder, path)
            check_inside([path], self.folder, self.source, allowed=self.allow_outside)
        return {"bytes": data, "path": path}

    def _position(self, row: Row, example: Row) -> int:
        """The row's position; where that is not known, a number made of its content."""
        if POSITION in row:
            return int(row[POSITION])
        content = example["image"]["bytes"] or str(example["image"]["path"]).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")

    def _objects(self, row: Row, image_id: int) -> ObjectLists:
        assert self.category is not None
        location = f"{self.source}, " + (f"row {row[POSITION]}" if POSITION in row else f"image_id {image_id}")
        objects = normalise_objects(row[self.map.columns["objects"]], self.map.objects, location)
        objects["category"] = [self.category.index(value) for value in objects["category"]]
        return self._clean(objects, row) if self.cleans_boxes and objects["bbox"] else objects

    def _clean(self, objects: ObjectLists, row: Row) -> ObjectLists:
        columns = self.map.columns
        width, height = (row.get(columns.get(side, "")) or np.inf for side in ("width", "height"))
        _, keep = clean_boxes(np.array(objects["bbox"], dtype=np.float64), width=width, height=height)
        return select_objects(objects, np.flatnonzero(keep).tolist())


def read_categories(feature: Any) -> Categories | None:
    """The names that a column of categories declares; None where it declares none."""
    return Categories(tuple(feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def make_categories(values: Collection[Any]) -> Categories:
    """Categories from the values that occur: numbers from 0 on, else one class per value, in alphabetical order."""
    if values and all(isinstance(value, int) and value < MAX_CLASSES for value in values):
        return Categories(tuple(str(index) for index in range(max(values) + 1)))
    names = sorted({str(value) for value in values})
    index_of = {name: index for index, name in enumerate(names)}
    return Categories(tuple(names), {value: index_of[str(value)] for value in values})


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _is_category(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or _is_text(feature) or _is_integer(feature)


def _holds_files(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _holds_bytes(feature: Any) -> bool:
    is_binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_binary or _holds_files(feature)


def _is_objects(feature: Any) -> bool:
    return {"bbox", "category"} <= set(_known_fields(object_fields(feature)))
