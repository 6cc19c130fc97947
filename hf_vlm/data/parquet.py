"""Parquet files on disk."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_vlm.data.checks import check_boxes
from hf_vlm.data.columns import (
    POSITION,
    Categories,
    ColumnMap,
    RowReader,
    find_columns,
    make_categories,
    object_fields,
    read_categories,
)
from hf_vlm.data.splits import choose_split, describe_folder, group_by_split, listing

__all__ = ["find_parquet_files", "open_parquet"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

BATCH_SIZE = 64  # rows read at a time


def open_parquet(source: Path, split: str, *, num_samples: int | None = None) -> datasets.IterableDataset:
    """Stream the rows of a Parquet file, or of the files of a split in a folder; a row group is a shard.

    The split is told by the names of files or folders, as `train-00000-of-00002.parquet` or `train/0.parquet`; where
    no name tells one, all is `train`. Columns are found by name and type (see `find_columns`). Only labels and boxes
    are read to check them.

    Raises:
        ValueError: There is no such split; a file is not Parquet or its columns differ from the others'; there is no
            column of images; or labels or categories are out of range.
    """
    root = source if source.is_dir() else source.parent
    files = find_parquet_files(source) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source} holds no Parquet files; {describe_folder(source)}")
    splits = group_by_split(files, root)
    table = _Table(choose_split(splits, split, source), splits)
    columns = find_columns(table.features, source)
    columns = table.without_repeated_ids(columns)
    label, category = table.labels(columns), table.object_categories(columns)
    reader = RowReader(
        map=columns,
        label=label,
        category=category,
        folder=str(root),
        cleans_boxes=category is not None and not table.check_objects(columns, category).all(),
    )
    raw = (*columns.source_names,)
    rows = datasets.IterableDataset.from_generator(
        _read_rows, gen_kwargs={"parts": table.parts(num_samples), "columns": raw}
    )
    return rows.map(reader, remove_columns=[POSITION, *raw], features=reader.features)


def find_parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below a folder, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*.parquet")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_rows(parts: list[tuple[str, int, int, int]], leaves: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of row groups given as (file, row group, position of its first row, rows to read)."""
    for path, group, first, num_rows in parts:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(BATCH_SIZE, row_groups=[group], columns=list(leaves), use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            for position, row in enumerate(islice(rows, num_rows), start=first):
                yield {POSITION: position, **row}


class _Files:
    """The files of a split, of which single columns can be read."""

    def __init__(self, paths: Sequence[Path], source: Path) -> None:
        self.source = source
        self.paths = paths
        self.metadata = [_metadata(path) for path in paths]
        self.features = datasets.Features.from_arrow_schema(self.metadata[0].schema.to_arrow_schema())

    def parts(self, num_samples: int | None) -> list[tuple[str, int, int, int]]:
        """What `_read_rows` takes, up to a number of rows."""
        parts, first = [], 0
        for path, metadata in zip(self.paths, self.metadata):
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                if num_samples is not None:
                    num_rows = min(num_rows, num_samples - first)
                if num_rows > 0:
                    parts.append((str(path), group, first, num_rows))
                first += num_rows
        if not parts:
            raise ValueError(f"{self.source}: no rows in {listing(self.paths)}")
        return parts

    def leaves(self, columns: ColumnMap) -> tuple[str, ...]:
        """The columns to read, where of the objects only the known fields.

        Raises:
            ValueError: The files differ in them.
        """
        objects, fields = columns.columns.get("objects"), set(columns.objects.values())
        chosen = []
        for path, metadata in zip(self.paths, self.metadata):
            leaves = {}
            for index in range(metadata.num_columns):
                column = metadata.schema.column(index)
                name, *inner = column.path.split(".")
                if name in columns.source_names and (name != objects or fields & set(inner)):
                    leaves[column.path] = column.physical_type
            chosen.append(leaves)
            if leaves != chosen[0]:
                differing = [name for name, _ in leaves.items() ^ chosen[0].items()]
                raise ValueError(f"{path} and {self.paths[0]} differ in the columns {listing(dict.fromkeys(differing))}")
        return tuple(chosen[0])

    def column(self, name: str, leaves: Sequence[str]) -> pa.Array:
        """All values of a column of the source."""
        wanted = [leaf for leaf in leaves if leaf.split(".")[0] == name]
        tables = [pq.ParquetFile(path).read(columns=wanted, use_threads=False) for path in self.paths]
        return pa.concat_arrays([chunk for table in tables for chunk in table.column(name).chunks])
