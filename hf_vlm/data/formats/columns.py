"""Which columns of a table are what, and its rows in the form of the schema."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from hf_vlm.data.boxes import clean_boxes
from hf_vlm.data.formats.annotations import ObjectLists, normalise_captions, normalise_objects, select_objects
from hf_vlm.data.formats.box_conventions import XYWH, as_xywh
from hf_vlm.data.formats.categories import Categories
from hf_vlm.data.formats.column_names import (
    ANNOTATION_NAMES,
    COLUMN_NAMES,
    IMAGE_NAMES,
    OBJECT_NAMES,
    POLYGON_NAMES,
    SIDE_NAMES,
    SIZE_NAMES,
)
from hf_vlm.data.io.files import join
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.trust import check_inside, outside_is_allowed
from hf_vlm.data.schema import captions_feature, image_feature, objects_feature

__all__ = [
    "POSITION",
    "ColumnMap",
    "RowReader",
    "category_feature",
    "find_columns",
    "find_objects",
    "object_fields",
]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

LISTS = datasets.List | datasets.LargeList
POSITION = "__position__"  # column that a reader adds to its rows, where it knows their position
BOX = "__bbox__"  # field that `read_objects` makes of four others


@dataclass(frozen=True)
class ColumnMap:
    """Names in the source of the columns of the schema, and of the fields of `objects`.

    Args:
        columns: Names of the columns. Where the fields of objects are columns of their own, without `objects`.
        objects: Names of the fields of objects; empty where there are none.
        sides: Names of the four numbers of a box, where they are fields of their own.
        convention: What these four numbers are; see `check_convention`.
    """

    columns: Mapping[str, str]
    objects: Mapping[str, str] = field(default_factory=dict)
    sides: tuple[str, ...] = ()
    convention: str = XYWH

    @property
    def is_flat(self) -> bool:
        """Whether the fields of objects are columns of their own."""
        return bool(self.objects) and "objects" not in self.columns

    @property
    def label_is_category(self) -> bool:
        """Whether the class of a row's one object is that of its image, too; images without objects have none."""
        return self.is_flat and self.columns.get("label") == self.objects["category"]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the columns to read."""
        fields = (*self.objects.values(), *self.sides) if self.is_flat else ()
        return tuple(dict.fromkeys((*self.columns.values(), *fields)))

    @property
    def objects_name(self) -> str:
        """What messages call the objects."""
        return self.columns.get("objects") or " ".join([*self.objects.values(), *self.sides])

    def without(self, *names: str) -> "ColumnMap":
        """The map without some columns of the schema."""
        columns = {name: column for name, column in self.columns.items() if name not in names}
        return ColumnMap(columns) if "objects" in names else replace(self, columns=columns)

    @property
    def has_object_masks(self) -> bool:
        """Whether objects have masks."""
        return "segmentation" in self.objects

    def without_object_masks(self) -> "ColumnMap":
        """The map without the masks of objects."""
        return replace(self, objects={name: field for name, field in self.objects.items() if name != "segmentation"})

    def read_objects(self, row: Row, location: object) -> ObjectLists:
        """The objects of a row in the one form; see `normalise_objects`."""
        stored = row.get(self.columns["objects"]) if not self.is_flat else None
        names = (*self.objects.values(), *self.sides)
        if self.is_flat:
            stored = {name: _as_list(row.get(name), is_box=name == self.objects.get("bbox")) for name in names}
            polygons = self.objects.get("segmentation", "")
            if len(stored[self.objects["category"]]) == 1 != len(stored.get(polygons, [None])):
                stored[polygons] = [row[polygons]]
        if not self.sides:
            return normalise_objects(stored, self.objects, location, has_masks=self.has_object_masks)
        if isinstance(stored, list) and all(isinstance(item, Mapping) for item in stored):
            stored = {name: [item.get(name) for item in stored] for name in names}
        if isinstance(stored, Mapping):
            sides = [stored.get(name) or [] for name in self.sides]
            if len(set(map(len, sides))) > 1:
                raise ValueError(f"{location}: an object needs one number of each of {', '.join(self.sides)}")
            stored = {**stored, BOX: [_as_box(box, self.convention) for box in zip(*sides)]}
        fields = {**self.objects, "bbox": BOX}
        return normalise_objects(stored, fields, location, has_masks=self.has_object_masks)


def _as_list(value: Any, *, is_box: bool) -> list[Any]:
    """The values of a row's objects, from a list of them or from that of one object."""
    if value is None or value != value:
        return []
    is_one = not isinstance(value, list) or (is_box and bool(value) and not isinstance(value[0], list))
    return [value] if is_one else value


