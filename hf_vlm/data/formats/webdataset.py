"""WebDataset: tar files in which the files of a sample follow each other and have one name."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hf_vlm.data.formats.annotations import MASK_FIELDS, OBJECT_FIELDS
from hf_vlm.data.formats.categories import Categories
from hf_vlm.data.formats.columns import ColumnMap, RowReader
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS
from hf_vlm.data.formats.splits import choose_split, common_folder, describe_folder, group_by_split
from hf_vlm.data.formats.webdataset_labels import Shard, annotations_in, find_classes, missing_columns, roles_of
from hf_vlm.data.formats.webdataset_samples import (
    ROLES,
    LabelError,
    Sample,
    check_images,
    labels_of,
    read_fields,
    read_member,
    walk_samples,
)
from hf_vlm.data.io.files import is_folder, is_remote, open_binary
from hf_vlm.data.io.indexed import generated_stream
from hf_vlm.data.io.messages import error_text, redact_url, summarise
from hf_vlm.data.io.tars import TarMember
from hf_vlm.data.source import Source

__all__ = ["open_webdataset"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
NUM_FIRST = 100  # samples that show what a tar holds


def open_webdataset(
    source: Path | Sequence[Path], split: str, *, num_samples: int | None = None, object_masks: bool = True
) -> Source:
    """Stream the samples of tar files: of one, of several, or of a folder of them. Each tar is a shard.

    A sample is the files that follow each other with the same name up to the first dot. `jpg`, `png` and so on is the
    image, `cls` the label, a number or a name, `txt` the caption, `mask.png` or `seg.png` the mask, and `json` may
    hold `image_id`, `label`, `text` and `objects` {bbox, category} under the names that other sources use; other files
    are left out. Names of
    classes are in `classes.txt` beside the tars, one per line. With it, opening reads the first samples alone. Without
    it, tars on disk are searched for labels and their classes when the first samples hold labels or json, and labels
    of remote tars are left out. The split is given by names, as for Parquet files.

    While streaming, samples without an image or with labels that make no sense, and what follows damage in a tar, are
    skipped with a warning; another counts the samples with labels or objects where opening saw none. Resuming walks
    the headers of one tar; of a remote tar it reads what precedes the position.

    Raises:
        ValueError: There are no tars, or none of this split; the first of them cannot be read or holds no image; or
            labels that opening reads make no sense.
    """
    paths = _find_tars(source)
    root = common_folder(paths)
    splits = group_by_split(paths, root)
    shards = _with_names(choose_split(splits, split, redact_url(source)), root)
    first = _first_samples(shards[0])
    everything = [shard for tars in splits.values() for shard in _with_names(tars, root)]
    columns, label, category = find_classes(first, everything, [shards[0][0].parent, root])
    columns = columns if object_masks else columns.without_object_masks()
    found = {"label": label, "objects": category}
    reader = _Reader(
        columns.without(*(name for name, classes in found.items() if classes is None)),
        label,
        category,
        frozenset(missing_columns(columns)),
    )
    samples = generated_stream(reader, shards=[(str(path), name) for path, name in shards])
    names = ["file", "images", "example"]
    examples = samples.map(_with_images, input_columns=names, remove_columns=names, features=reader.rows.features)
    return Source(dataset=examples if num_samples is None else examples.take(num_samples))


def _find_tars(source: Path | Sequence[Path]) -> list[Path]:
    if isinstance(source, Sequence):
        if not source:
            raise ValueError("no tar files are given")
        return list(source)
    if not is_folder(source):
        return [source]
    found = sorted(path for path in source.rglob("*.tar") if not path.name.startswith("."))
    if not found:
        raise ValueError(f"{source} holds no tar files; {describe_folder(source)}")
    return found


def _with_names(paths: Sequence[Path], root: Path) -> list[Shard]:
    """Paths and their names without folders; with these only where names repeat."""
    short = [redact_url(path).rpartition("/")[2] for path in paths]
    if len(set(short)) == len(short):
        return list(zip(paths, short))
    return [(path, redact_url(path).removeprefix(redact_url(root)).strip("/")) for path in paths]


# ---- samples


@dataclass(frozen=True)
class _Reader:
    """Yields the samples of tars as {"file", "images", "example"}, where the example has no bytes of images yet.

    Images of tars on disk are not read here, so that resuming skips samples without reading them.
    """

    columns: ColumnMap
    label: Categories | None
    category: Categories | None
    missing: frozenset[str]  # of `label` and `objects`, which opening saw none of; samples that have some are named

    @property
    def rows(self) -> RowReader:
        names = ("image_id", *self.columns.columns, *(["objects"] if self.columns.objects else []))
        fields = MASK_FIELDS if self.columns.has_object_masks else OBJECT_FIELDS
        columns = ColumnMap({name: name for name in names}, fields if self.columns.objects else {})
        return RowReader(map=columns, label=self.label, category=self.category, cleans_boxes=True)

    def __call__(self, shards: list[tuple[str, str]]) -> Iterator[tuple[int, Row]]:
        rows, wanted = self.rows, roles_of(self.columns)
        roles = wanted | ({"json"} if self.missing else set()) | ({"cls"} if "label" in self.missing else set())
        for path, name in shards:
            skipped: dict[str, list[str]] = {}
            unread: list[str] = []
            try:
                with open_binary(path) as file:
                    for sample in walk_samples(file, roles, reads_images=is_remote(path)):
                        if "image" not in sample.images:
                            skipped.setdefault("without an image", []).append(sample.key)
                            continue
                        try:
                            check_images(sample)
                            fields = _read_fields(sample, wanted)
                            example = rows(labels_of(sample, self.columns, name, fields))
                        except (KeyError, ValueError) as error:
                            problem = f"{error} is no class" if isinstance(error, KeyError) else error
                            what = "whose labels or images make no sense"
                            skipped.setdefault(what, []).append(f"{sample.key} ({problem})")
                            continue
                        if self.missing and annotations_in(fields, self.missing):
                            unread.append(sample.key)
                        yield example["image_id"], {"file": file, "images": sample.images, "example": example}
            except OSError as error:  # not damage of this tar: to skip it would drop what a server has
                raise ValueError(f"{redact_url(path)} cannot be read: {error_text(error)}") from error
            except ValueError as error:
                logger.warning("%s: the rest of this tar is skipped: %s", redact_url(path), error_text(error))
            for problem, keys in skipped.items():
                logger.warning(
                    "%s: %d samples %s are skipped: %s", redact_url(path), len(keys), problem, summarise(keys)
                )
            if unread:
                logger.warning(
                    "%s: %d samples have %s, which are not read, since the first %d samples of the first tar have "
                    "none: %s. Write one that has some among these",
                    redact_url(path),
                    len(unread),
                    " or ".join(sorted(self.missing)),
                    NUM_FIRST,
                    summarise(unread),
                )


def _read_fields(sample: Sample, wanted: Collection[str]) -> Row:
    """The fields of a sample; those of the wanted roles alone where others cannot be read."""
    try:
        return read_fields(sample)
    except LabelError:
        return read_fields(
            sample._replace(texts={role: sample.texts[role] for role in sample.texts if role in wanted})
        )


def _with_images(file: IO[bytes], images: dict[str, tuple[TarMember, bytes | None]], example: Row) -> Row:
    """The example with the bytes of its images, read from the tar that the walk has open: it waits for the next."""
    for role, (member, content) in images.items():
        if content is None:
            content = read_member(file, member)
        example[role]["bytes"] = content
    return example


def _first_samples(shard: Shard) -> list[tuple[Sample, Shard]]:
    """The first samples of a tar that have an image, each with the tar.

    Raises:
        ValueError: There is none.
    """
    path, samples = shard[0], list[tuple[Sample, Shard]]()
    try:
        with open_binary(path) as file:
            walk = walk_samples(file, ROLES.values(), reads_images=False)
            samples.extend(islice(((sample, shard) for sample in walk if "image" in sample.images), NUM_FIRST))
    except (OSError, ValueError) as error:
        if not samples or isinstance(error, OSError):  # else the stream reports it
            hint = "; unpack it first" if path.name.endswith(("gz", "bz2", "xz", "zst")) else ""
            raise ValueError(f"{redact_url(path)} cannot be read as a tar: {error_text(error)}{hint}") from error
    if not samples:
        raise ValueError(
            f"{redact_url(path)} holds no images: looked for samples with {' '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return samples
