"""Shards of encoded images, Parquet files or WebDataset tars: where they are, their images, and copies of some."""

import itertools
import logging
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.data.formats.columns import find_columns
from hf_vlm.data.formats.parquet_files import find_parquet_files, open_parquet_file, read_features
from hf_vlm.data.formats.splits import choose_split, common_folder, describe_folder, group_by_split
from hf_vlm.data.formats.webdataset_samples import ROLES, read_member, split_name
from hf_vlm.data.io.cells import rows_of_group
from hf_vlm.data.io.decode import MAX_ENCODED_BYTES
from hf_vlm.data.io.files import find_paths, is_folder, is_remote, open_binary
from hf_vlm.data.io.messages import redact_url
from hf_vlm.data.io.tars import TarMember, walk_tar
from hf_vlm.data.shards import ROWS_PER_GROUP

__all__ = ["SUFFIXES", "EncodedImage", "check_columns", "copy_rows", "find_shards", "read_images"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
BATCH_SIZE = 64  # rows read at a time


class EncodedImage(NamedTuple):
    """An image of a shard.

    Attributes:
        row: Its position among those of the shard, from 0.
        name: Of its file, where the shard gives one.
        data: Its bytes; empty where there are none.
    """

    row: int
    name: str
    data: bytes


def find_shards(data: str, split: str) -> tuple[str, list[Path]]:
    """The format and the files of a split of Parquet files or WebDataset tars: of one, several or a folder of them.

    Raises:
        ValueError: There are none, or none of this split.
    """
    found = find_paths(data)
    if len(found) == 1 and is_folder(found[0]):
        root = found[0]
        tars = sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))
        found = find_parquet_files(root) or tars
        if not found:
            raise ValueError(
                f"{root} holds neither Parquet files nor tars; {describe_folder(root)}. A folder of images is one "
                "after datasets.load_dataset('imagefolder', data_dir=..., split='train').to_parquet('images.parquet')."
            )
    else:
        root = common_folder(found)
    formats = {suffix: format for format, suffix in SUFFIXES.items()}
    suffixes = {path.suffix.lower() for path in found}
    if len(suffixes) != 1 or not suffixes <= formats.keys():
        raise ValueError(f"{redact_url(data)}: give Parquet files or WebDataset tars that hold the images")
    missing = [path for path in found if not is_remote(path) and not path.exists()]  # a server is asked later
    if missing:
        raise ValueError(f"{redact_url(missing[0])} does not exist")
    return formats[suffixes.pop()], choose_split(group_by_split(found, root), split, redact_url(data))


def read_images(path: str, format: str, rows: Iterable[int] | None = None) -> Iterator[EncodedImage]:
    """The images of a shard in their order, or those of some rows, without reading the others.

    Raises:
        ValueError: The shard cannot be read, or names files in place of images.
    """
    wanted = None if rows is None else frozenset(rows)
    return (_read_parquet if format == "parquet" else _read_tar)(path, wanted)


def copy_rows(parts: Iterable[tuple[str, Array]], format: str, file: IO[bytes]) -> None:
    """Write some rows of shards to a shard of the same format, with all that belongs to them.

    Args:
        parts: Paths of shards, and ascending rows of each.
        format: Of these shards.
        file: Open file.

    Raises:
        ValueError: A shard cannot be read.
    """
    (_copy_parquet if format == "parquet" else _copy_tar)(parts, file)


# ---- Parquet


def check_columns(path: str, like: str) -> None:
    """ValueError where the columns of a Parquet shard are not those of another, so that no shard could hold both."""
    with open_parquet_file(path) as file, open_parquet_file(like) as first:
        if not file.schema_arrow.equals(first.schema_arrow):
            raise ValueError(f"{redact_url(path)} and {redact_url(like)} differ in their columns: make them equal")


def _image_column(file: pq.ParquetFile, path: str) -> str:
    return find_columns(read_features(file.metadata, Path(path)), redact_url(path)).columns["image"]


