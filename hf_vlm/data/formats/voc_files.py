"""Which xml files a data set of Pascal VOC holds, their splits, and the image of each."""

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath

from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, find_images
from hf_vlm.data.formats.pairing import path_parts, plain_name
from hf_vlm.data.formats.splits import CANONICAL, canonical_split, describe_folder, folder_split_of, group_by_split
from hf_vlm.data.io.files import read_bytes, read_lines
from hf_vlm.data.io.messages import summarise

__all__ = ["find_splits", "looks_like_voc", "pair_images"]

logger = logging.getLogger(__name__)

ANNOTATIONS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "Data")
SUFFIXES = IMAGE_EXTENSIONS | {".xml"}
FLAGS = ("-1", "0", "1")  # whether an image shows a class, behind its name in a list
Index = Mapping[str, list[Path]]
NUM_TRIED = 20  # xml files by which a folder is recognised


def looks_like_voc(folder: Path) -> bool:
    """Whether a folder holds xml files where `find_splits` looks for them: in `Annotations`, or beside an image."""
    tried = 0
    for path in folder.rglob("*.xml"):
        if _annotations_of(path, folder) is not None or _has_image_beside(path):
            tried += 1
            if _is_annotation(path):
                return True
            if tried == NUM_TRIED:
                break
    return False


def _has_image_beside(path: Path) -> bool:
    return any(path.with_suffix(suffix).is_file() for suffix in (".jpg", ".png", ".jpeg", ".JPG", *IMAGE_EXTENSIONS))


def _is_annotation(path: Path) -> bool:
    return b"<annotation" in read_bytes(path)[: 2**16].replace(b"\0", b"")  # of any encoding


def _annotations_of(path: Path, source: Path) -> Path | None:
    """The folder `Annotations` that a file lies in."""
    parts = path.relative_to(source).parts[:-1]
    index = next((index for index, part in enumerate(parts) if part in ANNOTATIONS), None)
    return None if index is None else source.joinpath(*parts[: index + 1])


def find_splits(source: Path) -> dict[str, list[Path]]:
    """The xml files of each split: of the lists in `ImageSets/Main`, else by folders `train`, `val` and so on.

    Raises:
        ValueError: There are none.
    """
    files = sorted(path for path in source.rglob("*.xml") if not path.name.startswith("."))
    if not files:
        raise ValueError(f"{source} holds no xml files of Pascal VOC; {describe_folder(source)}")
    bases = defaultdict(list)
    for file in files:
        bases[_annotations_of(file, source)].append(file)
    splits: dict[str, list[Path]] = {}
    without_list: list[Path] = []
    for base, there in bases.items():
        folder = (source if base is None else base.parent) / "ImageSets" / "Main"
        lists = [path for path in sorted(folder.glob("*.txt")) if not _is_of_class(path)]
        if lists:
            _read_lists(lists, _index(there, base or source), splits)
        else:
            without_list += there
    if without_list:
        for split, members in group_by_split(without_list, source, folder_split_of).items():
            splits.setdefault(split, []).extend(members)
    return splits


def _is_of_class(path: Path) -> bool:
    """Whether a list is of the images of one class, as car_train.txt."""
    _, separator, split = path.stem.rpartition("_")
    return bool(separator) and split in (*CANONICAL, "trainval")


def _read_lists(lists: Sequence[Path], index: Index, splits: dict[str, list[Path]]) -> None:
    """Add the xml files that lists name to their splits."""
    listed: set[Path] = set()
    for path in lists:
        names = [line for line in read_lines(path) if line]
        found = [_find_listed(name, index) for name in names]
        members = [file for file in found if file is not None]
        if not members:  # test sets come without annotations
            continue
        split = "train" if len(lists) == 1 and path.stem == "default" else canonical_split(path.stem)  # CVAT's
        splits.setdefault(split, []).extend(members)
        listed |= set(members)
        missing = [name for name, file in zip(names, found) if file is None]
        if missing:
            logger.warning(
                "%s lists %d images without an xml file, which are left out: %s",
                path,
                len(missing),
                summarise(missing),
            )
    folder = lists[0].parent
    if not listed:
        raise ValueError(f"{folder} lists no image that has an xml file, in {summarise(path.name for path in lists)}")
    unlisted = sorted({file for files in index.values() for file in files} - listed)
    if unlisted:
        logger.warning(
            "%s: %d xml files are in none of its lists and not used: %s",
            folder,
            len(unlisted),
            summarise(file.name for file in unlisted),
        )


def _index(files: Sequence[Path], folder: Path) -> Index:
    """Files by their path in a folder without its suffix, and below that by their name alone, behind a slash."""
    index = defaultdict(list)
    for file in files:
        relative = plain_name(file.relative_to(folder).with_suffix("").as_posix())
        index[relative].append(file)
        index[f"/{PurePath(relative).name}"].append(file)
    return index


