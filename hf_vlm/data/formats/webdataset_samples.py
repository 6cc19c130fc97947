"""Samples of a WebDataset tar: files that follow each other and have one name, and the labels among them."""

import hashlib
import re
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import IO, Any, NamedTuple

import numpy as np

from hf_vlm.data.formats.columns import ColumnMap
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS
from hf_vlm.data.io.decode import MAX_ENCODED_BYTES
from hf_vlm.data.io.parsing import MAX_TEXT_BYTES, parse_json
from hf_vlm.data.io.tars import TarMember, walk_tar

__all__ = [
    "ROLES",
    "LabelError",
    "Sample",
    "check_images",
    "labels_of",
    "read_fields",
    "read_member",
    "split_name",
    "walk_samples",
]

Row = dict[str, Any]

MAX_ID = 2**63  # of an integer in a table

TEXT_ROLES = ("cls", "json", "txt")
ROLES = {".cls": "cls", ".json": "json", ".txt": "txt", ".mask.png": "mask", ".seg.png": "mask"} | dict.fromkeys(
    IMAGE_EXTENSIONS, "image"
)


class LabelError(ValueError):
    """Labels or images in a tar make no sense."""


class Sample(NamedTuple):
    """A sample: its key, its encoded labels, and the positions or bytes of its images, by role."""

    key: str
    texts: dict[str, bytes]
    images: dict[str, tuple[TarMember, bytes | None]]


def walk_samples(file: IO[bytes], roles: Collection[str], *, reads_images: bool) -> Iterator[Sample]:
    """The samples of an open tar, with images or without; other files than those of the roles are left out.

    Images of more than `MAX_ENCODED_BYTES` are not read.
    """
    members = ((*split_name(member.name), member) for member in walk_tar(file))
    # Files as `._0.jpg`, which macOS puts between those of a sample, are no part of it.
    named = (entry for entry in members if not entry[0].endswith("/") and entry[0])
    for key, files in groupby(named, key=lambda entry: entry[0]):
        sample = Sample(key, {}, {})
        for _, extension, member in files:
            role = ROLES.get(extension)
            if role is None or role not in roles or role in sample.texts or role in sample.images:
                continue
            if role in TEXT_ROLES:
                sample.texts[role] = read_member(file, member, limit=MAX_TEXT_BYTES + 1)  # one more shows
            else:
                is_read = reads_images and member.size <= MAX_ENCODED_BYTES
                sample.images[role] = member, read_member(file, member) if is_read else None
        yield sample


def check_images(sample: Sample) -> None:
    """Refuse a sample with an image that is too large to be read."""
    for member, _ in sample.images.values():
        if member.size > MAX_ENCODED_BYTES:
            raise LabelError(f"{member.name} has {member.size} bytes, more than the {MAX_ENCODED_BYTES} that are read")


def split_name(name: str) -> tuple[str, str]:
    """Key and extension: a name up to the first dot of its last part, and the rest in small letters."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def read_member(file: IO[bytes], member: TarMember, *, limit: int | None = None) -> bytes:
    """The bytes of a member, or the first of them up to a limit."""
    file.seek(member.offset)
    return file.read(member.size if limit is None else min(member.size, limit))


def read_fields(sample: Sample) -> Row:
    """The content of `json`, `cls` and `txt`, unchanged."""
    too_long = [role for role, text in sample.texts.items() if len(text) > MAX_TEXT_BYTES]
    if too_long:
        raise LabelError(f"its {too_long[0]} has more than the {MAX_TEXT_BYTES:,} bytes that are read")
    try:
        fields: Row = parse_json(sample.texts["json"]) if "json" in sample.texts else {}
        if not isinstance(fields, dict):
            raise LabelError("it is no json object")
        if "cls" in sample.texts:
            text = sample.texts["cls"].decode("utf-8-sig").strip()
            fields["cls"] = int(text) if re.fullmatch(r"-?[0-9]+", text) else text or None
        if "txt" in sample.texts:
            fields["txt"] = sample.texts["txt"].decode("utf-8-sig")
        return fields
    except ValueError as error:
        raise LabelError(str(error)) from error


def labels_of(sample: Sample, columns: ColumnMap, name: str, fields: Row | None = None) -> Row:
    """A sample as a row with the columns of the schema; what is missing is None.

    Args:
        sample: The sample.
        columns: Names of its fields.
        name: Name of its tar, in paths of images.
        fields: What `read_fields` gives, where it is known.
    """
    fields = read_fields(sample) if fields is None else fields
    row: Row = {column: fields.get(source) for column, source in columns.columns.items()}
    for role in ("image", "mask"):
        path = f"{name}/{sample.images[role][0].name}" if role in sample.images else None
        row[role] = {"bytes": None, "path": path}
    if type(row.get("image_id")) is not int or abs(row["image_id"]) >= MAX_ID:
        row["image_id"] = _identity(name, sample.key)
    label = row.get("label")
    if isinstance(label, float) and label.is_integer():
        row["label"] = int(label)
    elif not isinstance(label, int | str | None):
        raise LabelError(f"the label {label!r} is neither a whole number nor a name")
    for side in ("width", "height"):
        row[side] = row[side] if isinstance(row.get(side), int) and 0 < row[side] < MAX_ID else np.inf
    if columns.objects:
        try:
            row["objects"] = columns.read_objects(fields, "json")
        except ValueError as error:
            raise LabelError(str(error)) from error
    return row


def _identity(name: str, key: str) -> int:
    """A number for a sample that does not depend on where its tar lies."""
    return int.from_bytes(hashlib.blake2b(f"{name}/{key}".encode(), digest_size=7).digest(), "big")
