"""Folders of images, with one subfolder per class or without classes."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from hf_vlm.data.formats.metadata import find_metadata, metadata_source
from hf_vlm.data.formats.splits import CANONICAL, choose_split, describe_folder
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source

__all__ = ["IMAGE_EXTENSIONS", "find_images", "open_imagefolder"]

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def open_imagefolder(folder: Path, split: str, *, num_samples: int | None = None) -> Source:
    """Stream the images of a folder, in the order of their paths.

    Subfolders named as splits (`train`, `val`, `valid`, `validation`, `test`) are splits; without them all is `train`.
    Where every image lies in a subfolder one level deep and there are several of these, they are the classes, those of
    all splits together. Other layouts have no label; nor has a split whose images lie in no subfolder, as those of a
    test split do whose labels are hidden.

    A `metadata.jsonl` or `metadata.csv` in the folder or in those of the splits replaces the subfolders: a row
    has `file_name`, relative to the metadata, and columns such as `label`, a number or a name, or
    `objects` {bbox, categories}; `mask_file_name` names a mask. Images without a row are left out.

    Raises:
        ValueError: The folder holds no images, the split is not there, or metadata make no sense.
    """
    roots = {path.name: path for path in sorted(folder.iterdir()) if path.name.lower() in CANONICAL and path.is_dir()}
    images = {name: find_images(root) for name, root in (roots or {"train": folder}).items()}
    images = {name: paths for name, paths in images.items() if paths}
    if not images:
        raise ValueError(
            f"{folder} holds no images: looked in all its folders for {' '.join(sorted(IMAGE_EXTENSIONS))}; "
            f"{describe_folder(folder)}"
        )
    if roots:
        _warn_of_others(folder, roots)
    chosen = choose_split(images, split, folder)
    metadata = find_metadata([folder, *roots.values()])
    if metadata:
        everything = {str(path) for path in find_images(folder)}
        return metadata_source(
            metadata,
            everything,
            chosen,
            choose_split(roots or {"train": folder}, split, folder),
            folder,
            num_samples=num_samples,
        )
    layouts = {name: [path.relative_to(roots.get(name, folder)) for path in paths] for name, paths in images.items()}
    names = _class_names(layouts)
    if names and _is_flat(choose_split(layouts, split, folder)):
        logger.warning("%s: the images of split %r lie in no folder of a class; they have no label", folder, split)
        names = []
    paths = chosen[:num_samples]
    if names and num_samples is not None:  # sorted by class: the first ones would be of one class
        paths = [chosen[index * len(chosen) // len(paths)] for index in range(len(paths))]
    features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
    columns = {
        "image": [{"bytes": None, "path": str(path)} for path in paths],
        "image_id": list(range(len(paths))),
    }
    if names:
        features["label"] = datasets.ClassLabel(names=names)
        columns["label"] = features["label"].str2int([path.parent.name for path in paths])
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return Source(dataset=indexed_stream(TableReader(table), len(table), features), num_examples=len(table))


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted; hidden files and folders are left out."""
    if not isinstance(folder, Path):  # a remote one, which lists all at once; its walk would ask for each file
        start = len(folder.path.rstrip("/")) + 1
        names = [name[start:] for name in folder.fs.find(folder.path)]
        names = [name for name in names if _is_image(name) and not _is_hidden(name)]
        return [folder / name for name in sorted(names, key=lambda name: name.split("/"))]
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [Path(parent, name) for name in files if _is_image(name) and not _is_hidden(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def _class_names(layouts: Mapping[str, Sequence[Path]]) -> list[str]:
    """Names of the classes, given the paths in each split; empty where the folders are no classes."""
    paths = [path for layout in layouts.values() if not _is_flat(layout) for path in layout]
    names = sorted({path.parts[0] for path in paths})
    return names if len(names) > 1 and all(len(path.parts) == 2 for path in paths) else []


def _is_flat(layout: Sequence[Path]) -> bool:
    return all(len(path.parts) == 1 for path in layout)


def _warn_of_others(folder: Path, roots: Mapping[str, Path]) -> None:
    others = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in roots]
    ignored = [path.name for path in others if find_images(path)]
    if ignored:
        logger.warning("%s has the splits %s; images in %s are ignored", folder, summarise(roots), summarise(ignored))
