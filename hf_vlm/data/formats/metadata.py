"""The `metadata` of an image folder, csv, jsonl or Parquet: labels of its images by file name."""

import logging
import posixpath
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hf_vlm.data.formats.annotations import MASK_FIELDS, OBJECT_FIELDS, check_boxes, check_labels
from hf_vlm.data.formats.box_conventions import warn_of_convention
from hf_vlm.data.formats.categories import Categories, make_categories
from hf_vlm.data.formats.column_names import ANNOTATION_NAMES, COLUMN_NAMES, OBJECT_NAMES, TABLE_NAMES
from hf_vlm.data.formats.columns import POSITION, ColumnMap, RowReader, find_columns
from hf_vlm.data.formats.table_files import FILE_NAMES, holds_file_names, read_table
from hf_vlm.data.io.decode import image_size
from hf_vlm.data.io.files import is_remote
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import image_feature
from hf_vlm.data.segmentations import segmentation_text
from hf_vlm.data.source import Source

__all__ = ["is_metadata", "metadata_source"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Array = np.ndarray[Any, Any]

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "_annotations.csv")
FILE_NAME = FILE_NAMES[0]
KNOWN_NAMES = TABLE_NAMES | ANNOTATION_NAMES
OBJECTS = "objects"  # of a row, in the one form
ROW_LOCATION = "__location__"  # file and line of a row, for messages
MASK_NAMES = (*COLUMN_NAMES["mask"], *COLUMN_NAMES["instance_mask"])
READ_NAMES = {*FILE_NAMES, *KNOWN_NAMES, *(f"{name}_{FILE_NAME}" for name in MASK_NAMES)}
SAMPLE_SIZE = 64  # images whose sizes are read where no column gives them


def is_metadata(file: Path) -> bool:
    """Whether a file is the metadata of the images in its folder and below."""
    return file.name in METADATA_FILES and (file.suffix != ".parquet" or holds_file_names(file))


def metadata_source(
    files: Sequence[Path],
    images: Collection[str],
    chosen: Sequence[Path],
    folders: Sequence[Path],
    source: Path,
    *,
    num_samples: int | None,
    object_masks: bool,
) -> Source:
    """Stream the images of a split that metadata name.

    Rows of one image are its objects, where they have one box each. Images that are named but missing are examples
    like those that cannot be read.

    Args:
        files: Files of metadata of all splits, so that a class has the same number in each.
        images: Paths of all images of the source.
        chosen: The images of the split, in their order.
        folders: Those of the split.
        source: Name of the source, for messages.
        num_samples: Number of examples to read, from the first on; None for all.
        object_masks: Whether to read the masks of objects.

    Raises:
        ValueError: A row cannot be read or names a mask that does not exist; no row names an image of the split; or
            labels or boxes make no sense.
    """
    stored = _read_rows(files, images)
    columns = _find_columns(stored, source)
    columns = columns if object_masks else columns.without_object_masks()
    rows, columns = _by_image(stored, columns)
    named = [rows[str(path)] for path in chosen if str(path) in rows]
    if not named:
        raise ValueError(f"{source}: {summarise(files)} names none of the {len(chosen)} images of the split")
    missing = [
        path for path in rows if path not in images and path.startswith(tuple(f"{folder}/" for folder in folders))
    ]
    named += [rows[path] for path in missing]
    _warn_of_others(files, rows, chosen, missing, source)
    columns = _without_repeated_ids(rows.values(), columns, source)
    label = _check_labels(rows.values(), named, columns, source)
    named = named[:num_samples]
    category, is_clean = _check_objects(rows.values(), named, columns, source)
    kept = dict(columns.columns) if category is None else {**columns.columns, OBJECTS: OBJECTS}
    fields = MASK_FIELDS if columns.has_object_masks else OBJECT_FIELDS
    reader = RowReader(map=ColumnMap(kept, fields), label=label, category=category, cleans_boxes=not is_clean)
    empty = dict.fromkeys(columns.source_names)
    examples = [reader({POSITION: position, **empty, **row}) for position, row in enumerate(named)]
    table = pa.Table.from_pylist(examples, schema=reader.features.arrow_schema)
    return Source(
        dataset=indexed_stream(TableReader(table), len(table), reader.features),
        num_examples=len(table),
        max_objects=max((len(example["objects"]["bbox"]) for example in examples), default=None) if category else None,
    )


