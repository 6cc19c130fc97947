"""Parquet files on disk."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_vlm.data.formats.annotations import check_boxes, check_labels
from hf_vlm.data.formats.box_conventions import as_xywh, warn_of_convention
from hf_vlm.data.formats.categories import Categories, make_categories
from hf_vlm.data.formats.columns import POSITION, ColumnMap, RowReader, category_feature, find_columns
from hf_vlm.data.formats.parquet_columns import ParquetColumns
from hf_vlm.data.formats.parquet_files import find_parquet_files, open_parquet_file, read_metadata
from hf_vlm.data.formats.repeated_images import check_repeated_images
from hf_vlm.data.formats.splits import choose_split, common_folder, describe_folder, group_by_split
from hf_vlm.data.io.cells import rows_of_group
from hf_vlm.data.io.decode import image_size
from hf_vlm.data.io.files import as_path, exists, is_folder, is_remote
from hf_vlm.data.io.indexed import generated_stream
from hf_vlm.data.io.messages import redact_url, summarise
from hf_vlm.data.source import Source

__all__ = ["open_parquet"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

BATCH_SIZE = 64  # rows read at a time
SAMPLE_SIZE = 64  # images whose sizes are read where no column gives them
SAMPLE_BUFFER = 2**22  # bytes read at a time of these images
MAX_COMPARED = 2**26  # bytes of images that are compared: of 100 kB each the first 600, among which shuffled ones meet


def open_parquet(
    source: Path | Sequence[Path], split: str, *, num_samples: int | None = None, object_masks: bool = True
) -> Source:
    """Stream the rows of Parquet files, of one, of several or of the files of a split in a folder.

    Each row group is a shard.

    The names of files or folders give the split, as in `train-00000-of-00002.parquet` or `train/0.parquet`; where
    none does, all is `train`. Columns are found by name and type (see `find_columns`). Only the labels, ids and boxes
    of the rows are read, to check them. Names of image files are relative to the source, or to the folder of the split
    where the first of them lies there.

    Raises:
        ValueError: There is no such split; a file is not Parquet or its columns differ from the others'; there is no
            column of images; labels or categories are out of range; or an image with several objects has several rows.
    """
    paths, root = _find_paths(source)
    splits, name = group_by_split(paths, root), redact_url(source)
    files = ParquetColumns(choose_split(splits, split, name))
    parts = files.parts(num_samples)
    columns = _without_repeated_ids(files, find_columns(files.features, name), name)
    columns = columns if object_masks else columns.without_object_masks()
    label = _check_labels(files, splits, columns, name)
    folder = _folder_of_names(files, columns, root)
    category, is_clean, max_objects = _check_objects(files, splits, columns, name, folder)
    reader = RowReader(
        map=columns,
        label=label,
        category=category,
        source=name,
        folder=folder,
        cleans_boxes=not is_clean,
    )
    rows = generated_stream(_read_rows, parts=parts, leaves=files.leaves(columns))
    examples = rows.map(reader, remove_columns=[POSITION, *columns.source_names], features=reader.features)
    return Source(dataset=examples, num_examples=sum(count for *_, count in parts), max_objects=max_objects)


def _find_paths(source: Path | Sequence[Path]) -> tuple[list[Path], Path]:
    """The files, and the folder that their splits are named relative to."""
    if isinstance(source, Sequence):
        return list(source), common_folder(source)
    if not is_folder(source):
        return [source], source.parent
    paths = find_parquet_files(source)
    if not paths:
        raise ValueError(f"{source} holds no Parquet files; {describe_folder(source)}")
    return paths, source


def _folder_of_names(files: ParquetColumns, columns: ColumnMap, root: Path) -> str:
    """The folder that names of images are relative to."""
    own = common_folder(files.paths)
    if own != root:
        ((_, row),) = _read_rows(files.parts(1), files.image_leaves(columns), SAMPLE_BUFFER)
        for folder in map(str, (root, own)):
            image = RowReader(map=columns, folder=folder, allow_outside=True).encoded_image(row)
            if image["path"] is None or (image["bytes"] is None and exists(as_path(image["path"]))):
                return folder
    return str(root)


def _read_rows(
    parts: list[tuple[str, int, int, int]], leaves: tuple[str, ...], buffer_size: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of row groups, given as (path, row group, position of its first row, rows to read)."""
    for path, group, first, num_rows in parts:
        with open_parquet_file(path, buffer_size=buffer_size) as file:
            rows = rows_of_group(file, group, leaves, batch_size=BATCH_SIZE)
            for position, row in enumerate(islice(rows, num_rows), start=first):
                yield position, {POSITION: position, **row}