def _find_listed(line: str, index: Index) -> Path | None:
    """The xml file that a line of a list names, by a name or a path of any length, also with a flag."""
    name, _, flag = line.rpartition(" ")
    for text in (line, name.strip()) if flag in FLAGS else (line,):
        parts = path_parts(text)
        if parts and PurePath(parts[-1]).suffix.lower() in SUFFIXES:
            parts[-1] = parts[-1].rpartition(".")[0]
        for key in ["/".join(parts[start:]) for start in range(len(parts))] + [f"/{part}" for part in parts[-1:]]:
            found = index.get(plain_name(key), [])
            if len(found) == 1:
                return found[0]
    return None


def pair_images(names: Mapping[Path, str], files: Sequence[Path], source: Path) -> list[Path]:
    """The image of each of some xml files; where it is missing, where it should be.

    It has the path of the xml file, in a folder of images beside `Annotations` or in that of the xml file; else the
    name that the xml file gives, or its own in another folder, if that is only one.

    Args:
        names: File name of the image that each xml file of all splits gives; empty where it gives none.
        files: The xml files of the split.
        source: Folder of the data set.

    Raises:
        ValueError: An xml file may belong to several images, or no image is there.
    """
    bases = {file: _annotations_of(file, source) or file.parent for file in names}
    folders = {base: _image_folders(base) for base in set(bases.values())}
    indices = {folder: _index(find_images(folder), folder) for found in folders.values() for folder in found}

    def candidates(file: Path, key: str, taken: Collection[Path]) -> list[Path]:
        found = (
            [path for path in indices[folder].get(key, []) if path not in taken] for folder in folders[bases[file]]
        )
        return next((paths for paths in found if paths), [])

    pairs: dict[Path, list[Path]] = {}  # the candidates of each xml file
    for file, name in names.items():
        found = candidates(file, plain_name(file.relative_to(bases[file]).with_suffix("").as_posix()), ())
        named = [path for path in found if plain_name(path.name) == plain_name(name)]
        pairs[file] = named if len(named) == 1 else found
    taken = {path for found in pairs.values() for path in found}
    for file, name in names.items():
        if not pairs[file]:
            keys = [f"/{plain_name(PurePath(text).stem)}" for text in (*path_parts(name)[-1:], file.name)]
            pairs[file] = next((found for found in (candidates(file, key, taken) for key in keys) if found), [])
    _warn_of_unused(indices, pairs, source)
    _check_ambiguous(pairs, files, source)
    missing = [file for file in files if not pairs[file]]
    if len(missing) == len(files):
        raise ValueError(f"{source}: {len(missing)} of {len(files)} xml files have no image: {summarise(missing)}")
    if missing:
        logger.warning(
            "%s: %d of %d xml files have no image: %s; they count as images that cannot be read",
            source,
            len(missing),
            len(files),
            summarise(missing),
        )
    expected = {
        file: folders[bases[file]][0] / (path_parts(names[file]) or [f"{file.stem}.jpg"])[-1] for file in missing
    }
    return [pairs[file][0] if pairs[file] else expected[file] for file in files]


def _image_folders(base: Path) -> list[Path]:
    """Where the images of the xml files of a folder may be, the likeliest first."""
    parent = base.parent if base.name in ANNOTATIONS else base
    beside = [parent / name for name in IMAGE_FOLDERS if (parent / name).is_dir()]
    if base.name in ANNOTATIONS:
        return beside or [base, parent]  # masks may be in other folders
    return [base, *beside]


def _check_ambiguous(pairs: Mapping[Path, list[Path]], files: Sequence[Path], source: Path) -> None:
    xmls = defaultdict(list)
    for file, found in pairs.items():
        for path in found:
            xmls[path].append(file)
    chosen = set(files)
    several = [f"{file} of {summarise(pairs[file])}" for file in files if len(pairs[file]) > 1]
    several += [
        f"{path} of {summarise(found)}" for path, found in xmls.items() if len(found) > 1 and chosen & set(found)
    ]
    if several:
        raise ValueError(
            f"{source}: it is not clear which image {len(several)} xml files belong to: {summarise(several)}; give "
            "both the same path in Annotations and in the folder of the images"
        )


def _warn_of_unused(indices: Mapping[Path, Index], pairs: Mapping[Path, list[Path]], source: Path) -> None:
    used = {path for found in pairs.values() for path in found}
    images = {path for index in indices.values() for found in index.values() for path in found}
    unused = sorted(images - used)
    if unused:
        logger.warning(
            "%s: %d images without an xml file of a split are left out: %s",
            source,
            len(unused),
            summarise(path.relative_to(source) for path in unused),
        )