def _warn_of_others(
    files: Sequence[Path], rows: Mapping[str, Row], chosen: Sequence[Path], missing: Sequence[str], source: Path
) -> None:
    masks = {row[name]["path"] for row in rows.values() for name in MASK_NAMES if isinstance(row.get(name), dict)}
    left_out = [path.name for path in chosen if str(path) not in rows and str(path) not in masks]
    if left_out:
        logger.warning(
            "%s: %d images are left out, since %s does not name them: %s",
            source,
            len(left_out),
            summarise(files),
            summarise(left_out),
        )
    if missing:
        logger.warning(
            "%s: %d of %d images that metadata name do not exist and count as images that cannot be read: %s",
            source,
            len(missing),
            len(rows),
            summarise(f"{name} in {rows[name][ROW_LOCATION]}" for name in missing),
        )


# ---- rows


def _read_rows(files: Sequence[Path], images: Collection[str]) -> list[Row]:
    """All rows; the names of files become paths."""
    rows: list[Row] = []
    paths = {unicodedata.normalize("NFC", path): path for path in images}
    unknown = []
    for file in files:
        for location, row in read_table(file, READ_NAMES):
            row[ROW_LOCATION] = f"{file}, {location}"
            name = next((row[name] for name in FILE_NAMES if name in row), None)
            if not isinstance(name, str) or not name:
                there = summarise(sorted(row.keys() - {ROW_LOCATION}))
                raise ValueError(f"{row[ROW_LOCATION]}: there is no {FILE_NAME!r}; there is {there}")
            row[FILE_NAME] = _find(file, name, paths)
            for name in MASK_NAMES:
                mask = row.get(f"{name}_{FILE_NAME}")
                if isinstance(mask, str):
                    row[name] = {"bytes": None, "path": _find(file, mask, paths)}
                    unknown += [f"{mask} in {row[ROW_LOCATION]}"] * (row[name]["path"] not in images)
            rows.append(_with_mask_texts(row))
    outside = [row for row in rows if row[FILE_NAME] not in images and _is_outside(row[FILE_NAME], files)]
    if outside:
        examples = summarise(f"{row[FILE_NAME]} in {row[ROW_LOCATION]}" for row in outside)
        raise ValueError(f"{len(outside)} images that metadata name are not in the folder of the data: {examples}")
    if unknown:
        raise ValueError(f"{len(unknown)} masks that metadata name do not exist: {summarise(unknown)}")
    return rows


def _with_mask_texts(row: Row) -> Row:
    """A row whose masks of objects are text: polygons and run lengths in one column have no type in common."""
    for column in set(COLUMN_NAMES["objects"]) & row.keys():
        stored = row[column]
        items = stored if isinstance(stored, list) else [stored]
        for item in (item for item in items if isinstance(item, dict)):
            for name in set(OBJECT_NAMES["segmentation"]) & item.keys():
                values = item[name]
                one_each = isinstance(stored, dict) and isinstance(values, list)
                item[name] = [segmentation_text(v) for v in values] if one_each else segmentation_text(values)
    return row


def _find(file: Path, name: str, paths: Mapping[str, str]) -> str:
    """The path of what a file of metadata names; made as text, since path objects of remote folders are slow.

    Names in another Unicode form are found, and with the separators of Windows.
    """
    direct = posixpath.join(str(file.parent), posixpath.normpath(name))
    if paths.get(direct) == direct:
        return direct
    joined = [posixpath.join(str(file.parent), posixpath.normpath(name)) for name in (name, name.replace("\\", "/"))]
    found = (paths.get(unicodedata.normalize("NFC", path)) for path in joined)
    return next((path for path in found if path is not None), joined[0])


def _is_outside(path: str, files: Sequence[Path]) -> bool:
    return "/../" in path or not any(path.startswith(f"{file.parent}/") for file in files)


def _by_image(stored: Sequence[Row], columns: ColumnMap) -> tuple[dict[str, Row], ColumnMap]:
    """Rows by the path of their image, and their columns; rows with one object each are joined.

    Raises:
        ValueError: Several rows that do not have one object each name an image.
    """
    groups: dict[str, list[Row]] = {}
    for row in stored:
        groups.setdefault(row[FILE_NAME], []).append(row)
    repeated = [rows for rows in groups.values() if len(rows) > 1]
    if not repeated:
        return {path: row for path, (row,) in groups.items()}, columns
    fields = (*columns.objects.values(), *columns.sides)
    if not columns.is_flat or any(isinstance(row.get(columns.objects["category"]), list) for row in stored):
        first, second = repeated[0][:2]
        raise ValueError(
            f"{second[ROW_LOCATION]}: {second[FILE_NAME]} was named before, in {first[ROW_LOCATION]}; rows are joined "
            "where each has one object, with a bbox and a category: else give an image one row"
        )
    joined = {}
    for path, rows in groups.items():
        objects = [row for row in rows if any(row.get(name) is not None for name in fields)]
        joined[path] = {**rows[0], **{name: [row.get(name) for row in objects] for name in fields}}
    return joined, columns.without("label")


