"""The `metadata.jsonl` or `metadata.csv` of an image folder: labels of its images by file name."""

import csv
import io
import logging
import posixpath
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from hf_vlm.data.formats.annotations import OBJECT_FIELDS, check_boxes, check_labels, normalise_objects
from hf_vlm.data.formats.columns import (
    COLUMN_NAMES,
    POSITION,
    Categories,
    ColumnMap,
    RowReader,
    find_columns,
    make_categories,
)
from hf_vlm.data.io.files import read_bytes
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source

__all__ = ["find_metadata", "metadata_source"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
ROW_LOCATION = "__location__"  # file and line of a row, for messages
MASK_NAMES = (*COLUMN_NAMES["mask"], *COLUMN_NAMES["instance_mask"])


def find_metadata(folders: Iterable[Path]) -> list[Path]:
    """The files of metadata that lie in some folders."""
    return [folder / name for folder in folders for name in METADATA_FILES if (folder / name).is_file()]


def metadata_source(
    files: Sequence[Path], images: Collection[str], chosen: Sequence[Path], source: Path, *, num_samples: int | None
) -> Source:
    """Stream the images of a split that metadata name.

    Args:
        files: Files of metadata of all splits, so that a class has the same number in each.
        images: Paths of all images of the source.
        chosen: The images of the split, in their order.
        source: Name of the source, for messages.
        num_samples: Number of examples to read, from the first on; None for all.

    Raises:
        ValueError: A row cannot be read or names no image; no row names an image of the split; or labels or boxes
            make no sense.
    """
    rows = _read_rows(files, images)
    named = [rows[str(path)] for path in chosen if str(path) in rows]
    masks = {row[name]["path"] for row in rows.values() for name in MASK_NAMES if isinstance(row.get(name), dict)}
    left_out = [path.name for path in chosen if str(path) not in rows and str(path) not in masks]
    if not named:
        raise ValueError(f"{source}: {summarise(files)} names none of the {len(chosen)} images of the split")
    if left_out:
        logger.warning(
            "%s: %d images are left out, since %s does not name them: %s",
            source,
            len(left_out),
            summarise(files),
            summarise(left_out),
        )
    columns = _find_columns(rows.values(), source)
    label = _check_labels(rows.values(), named, columns, source)
    named = named[:num_samples]
    category, is_clean = _check_objects(rows.values(), named, columns, source)
    reader = RowReader(
        map=replace(columns, objects=OBJECT_FIELDS), label=label, category=category, cleans_boxes=not is_clean
    )
    empty = dict.fromkeys(columns.source_names)
    examples = [reader({POSITION: position, **empty, **row}) for position, row in enumerate(named)]
    table = pa.Table.from_pylist(examples, schema=reader.features.arrow_schema)
    return Source(
        dataset=indexed_stream(TableReader(table), len(table), reader.features),
        num_examples=len(table),
        max_objects=max((len(example["objects"]["bbox"]) for example in examples), default=None) if category else None,
    )


# ---- rows


def _read_rows(files: Sequence[Path], images: Collection[str]) -> dict[str, Row]:
    """Rows by the path of their image; the names of files become paths."""
    rows: dict[str, Row] = {}
    unknown = []
    for file in files:
        for line, row in _read_json_lines(file) if file.suffix == ".jsonl" else _read_csv(file):
            row[ROW_LOCATION] = f"{file}, line {line}"
            if not isinstance(row.get(FILE_NAME), str) or not row[FILE_NAME]:
                raise ValueError(
                    f"{row[ROW_LOCATION]}: there is no {FILE_NAME!r}; there is {summarise(sorted(row)[1:])}"
                )
            path = row[FILE_NAME] = _join(file, row[FILE_NAME])
            if path in rows:
                raise ValueError(f"{row[ROW_LOCATION]}: {path} was named before, in {rows[path][ROW_LOCATION]}")
            for name in MASK_NAMES:
                mask = row.get(f"{name}_{FILE_NAME}")
                if isinstance(mask, str):
                    row[name] = {"bytes": None, "path": _join(file, mask)}
            named = [path, *(row[name]["path"] for name in MASK_NAMES if isinstance(row.get(name), dict))]
            unknown += [f"{name} in {row[ROW_LOCATION]}" for name in named if name not in images]
            rows[path] = row
    if unknown:
        raise ValueError(f"{len(unknown)} images that metadata name do not exist: {summarise(unknown)}")
    return rows


def _join(file: Path, name: str) -> str:
    """The path of what a file of metadata names; made as text, since path objects of remote folders are slow."""
    return posixpath.join(str(file.parent), posixpath.normpath(name))


def _read_text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def _read_json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(_read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{file}, line {line}: it is not json: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {line}: it is no json object but {text[:40]!r}")
        yield line, row


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows in which columns of whole numbers hold numbers, and empty cells None."""
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""))
    rows: list[tuple[int, Row]] = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{file}, line {reader.line_num}: there are more cells than columns")
            rows.append((reader.line_num, {name: value or None for name, value in row.items()}))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: it is not csv: {error}") from error
    for name in set(reader.fieldnames or ()) - {FILE_NAME}:
        values = [row[name] for _, row in rows if row[name] is not None]
        if all(value.lstrip("-").isdecimal() for value in values):
            for _, row in rows:
                row[name] = None if row[name] is None else int(row[name])
    yield from rows


# ---- columns


def _find_columns(rows: Collection[Row], source: Path) -> ColumnMap:
    """Which columns are what; those that the schema does not have, such as captions, are ignored."""
    features: Row = {FILE_NAME: datasets.Value("string")}
    for name in {name for names in COLUMN_NAMES.values() for name in names} & {name for row in rows for name in row}:
        values = [row.get(name) for row in rows]
        if name in MASK_NAMES:
            if all(isinstance(value, dict) for value in values):
                features[name] = image_feature()
            continue
        try:
            column = pa.table({name: pa.array(values)})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{source}: the column {name!r} of the metadata mixes types of values: {error}"
            ) from error
        features[name] = datasets.Features.from_arrow_schema(column.schema)[name]
    columns = find_columns(features, source)
    ids = columns.columns.get("image_id")
    if ids is not None and len({row.get(ids) for row in rows} - {None}) < len(rows):
        logger.warning("%s: the column %r is not unique; the image_id is the position instead", source, ids)
        return ColumnMap({key: value for key, value in columns.columns.items() if key != "image_id"}, columns.objects)
    return columns


def _check_labels(rows: Collection[Row], named: Sequence[Row], columns: ColumnMap, source: Path) -> Categories | None:
    """The classes; None where there are no labels, as in test splits that hide them."""
    name = columns.columns.get("label")
    if name is None:
        return None
    categories = make_categories([row[name] for row in rows if row.get(name) is not None])
    has_labels = check_labels(
        np.array([categories.index(row.get(name)) >= 0 for row in named]),
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
    if "objects" not in columns.columns:
        return None, True
    name = columns.columns["objects"]
    for row in rows:
        row[name] = normalise_objects(row.get(name), columns.objects, row[ROW_LOCATION])
    values = [value for row in rows for value in row[name]["category"]]
    if not values:
        logger.warning("%s: no row has an object; the column %r is left out", source, name)
        return None, True
    categories = make_categories(values)
    found = [(row, *pair) for row in named for pair in zip(row[name]["bbox"], row[name]["category"])]
    width, height = (
        np.array([row.get(columns.columns.get(side, "")) or np.inf for row, _, _ in found], dtype=np.float64)
        for side in ("width", "height")
    )
    keep = check_boxes(
        np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4),
        np.array([categories.index(value) for _, _, value in found], dtype=np.int64),
        width=width,
        height=height,
        class_names=categories.names,
        name_of=lambda index: found[index][0][ROW_LOCATION].rpartition("/")[2],
        source=source,
    )
    return categories, bool(keep.all())
