"""Folders of images, with a subfolder a class or without classes."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from hf_vlm.data.indexed import TableReader, indexed_stream
from hf_vlm.data.schema import image_feature
from hf_vlm.data.splits import CANONICAL, choose_split, describe_folder, listing

__all__ = ["IMAGE_EXTENSIONS", "find_images", "open_imagefolder"]

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def open_imagefolder(folder: Path, split: str, *, num_samples: int | None = None) -> datasets.IterableDataset:
    """Stream the images of a folder, in the order of their paths.

    Subfolders named as splits (`train`, `val`, `valid`, `validation`, `test`) are splits; without them all is `train`.
    Where every image lies in a subfolder one level deep and there are several of these, they are the classes, those of
    all splits together. Other layouts have no label.

    Raises:
        ValueError: The folder holds no images, or the split is not there.
    """
    roots = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in CANONICAL}
    images = {name: find_images(root) for name, root in (roots or {"train": folder}).items()}
    images = {name: paths for name, paths in images.items() if paths}
    if not images:
        raise ValueError(
            f"{folder} holds no images: looked in all its folders for {' '.join(sorted(IMAGE_EXTENSIONS))}; "
            f"{describe_folder(folder)}"
        )
    if roots:
        _warn_of_others(folder, roots)
    paths = choose_split(images, split, folder)[:num_samples]
    features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
    columns = {
        "image": [{"bytes": None, "path": str(path)} for path in paths],
        "image_id": list(range(len(paths))),
    }
    names = _class_names([path.relative_to(roots.get(name, folder)) for name in images for path in images[name]])
    if names:
        features["label"] = datasets.ClassLabel(names=names)
        columns["label"] = features["label"].str2int([path.parent.name for path in paths])
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return indexed_stream(TableReader(table), len(table), features)


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted; hidden files and folders are left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [
            Path(parent, name)
            for name in files
            if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)


def _class_names(paths: Sequence[Path]) -> list[str]:
    """Names of the classes, given the paths relative to their split; empty where the folders are no classes."""
    names = sorted({path.parts[0] for path in paths})
    return names if len(names) > 1 and all(len(path.parts) == 2 for path in paths) else []


def _warn_of_others(folder: Path, roots: Mapping[str, Path]) -> None:
    others = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in roots]
    ignored = [path.name for path in others if find_images(path)]
    if ignored:
        logger.warning("%s has the splits %s; images in %s are ignored", folder, listing(roots), listing(ignored))
