"""Pascal VOC: an xml file an image."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from tqdm.auto import tqdm

from hf_vlm.data.boxed_images import Boxes, labelled_stream
from hf_vlm.data.imagefolder import find_images
from hf_vlm.data.splits import canonical_split, choose_split, describe_folder, group_by_split, listing

__all__ = ["looks_like_voc", "open_voc"]

ANNOTATIONS = "Annotations"
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """An object of an xml file."""

    name: str
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    is_difficult: bool


class VocImage(NamedTuple):
    """What an xml file says."""

    size: tuple[float, float]  # width, height; infinity where it does not say
    objects: list[VocObject]


def open_voc(source: Path, split: str, *, num_samples: int | None = None) -> datasets.IterableDataset:
    """Stream the images and boxes of Pascal VOC annotations, in the order of their names.

    Layouts: `Annotations/*.xml` beside `JPEGImages` or `images`, with the splits in `ImageSets/Main/<split>.txt`, also
    in a folder `VOC20xx` or several of them; or xml files beside their images, in a folder a split or in one for all.
    Corners are pixels counted from 1 and belong to the box: x = xmin - 1, width = xmax - xmin + 1. Objects marked as
    difficult have `iscrowd` 1: evaluation ignores them. Classes are in alphabetical order, those of all splits.

    Raises:
        ValueError: There are no xml files or no such split; or a file cannot be read, lacks its image, or has a box
            that is not four numbers.
    """
    splits = _find_splits(source)
    files = choose_split(splits, split, source)
    every = sorted({file for group in splits.values() for file in group})
    parsed = {file: _parse(file) for file in tqdm(every, desc="Reading xml", disable=len(every) < 5000)}
    names = sorted({item.name for image in parsed.values() for item in image.objects})
    paths = _find_images(files, source)[:num_samples]
    found = [(row, file, item) for row, file in enumerate(files) for item in parsed[file].objects]
    boxes = Boxes(
        class_names=names,
        rows=np.array([row for row, _, _ in found], dtype=np.int64),
        boxes=np.array([item.box for _, _, item in found], dtype=np.float64).reshape(-1, 4),
        categories=np.array([names.index(item.name) for _, _, item in found], dtype=np.int64),
        sizes=np.array([parsed[file].size for _, file, _ in found], dtype=np.float64).reshape(-1, 2),
        name_of=lambda index: f"{found[index][2].name} of {found[index][1].name}",
        crowds=np.array([item.is_difficult for _, _, item in found]),
    )
    return labelled_stream(paths, range(len(paths)), boxes if names else None, source)


def looks_like_voc(folder: Path) -> bool:
    """Whether a folder holds xml files where `open_voc` looks for them."""
    roots = [folder, *_years(folder)]
    return any((root / ANNOTATIONS).is_dir() for root in roots) or any(
        next(folder.glob(pattern), None) for pattern in ("*.xml", "*/*.xml")
    )


def _years(folder: Path) -> list[Path]:
    """Folders VOC2007, VOC2012 and so on, also within VOCdevkit."""
    return [path for path in sorted(folder.glob("**/VOC20*")) if (path / ANNOTATIONS).is_dir()]


def _find_splits(source: Path) -> dict[str, list[Path]]:
    """The xml files of each split."""
    roots = [source] if (source / ANNOTATIONS).is_dir() else _years(source)
    if not roots:
        files = sorted(path for path in source.rglob("*.xml") if not path.name.startswith("."))
        if not files:
            raise ValueError(f"{source} holds no xml files of Pascal VOC; {describe_folder(source)}")
        return group_by_split(files, source)
    splits: dict[str, list[Path]] = {}
    for root in roots:
        # Files such as car_train.txt list the images of one class.
        lists = [path for path in sorted((root / "ImageSets" / "Main").glob("*.txt")) if "_" not in path.stem]
        for path in lists:
            names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            files = [root / ANNOTATIONS / f"{name}.xml" for name in names]
            missing = sorted(set(files) - set((root / ANNOTATIONS).glob("*.xml")))
            # Test sets come without annotations.
            if files and len(missing) < len(files):
                if missing:
                    raise ValueError(f"{path} lists {len(missing)} images without annotations: {listing(missing)}")
                splits.setdefault(canonical_split(path.stem), []).extend(files)
        if not lists:
            splits.setdefault("train", []).extend(sorted((root / ANNOTATIONS).glob("*.xml")))
    return splits


def _find_images(files: list[Path], source: Path) -> list[Path]:
    """The image of each xml file: of the same name, beside it or in a folder of images beside its folder."""
    folders: dict[Path, dict[str, Path]] = {}
    images, missing = [], []
    for file in files:
        if file.parent not in folders:
            beside = [file.parent.parent / name for name in IMAGE_FOLDERS] if file.parent.name == ANNOTATIONS else []
            places = [place for place in beside if place.is_dir()] or [file.parent]
            folders[file.parent] = {path.stem: path for place in places for path in find_images(place)}
        image = folders[file.parent].get(file.stem)
        if image is None:
            missing.append(file)
        else:
            images.append(image)
    if missing:
        raise ValueError(f"{source}: {len(missing)} of {len(files)} xml files have no image: {listing(missing)}")
    return images


def _parse(file: Path) -> VocImage:
    try:
        content = file.read_bytes()
        if re.search(rb"<!(DOCTYPE|ENTITY)", content):
            raise ValueError("it declares a DOCTYPE, which annotations have no need of")
        root = ET.fromstring(content)
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        width, height = (float(root.findtext(f"size/{side}") or "inf") for side in ("width", "height"))
        # Zero is what tools write that do not know the size.
        return VocImage((width or np.inf, height or np.inf), [_parse_object(item) for item in root.iter("object")])
    except (ET.ParseError, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an annotation of Pascal VOC: {error}") from error


def _parse_object(item: ET.Element) -> VocObject:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    texts = [item.findtext(f"bndbox/{corner}") for corner in CORNERS]
    try:
        left, top, right, bottom = (float(text or "") for text in texts)
    except ValueError:
        raise ValueError(f"the bndbox of {name} needs {', '.join(CORNERS)}, has {texts}") from None
    is_difficult = (item.findtext("difficult") or "0").strip() == "1"
    return VocObject(name, (left - 1, top - 1, right - left + 1, bottom - top + 1), is_difficult)
