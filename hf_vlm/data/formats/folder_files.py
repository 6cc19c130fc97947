"""The files of a folder: which are images, and which of these are masks or thumbnails of others."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_vlm.data.io.messages import summarise

__all__ = ["IMAGE_EXTENSIONS", "find_images", "find_masks", "is_image", "list_files"]

logger = logging.getLogger(__name__)

Parts = tuple[str, ...]  # of a path

IMAGE_EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# What archives, network drives and file managers put beside images, thumbnails among it.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
IMAGE_FOLDERS = frozenset(("image", "images", "img", "imgs", "jpegimages"))
DERIVED_FOLDERS = frozenset(
    (
        *("mask", "masks", "label", "labels", "annotation", "annotations", "annot", "gt", "groundtruth"),
        *("ground_truth", "segmentation", "segmentations", "segmentationclass", "segmentationobject"),
        *("thumb", "thumbs", "thumbnail", "thumbnails"),
    )
)
MAY_BE_CLASSES = frozenset(
    ("mask", "label", "annotation", "segmentation", "thumb", "thumbnail")
)  # of faces, of bottles
DERIVED_STEM = re.compile(r"(.+)[_-](?:mask|masks|seg|label|labels|gt|thumb|thumbnail)", re.IGNORECASE)


def is_image(name: str) -> bool:
    """Whether a file has the extension of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, sorted; hidden files and folders are left out."""
    return [path for path in list_files(folder) if is_image(path.name)]


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, but for hidden ones and those of the system.

    Links to folders are followed, except those that lead back to a folder above.
    """
    if not isinstance(folder, Path):  # a remote one, which lists all at once; its walk would ask for each file
        start = len(folder.path.rstrip("/")) + 1
        names = [name[start:] for name in folder.fs.find(folder.path)]
        shown = [name for name in names if not _is_hidden(name.split("/"))]
        return [folder / name for name in sorted(shown, key=lambda name: name.split("/"))]
    found, loops = [], []
    above = {str(folder): [os.path.realpath(folder)]}  # the folders that a walk went through, without links
    for parent, folders, files in os.walk(folder, followlinks=True):
        chain = above.pop(parent)
        kept = [name for name in folders if not _is_hidden([name])]
        folders[:] = []
        for name in kept:
            path = os.path.join(parent, name)
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(chain[-1], name)
            if any(f"{other}/".startswith(f"{real}/") for other in chain):
                loops.append(path)
            else:
                above[path] = [*chain, real]
                folders.append(name)
        found += [Path(parent, name) for name in files if not _is_hidden([name])]
    if loops:
        logger.warning("%s: links to folders above are not followed: %s", folder, summarise(sorted(loops)))
    return sorted(found)


def _is_hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith((".", *SYSTEM_FOLDERS)) for part in parts)


def find_masks(images: Iterable[Parts]) -> set[Parts]:
    """The images that are masks or thumbnails of others, by their paths below one folder.

    They are in a folder with such a name, as `masks`, beside one named `images` or one with the same names of files;
    or have such a name beside their image, as `1_mask.png` beside `1.jpg`.
    """
    images = list(images)
    stems: dict[Parts, set[str]] = {}  # of the images in a folder
    derived: set[Parts] = set()  # folders with such a name
    for parts in images:
        stems.setdefault(parts[:-1], set()).add(os.path.splitext(parts[-1])[0])
        derived |= {parts[: depth + 1] for depth, part in enumerate(parts[:-1]) if part.lower() in DERIVED_FOLDERS}
    if derived:
        above = {name[:-1] for name in derived}
        below: dict[Parts, set[str]] = {}  # stems anywhere below the folders beside
        for folder, names in stems.items():
            for depth in range(len(folder)):
                if folder[:depth] in above:
                    below.setdefault(folder[: depth + 1], set()).update(_base(name) for name in names)
        derived = {
            folder
            for folder in derived
            if any(
                other[:-1] == folder[:-1]
                and (
                    other[-1].lower() in IMAGE_FOLDERS
                    or (folder[-1].lower() not in MAY_BE_CLASSES and below[folder] <= names)
                )
                for other, names in below.items()
                if other[-1].lower() not in DERIVED_FOLDERS
            )
        }
    return {
        parts
        for parts in images
        if (derived and any(parts[: depth + 1] in derived for depth in range(len(parts) - 1)))
        or _is_derived(os.path.splitext(parts[-1])[0], stems[parts[:-1]])
    }


def _base(stem: str) -> str:
    """The name of the image that a name of a mask is of."""
    found = DERIVED_STEM.fullmatch(stem)
    return found[1] if found else stem


def _is_derived(stem: str, stems: set[str]) -> bool:
    base = _base(stem)
    return base != stem and base in stems
