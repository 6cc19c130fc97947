"""What describes a data set of YOLO: `data.yaml`, Darknet's `obj.data`, lists of images, names of classes."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_vlm.data.formats.imagefolder import IMAGE_EXTENSIONS, find_images
from hf_vlm.data.formats.pairing import locate_names, path_parts
from hf_vlm.data.formats.splits import CANONICAL, canonical_split, choose_split, describe_folder
from hf_vlm.data.formats.yolo_labels import holds_labels
from hf_vlm.data.io.files import can_list, exists, is_folder, read_bytes, read_lines
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.parsing import MAX_TEXT_BYTES, parse_yaml
from hf_vlm.data.io.trust import check_inside, is_inside

__all__ = ["Description", "describe", "find_data_file", "find_flat_folders"]

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")
IMAGE_FOLDERS = ("images", "Images")
CLASSES_FILES = ("classes.txt", "obj.names", "_darknet.labels")
NULLS = ("", "~", "null", "Null", "NULL")
MAX_CLASSES = 100_000
NUM_TRIED = 20  # files of labels by which a folder is recognised


@dataclass(frozen=True)
class Description:
    """Where the images of each split are, looked up for the split that is opened, and what their labels mean.

    Args:
        folders: Folders of images, or text files that list them, of each split.
        roots: What these are relative to, the likeliest first.
        named_by: The file or folder that says so, for messages.
        class_names: Names of the classes; empty where they are not given.
        num_keypoint_values: How many numbers follow the box of an object with keypoints; 0 without them.
    """

    folders: Mapping[str, Sequence[str]]
    roots: Sequence[Path]
    named_by: Path
    class_names: list[str]
    num_keypoint_values: int = 0

    def images(self, split: str, source: Path) -> tuple[list[Path], set[Path]]:
        """The images of a split, and which of them are listed and not there.

        Raises:
            ValueError: There is no such split, or nothing where it should be.
        """
        parts = [self._images_at(name) for name in choose_split(self.folders, split, source)]
        return [image for images, _ in parts for image in images], {image for _, missing in parts for image in missing}

    def _images_at(self, path: str) -> tuple[list[Path], list[Path]]:
        """Images in a folder or in a list."""
        candidates = list(dict.fromkeys(root / name for root in self.roots for name in (path, *_endings(path))))
        if not can_list(self.named_by) and not path.endswith(".txt"):
            raise ValueError(
                f"{self.named_by} names the folder {path}, which a web server cannot list; name a text file that "
                "lists the images"
            )
        there = [candidate for candidate in candidates if exists(candidate)]
        if not there:
            raise ValueError(f"{self.named_by} names {path}, which is not there: looked for {summarise(candidates)}")
        root = self.roots[-1]
        found = next((candidate for candidate in there if is_inside(str(candidate), str(root))), there[0])
        check_inside([found], root, self.named_by)
        if is_folder(found):
            return find_images(found), []
        listed = [name for name in read_lines(found) if name]
        if not listed:
            raise ValueError(f"{found} lists no images")
        located = locate_names(listed, list(dict.fromkeys([found.parent, *self.roots])), root, found)
        if located is None:
            raise ValueError(f"{found} lists {len(listed)} images that are not there: {summarise(listed)}")
        images, missing = located
        return images, [images[index] for index in missing]


def _endings(path: str) -> Iterator[str]:
    """A path without its first folders, which may be of another machine, but not without that of a split.

    Roboflow, too, writes ../train/images for what lies in train/images.
    """
    parts = path_parts(path)
    for index in range(len(parts)):
        yield "/".join(parts[index:])
        if parts[index].lower() in CANONICAL:
            return


def find_data_file(folder: Path) -> Path | None:
    """The file that describes a data set: one of a usual name, or the only yaml that names classes and images."""
    usual = next((folder / name for name in DATA_FILES if (folder / name).is_file()), None)
    if usual is not None:
        return usual
    others = [path for pattern in ("*.yaml", "*.yml") for path in sorted(folder.glob(pattern)) if _names_images(path)]
    return others[0] if len(others) == 1 else None


def _names_images(file: Path) -> bool:
    try:
        text = "\n".join(read_lines(file))
    except (OSError, ValueError):
        return False
    return all(re.search(pattern, text, re.MULTILINE) for pattern in (r"^names\s*:", r"^(train|val)\s*:"))


def describe(file: Path | None, folder: Path) -> Description:
    """The description that a file gives, or the layout of a folder where there is none.

    Raises:
        ValueError: The file makes no sense, or there are no images.
    """
    if file is None:
        return Description(_find_splits(folder), [folder], folder, _read_classes(folder))
    content = _parse_darknet(file) if file.suffix == ".data" else _parse_yaml(file)
    # `path` may be of another machine; what lies beside the file is meant then.
    root = file.parent / content.get("path", "") if isinstance(content.get("path", ""), str) else file.parent
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    folders = {}
    for name, value in content.items():
        values = [path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str)]
        if canonical_split(str(name)) in ("train", "validation", "test") and values:
            folders[canonical_split(name)] = values
    names = _class_names(content, file)
    if not folders:
        raise ValueError(f"{file} names no images: it needs 'train', 'val' or 'test'")
    return Description(folders, roots, file, names, _num_keypoint_values(content, file))


def _parse_yaml(file: Path) -> dict[str, Any]:
    """The content of a data.yaml, its scalars as they are written: yaml would take `on` and 010 for True and 8."""
    try:
        content = parse_yaml(read_bytes(file, limit=MAX_TEXT_BYTES), loader=yaml.BaseLoader)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"names", "nc"} & set(content):
        raise ValueError(f"{file} is no data file of YOLO: it needs 'names' and 'train', 'val' or 'test'")
    return {str(key): value for key, value in content.items() if value not in NULLS}


def _parse_darknet(file: Path) -> dict[str, Any]:
    """The content of an obj.data, as that of a data.yaml."""
    pairs = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in read_lines(file) if "=" in line)
    names = pairs.pop("names", "obj.names")
    found = next((file.parent / name for name in (names, Path(names).name) if (file.parent / name).is_file()), None)
    if found is not None:
        check_inside([found], file.parent, file)
    else:
        raise ValueError(f"{file} names the classes in {names}, which is not there")
    content: dict[str, Any] = {**pairs, "names": [line for line in read_lines(found) if line]}
    return content | ({"nc": pairs["classes"]} if "classes" in pairs else {})


def _class_names(content: Mapping[str, Any], file: Path) -> list[str]:
    names, number = content.get("names"), content.get("nc")
    if number is not None and not (isinstance(number, str) and number.isdecimal() and int(number) <= MAX_CLASSES):
        raise ValueError(f"{file}: 'nc' must be a number of classes, at most {MAX_CLASSES}, not {str(number)[:40]}")
    if names is None and number is not None:
        names = [str(index) for index in range(int(number))]
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(len(names)))):
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: 'names' must be a list, or number the classes from 0 on")
    if number is not None and int(number) != len(names):
        raise ValueError(f"{file}: 'nc' is {number}, and 'names' has {len(names)}")
    return _unique(names, file)


def _num_keypoint_values(content: Mapping[str, Any], file: Path) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, str) and n.isdecimal() for n in shape)):
        raise ValueError(f"{file}: 'kpt_shape' must be [number of keypoints, 2 or 3], not {str(shape)[:40]}")
    return int(shape[0]) * int(shape[1])


def _unique(names: list[str], file: Path) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} names of classes are used more than once: {summarise(repeated)}")
    return names


def _find_splits(root: Path) -> dict[str, list[str]]:
    """Where the images of each split of a folder without a data file are."""
    splits = [path.name for path in sorted(root.iterdir()) if path.name.lower() in CANONICAL and path.is_dir()]
    folders = {
        name: [f"{name}/{inner}"] for name in splits for inner in IMAGE_FOLDERS if (root / name / inner).is_dir()
    }
    for outer in IMAGE_FOLDERS:
        if (root / outer).is_dir():
            inner = [path for path in sorted((root / outer).iterdir()) if path.name.lower() in CANONICAL]
            folders = {path.name: [f"{outer}/{path.name}"] for path in inner if path.is_dir()} or {"train": [outer]}
    if not folders:
        flat = find_flat_folders(root) or [
            folder for folder in (root, *(root / name for name in splits)) if _images_in(folder)
        ]
        folders = {"train" if path == root else path.name: ["." if path == root else path.name] for path in flat}
    if not any(find_images(root / path) for paths in folders.values() for path in paths):
        raise ValueError(f"{root} holds no images/ and labels/ of YOLO; {describe_folder(root)}")
    return folders


def find_flat_folders(root: Path) -> list[Path]:
    """The folder or its folders of splits where images have files of labels, and not of captions, beside them."""
    splits = [path for path in sorted(root.iterdir()) if path.name.lower() in CANONICAL and path.is_dir()]
    return [folder for folder in splits or [root] if _has_labels_beside(folder)]


def _has_labels_beside(folder: Path) -> bool:
    stems = {path.stem for path in _images_in(folder)}
    texts = [path for path in sorted(folder.glob("*.txt")) if path.stem in stems] if stems else []
    return any(map(holds_labels, texts[:NUM_TRIED]))


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS]


def _read_classes(root: Path) -> list[str]:
    """Names of the classes beside the labels; the same in every folder of a split."""
    folders = [
        root,
        *(
            path
            for path in sorted(root.iterdir())
            if path.name in ("labels", "Labels") or path.name.lower() in CANONICAL
        ),
    ]
    file = next((path for folder in folders for path in map(folder.joinpath, CLASSES_FILES) if path.is_file()), None)
    return [] if file is None else _unique([line for line in read_lines(file) if line], file)