def _files_with(name: str, splits: Mapping[str, Sequence[Path]]) -> ParquetColumns:
    """The files of all splits that have a column, so that classes without declared names have equal numbers in all."""
    return ParquetColumns(
        [
            path
            for paths in splits.values()
            for path in paths
            if name in read_metadata(path).schema.to_arrow_schema().names
        ]
    )


def _without_repeated_ids(files: ParquetColumns, columns: ColumnMap, source: object) -> ColumnMap:
    name = columns.columns.get("image_id")
    if name is None:
        return columns
    ids = files.column(name)
    if pc.count_distinct(ids).as_py() == len(ids):
        return columns
    logger.warning("%s: the column %r is not unique; the image_id is the position instead", source, name)
    return columns.without("image_id")


def _check_labels(
    files: ParquetColumns, splits: Mapping[str, Sequence[Path]], columns: ColumnMap, source: object
) -> Categories | None:
    """The classes; None where there are no labels, as in test splits that hide them."""
    name = columns.columns.get("label")
    if name is None:
        return None
    values = files.column(name)
    categories = files.declared_categories(lambda features: features[name])
    try:
        categories = categories or make_categories(pc.unique(_files_with(name, splits).column(name)).to_pylist())
    except ValueError as error:
        logger.warning("%s: the column %r is left out: %s", source, name, error)
        return None
    indices = _indices(values, categories)
    if columns.label_is_category and (indices < 0).any():
        return None
    has_labels = check_labels(
        (indices >= 0) & (indices < len(categories.names)),
        class_names=categories.names,
        name_of=lambda row: f"{values[row]} in row {row}",
        column=name,
        source=source,
    )
    return categories if has_labels else None


def _check_objects(
    files: ParquetColumns, splits: Mapping[str, Sequence[Path]], columns: ColumnMap, source: object, folder: str
) -> tuple[Categories | None, bool, int | None]:
    """Categories and most objects of a row, None without objects; between them, whether nothing is to be dropped."""
    if not columns.objects:
        return None, True, None
    values, counts = files.object_field(columns, columns.objects["category"])
    boxes = [files.object_field(columns, name) for name in columns.sides or [columns.objects["bbox"]]]
    if not any(len(numbers) for numbers, _ in boxes):
        logger.warning("%s: no row has an object; the column %r is left out", source, columns.objects_name)
        return None, True, None
    for _, box_counts in boxes:
        _check_counts(box_counts, counts, columns.objects["category"], source)
    for field in {"area", "iscrowd"} & columns.objects.keys():
        _, field_counts = files.object_field(columns, columns.objects[field])
        _check_counts(counts, np.where(field_counts == 0, counts, field_counts), columns.objects[field], source)
    categories = files.declared_categories(lambda features: category_feature(features, columns))
    if categories is None:
        field = columns.objects["category"]
        everything, _ = _files_with(columns.columns.get("objects", field), splits).object_field(columns, field)
        try:
            categories = make_categories(pc.unique(everything).to_pylist())
        except ValueError as error:
            raise ValueError(f"{source}: {field!r} of objects: {error}") from error
    rows = np.repeat(np.arange(len(counts)), counts)
    width, height = (_sides(files, columns.columns.get(side), len(counts)) for side in ("width", "height"))
    stored = _as_boxes([numbers for numbers, _ in boxes], columns.convention, rows, source)
    if not np.isfinite(width).any():
        warn_of_convention(stored, _sample_sizes(files, columns, counts, folder)[:, rows], source)
    indices = _indices(values, categories)
    if counts.max() == 1:
        keys, positions = _image_keys(files, columns), rows.tolist()
        objects = zip(map(tuple, stored.tolist()), indices.tolist())
        known = [keys[row] for row in positions if row < len(keys)]
        check_repeated_images(known, objects, positions, columns, source)
    keep = check_boxes(
        stored,
        indices,
        width=width[rows],
        height=height[rows],
        class_names=categories.names,
        name_of=lambda index: f"row {rows[index]}",
        source=source,
    )
    return categories, bool(keep.all()), int(counts.max())


