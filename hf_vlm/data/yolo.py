"""YOLO: a text file an image, with coordinates in shares of the image."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from tqdm.auto import tqdm

from hf_vlm.data.boxed_images import Boxes, labelled_stream
from hf_vlm.data.image_header import read_header
from hf_vlm.data.imagefolder import find_images
from hf_vlm.data.splits import CANONICAL, canonical_split, choose_split, describe_folder, listing

__all__ = ["looks_like_yolo", "open_yolo"]

Array = np.ndarray[Any, Any]

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")
CLASSES_FILE = "classes.txt"
HEADER_BYTES = 2**16  # hold the size of an image but for few
NUM_THREADS = 8
TOLERANCE = 0.01  # by which coordinates may leave 0 to 1: tools round


def open_yolo(source: Path, split: str, *, num_samples: int | None = None) -> datasets.IterableDataset:
    """Stream the images and boxes of a YOLO data set, in the order of the image files' names.

    The source is a `data.yaml` with `train`, `val`, `test` (folders of images, text files that list images, or lists
    of these) and `names`, a folder that holds one, or a folder with `images/<split>` and `labels/<split>`, or with
    `<split>/images` and `<split>/labels`; its classes stand in `classes.txt`, else they are numbers. The labels of
    `.../images/.../a.jpg` stand in `.../labels/.../a.txt`, a line an object: class, centre x, centre y, width, height,
    or class and the points of a polygon, of which the bounding box is taken. Images without labels have no objects.

    Opening reads the headers of the labelled images, since boxes in pixels need the images' sizes.

    Raises:
        ValueError: There is no such split; images are missing; or a line of labels makes no sense.
    """
    file, root = _data_file(source)
    splits, names = _read_data_file(file) if file is not None else (_find_splits(root), _read_classes(root))
    images = choose_split(splits, split, source)[:num_samples]
    labels = [_label_path(image) for image in images]
    lines = [(row, line) for row, label in enumerate(labels) for line in _read_labels(label)]
    if not lines and not names:
        return labelled_stream(images, range(len(images)), None, source)
    categories = np.array([int(line[0]) for _, line in lines], dtype=np.int64)
    if not names:  # those of all splits, which must agree
        found = (line[0] for group in splits.values() for image in group for line in _read_labels(_label_path(image)))
        names = [str(index) for index in range(int(max(found)) + 1)]
    rows = np.array([row for row, _ in lines], dtype=np.int64)
    sizes = _sizes(images, np.unique(rows))[rows]
    shares = np.array([line[1:] for _, line in lines], dtype=np.float64).reshape(-1, 4)  # x, y, width, height
    boxes = Boxes(
        class_names=names,
        rows=rows,
        boxes=shares * np.tile(np.nan_to_num(sizes, posinf=0.0), 2),
        categories=categories,
        sizes=sizes,
        name_of=lambda index: f"{labels[rows[index]].name}",
    )
    return labelled_stream(images, range(len(images)), boxes, source)


def looks_like_yolo(folder: Path) -> bool:
    """Whether a folder holds a data file of YOLO, or labels where `open_yolo` looks for them."""
    if any((folder / name).is_file() for name in DATA_FILES) or (folder / "labels").is_dir():
        return True
    return any(path.name.lower() in CANONICAL and (path / "labels").is_dir() for path in folder.iterdir())


def _data_file(source: Path) -> tuple[Path | None, Path]:
    if source.is_file():
        return source, source.parent
    return next((source / name for name in DATA_FILES if (source / name).is_file()), None), source


def _read_data_file(file: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Images of each split, and names of the classes."""
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not yaml: {error}") from error
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{file} is no data file of YOLO: it needs 'names' and 'train', 'val' or 'test'")
    names = content["names"]
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{file}: 'names' must be a list, or number the classes from 0 on")
    # `path` may be of another machine; what lies beside the file is meant then.
    root = file.parent / str(content.get("path") or "")
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    splits = {}
    for name, value in content.items():
        if canonical_split(str(name)) in ("train", "validation", "test") and value:
            places = value if isinstance(value, list) else [value]
            splits[canonical_split(name)] = [
                image for place in places for image in _images_at(str(place), roots, file)
            ]
    if not splits:
        raise ValueError(f"{file} names no images: it needs 'train', 'val' or 'test'")
    return splits, [str(name) for name in names]


