"""Folders of images and of their masks, the class of each pixel, in files of the same names."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

import datasets
import pyarrow as pa

from hf_vlm.data.formats.folder_files import IMAGE_FOLDERS, find_images, list_files
from hf_vlm.data.formats.mask_classes import find_mask_classes
from hf_vlm.data.formats.metadata import is_metadata
from hf_vlm.data.formats.pairing import plain_name
from hf_vlm.data.formats.splits import canonical_split, choose_split, describe_folder, folder_split_of, group_by_split
from hf_vlm.data.io.files import read_lines
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source

__all__ = ["looks_like_mask_folder", "open_mask_folder"]

logger = logging.getLogger(__name__)

Key = tuple[str, ...]  # what the paths of an image and of its mask have in common

# Folders of masks, as masks/ and train_labels/, and what such names begin with is the folder of the images.
MASK_FOLDER = re.compile(
    r"(.*?)[_-]?(?:masks?|labels?|annot(?:ation)?s?|gt(?:fine|coarse)?|ground_?truth|segmentations?|segmentationclass)",
    re.IGNORECASE,
)
IMAGE_STEM = re.compile(r"(.+)_leftImg8bit")
# Endings of masks' names, the preferred ones of several masks of an image first.
MASK_ENDINGS = ("labelTrainIds", "labelIds", "mask", "masks", "seg", "label", "labels", "gt", "L")
MASK_STEM = re.compile(rf"(.+?)(?:_gtFine|_gtCoarse)?[_-]({'|'.join(MASK_ENDINGS)})", re.IGNORECASE)
OF_OTHER_THINGS = re.compile(r".+_gt(?:Fine|Coarse)_(?:color|instanceIds|instanceTrainIds)|SegmentationObject")
LISTS = ("ImageSets", "Segmentation")


def open_mask_folder(folder: Path, split: str, *, num_samples: int | None = None, object_masks: bool = True) -> Source:
    """Stream the images of a folder that have a mask, in the order of their paths.

    A mask has the path of its image with a folder `masks`, `labels`, `annotations`, `gt` or the like in place of
    `images`, or with such a word behind the name of a folder or of the file, as `train_labels/1.png` or `1_mask.png`;
    so have VOC (`JPEGImages`, `SegmentationClass`), Cityscapes (`leftImg8bit`, `gtFine`, `_labelIds`), ADE20K, and
    what CVAT exports. Splits are those of the lists in `ImageSets/Segmentation`, else folders named so at any depth;
    without them all is `train`. A file names the classes (see `name_mask_classes`).

    Raises:
        ValueError: No image has a mask, or there is no such split.
    """
    pairs, unpaired = _pair(folder)
    if not pairs:
        raise ValueError(f"{folder}: no image has a mask of its name in a folder as masks/; {describe_folder(folder)}")
    images = choose_split(_splits(list(pairs), folder), split, folder)[:num_samples]
    if unpaired:
        logger.warning(
            "%s: %d images without a mask, or masks without an image, are left out: %s",
            folder,
            len(unpaired),
            summarise(path.relative_to(folder) for path in unpaired),
        )
    features = datasets.Features(
        {"image": image_feature(), "image_id": datasets.Value("int64"), "mask": image_feature()}
    )
    columns = {
        "image": [{"bytes": None, "path": str(path)} for path in images],
        "image_id": list(range(len(images))),
        "mask": [{"bytes": None, "path": str(pairs[path])} for path in images],
    }
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return Source(dataset=indexed_stream(TableReader(table), len(table), features), num_examples=len(table))


def looks_like_mask_folder(folder: Path) -> bool:
    """Whether a folder holds images with masks, a file that names their classes, and no metadata of the images."""
    if find_mask_classes(folder) is None or any(map(is_metadata, list_files(folder))):
        return False
    return bool(_pair(folder)[0])


def _pair(folder: Path) -> tuple[dict[Path, Path], list[Path]]:
    """The mask of each image, and the images and masks that are alone."""
    masks: dict[Key, list[tuple[int, Path]]] = {}  # with their preference
    images: dict[Key, list[Path]] = {}
    paths = [path for path in find_images(folder) if not _is_of_other_things(path.relative_to(folder))]
    keys = {path: _key(path.relative_to(folder)) for path in paths}
    plain = {key for key, preference in keys.values() if preference is None}
    for path, (key, preference) in keys.items():
        if preference is not None and key in plain:
            masks.setdefault(key, []).append((preference, path))
        else:
            images.setdefault(key, []).append(path)
    pairs = {images[key][0]: min(found)[1] for key, found in masks.items() if len(images[key]) == 1}
    alone = [path for key, found in images.items() if key not in masks or len(found) > 1 for path in found]
    return dict(sorted(pairs.items())), sorted(alone)


def _is_of_other_things(path: PurePath) -> bool:
    return any(OF_OTHER_THINGS.fullmatch(part) for part in (*path.parts[:-1], path.stem))


def _key(path: PurePath) -> tuple[Key, int | None]:
    """What the path of an image or a mask has in common with the other; for a mask also how much it is preferred."""
    stem, folders, preference = path.stem, [], None
    for name in path.parts[:-1]:
        found = MASK_FOLDER.fullmatch(name)
        if found:
            preference = len(MASK_ENDINGS)
        base = plain_name(found[1] if found else name)
        if base and base not in IMAGE_FOLDERS and base != "leftimg8bit":
            folders.append(base)
    if found := MASK_STEM.fullmatch(stem):
        endings = [ending.lower() for ending in MASK_ENDINGS]
        stem, preference = found[1], endings.index(found[2].lower())
    elif found := IMAGE_STEM.fullmatch(stem):
        stem = found[1]
    return (*folders, plain_name(stem)), preference


def _splits(images: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The images of each split, by lists or by folders."""
    lists = sorted(folder.joinpath(*LISTS).glob("*.txt"))
    if not lists:
        return group_by_split(images, folder, folder_split_of)
    by_name = {plain_name(path.stem): path for path in images}
    splits: dict[str, list[Path]] = {}
    for file in lists:
        split = "train" if len(lists) == 1 and file.stem == "default" else canonical_split(file.stem)  # CVAT's
        names = [plain_name(PurePath(line).name) for line in read_lines(file) if line]
        splits[split] = list(_listed(names, by_name))
        if missing := [name for name in names if name not in by_name]:
            logger.warning("%s: %d images with a mask are missing: %s", file, len(missing), summarise(missing))
    return splits


def _listed(names: Iterable[str], by_name: dict[str, Path]) -> Iterable[Path]:
    return (by_name[name] for name in names if name in by_name)
