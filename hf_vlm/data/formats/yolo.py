"""YOLO: one text file per image, with coordinates relative to the image."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hf_vlm.data.formats.annotations import OBJECT_FIELDS, normalise_objects
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.image_sizes import read_file_sizes
from hf_vlm.data.formats.imagefolder import find_images
from hf_vlm.data.formats.splits import CANONICAL, canonical_split, choose_split, describe_folder
from hf_vlm.data.io.files import can_list, existing_paths, exists, is_folder, map_files, read_bytes
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.source import Source

__all__ = ["looks_like_yolo", "open_yolo"]

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Line = tuple[int, tuple[float, ...]]  # number in its file; class, x, y, width, height

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")
CLASSES_FILE = "classes.txt"
TOLERANCE = 0.01  # by which coordinates may leave 0 to 1: tools round


def open_yolo(source: Path, split: str, *, num_samples: int | None = None) -> Source:
    """Stream the images and boxes of a YOLO data set, in the order of the image files' names.

    The source is a `data.yaml` with `train`, `val`, `test` (folders of images, text files that list images, or lists
    of these) and `names`, a folder that holds one, or a folder with `images/<split>` and `labels/<split>`, or with
    `<split>/images` and `<split>/labels`; its classes are in `classes.txt`, else they are numbers. The labels of
    `.../images/.../a.jpg` are in `.../labels/.../a.txt`, one line per object: class, centre x, centre y, width,
    height, or class and the points of a polygon, whose bounding box is taken. Images without labels have no objects.

    Opening reads the headers of the labelled images, since boxes in pixels need the images' sizes.

    Raises:
        ValueError: There is no such split; images are missing; or a line of labels makes no sense.
    """
    file, root = _data_file(source)
    splits, names = _read_data_file(file) if file is not None else (_find_splits(root), _read_classes(root))
    images = splits.images(split, source)[:num_samples]
    labels = [_label_path(image) for image in images]
    lines = [(row, *line) for row, found in enumerate(_read_all(labels, source)) for line in found]
    if not lines and not names:
        return boxed_images_source(images, range(len(images)), None, source)
    if not names:  # numbers, those of all splits, which must agree
        others = [_label_path(image) for name in splits.folders for image in splits.images(name, source)]
        classes = [line[0] for found in _read_all(others, source) for _, line in found]
        names = [str(index) for index in range(int(max(classes)) + 1)]
    rows = np.array([row for row, _, _ in lines], dtype=np.int64)
    labelled = np.unique(rows).tolist()
    sizes = np.full((len(images), 2), np.inf)
    sizes[labelled] = read_file_sizes([images[row] for row in labelled]).shown
    relative = np.array([line[1:] for _, _, line in lines], dtype=np.float64).reshape(-1, 4)  # x, y, width, height
    pixels = relative * np.tile(np.nan_to_num(sizes[rows], posinf=0.0), 2)
    stored = {"bbox": pixels.tolist(), "category": [int(line[0]) for _, _, line in lines]}
    boxes = BoxedImages(
        class_names=names,
        objects=normalise_objects(stored, OBJECT_FIELDS, source),
        rows=rows,
        sizes=sizes,
        name_of=lambda index: f"{labels[rows[index]].name}, line {lines[index][1]}",
        are_measured=True,
    )
    return boxed_images_source(images, range(len(images)), boxes, source)


def looks_like_yolo(folder: Path) -> bool:
    """Whether a folder holds a data file of YOLO beside images, or labels where `open_yolo` looks for them."""
    splits = [path for path in folder.iterdir() if path.name.lower() in CANONICAL and path.is_dir()]
    if any((folder / name).is_file() for name in DATA_FILES) and ((folder / "images").is_dir() or splits):
        return True
    # Masks may be in folders of that name too.
    return any(
        next((root / "labels").glob(pattern), None) for root in (folder, *splits) for pattern in ("*.txt", "*/*.txt")
    )


@dataclass(frozen=True)
class _Splits:
    """Where the images of each split are; looked up for the split that is opened."""

    folders: Mapping[str, Sequence[str]]  # of images, or text files that list them
    roots: Sequence[Path]  # that these are relative to, the likeliest first
    named_by: Path

    def images(self, split: str, source: Path) -> list[Path]:
        chosen = choose_split(self.folders, split, source)
        return [image for name in chosen for image in _images_at(name, self.roots, self.named_by)]


def _data_file(source: Path) -> tuple[Path | None, Path]:
    if not is_folder(source):
        return source, source.parent
    return next((source / name for name in DATA_FILES if (source / name).is_file()), None), source


def _read_data_file(file: Path) -> tuple[_Splits, list[str]]:
    """Where the images of each split are, and names of the classes."""
    try:
        content = yaml.safe_load(read_bytes(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not yaml: {error}") from error
    if not isinstance(content, dict) or not {"names", "nc"} & set(content):
        raise ValueError(f"{file} is no data file of YOLO: it needs 'names' and 'train', 'val' or 'test'")
    names, number = content.get("names"), content.get("nc")
    if names is None and isinstance(number, int):
        names = list(range(number))
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{file}: 'names' must be a list, or number the classes from 0 on")
    if number is not None and number != len(names):
        raise ValueError(f"{file}: 'nc' is {number}, and 'names' has {len(names)}")
    # `path` may be of another machine; what lies beside the file is meant then.
    root = file.parent / str(content.get("path") or "")
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    folders = {}
    for name, value in content.items():
        if canonical_split(str(name)) in ("train", "validation", "test") and value:
            folders[canonical_split(name)] = [str(path) for path in (value if isinstance(value, list) else [value])]
    if not folders:
        raise ValueError(f"{file} names no images: it needs 'train', 'val' or 'test'")
    return _Splits(folders, roots, file), _unique([str(name) for name in names], file)


def _unique(names: list[str], file: Path) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} names of classes are used more than once: {summarise(repeated)}")
    return names


def _read_lines(file: Path) -> list[str]:
    """Lines of a text file with their ends stripped."""
    try:
        return [line.strip() for line in read_bytes(file).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def _images_at(path: str, roots: Sequence[Path], file: Path) -> list[Path]:
    """Images in a folder or in a list. Roboflow writes ../train/images for what lies in train/images."""
    candidates = list(dict.fromkeys(root / name for root in roots for name in (path, path.removeprefix("../"))))
    if not can_list(file) and not path.endswith(".txt"):
        raise ValueError(
            f"{file} names the folder {path}, which a web server cannot list; name a text file that lists the images"
        )
    found = next((candidate for candidate in candidates if exists(candidate)), None)
    if found is None:
        raise ValueError(f"{file} names {path}, which is not there: looked for {summarise(candidates)}")
    if is_folder(found):
        return find_images(found)
    names = [name for name in _read_lines(found) if name]
    beside = [found.parent / name for name in names]
    there = existing_paths(beside)
    images = [image if image in there else roots[0] / name for image, name in zip(beside, names)]
    missing = sorted(set(images) - there - existing_paths(set(images) - there))
    if missing:
        raise ValueError(f"{found} lists {len(missing)} images that are not there: {summarise(missing)}")
    return images


def _find_splits(root: Path) -> _Splits:
    """Where the images of each split of a folder without a data file are."""
    splits = [path.name for path in sorted(root.iterdir()) if path.name.lower() in CANONICAL]
    folders = {name: [f"{name}/images"] for name in splits if (root / name / "images").is_dir()}
    if (root / "images").is_dir():
        inner = [path for path in sorted((root / "images").iterdir()) if path.name.lower() in CANONICAL]
        folders = {path.name: [f"images/{path.name}"] for path in inner if path.is_dir()} or {"train": ["images"]}
    if not any(find_images(root / path) for paths in folders.values() for path in paths):
        raise ValueError(f"{root} holds no images/ and labels/ of YOLO; {describe_folder(root)}")
    return _Splits(folders, [root], root)


def _read_classes(root: Path) -> list[str]:
    file = next((path for path in (root / CLASSES_FILE, root / "labels" / CLASSES_FILE) if path.is_file()), None)
    return [] if file is None else _unique([line for line in _read_lines(file) if line], file)


def _label_path(image: Path) -> Path:
    """Location of the labels of an image: the last folder `images` of its path is `labels`; else beside it."""
    parts = list(image.parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            return (
                image.parents[len(parts) - 2 - index]
                .parent.joinpath("labels", *parts[index + 1 :])
                .with_suffix(".txt")
            )
    return image.with_suffix(".txt")


def _read_all(labels: Sequence[Path], source: Path) -> list[list[Line]]:
    """The lines of each file of labels; none where there is no file."""
    there = existing_paths(labels)
    if labels and not there:
        logger.warning("%s: no image has a file of labels; looked for %s", source, summarise(labels, num_shown=2))
    results = map_files(lambda path: _read_labels(path) if path in there else ([], []), labels, "Reading labels")
    problems = [problem for _, found in results for problem in found]
    if problems:
        raise ValueError(f"{source}: {len(problems)} lines of labels make no sense: {summarise(problems)}")
    return [lines for lines, _ in results]


def _read_labels(path: Path) -> tuple[list[Line], list[str]]:
    """The lines of a file that make sense, and what is wrong with the others."""
    lines: list[Line] = []
    problems = []
    try:
        texts = _read_lines(path)
    except FileNotFoundError:  # on a web server, where this is known only now
        return [], []
    except ValueError as error:
        return [], [str(error)]
    for number, text in enumerate(texts, start=1):
        if text:
            try:
                lines.append((number, _parse_line(text, f"{path}, line {number}")))
            except ValueError as error:
                problems.append(str(error))
    return lines, problems


def _parse_line(line: str, location: str) -> tuple[float, ...]:
    try:
        category, *values = (float(word) for word in line.split())
    except ValueError:
        raise ValueError(f"{location}: {line!r} must be numbers: class, centre x, centre y, width, height") from None
    if not (category >= 0 and category.is_integer()):
        raise ValueError(f"{location}: the class {category:g} must be a number from 0 on")
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        raise ValueError(f"{location}: {line!r} must have coordinates of 0 to 1, relative to the image's sides")
    if len(values) == 4:
        x, y, width, height = values
        return category, x - width / 2, y - height / 2, width, height
    if len(values) >= 6 and len(values) % 2 == 0:
        x, y = min(values[::2]), min(values[1::2])
        return category, x, y, max(values[::2]) - x, max(values[1::2]) - y
    raise ValueError(f"{location}: {line!r} must have a class and 4 numbers, or a class and the points of a polygon")
