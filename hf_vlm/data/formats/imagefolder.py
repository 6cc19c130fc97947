"""Folders of images, with one subfolder per class or without classes."""

import logging
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

from hf_vlm.data.formats.folder_files import IMAGE_EXTENSIONS, find_images, find_masks, is_image, list_files
from hf_vlm.data.formats.metadata import is_metadata, metadata_source
from hf_vlm.data.formats.splits import CANONICAL, canonical_split, choose_split, describe_folder
from hf_vlm.data.io.indexed import TableReader, indexed_stream
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source

__all__ = ["IMAGE_EXTENSIONS", "find_images", "open_imagefolder"]

logger = logging.getLogger(__name__)

MAX_STRAY_FRACTION = 0.1  # of the images, that may lie in no folder of a class
NO_ANNOTATIONS = ("readme", "license", "licence", "thumbs.db", "desktop.ini")  # beginnings of names


def open_imagefolder(folder: Path, split: str, *, num_samples: int | None = None, object_masks: bool = True) -> Source:
    """Stream the images of a folder, in the order of their paths.

    Subfolders named as splits (`train`, `val`, `valid`, `validation`, `test`) are splits; without them all is `train`.
    Where images lie in several subfolders, one level deep, these are the classes, those of all splits together; a few
    images elsewhere are left out. Other layouts have no label; nor has a split whose images lie in no subfolder, as
    those of a test split do whose labels are hidden. Masks and thumbnails beside the images are left out (see
    `find_masks`).

    A `metadata.jsonl`, `metadata.csv`, `metadata.parquet` or `_annotations.csv` in the folder or in any below replaces
    the subfolders: a row has `file_name`, relative to the metadata, and columns such as `label`, a number or a name,
    or `objects` {bbox, categories}, or `text`, its captions; `mask_file_name` names a mask. Images without a row
    are left out.

    Raises:
        ValueError: The folder holds no images, the split is not there, or metadata make no sense.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.lower() in CANONICAL and path.is_dir():
            splits.setdefault(canonical_split(path.name), []).append(path)
    roots = [root for several in splits.values() for root in several]
    layouts = {name: _layout(several) for name, several in (splits or {"train": [folder]}).items()}
    images = {
        name: {path: parts for path, parts in layout.items() if is_image(path.name)}
        for name, layout in layouts.items()
    }
    images = {name: paths for name, paths in images.items() if paths}
    if not images:
        raise ValueError(
            f"{folder} holds no images: looked in all its folders for {' '.join(sorted(IMAGE_EXTENSIONS))}; "
            f"{describe_folder(folder)}"
        )
    chosen = choose_split(images, split, folder)
    beside = [path for path in folder.iterdir() if path.is_file()] if roots else []
    files = (path for paths in (beside, *layouts.values()) for path in paths)
    metadata = sorted(path for path in files if is_metadata(path))
    _warn_of_others(folder, roots, choose_split(layouts, split, folder).keys() - chosen.keys() - {*metadata})
    if metadata:
        everything = {str(path) for path in find_images(folder)}
        inside = choose_split(splits or {"train": [folder]}, split, folder)
        return metadata_source(
            metadata, everything, list(chosen), inside, folder, num_samples=num_samples, object_masks=object_masks
        )
    labelled = {name: _without_masks(layout) for name, layout in images.items()}
    masks = sorted(chosen.keys() - choose_split(labelled, split, folder).keys())
    if masks:
        logger.warning(
            "%s: %d of %d images are masks or thumbnails beside their images, by their names, and are left out: %s",
            folder,
            len(masks),
            len(chosen),
            summarise("/".join(chosen[path]) for path in masks),
        )
    return _labelled(labelled, split, folder, num_samples)


Layout = dict[Path, tuple[str, ...]]  # of files: the parts of their path below the folder of the split


def _layout(roots: Sequence[Path]) -> Layout:
    return {path: path.relative_to(root).parts for root in roots for path in list_files(root)}


def _without_masks(images: Layout) -> Layout:
    masks = find_masks(images.values())
    return {path: parts for path, parts in images.items() if parts not in masks}


def _labelled(layouts: Mapping[str, Layout], split: str, folder: Path, num_samples: int | None) -> Source:
    """The images of a split, with the class that the folders of all splits give them."""
    layout, names = choose_split(layouts, split, folder), _class_names(layouts, folder)
    if names and _is_flat(layout):
        logger.warning("%s: the images of split %r lie in no folder of a class; they have no label", folder, split)
        names = []
    chosen = [path for path, parts in layout.items() if not names or len(parts) == 2]
    strays = [path for path in layout if names and len(layout[path]) != 2]
    if strays:
        logger.warning(
            "%s: %d of %d images do not lie in a folder of a class and are left out: %s",
            folder,
            len(strays),
            len(layout),
            summarise(strays),
        )
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
        columns["label"] = features["label"].str2int([_class_of(layout[path]) for path in paths])
    table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
    return Source(dataset=indexed_stream(TableReader(table), len(table), features), num_examples=len(table))


def _class_names(layouts: Mapping[str, Layout], folder: Path) -> list[str]:
    """Names of the classes of all splits; empty where the folders are no classes."""
    depths = [parts for layout in layouts.values() if not _is_flat(layout) for parts in layout.values()]
    names = sorted({_class_of(parts) for parts in depths if len(parts) == 2})
    strays = [parts for parts in depths if len(parts) != 2]
    if len(names) > 1 and len(strays) > MAX_STRAY_FRACTION * len(depths):
        logger.warning(
            "%s: images have no label: %s would be classes, but %d of %d images do not lie in such a folder: %s",
            folder,
            summarise(names),
            len(strays),
            len(depths),
            summarise("/".join(parts) for parts in strays),
        )
        return []
    return names if len(names) > 1 else []


def _class_of(parts: tuple[str, ...]) -> str:
    return unicodedata.normalize("NFC", parts[0])  # one name may be stored in two forms


def _is_flat(layout: Layout) -> bool:
    return all(len(parts) == 1 for parts in layout.values())


def _warn_of_others(folder: Path, roots: Sequence[Path], others: Collection[Path]) -> None:
    """Name what is not read: images outside the splits, and files that are no images."""
    beside = [path for path in sorted(folder.iterdir()) if path not in roots] if roots else []
    ignored = [path.name for path in beside if (find_images(path) if path.is_dir() else is_image(path.name))]
    if ignored:
        names = summarise(root.name for root in roots)
        logger.warning("%s has the splits %s; images in %s are ignored", folder, names, summarise(ignored))
    unread = sorted(path for path in others if not path.name.lower().startswith(NO_ANNOTATIONS))
    if unread:
        suffixes = Counter(path.suffix.lower() or path.name for path in unread)
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(5))
        logger.warning(
            "%s: %s not read, %s: %s",
            folder,
            "1 file is no image and is" if len(unread) == 1 else f"{len(unread)} files are no images and are",
            kinds,
            summarise(path.name for path in unread),
        )
