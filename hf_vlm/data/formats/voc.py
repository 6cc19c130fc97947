"""Pascal VOC: one xml file per image."""

import logging
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_vlm.data.formats.annotations import OBJECT_FIELDS, normalise_objects
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, find_images
from hf_vlm.data.formats.splits import CANONICAL, canonical_split, choose_split, describe_folder, group_by_split
from hf_vlm.data.io.files import map_files, read_bytes
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.source import Source

__all__ = ["looks_like_voc", "open_voc"]

logger = logging.getLogger(__name__)

ANNOTATIONS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """An object of an xml file."""

    name: str
    box: tuple[float, float, float, float]  # x, y, width, height in pixels
    is_difficult: bool


class VocImage(NamedTuple):
    """The content of an xml file."""

    size: tuple[float, float]  # width, height; infinity where it is not given
    objects: list[VocObject]


def open_voc(source: Path, split: str, *, num_samples: int | None = None) -> Source:
    """Stream the images and boxes of Pascal VOC annotations, in the order of their names.

    Layouts: `Annotations/*.xml` beside `JPEGImages` or `images`, with the splits in `ImageSets/Main/<split>.txt`, also
    in a folder `VOC20xx` or several of them; or xml files beside their images, in one folder per split or one for all.
    Corners are pixels counted from 1 and belong to the box: x = xmin - 1, width = xmax - xmin + 1. Objects marked as
    difficult have `iscrowd` 1: evaluation ignores them. Classes are in alphabetical order, those of all splits.

    So difficult objects are neither trained on nor counted as errors. Images without an xml file are left out.

    Raises:
        ValueError: There are no xml files or no such split; or a file cannot be read, lacks its image, or has a box
            that is not four numbers.
    """
    splits = _find_splits(source)
    files = choose_split(splits, split, source)
    every = sorted({file for group in splits.values() for file in group})
    parsed = _parse_all(every, source)
    names = sorted({item.name for image in parsed.values() for item in image.objects})
    paths = _find_images(files, every, source)[:num_samples]
    found = [(row, file, item) for row, file in enumerate(files) for item in parsed[file].objects]
    index_of = {name: index for index, name in enumerate(names)}
    stored = [
        {"bbox": item.box, "category": index_of[item.name], "iscrowd": item.is_difficult} for _, _, item in found
    ]
    boxes = BoxedImages(
        class_names=names,
        objects=normalise_objects(stored, OBJECT_FIELDS, source),
        rows=np.array([row for row, _, _ in found], dtype=np.int64),
        sizes=np.array([parsed[file].size for file in files], dtype=np.float64).reshape(-1, 2),
        name_of=lambda index: f"{found[index][2].name} of {found[index][1].name}",
    )
    return boxed_images_source(paths, range(len(paths)), boxes if names else None, source)


def looks_like_voc(folder: Path) -> bool:
    """Whether a folder holds xml files where `open_voc` looks for them."""
    roots = [folder, *_years(folder)]
    if any(next(annotations.glob("*.xml"), None) for annotations in map(_annotations, roots) if annotations):
        return True
    splits = [path for path in folder.iterdir() if path.name.lower() in CANONICAL and path.is_dir()]
    for parent in (folder, *splits):  # files that lie beside an image of their name
        xmls = {path.stem for path in parent.glob("*.xml")}
        if xmls and any(path.stem in xmls for path in parent.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS):
            return True
    return False


def _annotations(root: Path) -> Path | None:
    return next((root / name for name in ANNOTATIONS if (root / name).is_dir()), None)


def _years(folder: Path) -> list[Path]:
    """Folders VOC2007, VOC2012 and so on, also within VOCdevkit."""
    found = [path for pattern in ("VOC20*", "VOC*/VOC20*", "*/VOCdevkit/VOC20*") for path in folder.glob(pattern)]
    return [path for path in sorted(found) if _annotations(path)]


def _find_splits(source: Path) -> dict[str, list[Path]]:
    """The xml files of each split."""
    roots = [source] if _annotations(source) else _years(source)
    if not roots:
        files = sorted(path for path in source.rglob("*.xml") if not path.name.startswith("."))
        if not files:
            raise ValueError(f"{source} holds no xml files of Pascal VOC; {describe_folder(source)}")
        return group_by_split(files, source)
    splits: dict[str, list[Path]] = {}
    for root in roots:
        annotations = _annotations(root) or root
        there = sorted(annotations.glob("*.xml"))
        # Files such as car_train.txt list the images of one class.
        lists = [path for path in sorted((root / "ImageSets" / "Main").glob("*.txt")) if "_" not in path.stem]
        for path in lists:
            names = [line.split()[0] for line in read_bytes(path).decode().splitlines() if line.strip()]
            files = [annotations / f"{name}.xml" for name in names]
            missing = sorted(set(files) - set(there))
            # Test sets come without annotations.
            if files and len(missing) < len(files):
                if missing:
                    raise ValueError(f"{path} lists {len(missing)} images without annotations: {summarise(missing)}")
                splits.setdefault(canonical_split(path.stem), []).extend(files)
        if not lists:
            splits.setdefault("train", []).extend(there)
    return splits


def _find_images(files: list[Path], every: list[Path], source: Path) -> list[Path]:
    """The image of each xml file: of the same name, beside it or in a folder of images beside its folder."""
    folders: dict[Path, dict[str, Path]] = {}
    images, missing = [], []
    for file in files:
        if file.parent not in folders:
            beside = [file.parent.parent / name for name in IMAGE_FOLDERS] if file.parent.name in ANNOTATIONS else []
            parents = [folder for folder in beside if folder.is_dir()] or [file.parent]
            folders[file.parent] = {path.stem: path for folder in parents for path in find_images(folder)}
        image = folders[file.parent].get(file.stem)
        if image is None:
            missing.append(file)
        else:
            images.append(image)
    stems = {file.stem for file in every}
    left_out = [path.name for found in folders.values() for stem, path in found.items() if stem not in stems]
    if left_out:
        logger.warning(
            "%s: %d images without an xml file are left out: %s", source, len(left_out), summarise(left_out)
        )
    if missing:
        raise ValueError(f"{source}: {len(missing)} of {len(files)} xml files have no image: {summarise(missing)}")
    return images


class _Builder(ET.TreeBuilder):
    """Refuses what could declare entities, in any encoding."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which annotations have no need of")


def _parse_all(files: list[Path], source: Path) -> dict[Path, VocImage]:
    parsed = dict(zip(files, map_files(_try_parse, files, "Reading xml")))
    problems = [str(result) for result in parsed.values() if isinstance(result, ValueError)]
    if problems:
        raise ValueError(f"{source}: {len(problems)} of {len(files)} xml files make no sense: {summarise(problems)}")
    return {file: result for file, result in parsed.items() if isinstance(result, VocImage)}


def _try_parse(file: Path) -> VocImage | ValueError:
    try:
        return _parse(file)
    except (ET.ParseError, OSError, ValueError) as error:
        return ValueError(f"{file} cannot be read as an annotation of Pascal VOC: {error}")


def _parse(file: Path) -> VocImage:
    root = ET.fromstring(read_bytes(file), ET.XMLParser(target=_Builder()))
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>, not <annotation>")
    width, height = (float(root.findtext(f"size/{side}") or "inf") for side in ("width", "height"))
    # Zero is what tools write that do not know the size.
    return VocImage((width or np.inf, height or np.inf), [_parse_object(item) for item in root.iter("object")])


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