def _images_at(place: str, roots: Sequence[Path], file: Path) -> list[Path]:
    """Images in a folder or in a list. Roboflow writes ../train/images for what lies in train/images."""
    candidates = [root / name for root in roots for name in (place, place.removeprefix("../"))]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise ValueError(f"{file} names {place}, which is not there: looked for {listing(candidates)}")
    if found.is_dir():
        return find_images(found)
    names = [line.strip() for line in found.read_text().splitlines() if line.strip()]
    images = [found.parent / name for name in names]
    images = [image if image.is_file() else roots[0] / name for image, name in zip(images, names)]
    missing = [image for image in images if not image.is_file()]
    if missing:
        raise ValueError(f"{found} lists {len(missing)} images that are not there: {listing(missing)}")
    return images


def _find_splits(root: Path) -> dict[str, list[Path]]:
    """Images of each split of a folder without a data file."""
    folders = {path.name: path / "images" for path in sorted(root.iterdir()) if path.name.lower() in CANONICAL}
    if (root / "images").is_dir():
        inner = [path for path in sorted((root / "images").iterdir()) if path.name.lower() in CANONICAL]
        folders = {path.name: path for path in inner if path.is_dir()} or {"train": root / "images"}
    splits = {name: find_images(folder) for name, folder in folders.items() if folder.is_dir()}
    if not any(splits.values()):
        raise ValueError(f"{root} holds no images/ and labels/ of YOLO; {describe_folder(root)}")
    return splits


def _read_classes(root: Path) -> list[str]:
    file = next((path for path in (root / CLASSES_FILE, root / "labels" / CLASSES_FILE) if path.is_file()), None)
    return [line.strip() for line in file.read_text().splitlines() if line.strip()] if file is not None else []


def _label_path(image: Path) -> Path:
    """Where the labels of an image stand: the last folder `images` of its path is `labels`; else beside it."""
    parts = list(image.parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            return (
                image.parents[len(parts) - 2 - index]
                .parent.joinpath("labels", *parts[index + 1 :])
                .with_suffix(".txt")
            )
    return image.with_suffix(".txt")


def _read_labels(path: Path) -> list[tuple[float, ...]]:
    """Class, x, y, width and height, in shares of the image, of each line; none where there is no file."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: str, place: str) -> tuple[float, ...]:
    try:
        category, *values = (float(word) for word in line.split())
    except ValueError:
        raise ValueError(f"{place}: {line!r} must be numbers: class, centre x, centre y, width, height") from None
    if not (category >= 0 and category.is_integer()):
        raise ValueError(f"{place}: the class {category:g} must be a number from 0 on")
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in values):
        raise ValueError(f"{place}: {line!r} must have coordinates of 0 to 1, in shares of the image's sides")
    if len(values) == 4:
        x, y, width, height = values
        return category, x - width / 2, y - height / 2, width, height
    if len(values) >= 6 and len(values) % 2 == 0:
        x, y = min(values[::2]), min(values[1::2])
        return category, x, y, max(values[::2]) - x, max(values[1::2]) - y
    raise ValueError(f"{place}: {line!r} must have a class and 4 numbers, or a class and the points of a polygon")


def _sizes(images: Sequence[Path], rows: Array) -> Array:
    """Width and height (n, 2) of the images at the given rows; infinity for others and for what cannot be read."""
    sizes = np.full((len(images), 2), np.inf)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = pool.map(lambda row: _read_size(images[row]), rows.tolist())
        for row, size in zip(rows, tqdm(found, desc="Reading sizes", total=len(rows), disable=len(rows) < 5000)):
            sizes[row] = size
    return sizes


def _read_size(image: Path) -> tuple[float, float]:
    """Width and height as the image is shown."""
    try:
        with image.open("rb") as file:
            data = file.read(HEADER_BYTES)
            header = _header(data) or _header(data + file.read())
    except OSError:
        header = None
    if header is None:
        return np.inf, np.inf  # the stream will name the image and pass it over
    is_turned = header.orientation >= 5
    return (header.height, header.width) if is_turned else (header.width, header.height)


def _header(data: bytes) -> Any:
    try:
        return read_header(data)
    except Exception:  # decoders raise anything for broken files
        return None
