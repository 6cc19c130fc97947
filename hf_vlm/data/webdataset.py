"""WebDataset: tar files in which the files of a sample stand together and share a name."""

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_vlm.data.checks import check_boxes
from hf_vlm.data.columns import COLUMN_NAMES, OBJECT_NAMES, Categories, ColumnMap, RowReader, make_categories
from hf_vlm.data.files import display, is_folder, is_remote, open_binary, reason
from hf_vlm.data.imagefolder import IMAGE_EXTENSIONS
from hf_vlm.data.indexed import generated_stream
from hf_vlm.data.splits import choose_split, describe_folder, group_by_split, listing
from hf_vlm.data.tar import TarMember, walk_tar

__all__ = ["open_webdataset"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

ROLES = {".cls": "cls", ".json": "json", ".mask.png": "mask", ".seg.png": "mask"} | dict.fromkeys(
    IMAGE_EXTENSIONS, "image"
)
CLASSES_FILE = "classes.txt"
NUM_FIRST = 100  # samples that tell what a tar holds


class LabelError(ValueError):
    """Labels in a tar cannot be read."""


def open_webdataset(
    source: Path | Sequence[Path], split: str, *, num_samples: int | None = None
) -> datasets.IterableDataset:
    """Stream the samples of tar files: of one, of several, or of a folder of them. A tar is a shard.

    A sample is the files that follow each other with the same name up to the first dot. `jpg`, `png` and so on is the
    image, `cls` the label, a number or a name, `mask.png` or `seg.png` the mask, and `json` may hold `label` and
    `objects` {bbox, category} under the names that other sources use; other files are left out. Names of classes
    stand in `classes.txt` beside the tars, one a line. Without it, tars on disk are searched for their classes when
    they hold labels, and labels of remote tars are left out. The split is told by names, as of Parquet files.

    Resuming walks the headers of one tar; of a remote tar it reads what stands before the position.

    Raises:
        ValueError: There are no tars, or none of this split; the first of them cannot be read or holds no image; or
            labels make no sense.
    """
    paths, root = _find_tars(source)
    splits = group_by_split(paths, root)
    shards = choose_split(splits, split, display(source))
    columns = _find_columns(shards[0])
    label, category = _find_classes(columns, shards, [tar for tars in splits.values() for tar in tars])
    kept = {name: column for name, column in columns.columns.items() if name != "label" or label is not None}
    if category is None:
        kept.pop("objects", None)
    reader = RowReader(map=ColumnMap(kept, columns.objects), label=label, category=category, cleans_boxes=True)
    samples = generated_stream(_samples, shards=[str(shard) for shard in shards])
    stream = samples.map(
        _SampleReader(reader),
        input_columns=["shard", "key", "parts"],
        remove_columns=["shard", "key", "parts"],
        features=reader.features,
    )
    return stream if num_samples is None else stream.take(num_samples)


def _find_tars(source: Path | Sequence[Path]) -> tuple[list[Path], Path]:
    """The tars, and the folder that their splits are told from."""
    if isinstance(source, Sequence):
        return list(source), source[0].parent
    if not is_folder(source):
        return [source], source.parent
    found = sorted(path for path in source.rglob("*.tar") if not path.name.startswith("."))
    if not found:
        raise ValueError(f"{source} holds no tar files; {describe_folder(source)}")
    return found, source


# ---- samples


def _samples(shards: list[str]) -> Iterator[tuple[int, Row]]:
    """Samples as {"shard", "key", "parts"}: the places of the parts in the tar, or of a remote tar their bytes.

    On disk nothing but headers is read here, so that resuming skips samples without reading them.
    """
    for shard in shards:
        num_without_image = 0
        try:
            for key, parts in _walk(shard):
                if "image" in parts:
                    yield _identity(shard, key), {"shard": shard, "key": key, "parts": parts}
                else:
                    num_without_image += 1
        except ValueError as error:
            logger.warning("%s: the rest of this tar is passed over: %s", display(shard), reason(error))
        if num_without_image:
            logger.warning("%s: %d samples without an image are passed over", display(shard), num_without_image)


def _walk(shard: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and parts of each sample of a tar, with images or without."""
    with open_binary(shard) as file:
        is_local = not is_remote(shard)
        # A map has no buffer that each seek would fill anew.
        tar: Any = (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if is_local and os.path.getsize(shard) else file
        )
        for key, members in groupby(walk_tar(tar), key=lambda member: _split_name(member.name)[0]):
            parts: dict[str, Any] = {}
            for member in members:
                role = ROLES.get(_split_name(member.name)[1])
                if role is not None:
                    parts.setdefault(role, member if is_local else (member.name, _read(file, member)))
            yield key, parts


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension: a name up to the first dot of its last part, and the rest in small letters."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _read(file: IO[bytes], member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _identity(shard: str, key: str) -> int:
    """A number for a sample that does not depend on where the tars lie nor on which others are read."""
    text = f"{_name(shard)}/{key}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _name(shard: str) -> str:
    return PurePosixPath(display(shard)).name


def _load(shard: str, key: str, parts: dict[str, Any]) -> Row:
    """The parts of a sample: encoded images as {"bytes", "path"}, `cls` as text or a number, the fields of `json`."""
    if isinstance(next(iter(parts.values())), TarMember):
        with open(shard, "rb") as file:
            parts = {role: (member.name, _read(file, member)) for role, member in parts.items()}
    row: Row = {"image_id": _identity(shard, key)}
    try:
        if "json" in parts:
            fields = json.loads(parts["json"][1])
            if not isinstance(fields, dict):
                raise ValueError("it is no json object")
            row = fields | row
        if "cls" in parts:
            text = parts["cls"][1].decode().strip()
            row["cls"] = int(text) if text.lstrip("-").isdigit() else text
    except ValueError as error:
        raise LabelError(f"{display(shard)}: the labels of {key} cannot be read: {error}") from error
    for role in ("image", "mask"):
        name, content = parts.get(role, (None, None))
        row[role] = {
            "bytes": content,
            "path": None if name is None else f"{PurePosixPath(display(shard)).name}/{name}",
        }
    return row


@dataclass(frozen=True)
class _SampleReader:
    """Brings samples into the form of the schema; a label that is missing is -1."""

    reader: RowReader

    def __call__(self, shard: str, key: str, parts: dict[str, Any]) -> Row:
        row = _load(shard, key, parts)
        try:
            return self.reader(dict.fromkeys(self.reader.map.source_names) | row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{display(shard)}: the labels of {key} make no sense: {error!r}") from error


# ---- labels


def _find_columns(shard: Path) -> ColumnMap:
    """Which parts and fields of the first samples are what.

    Raises:
        ValueError: The tar cannot be read or holds no image.
    """
    try:
        samples = ((key, parts) for key, parts in _walk(str(shard)) if "image" in parts)
        rows = [_load(str(shard), key, parts) for key, parts in islice(samples, NUM_FIRST)]
    except LabelError:
        raise
    except (OSError, ValueError) as error:
        hint = "; unpack it first" if shard.name.endswith(("gz", "bz2", "xz", "zst")) else ""
        raise ValueError(f"{display(shard)} cannot be read as a tar: {reason(error)}{hint}") from error
    if not rows:
        raise ValueError(
            f"{display(shard)} holds no images: looked for samples with {' '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    columns = {"image": "image", "image_id": "image_id"}
    for column in ("label", "objects", "width", "height"):
        names = [name for name in COLUMN_NAMES[column] if any(name in row for row in rows)]
        if names:
            columns[column] = names[0]
    if any("cls" in row for row in rows):
        columns["label"] = "cls"
    if any(row["mask"]["bytes"] is not None for row in rows):
        columns["mask"] = "mask"
    fields: set[str] = set().union(*(_object_fields(row.get(columns.get("objects", ""))) for row in rows))
    objects = {name: alias for name, aliases in OBJECT_NAMES.items() for alias in aliases[::-1] if alias in fields}
    if not {"bbox", "category"} <= objects.keys():
        columns.pop("objects", None)
        objects = {}
    return ColumnMap(columns, objects)


def _object_fields(objects: Any) -> set[str]:
    """Names of the fields of objects, given as a json object of lists or as a list of json objects."""
    first = objects[0] if isinstance(objects, list) and objects else objects
    return set(first) if isinstance(first, dict) else set()


def _find_classes(
    columns: ColumnMap, shards: Sequence[Path], tars: Sequence[Path]
) -> tuple[Categories | None, Categories | None]:
    """Classes of labels and of objects, from `classes.txt` beside the shards or from all tars on disk."""
    if columns.columns.keys().isdisjoint(("label", "objects")):
        return None, None
    file = shards[0].parent / CLASSES_FILE
    names = file.read_text().split("\n") if _exists(file) else []
    named = tuple(name.strip() for name in names if name.strip())
    if is_remote(shards[0]):
        if not named:
            logger.warning("%s: labels are left out, since there is no %s beside it", display(shards[0]), CLASSES_FILE)
            return None, None
        classes = _named(named)
        return (classes if "label" in columns.columns else None), (classes if "objects" in columns.columns else None)
    rows = [row for tar in tqdm(tars, desc="Reading labels", disable=len(tars) < 10) for row in _label_rows(tar)]
    name, folder = columns.columns.get("label"), shards[0].parent
    return (
        None if name is None else _label_classes(rows, name, named, folder),
        _object_classes(rows, columns, named, folder) if "objects" in columns.columns else None,
    )


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a server that answers neither yes nor no
        return False


def _named(names: Sequence[str]) -> Categories:
    """Classes that may be given by name or by number."""
    numbers: dict[Any, int] = {index: index for index in range(len(names))}
    return Categories(tuple(names), numbers | {name: index for index, name in enumerate(names)})


def _label_rows(tar: Path) -> Iterator[Row]:
    """Labels and objects of a tar's samples, with `sample` to name them; images are not read."""
    try:
        for key, parts in _walk(str(tar)):
            if "image" in parts:
                labels = {role: part for role, part in parts.items() if role in ("cls", "json")}
                row = _load(str(tar), key, labels) if labels else {}
                yield row | {"sample": f"{key} in {tar.name}"}
    except OSError as error:
        raise ValueError(f"{display(tar)} cannot be read: {reason(error)}") from error


def _label_classes(rows: Sequence[Row], column: str, names: Sequence[str], folder: Path) -> Categories:
    values = [row.get(column) for row in rows]
    occurring = sorted({value for value in values if value is not None}, key=str)
    classes = _named(names) if names else make_categories(occurring)
    unknown = [
        f"{value!r} of {row['sample']}"
        for row, value in zip(rows, values)
        if value is not None and not _is_known(value, classes)
    ]
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} labels are none of the {len(classes.names)} classes: {listing(unknown)}"
        )
    return classes


