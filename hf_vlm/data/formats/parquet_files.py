"""Parquet files: where they are, and how each is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.data.io.files import is_remote, open_binary
from hf_vlm.data.io.messages import error_text, redact_url

__all__ = ["find_parquet_files", "open_parquet_file", "read_features", "read_metadata"]


def find_parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below a folder, sorted; hidden ones are left out."""
    found = (path for path in folder.rglob("*.parquet") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


@contextmanager
def open_parquet_file(path: object, *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Open a file; one on disk by its path, which Arrow reads fastest itself.

    Args:
        buffer_size: Bytes to read at a time; 0 for whole row groups.

    Raises:
        ValueError: It is no Parquet or is damaged, then or while it is read.
    """
    try:
        if is_remote(path):  # without reading ahead: Arrow knows which bytes it wants
            with (
                open_binary(path, read_ahead=False) as remote,
                pq.ParquetFile(remote, buffer_size=buffer_size) as file,
            ):
                yield file
        else:
            with pq.ParquetFile(str(path), buffer_size=buffer_size) as file:
                yield file
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{redact_url(path)} cannot be read as Parquet: {error_text(error)}") from error


def read_metadata(path: Path) -> pq.FileMetaData:
    """The footer of a file.

    Raises:
        ValueError: It is no Parquet or is damaged.
    """
    with open_parquet_file(path) as file:
        return file.metadata


def read_features(metadata: pq.FileMetaData, path: Path) -> datasets.Features:
    """Types of the columns of a file, by its footer.

    Raises:
        ValueError: They make no sense.
    """
    try:
        return datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
    except Exception as error:  # any type: what `datasets` writes of itself into a file may be damaged
        raise ValueError(f"{redact_url(path)} has columns that make no sense: {error!r}") from error
