"""Cells of Parquet files within bounds: a file of kilobytes may name one cell of megabytes in each of its rows."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

__all__ = ["check_names", "rows_of_group"]

BATCH_BYTES = 2**30  # that a batch may have where every cell is as large as can be
LARGE_CELL = 2**20  # bytes; writers leave off dictionaries at about this size, so that larger cells hardly repeat
MAX_REPEATED = 2**31  # bytes in large cells beyond what the file stores
MAX_NAME_BYTES = 2**12  # of the text of a label


def rows_of_group(
    file: pq.ParquetFile, group: int, leaves: Sequence[str], *, batch_size: int
) -> Iterator[dict[str, Any]]:
    """The rows of a row group, read a few at a time, fewer where cells may be large.

    Raises:
        ValueError: Large cells repeat so often that they are many times what the file stores.
    """
    stored = file.metadata.row_group(group).total_byte_size
    num_rows = min(max(BATCH_BYTES // max(stored, 1), 1), batch_size)
    num_large = 0
    # Without threads: the reader may run in a forked worker.
    for batch in file.iter_batches(num_rows, row_groups=[group], columns=list(leaves), use_threads=False):
        for row in batch.to_pylist():
            num_large += sum(size for size in map(len, _binary_cells(row.values())) if size > LARGE_CELL)
            if num_large > stored + MAX_REPEATED:
                raise ValueError(
                    f"its row group {group} stores {stored:,} bytes, which repeated cells expand to more than "
                    f"{num_large:,}; write the file without dictionaries"
                )
            yield row


def _binary_cells(values: Iterable[Any]) -> Iterator[bytes]:
    for value in values:
        if isinstance(value, bytes):
            yield value
        elif isinstance(value, dict):  # {"bytes", "path"}
            yield from _binary_cells(value.values())
        elif isinstance(value, list) and value and isinstance(value[0], bytes | dict | list):  # of objects
            yield from _binary_cells(value)


def check_names(file: pq.ParquetFile, leaves: Sequence[str]) -> None:
    """Refuse leaves of text whose cells are too long or too many for names, before they are read whole.

    Only row groups that could expand are looked at, a few rows at a time.

    Raises:
        ValueError: A cell has more than `MAX_NAME_BYTES`, or all have more than `MAX_REPEATED`.
    """
    total, columns = 0, [file.schema.column(index) for index in range(len(file.schema))]
    texts = [
        index
        for index, column in enumerate(columns)
        if _is_one_of(column.path, leaves) and column.physical_type == "BYTE_ARRAY"
    ]
    for group, index in itertools.product(range(file.num_row_groups), texts):
        name, metadata = columns[index].path, file.metadata.row_group(group)
        # Reading with a damaged footer raises; to ask for the metadata of a chunk at once would end the process.
        next(file.iter_batches(1, row_groups=[group], columns=[name], use_threads=False), None)
        chunk = metadata.column(index)
        largest = chunk.total_uncompressed_size  # no cell is larger than its chunk
        if largest * chunk.num_values > BATCH_BYTES:
            num_rows = max(BATCH_BYTES // largest * metadata.num_rows // chunk.num_values, 1)
            for batch in file.iter_batches(num_rows, row_groups=[group], columns=[name], use_threads=False):
                longest, total = _longest(batch.column(0)), total + batch.nbytes
                if longest > MAX_NAME_BYTES or total > MAX_REPEATED:
                    raise ValueError(
                        f"the column {name!r} has cells of {longest:,} bytes and {total:,} bytes so far, too many for "
                        "names of classes"
                    )


def _is_one_of(name: str, leaves: Sequence[str]) -> bool:
    return any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)


def _longest(array: pa.Array) -> int:
    """Most bytes of a text in an array, also in lists and structs."""
    if pa.types.is_dictionary(array.type):
        return _longest(array.dictionary)
    if pa.types.is_struct(array.type):
        return max(map(_longest, array.flatten()), default=0)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _longest(array.flatten())
    is_text = any(is_of(array.type) for is_of in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))
    return (pc.max(pc.binary_length(array)).as_py() or 0) if is_text else 0