def _is_known(value: Any, classes: Categories) -> bool:
    if classes.index_of is not None:
        return value in classes.index_of
    return isinstance(value, int) and 0 <= value < len(classes.names)


def _object_classes(rows: Sequence[Row], columns: ColumnMap, names: Sequence[str], folder: Path) -> Categories | None:
    """Classes of the objects, whose boxes are checked."""
    boxes, values, samples, sizes = [], [], [], []
    for row in rows:
        for box, value in _objects_of(row, columns):
            boxes.append(box)
            values.append(value)
            samples.append(row["sample"])
            sizes.append([row.get(columns.columns.get(side, "")) or np.inf for side in ("width", "height")])
    if not boxes:
        logger.warning("%s: no sample has an object; they are left out", folder)
        return None
    classes = _named(names) if names else make_categories(sorted(set(values), key=str))
    size = np.array(sizes, dtype=np.float64)
    check_boxes(
        np.array(boxes, dtype=np.float64),
        np.array([classes.index(value) if _is_known(value, classes) else -1 for value in values]),
        width=size[:, 0],
        height=size[:, 1],
        class_names=classes.names,
        name_of=samples.__getitem__,
        source=folder,
    )
    return classes


def _objects_of(row: Row, columns: ColumnMap) -> list[tuple[list[float], Any]]:
    """Boxes and categories of a sample.

    Raises:
        ValueError: They are not as many, or a box is not four numbers.
    """
    stored, names = row.get(columns.columns["objects"]) or [], columns.objects
    try:
        if isinstance(stored, dict):
            objects = list(zip(stored[names["bbox"]], stored[names["category"]], strict=True))
        else:
            objects = [(item[names["bbox"]], item[names["category"]]) for item in stored]
        return [([float(side) for side in (x, y, width, height)], value) for (x, y, width, height), value in objects]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the objects of {row['sample']} need a bbox of four numbers, x, y, width, height, and a category each: "
            f"{error!r}"
        ) from error