def _as_box(sides: Sequence[Any], convention: str) -> list[float] | None:
    """x, y, width and height of one box; None where one of the numbers is missing."""
    if any(side is None for side in sides):
        return None
    return as_xywh(np.array([sides], dtype=np.float64), convention)[0].tolist()  # type: ignore[no-any-return]


def find_columns(features: Mapping[str, Any], source: object) -> ColumnMap:
    """Find the columns of the schema among those of a source, by name and type.

    Of several names for classes, declared ones and texts are preferred to numbers. Columns that look like annotations
    and are not read are named in a warning.

    Raises:
        ValueError: None of the columns holds images.
    """
    columns = {"image": _image_column(features, source)}
    nested = [name for name in COLUMN_NAMES["objects"] if find_objects(object_fields(features.get(name)))[0]]
    if nested:
        columns["objects"] = nested[0]
    objects, sides, convention = find_objects(object_fields(features[nested[0]]) if nested else _flat_fields(features))
    taken = {*columns.values()} | (set() if nested else {*objects.values(), *sides})
    # One object per row: its class may be that of the image, too.
    taken -= {objects["category"]} if objects and not nested and _is_category(features[objects["category"]]) else set()
    accepted = {"label": _is_category, "mask": _holds_files, "instance_mask": _holds_files, "text": _holds_captions}
    for column, names in COLUMN_NAMES.items():
        fits = accepted.get(column, _is_integer)
        found = [name for name in names if fits(features.get(name)) and name not in taken]
        if found and column != "objects":
            columns[column] = _most_telling(found, features) if column == "label" else found[0]
            taken.add(columns[column])
    unread = [name for name in features if name.lower() in ANNOTATION_NAMES and name not in taken]
    if unread:
        logger.warning(
            "%s: %d columns that look like annotations are not read: %s. A label is one number or text per image; "
            "objects have a bbox and a category each, in one column 'objects' or in columns of their own",
            source,
            len(unread),
            summarise(f"{name!r}, {features[name]}" for name in unread),
        )
    return ColumnMap(columns, objects, sides, convention)


def _image_column(features: Mapping[str, Any], source: object) -> str:
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
    return candidates[0]


def find_objects(fields: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], str]:
    """Names of the fields of objects; of the four numbers of a box, where they are fields; and what these are.

    Args:
        fields: Types by name of what an object may have; nothing is found without a box and a category.
    """
    by_name = {name.lower(): name for name in fields}
    found = {name: [by_name[alias] for alias in names if alias in by_name] for name, names in OBJECT_NAMES.items()}
    objects = {name: names[0] for name, names in found.items() if names}
    sides: tuple[str, ...] = ()
    convention = XYWH
    if "bbox" not in objects:
        named = ((kind, names) for kind, names in SIDE_NAMES if by_name.keys() >= set(names))
        convention, names = next(named, (XYWH, ()))
        sides = tuple(by_name[name] for name in names)
    if "category" not in objects or not (sides or "bbox" in objects):
        return {}, (), XYWH
    return objects | {"category": _most_telling(found["category"], fields)}, sides, convention


def _most_telling(names: Sequence[str], features: Mapping[str, Any]) -> str:
    """The first of several columns or fields whose values name classes; else the first."""
    telling = [name for name in names if isinstance(features[name], datasets.ClassLabel) or _is_text(features[name])]
    return (telling or list(names))[0]