def _sides(files: ParquetColumns, name: str | None, num_rows: int) -> Array:
    """Widths or heights of the images in pixels, (num_rows,); infinity where they are not known."""
    if name is None:
        return np.full(num_rows, np.inf)
    sides = pc.fill_null(files.column(name), 0).to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(sides > 0, sides, np.inf)


def _sample_sizes(files: ParquetColumns, columns: ColumnMap, counts: Array, folder: str) -> Array:
    """Widths and heights (2, num_rows) of the first images, which show what boxes are; infinity for all others."""
    sizes, reader = np.full((2, len(counts)), np.inf), RowReader(map=columns, folder=folder)
    for position, row in _read_rows(files.parts(SAMPLE_SIZE), files.image_leaves(columns), SAMPLE_BUFFER):
        image = reader.encoded_image(row)
        if counts[position] and (image["bytes"] is not None or not is_remote(image["path"])):
            size = image_size(image)
            if size is not None:
                sizes[:, position] = size[::-1]
    return sizes


def _image_keys(files: ParquetColumns, columns: ColumnMap) -> list[str | bytes | None]:
    """What identifies the images of the rows: their names where these are all there is, else digests of the first."""
    name, leaves, total = columns.columns["image"], files.image_leaves(columns), 0
    digests: list[str | bytes | None] = []
    for _, row in _read_rows(files.parts(None), leaves, SAMPLE_BUFFER):
        image = row[name] if isinstance(row[name], dict) else {"bytes": row[name]}
        data = image["bytes"]
        if isinstance(data, str) or (data is None and image.get("path")):
            names = files.column(name, leaves=[leaf for leaf in leaves if not leaf.endswith(".bytes")])
            return list((pc.struct_field(names, "path") if pa.types.is_struct(names.type) else names).to_pylist())
        digests.append(data and hashlib.blake2b(data, digest_size=16).digest())
        total += len(data or b"")
        if total > MAX_COMPARED:
            break
    return digests


def _check_counts(num_boxes: Array, num_values: Array, field: str, source: object) -> None:
    """Refuse rows of which a list is not as long as that of the boxes."""
    unequal = np.flatnonzero(num_boxes != num_values).tolist()
    if unequal:
        examples = summarise(f"row {row}" for row in unequal)
        raise ValueError(f"{source}: {len(unequal)} rows have not one {field} per box: {examples}")


def _indices(values: pa.Array, categories: Categories) -> Array:
    """Index of the class of each value (n,); -1 for missing ones."""
    encoded = values.dictionary_encode()
    known = np.array([*(categories.index(value) for value in encoded.dictionary.to_pylist()), -1], dtype=np.int64)
    indices: Array = known[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]
    return indices


def _as_boxes(numbers: Sequence[pa.Array], convention: str, rows: Array, source: object) -> Array:
    """Boxes (n, 4) as x, y, width, height, from one array of them or from four of their numbers."""
    if len(numbers) == 4:
        sides = [side.to_numpy(zero_copy_only=False).astype(np.float64) for side in numbers]
        return as_xywh(np.stack(sides, axis=1), convention)
    (boxes,) = numbers
    lengths = pc.fill_null(pc.list_value_length(boxes), 0).to_numpy(zero_copy_only=False)
    is_short = lengths != 4
    # A side may be null, too.
    sides = pc.list_parent_indices(boxes).filter(pc.is_null(boxes.flatten()))
    is_short[sides.to_numpy(zero_copy_only=False)] = True
    wrong = np.flatnonzero(is_short)
    if len(wrong):
        examples = summarise(f"{boxes[index].as_py()} in row {rows[index]}" for index in wrong.tolist())
        raise ValueError(f"{source}: {len(wrong)} boxes are not four numbers, x, y, width, height: {examples}")
    return boxes.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, 4)
