"""Parquet files with the same columns, whose annotations are read column by column."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_vlm.data.formats.categories import Categories, read_categories
from hf_vlm.data.formats.column_names import ANNOTATION_NAMES
from hf_vlm.data.formats.columns import ColumnMap
from hf_vlm.data.formats.parquet_files import open_parquet_file, read_features, read_metadata
from hf_vlm.data.io.cells import check_names
from hf_vlm.data.io.messages import summarise

__all__ = ["ParquetColumns"]

Array = np.ndarray[Any, Any]


class ParquetColumns:
    """Parquet files with the same columns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.metadata = [read_metadata(path) for path in paths]
        self.features = read_features(self.metadata[0], paths[0])

    def parts(self, num_samples: int | None) -> list[tuple[str, int, int, int]]:
        """(path, row group, position of its first row, rows to read) of all rows, or of the first few."""
        parts, first = [], 0
        for path, metadata in zip(self.paths, self.metadata):
            for group in range(metadata.num_row_groups):
                num_rows = metadata.row_group(group).num_rows
                num_read = num_rows if num_samples is None else min(num_rows, num_samples - first)
                if num_read > 0:
                    parts.append((str(path), group, first, num_read))
                first += num_rows
        if not parts:
            raise ValueError(f"there are no rows in {summarise(self.paths)}")
        return parts

    def leaves(self, columns: ColumnMap) -> tuple[str, ...]:
        """Paths of the leaves to read: the columns of the map, and only the known fields of objects."""
        objects, fields = columns.columns.get("objects"), {*columns.objects.values(), *columns.sides}
        read, types_of = columns.source_names, dict[Path, dict[str, str]]()
        for path, metadata in zip(self.paths, self.metadata):
            types_of[path] = {}
            for leaf in map(metadata.schema.column, range(metadata.num_columns)):
                name, *inner = leaf.path.split(".")
                # Annotations that the first file lacks would be left out, too.
                if (name in read or name.lower() in ANNOTATION_NAMES) and (name != objects or fields & set(inner)):
                    types_of[path][leaf.path] = leaf.physical_type
        first = types_of[self.paths[0]]
        for path, types in types_of.items():
            differing = {leaf.split(".")[0] for leaf, _ in types.items() ^ first.items()}
            if differing:
                raise ValueError(f"{path} and {self.paths[0]} differ in their columns {summarise(sorted(differing))}")
        return tuple(leaf for leaf in first if leaf.split(".")[0] in read)

    def image_leaves(self, columns: ColumnMap) -> tuple[str, ...]:
        """Those of `leaves` that hold the images."""
        return tuple(leaf for leaf in self.leaves(columns) if leaf.split(".")[0] == columns.columns["image"])

    def declared_categories(self, feature_of: Callable[[datasets.Features], Any]) -> Categories | None:
        """The classes that the type of a column declares, the same in all files; None where it declares none."""
        found = [
            read_categories(feature_of(read_features(meta, path))) for meta, path in zip(self.metadata, self.paths)
        ]
        for path, categories in zip(self.paths, found):
            if categories != found[0]:
                names = (summarise(other.names) if other else "no names" for other in (found[0], categories))
                raise ValueError(
                    f"{self.paths[0]} and {path} number their classes differently: {next(names)}, and {next(names)}; "
                    "write the files of a split with the same ClassLabel"
                )
        return found[0]

    def column(self, name: str, *, leaves: Sequence[str] | None = None) -> pa.Array:
        """All values of a column, or of the leaves of it."""
        parts: list[pa.ChunkedArray] = []
        for path in self.paths:
            with open_parquet_file(path) as file:
                check_names(file, leaves or [name])
                parts.append(file.read(columns=list(leaves or [name]), use_threads=False).column(name))
            if parts[-1].type != parts[0].type:
                raise ValueError(f"{path} and {self.paths[0]} differ in their columns {name}")
        return pa.concat_arrays([chunk for part in parts for chunk in part.chunks])

    def object_field(self, columns: ColumnMap, field: str) -> tuple[pa.Array, Array]:
        """A field of all objects one after the other, and the number of objects of each row."""
        if columns.is_flat:
            return _as_objects(self.column(field), is_box=field == columns.objects.get("bbox"))
        name, inner = columns.columns["objects"], field
        schema = self.metadata[0].schema
        paths = [schema.column(index).path for index in range(len(schema.names))]
        leaves = [path for path in paths if path.split(".")[0] == name and inner in path.split(".")]
        objects = self.column(name, leaves=leaves)
        is_struct = pa.types.is_struct(objects.type)
        lists = pc.struct_field(objects, inner) if is_struct else objects
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        return lists.flatten() if is_struct else pc.struct_field(lists.flatten(), inner), counts


def _as_objects(values: pa.Array, *, is_box: bool) -> tuple[pa.Array, Array]:
    """What `object_field` returns of a column of its own, with a list per row or with one object per row."""
    is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    is_list |= pa.types.is_fixed_size_list(values.type) and not is_box
    if is_list and not (is_box and not _is_nested_list(values.type)):
        return values.flatten(), pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    return values.drop_null(), pc.is_valid(values).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_nested_list(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind.value_type)
