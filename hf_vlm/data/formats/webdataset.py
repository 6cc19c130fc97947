"""WebDataset: tar files in which the files of a sample follow each other and have one name."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm.auto import tqdm

from hf_vlm.data.formats.annotations import OBJECT_FIELDS, check_boxes
from hf_vlm.data.formats.categories import Categories, make_categories
from hf_vlm.data.formats.columns import COLUMN_NAMES, OBJECT_NAMES, ColumnMap, RowReader
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS
from hf_vlm.data.formats.splits import choose_split, common_folder, describe_folder, group_by_split
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
from hf_vlm.data.io.files import is_folder, is_remote, open_binary, read_bytes
from hf_vlm.data.io.indexed import generated_stream
from hf_vlm.data.io.messages import error_text, redact_url, summarise
from hf_vlm.data.io.tars import TarMember
from hf_vlm.data.source import Source

__all__ = ["open_webdataset"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Shard = tuple[Path, str]  # a tar and its name in paths of images

CLASSES_FILE = "classes.txt"
LABEL_NAMES = ("cls", *COLUMN_NAMES["label"])
NUM_FIRST = 100  # samples that show what a tar holds


def open_webdataset(source: Path | Sequence[Path], split: str, *, num_samples: int | None = None) -> Source:
    """Stream the samples of tar files: of one, of several, or of a folder of them. Each tar is a shard.

    A sample is the files that follow each other with the same name up to the first dot. `jpg`, `png` and so on is the
    image, `cls` the label, a number or a name, `mask.png` or `seg.png` the mask, and `json` may hold `image_id`,
    `label` and `objects` {bbox, category} under the names that other sources use; other files are left out. Names of
    classes are in `classes.txt` beside the tars, one per line. With it, opening reads the first samples alone. Without
    it, tars on disk are searched for their classes when they hold labels, and labels of remote tars are left out. The
    split is given by names, as for Parquet files.

    While streaming, samples without an image or with labels that make no sense, and what follows damage in a tar, are
    skipped with a warning. Resuming walks the headers of one tar; of a remote tar it reads what precedes the
    position.

    Raises:
        ValueError: There are no tars, or none of this split; the first of them cannot be read or holds no image; or
            labels that opening reads make no sense.
    """
    paths = _find_tars(source)
    root = common_folder(paths)
    splits = group_by_split(paths, root)
    shards = _with_names(choose_split(splits, split, redact_url(source)), root)
    first = _first_samples(shards[0])
    columns = _find_columns(first)
    everything = [shard for tars in splits.values() for shard in _with_names(tars, root)]
    label, category = _find_classes(columns, first, everything, [shards[0][0].parent, root])
    found = {"label": label, "objects": category}
    kept = {name: column for name, column in columns.columns.items() if found.get(name, True) is not None}
    reader = _Reader(ColumnMap(kept, columns.objects), label, category)
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

    @property
    def rows(self) -> RowReader:
        columns = ColumnMap({name: name for name in ("image_id", *self.columns.columns)}, OBJECT_FIELDS)
        return RowReader(map=columns, label=self.label, category=self.category, cleans_boxes=True)

    def __call__(self, shards: list[tuple[str, str]]) -> Iterator[tuple[int, Row]]:
        rows, roles = self.rows, _roles(self.columns)
        for path, name in shards:
            without_image: list[str] = []
            wrong: list[str] = []
            try:
                with open_binary(path) as file:
                    for sample in walk_samples(file, roles, reads_images=is_remote(path)):
                        if "image" not in sample.images:
                            without_image.append(sample.key)
                            continue
                        try:
                            check_images(sample)
                            example = rows(labels_of(sample, self.columns, name))
                        except KeyError as error:
                            wrong.append(f"{sample.key} ({error} is no class)")
                            continue
                        except ValueError as error:
                            wrong.append(f"{sample.key} ({error})")
                            continue
                        yield example["image_id"], {"file": file, "images": sample.images, "example": example}
            except OSError as error:  # not damage of this tar: to skip it would drop what a server has
                raise ValueError(f"{redact_url(path)} cannot be read: {error_text(error)}") from error
            except ValueError as error:
                logger.warning("%s: the rest of this tar is skipped: %s", redact_url(path), error_text(error))
            for keys, problem in (
                (without_image, "without an image"),
                (wrong, "whose labels or images make no sense"),
            ):
                if keys:
                    logger.warning(
                        "%s: %d samples %s are skipped: %s", redact_url(path), len(keys), problem, summarise(keys)
                    )


def _with_images(file: IO[bytes], images: dict[str, tuple[TarMember, bytes | None]], example: Row) -> Row:
    """The example with the bytes of its images, read from the tar that the walk has open: it waits for the next."""
    for role, (member, content) in images.items():
        if content is None:
            content = read_member(file, member)
        example[role]["bytes"] = content
    return example


def _roles(columns: ColumnMap) -> set[str]:
    """What to read of samples."""
    return {source if source in ("image", "mask", "cls") else "json" for source in columns.columns.values()}


# ---- labels of a source


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


def _find_columns(samples: Sequence[tuple[Sample, Shard]]) -> ColumnMap:
    """The parts and fields of samples that hold the columns of the schema."""
    rows = [_as_value_error(read_fields, sample, shard) for sample, shard in samples]
    columns = {"image": "image"}
    types = {"label": int | float | str, "objects": dict | list, "width": int, "height": int}
    for column, value_type in types.items():
        aliases = LABEL_NAMES if column == "label" else COLUMN_NAMES[column]
        names = [name for name in aliases if any(isinstance(row.get(name), value_type) for row in rows)]
        if names:
            columns[column] = names[0]
    ids = [row.get("image_id") for row in rows]
    if all(type(image_id) is int for image_id in ids) and len(set(ids)) == len(ids):
        columns["image_id"] = "image_id"
    if any("mask" in sample.images for sample, _ in samples):
        columns["mask"] = "mask"
    fields: set[str] = set().union(*(_object_fields(row.get(columns.get("objects", ""))) for row in rows))
    objects = {name: alias for name, aliases in OBJECT_NAMES.items() for alias in aliases[::-1] if alias in fields}
    if not {"bbox", "category"} <= objects.keys():
        columns = {name: source for name, source in columns.items() if name not in ("objects", "width", "height")}
    return ColumnMap(columns, {**OBJECT_FIELDS, **objects})  # later samples may have an area or iscrowd


def _object_fields(objects: Any) -> set[str]:
    """Names of the fields of objects, given as a json object of lists or as a list of json objects."""
    items = objects if isinstance(objects, list) else [objects]
    return {name for item in items if isinstance(item, dict) for name in item}


def _as_value_error(read: Callable[..., Row], sample: Sample, shard: Shard, *args: Any) -> Row:
    """What is read of a sample, with its tar and key in the message of an error."""
    try:
        return read(sample, *args)
    except LabelError as error:
        raise LabelError(f"{redact_url(shard[0])}: the labels of {sample.key} cannot be read: {error}") from error


def _find_classes(
    columns: ColumnMap,
    first: Sequence[tuple[Sample, Shard]],
    tars: Sequence[Shard],
    folders: Sequence[Path],
) -> tuple[Categories | None, Categories | None]:
    """Classes of labels and of objects, from `classes.txt` or from all tars on disk."""
    if columns.columns.keys().isdisjoint(("label", "objects")):
        return None, None
    names = _read_class_names(folders)
    if not names and is_remote(tars[0][0]):
        logger.warning("%s: labels are left out, since there is no %s beside it", redact_url(tars[0][0]), CLASSES_FILE)
        return None, None
    labels = _Labels(names, redact_url(folders[-1]))
    for sample, shard in first if names else _scan(tars, _roles(columns)):
        labels.add(_as_value_error(labels_of, sample, shard, columns, shard[1]), f"{sample.key} in {shard[1]}")
    return (
        labels.classes("labels") if "label" in columns.columns else None,
        labels.classes("categories") if "objects" in columns.columns else None,
    )


def _read_class_names(folders: Sequence[Path]) -> list[str]:
    """The names in the first `classes.txt` of the folders; none where there is none."""
    for folder in dict.fromkeys(folders):
        try:
            lines = read_bytes(folder / CLASSES_FILE).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{redact_url(folder / CLASSES_FILE)} is not text in UTF-8: {error}") from error
        except Exception as error:  # servers have errors of their own types
            if isinstance(error, FileNotFoundError):
                continue
            raise ValueError(f"{redact_url(folder / CLASSES_FILE)} cannot be read: {error_text(error)}") from error
        return [line.strip() for line in lines if line.strip()]
    return []


def _scan(tars: Sequence[Shard], roles: Collection[str]) -> Iterator[tuple[Sample, Shard]]:
    """All samples with an image, up to damage, of tars on disk; no image is read."""
    for path, name in tqdm(tars, desc="Reading labels", disable=len(tars) < 10):
        try:
            with open_binary(path) as file:
                for sample in walk_samples(file, roles, reads_images=False):
                    if "image" in sample.images:
                        yield sample, (path, name)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        except ValueError as error:
            logger.warning("%s: labels are read up to a damage: %s", path, error)


class _Labels:
    """Labels and boxes of samples, and the classes they make."""

    def __init__(self, names: Sequence[str], source: str) -> None:
        self.names, self.source = names, source
        self.counts: dict[str, Counter[int | str]] = {"labels": Counter(), "categories": Counter()}
        self.first_of: dict[tuple[str, int | str], str] = {}
        self.boxes: list[tuple[list[float], tuple[float, float], int | str, str]] = []

    def add(self, row: Row, sample: str) -> None:
        objects = row.get("objects", {"bbox": [], "category": []})
        for what, values in (("labels", [row.get("label")]), ("categories", objects["category"])):
            for value in values:
                if value is not None:
                    self.counts[what][value] += 1
                    self.first_of.setdefault((what, value), sample)
        for box, category in zip(objects["bbox"], objects["category"]):
            self.boxes.append((box, (row["width"], row["height"]), category, sample))

    def classes(self, what: str) -> Categories | None:
        """The named classes, which may be given by their positions too; without names those that occur."""
        counts = self.counts[what]
        if not counts and not self.names:
            logger.warning("%s: no sample has %s; they are left out", self.source, what)
            return None
        classes = _named(self.names) if self.names else make_categories(counts)
        known = range(len(classes.names)) if classes.index_of is None else classes.index_of
        unknown = [value for value in counts if value not in known]
        if unknown:
            raise ValueError(
                f"{self.source}: {sum(counts[value] for value in unknown)} {what} are none of the "
                f"{len(classes.names)} classes: {summarise(f'{v!r} of {self.first_of[what, v]}' for v in unknown)}"
            )
        if what == "categories" and self.boxes:
            self._check_boxes(classes)
        return classes

    def _check_boxes(self, classes: Categories) -> None:
        boxes, sizes, values, samples = zip(*self.boxes)
        # Only of classes that occur: other samples may have the others.
        occurring, categories = np.unique([classes.index(value) for value in values], return_inverse=True)
        width, height = np.array(sizes, dtype=np.float64).T
        check_boxes(
            np.array(boxes, dtype=np.float64),
            categories,
            width=width,
            height=height,
            class_names=[classes.names[index] for index in occurring],
            name_of=samples.__getitem__,
            source=self.source,
        )


def _named(names: Sequence[str]) -> Categories:
    """Classes that may be given by name or by number."""
    numbers: dict[Any, int] = {index: index for index in range(len(names))}
    return Categories(tuple(names), numbers | {name: index for index, name in enumerate(names)})
