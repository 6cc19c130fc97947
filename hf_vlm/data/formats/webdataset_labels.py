"""Which parts of the samples of tars are labels, and the classes that these have."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_vlm.data.formats.annotations import check_boxes
from hf_vlm.data.formats.box_conventions import warn_of_convention
from hf_vlm.data.formats.categories import Categories, make_categories
from hf_vlm.data.formats.column_names import COLUMN_NAMES, OBJECT_NAMES, SIDE_NAMES
from hf_vlm.data.formats.columns import ColumnMap, find_objects
from hf_vlm.data.formats.webdataset_samples import (
    LabelError,
    Sample,
    labels_of,
    read_fields,
    read_member,
    walk_samples,
)
from hf_vlm.data.io.decode import image_size
from hf_vlm.data.io.files import is_remote, open_binary, read_bytes
from hf_vlm.data.io.messages import error_text, redact_url, summarise

__all__ = ["Shard", "annotations_in", "find_classes", "missing_columns", "roles_of"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Size = tuple[float, float]  # width and height in pixels
Shard = tuple[Path, str]  # a tar and its name in paths of images

UNKNOWN_SIZE = (np.inf, np.inf)
SAMPLE_SIZE = 64  # images whose sizes are read where json gives none
CLASSES_FILE = "classes.txt"
LABEL_NAMES = ("cls", *COLUMN_NAMES["label"])
CAPTION_NAMES = ("txt", *COLUMN_NAMES["text"])
ANNOTATIONS = {  # names in json that show that there are some
    "label": LABEL_NAMES,
    "objects": (*COLUMN_NAMES["objects"], *OBJECT_NAMES["bbox"], *(names[0] for _, names in SIDE_NAMES)),
}


def roles_of(columns: ColumnMap) -> set[str]:
    """What to read of samples."""
    return {source if source in ("image", "mask", "cls", "txt") else "json" for source in columns.source_names}


def missing_columns(columns: ColumnMap) -> set[str]:
    """Which of `label` and `objects` there are no columns for."""
    return {"label", "objects"} - {*columns.columns, *(["objects"] if columns.objects else [])}


def annotations_in(fields: Row, columns: Collection[str]) -> set[str]:
    """Which of some columns the fields of one sample hold, as far as names and types show."""
    named = {column for column in columns if not fields.keys().isdisjoint(ANNOTATIONS[column])}
    return named - missing_columns(_columns_of([fields])) if named else named


def _find_columns(samples: Sequence[tuple[Sample, Shard]]) -> ColumnMap:
    """The parts and fields of samples that hold the columns of the schema."""
    columns = _columns_of([_as_value_error(read_fields, sample, shard) for sample, shard in samples])
    if any("mask" in sample.images for sample, _ in samples):
        return replace(columns, columns={**columns.columns, "mask": "mask"})
    return columns


def _columns_of(rows: Sequence[Row]) -> ColumnMap:
    columns = {"image": "image"}
    types = {"label": int | float | str, "text": str | list, "width": int, "height": int}
    for column, value_type in types.items():
        aliases = {"label": LABEL_NAMES, "text": CAPTION_NAMES}.get(column, COLUMN_NAMES[column])
        names = [name for name in aliases if any(isinstance(row.get(name), value_type) for row in rows)]
        texts = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
        if names:
            columns[column] = (texts or names)[0]
    ids = [row.get("image_id") for row in rows]
    if all(type(image_id) is int for image_id in ids) and len(set(ids)) == len(ids):
        columns["image_id"] = "image_id"
    lists = ({name: value for name, value in row.items() if isinstance(value, list)} for row in rows)
    nested = {name: find_objects(_object_fields(row.get(name) for row in rows)) for name in COLUMN_NAMES["objects"]}
    named = [name for name, (objects, *_) in nested.items() if objects]
    objects, sides, convention = nested[named[0]] if named else find_objects(_object_fields(lists))
    if not objects:
        return ColumnMap({name: source for name, source in columns.items() if name not in ("width", "height")})
    # Later samples may have an area or iscrowd.
    fields = {"area": "area", "iscrowd": "iscrowd", **objects}
    return ColumnMap(columns | ({"objects": named[0]} if named else {}), fields, sides, convention)


def _object_fields(values: Iterable[Any]) -> dict[str, Any]:
    """Types by name of the fields of objects, given as json objects of lists or as lists of json objects."""
    fields: dict[str, Any] = {}
    items = (item for value in values for item in (value if isinstance(value, list) else [value]))
    for name, value in ((name, value) for item in items if isinstance(item, dict) for name, value in item.items()):
        is_text = isinstance(value, str) or (isinstance(value, list) and any(isinstance(v, str) for v in value))
        if is_text or name not in fields:
            fields[name] = datasets.Value("string" if is_text else "int64")
    return fields


def _as_value_error(read: Callable[..., Row], sample: Sample, shard: Shard, *args: Any) -> Row:
    """What is read of a sample, with its tar and key in the message of an error."""
    try:
        return read(sample, *args)
    except LabelError as error:
        raise LabelError(f"{redact_url(shard[0])}: the labels of {sample.key} cannot be read: {error}") from error


def find_classes(
    first: Sequence[tuple[Sample, Shard]], tars: Sequence[Shard], folders: Sequence[Path]
) -> tuple[ColumnMap, Categories | None, Categories | None]:
    """Columns, and classes of labels and of objects, from `classes.txt` or from all tars on disk."""
    columns = _find_columns(first)
    missing = missing_columns(columns)
    has_labels = any(sample.texts.keys() - {"txt"} for sample, _ in first)
    if len(missing) == 2 and (is_remote(tars[0][0]) or not has_labels):
        return columns, None, None
    names = _read_class_names(folders)
    if not names and is_remote(tars[0][0]):
        logger.warning("%s: labels are left out, since there is no %s beside it", redact_url(tars[0][0]), CLASSES_FILE)
        return columns, None, None
    labels = _Labels(names, redact_url(folders[-1]))
    roles = {*roles_of(columns), "cls", "json"} if missing else roles_of(columns)
    for sample, shard in first if names and len(missing) < 2 else _scan(tars, roles):
        fields = _as_value_error(read_fields, sample, shard)
        if annotations_in(fields, missing):
            return find_classes([*first, (sample, shard)], tars, folders)
        row = _as_value_error(labels_of, sample, shard, columns, shard[1], fields)
        if labels.wants_size(row) and not is_remote(shard[0]):
            row["sampled"] = _image_size(sample, shard)
        labels.add(row, f"{sample.key} in {shard[1]}")
    return (
        columns,
        labels.classes("labels") if "label" in columns.columns else None,
        labels.classes("categories") if columns.objects else None,
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
    for path, name in tqdm(tars, desc="Reading labels", disable=len(tars) < 10 or None):
        try:
            with open_binary(path) as file:
                for sample in walk_samples(file, roles, reads_images=False):
                    if "image" in sample.images:
                        yield sample, (path, name)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        except ValueError as error:
            logger.warning("%s: labels are read up to a damage: %s", path, error)


def _image_size(sample: Sample, shard: Shard) -> Size | None:
    """Width and height of an image in pixels; None where its header is broken."""
    with open_binary(shard[0]) as file:
        size = image_size(read_member(file, sample.images["image"][0]))
    return None if size is None else (size[1], size[0])


class _Labels:
    """Labels and boxes of samples, and the classes they make."""

    def __init__(self, names: Sequence[str], source: str) -> None:
        self.names, self.source = names, source
        self.counts: dict[str, Counter[int | str]] = {"labels": Counter(), "categories": Counter()}
        self.first_of: dict[tuple[str, int | str], str] = {}
        self.boxes: list[tuple[list[float], Size, Size, int | str, str]] = []
        self.num_sampled = 0

    def wants_size(self, row: Row) -> bool:
        """Whether the size of the image is to be read, to see by some of them what the boxes are."""
        return self.num_sampled < SAMPLE_SIZE and row["width"] == np.inf and bool(row.get("objects", {}).get("bbox"))

    def add(self, row: Row, sample: str) -> None:
        objects = row.get("objects", {"bbox": [], "category": []})
        for what, values in (("labels", [row.get("label")]), ("categories", objects["category"])):
            for value in values:
                if value is not None:
                    self.counts[what][value] += 1
                    self.first_of.setdefault((what, value), sample)
        for box, category in zip(objects["bbox"], objects["category"]):
            size = row["width"], row["height"]
            self.boxes.append((box, size, row.get("sampled") or UNKNOWN_SIZE, category, sample))
        self.num_sampled += "sampled" in row

    def classes(self, what: str) -> Categories | None:
        """The named classes, which may be given by their positions too; without names those that occur."""
        counts = self.counts[what]
        if not counts and not self.names:
            logger.warning("%s: no sample has %s; they are left out", self.source, what)
            return None
        classes = _named(self.names) if self.names else make_categories(counts)
        known = range(len(classes.names)) if classes.index_of is None else classes.index_of
        unknown = [value for value in counts if value not in known or classes.index(value) < 0]
        if unknown:
            raise ValueError(
                f"{self.source}: {sum(counts[value] for value in unknown)} {what} are none of the "
                f"{len(classes.names)} classes: {summarise(f'{v!r} of {self.first_of[what, v]}' for v in unknown)}"
            )
        if what == "categories" and self.boxes:
            self._check_boxes(classes)
        return classes

    def _check_boxes(self, classes: Categories) -> None:
        boxes, sizes, sampled, values, samples = zip(*self.boxes)
        # Only of classes that occur: other samples may have the others.
        occurring, categories = np.unique([classes.index(value) for value in values], return_inverse=True)
        width, height = np.array(sizes, dtype=np.float64).T
        if not np.isfinite(width).any():
            warn_of_convention(np.array(boxes, dtype=np.float64), np.array(sampled, dtype=np.float64).T, self.source)
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