def _flat_fields(features: Mapping[str, Any]) -> dict[str, Any]:
    """Types of what objects may have, where that is in columns: lists per row, or else one object per row."""
    in_lists = {name: feature.feature for name, feature in features.items() if isinstance(feature, LISTS)}
    numbers = {name for name, inner in in_lists.items() if isinstance(inner, datasets.Value)}
    boxes = {name for name in in_lists if name.lower() in OBJECT_NAMES["bbox"]}
    many = {name: inner for name, inner in in_lists.items() if name not in boxes & numbers}
    if find_objects(many)[0]:
        return many
    of_image = {*in_lists, *SIZE_NAMES, "name", *COLUMN_NAMES["mask"], "masks"}
    one = {name: feature for name, feature in features.items() if name not in of_image}
    one |= {name: in_lists[name] for name in in_lists if name.lower() in POLYGON_NAMES}
    return one | {name: in_lists[name] for name in boxes & numbers}


def category_feature(features: Mapping[str, Any], columns: ColumnMap) -> Any:
    """Type of the categories of objects."""
    if not columns.is_flat:
        return object_fields(features[columns.columns["objects"]])[columns.objects["category"]]
    feature = features[columns.objects["category"]]
    return feature.feature if isinstance(feature, LISTS) else feature


def object_fields(feature: Any) -> dict[str, Any]:
    """Features of one object, stored as a list of structs or as a struct of lists; empty where it is neither."""
    if isinstance(feature, LISTS):
        return dict(feature.feature) if isinstance(feature.feature, dict) else {}
    fields = feature.items() if isinstance(feature, dict) else ()
    return {
        name: inner.feature if isinstance(inner, LISTS) else dict(inner)
        for name, inner in fields
        if isinstance(inner, LISTS) or _is_struct_of_lists(inner)
    }


def _is_struct_of_lists(feature: Any) -> bool:
    """Whether a type is what `datasets` makes of a list of structs within a struct, as of run lengths."""
    return isinstance(feature, dict) and all(isinstance(inner, LISTS) for inner in feature.values())


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
            features["objects"] = objects_feature(self.category.names, has_masks=self.map.has_object_masks)
        for name in ("mask", "instance_mask"):
            if name in self.map.columns:
                features[name] = image_feature()
        if "text" in self.map.columns:
            features["text"] = captions_feature()
        return features

    def __call__(self, row: Row) -> Row:
        columns = self.map.columns
        example: Row = {"image": self.encoded_image(row)}
        example["image_id"] = int(row[columns["image_id"]]) if "image_id" in columns else self._position(row, example)
        if self.label is not None:
            example["label"] = self.label.index(row[columns["label"]])
        if self.category is not None:
            example["objects"] = self._objects(row, example["image_id"])
        for name in ("mask", "instance_mask"):
            if name in columns:
                example[name] = self._encoded(row[columns[name]])
        if "text" in columns:
            example["text"] = normalise_captions(row[columns["text"]])
        return example

    def encoded_image(self, row: Row) -> Row:
        """The image of a row as {"bytes", "path"}."""
        return self._encoded(row[self.map.columns["image"]])

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
        objects = self.map.read_objects(row, location)
        objects["category"] = [self.category.index(value) for value in objects["category"]]
        return self._clean(objects, row) if self.cleans_boxes and objects["bbox"] else objects

    def _clean(self, objects: ObjectLists, row: Row) -> ObjectLists:
        columns = self.map.columns
        width, height = (row.get(columns.get(side, "")) or np.inf for side in ("width", "height"))
        _, keep = clean_boxes(np.array(objects["bbox"], dtype=np.float64), width=width, height=height)
        return select_objects(objects, np.flatnonzero(keep).tolist())


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _holds_captions(feature: Any) -> bool:
    return _is_text(feature.feature if isinstance(feature, LISTS) else feature)


def _is_category(feature: Any) -> bool:
    """Whether values may be classes: floats are, as tables store integers among which some are missing."""
    is_number = isinstance(feature, datasets.Value) and feature.dtype in ("bool", "float16", "float32", "float64")
    return isinstance(feature, datasets.ClassLabel) or _is_text(feature) or _is_integer(feature) or is_number


def _holds_files(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _holds_bytes(feature: Any) -> bool:
    is_binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_binary or _holds_files(feature)
