"""Tables beside images: csv, lines of json and Parquet."""

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_vlm.data.formats.column_names import NUMBER_NAMES, TABLE_NAMES
from hf_vlm.data.formats.columns import LISTS
from hf_vlm.data.formats.parquet_files import open_parquet_file, read_features, read_metadata
from hf_vlm.data.io.cells import rows_of_group
from hf_vlm.data.io.files import read_bytes
from hf_vlm.data.io.parsing import parse_json

__all__ = ["FILE_NAMES", "holds_file_names", "read_table"]

Row = dict[str, Any]

FILE_NAMES = ("file_name", "filename")  # of images, which stay text
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")  # others, such as 007, are names
DELIMITERS = ",;\t"  # spreadsheets write what their language has
BATCH_SIZE = 1024  # rows of Parquet read at a time


def read_table(file: Path, columns: Collection[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file by its suffix, `.csv`, `.jsonl` or `.parquet`, each with where it is, as "line 2" or "row 0".

    Args:
        columns: Names, in small letters, of the columns that matter: of Parquet, which may hold much else, only these
            are read.

    Raises:
        ValueError: It cannot be read as that.
    """
    if file.suffix == ".parquet":
        yield from ((f"row {number}", row) for number, row in enumerate(_read_parquet(file, columns)))
    else:
        read = _read_json_lines if file.suffix == ".jsonl" else _read_csv
        yield from ((f"line {line}", row) for line, row in read(file))


def holds_file_names(file: Path) -> bool:
    """Whether a Parquet file has a column of names of images."""
    try:
        return not {*FILE_NAMES}.isdisjoint(read_metadata(file).schema.to_arrow_schema().names)
    except ValueError:
        return False  # opening it says what is wrong


def _read_parquet(file: Path, columns: Collection[str]) -> Iterator[Row]:
    with open_parquet_file(file) as table:
        features = read_features(table.metadata, file)
        read = [name for name in features if name.lower() in columns]
        for group in range(table.num_row_groups):
            for row in rows_of_group(table, group, read, batch_size=BATCH_SIZE):
                yield {name: _with_names(value, features[name]) for name, value in row.items()}


def _with_names(value: Any, feature: Any) -> Any:
    """A value with the names of the classes that it holds by number, as its type declares them; None for NaN."""
    if value is None or value != value:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, LISTS):
        return [_with_names(item, feature.feature) for item in value]
    return {name: _with_names(value[name], feature[name]) for name in value} if isinstance(feature, dict) else value


def _read_json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a file of one json object per line, each with the number of its line.

    Raises:
        ValueError: A line is none.
    """
    for line, text in enumerate(_read_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        row = _read_json(text, f"{file}, line {line}")
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {line}: it is no json object but {text[:40]!r}")
        yield line, row


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a csv file, each with the number of its last line, and None for empty cells.

    Columns of whole numbers hold numbers, but with leading zeros names; columns of annotations also hold numbers with
    fractions, or what cells contain as json.

    Raises:
        ValueError: It is no csv, or there are more cells than columns.
    """
    text = _read_text(file)
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[tuple[int, Row]] = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{file}, line {reader.line_num}: there are more cells than columns")
            rows.append((reader.line_num, {name: value or None for name, value in row.items()}))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: it is not csv: {error}") from error
    for name in set(reader.fieldnames or ()) - {*FILE_NAMES}:
        cells = [(line, row) for line, row in rows if row[name] is not None]
        parse = _parser(name, [row[name] for _, row in cells])
        if parse is not None:
            for line, row in cells:
                row[name] = parse(row[name], f"{file}, line {line}, {name!r}")
    yield from rows


def _parser(name: str, cells: Sequence[str]) -> Callable[[str, str], Any] | None:
    """What reads the cells of a column, given also where they are; None for those that are text."""
    if all(map(INTEGER.fullmatch, cells)):
        return lambda text, location: int(text)
    if name.lower() in NUMBER_NAMES and all(map(_is_number, cells)):
        return lambda text, location: float(text)
    if name.lower() in TABLE_NAMES and all(text.lstrip().startswith(("[", "{")) for text in cells):
        return _read_json
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _read_text(file: Path) -> str:
    content = read_bytes(file)
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def _read_json(text: str, location: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{location}: it is not json: {error}") from error