def _read_parquet(path: str, wanted: frozenset[int] | None) -> Iterator[EncodedImage]:
    first = 0
    with open_parquet_file(path) as file:
        column = _image_column(file, path)
        for group in range(file.num_row_groups):
            numbers = range(first, first + file.metadata.row_group(group).num_rows)
            first = numbers.stop
            if wanted is not None and wanted.isdisjoint(numbers):
                continue
            for row, cells in zip(numbers, rows_of_group(file, group, [column], batch_size=BATCH_SIZE)):
                if wanted is None or row in wanted:
                    yield EncodedImage(row, *_name_and_bytes(cells[column], f"{redact_url(path)}, row {row}"))


def _name_and_bytes(cell: Any, location: str) -> tuple[str, bytes]:
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, str) or (data is None and name):
        raise ValueError(f"{location} names a file, {data or name}: what is curated must hold its images")
    return name or "", data or b""


def _copy_parquet(parts: Iterable[tuple[str, Array]], file: IO[bytes]) -> None:
    schema: pa.Schema | None = None
    writer: pq.ParquetWriter | None = None
    pending: list[pa.Table] = []
    for path, rows in parts:
        with open_parquet_file(path) as source:
            if schema is None or writer is None:
                schema = source.schema_arrow
                writer = pq.ParquetWriter(file, schema)
            for table in _tables_of_rows(source, rows):
                pending = _write_groups(writer, [*pending, table])
    if writer is not None:
        for table in pending:
            writer.write_table(table)
        writer.close()


def _tables_of_rows(file: pq.ParquetFile, rows: Array) -> Iterator[pa.Table]:
    first = 0
    for group in range(file.num_row_groups):
        stop = first + file.metadata.row_group(group).num_rows
        if np.searchsorted(rows, first) < np.searchsorted(rows, stop):
            for batch in file.iter_batches(ROWS_PER_GROUP, row_groups=[group], use_threads=False):
                inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(batch))] - first
                if len(inside):
                    yield pa.Table.from_batches([batch]).take(pa.array(inside))
                first += len(batch)
        first = stop


def _write_groups(writer: pq.ParquetWriter, tables: list[pa.Table]) -> list[pa.Table]:
    """Write full row groups, and return what is left: readers of a stream hold a group in memory."""
    table = pa.concat_tables(tables)
    while len(table) >= ROWS_PER_GROUP:
        writer.write_table(table.slice(0, ROWS_PER_GROUP))
        table = table.slice(ROWS_PER_GROUP)
    return [table] if len(table) else []


# ---- WebDataset


def _samples(file: IO[bytes], path: str) -> Iterator[tuple[TarMember, list[TarMember]]]:
    """The image and all files of each sample that has an image."""
    try:
        for key, members in itertools.groupby(walk_tar(file), key=lambda member: split_name(member.name)[0]):
            files = list(members) if key and not key.endswith("/") else []  # of hidden files, as macOS leaves them
            images = [member for member in files if ROLES.get(split_name(member.name)[1]) == "image"]
            if images:
                yield images[0], files
    except ValueError as error:
        logger.warning("%s: the rest of this tar is skipped: %s", redact_url(path), error)


def _read_tar(path: str, wanted: frozenset[int] | None) -> Iterator[EncodedImage]:
    with open_binary(path) as file:
        for row, (image, _) in enumerate(_samples(file, path)):
            if wanted is None or row in wanted:
                data = read_member(file, image) if image.size <= MAX_ENCODED_BYTES else b""
                yield EncodedImage(row, image.name, data)


def _copy_tar(parts: Iterable[tuple[str, Array]], file: IO[bytes]) -> None:
    """The samples in folders named by their shards, so that equal names in these stay apart."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, (path, rows) in enumerate(parts):
            wanted, folder = frozenset(rows.tolist()), f"{number:03d}-{Path(path).stem}"
            with open_binary(path) as source:
                for row, (_, members) in enumerate(_samples(source, path)):
                    for member in members if row in wanted else ():
                        info = tarfile.TarInfo(f"{folder}/{member.name}")
                        info.size = member.size
                        source.seek(member.offset)
                        tar.addfile(info, source)