# ---- columns


def _find_columns(rows: Sequence[Row], source: Path) -> ColumnMap:
    """Which columns are what; those that the schema does not have are ignored."""
    features: Row = {FILE_NAME: datasets.Value("string")}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name in MASK_NAMES:
            if all(isinstance(value, dict) for value in values):
                features[name] = image_feature()
        elif name.lower() in KNOWN_NAMES:
            try:
                column = pa.table({name: pa.array(values)})
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                if name.lower() not in ANNOTATION_NAMES:
                    continue  # it may be anything
                raise ValueError(
                    f"{source}: the column {name!r} of the metadata mixes types of values: {error}"
                ) from error
            features[name] = datasets.Features.from_arrow_schema(column.schema)[name]
    return find_columns(features, source)


def _without_repeated_ids(rows: Collection[Row], columns: ColumnMap, source: Path) -> ColumnMap:
    ids = columns.columns.get("image_id")
    if ids is None or len({row.get(ids) for row in rows} - {None}) == len(rows):
        return columns
    logger.warning("%s: the column %r is not unique; the image_id is the position instead", source, ids)
    return columns.without("image_id")


def _check_labels(rows: Collection[Row], named: Sequence[Row], columns: ColumnMap, source: Path) -> Categories | None:
    """The classes; None where there are no labels, as in test splits that hide them."""
    name = columns.columns.get("label")
    if name is None:
        return None
    try:
        categories = make_categories([row[name] for row in rows if row.get(name) is not None])
    except ValueError as error:
        logger.warning("%s: the column %r is left out: %s", source, name, error)
        return None
    is_known = np.array([categories.index(row.get(name)) >= 0 for row in named])
    if columns.label_is_category and not is_known.all():
        return None
    has_labels = check_labels(
        is_known,
        class_names=categories.names,
        name_of=lambda index: f"{named[index].get(name)} in {named[index][ROW_LOCATION]}",
        column=name,
        source=source,
    )
    return categories if has_labels else None


def _check_objects(
    rows: Collection[Row], named: Sequence[Row], columns: ColumnMap, source: Path
) -> tuple[Categories | None, bool]:
    """The categories, None where there are no objects; and whether nothing remains to be dropped."""
    if not columns.objects:
        return None, True
    for row in rows:
        row[OBJECTS] = columns.read_objects(row, row[ROW_LOCATION])
    values = [value for row in rows for value in row[OBJECTS]["category"]]
    if not values:
        logger.warning("%s: no row has an object; the column %r is left out", source, columns.objects_name)
        return None, True
    try:
        categories = make_categories(values)
    except ValueError as error:
        raise ValueError(f"{source}: {columns.objects['category']!r} of objects: {error}") from error
    found = [(row, *pair) for row in named for pair in zip(row[OBJECTS]["bbox"], row[OBJECTS]["category"])]
    boxes = np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4)
    width, height = (
        np.array([row.get(columns.columns.get(side, "")) or np.inf for row, _, _ in found], dtype=np.float64)
        for side in ("width", "height")
    )
    if not np.isfinite(width).any():
        warn_of_convention(boxes, _sample_sizes([row[FILE_NAME] for row, _, _ in found]), source)
    keep = check_boxes(
        boxes,
        np.array([categories.index(value) for _, _, value in found], dtype=np.int64),
        width=width,
        height=height,
        class_names=categories.names,
        name_of=lambda index: found[index][0][ROW_LOCATION].rpartition("/")[2],
        source=source,
    )
    return categories, bool(keep.all())


def _sample_sizes(paths: Sequence[str]) -> Array:
    """Width and height (2, n) of the first of the images on disk, one of each box; infinity for the others."""
    on_disk = [path for path in dict.fromkeys(paths) if not is_remote(path)][:SAMPLE_SIZE]
    sizes = {path: image_size(path) for path in on_disk}
    return np.array([(sizes.get(path) or (np.inf, np.inf))[::-1] for path in paths], dtype=np.float64).reshape(-1, 2).T
