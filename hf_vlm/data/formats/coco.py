"""COCO json files with their images."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_vlm.data.formats.annotations import MASK_FIELDS, normalise_objects
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.imagefolder import find_images
from hf_vlm.data.formats.pairing import locate_names
from hf_vlm.data.formats.splits import canonical_split, choose_split, common_folder, describe_folder, group_by_split
from hf_vlm.data.io.files import can_list, is_folder, read_beginning, read_bytes
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.data.source import Source

__all__ = ["find_coco_files", "open_coco"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

LIST_OF_COCO = re.compile(r'"(images|annotations)"\s*:\s*\[')
ROBOFLOW_NAME = "_annotations.coco.json"
IDS = (int, str)  # types of ids
FIELDS = {**MASK_FIELDS, "category": "category_id"}


def open_coco(source: Path, split: str, *, num_samples: int | None = None, object_masks: bool = True) -> Source:
    """Stream the images and boxes of a COCO json, in the order of the json; with `object_masks` also masks of objects.

    Layouts: one json beside its images or beside a folder `images`; `annotations/instances_<split>*.json` with a
    folder of images per split (`train2017/`, `images/`, `images/train/`); `<split>/_annotations.coco.json` with the
    images beside it (Roboflow). Names of images may be paths of another machine; images that are missing stay, as ones
    that cannot be read. Category ids become 0, 1, 2, ... in their order, with their names kept. An annotation without
    a box has that of its segmentation; an image whose size the json does not give is asked for it.

    Raises:
        ValueError: There is no such split; the json is not COCO; its ids do not fit each other; no image is there; or
            its boxes are of another convention or of other images.
    """
    is_file = not is_folder(source)
    root = source.parent if is_file else source
    files = [source] if is_file else find_coco_files(source)
    if not files:
        raise ValueError(f"{source} holds no COCO json; {describe_folder(source)}")
    chosen = choose_split(group_by_split(files, root), split, source)
    if len(chosen) > 1:
        raise ValueError(
            f"{source} has several COCO files for the split {split!r}: {summarise(chosen)}; name one of them"
        )
    if not is_file:
        _warn_of_unread(source, files)
    content = _load(chosen[0])
    images = content["images"][:num_samples]
    paths = _image_paths(images, chosen[0], root, split)
    image_ids = _image_ids(content["images"], chosen[0])[:num_samples]
    if not content["annotations"]:
        logger.warning("%s has no annotations: its images are used without labels", chosen[0])
    boxes = _boxes(content, chosen[0], object_masks) if content["annotations"] else None
    if num_samples is None and can_list(source) and len(_coco_beside(chosen[0])) == 1:
        _warn_of_unlisted(paths, chosen[0])
    return boxed_images_source(paths, image_ids, boxes, chosen[0])


def _warn_of_unread(folder: Path, files: Sequence[Path]) -> None:
    """Name the json files that lie where those of COCO do, as captions and keypoints of the same images."""
    beside = [path for path in sorted(folder.glob("*.json")) if _looks_like_coco(path)]
    unread = sorted({*(folder / "annotations").glob("*.json"), *beside} - set(files))
    if unread:
        logger.warning("%s: json files that are not read: %s", folder, summarise(path.name for path in unread))


def _coco_beside(file: Path) -> list[Path]:
    """The COCO json files of the folder of one, which may share its images."""
    return [path for path in sorted(file.parent.glob("*.json")) if path == file or _looks_like_coco(path)]


def _warn_of_unlisted(paths: Sequence[Path], file: Path) -> None:
    """Name the images that are in the folders of the listed ones and are not listed."""
    folder = common_folder(paths)
    unlisted = sorted(set(find_images(folder)) - set(paths)) if folder.is_dir() else []
    if unlisted:
        logger.warning(
            "%s: %d images of %s are not listed and not used: %s",
            file,
            len(unlisted),
            folder,
            summarise(path.relative_to(folder) for path in unlisted),
        )


def find_coco_files(folder: Path) -> list[Path]:
    """The COCO json files of a folder, recognised by their location: see `open_coco`."""
    roboflow = [folder / ROBOFLOW_NAME, *sorted(folder.glob(f"*/{ROBOFLOW_NAME}"))]
    annotations = sorted((folder / "annotations").glob("*.json"))
    # Keypoints and captions of the same images are beside the boxes.
    instances = [path for path in annotations if path.stem.startswith("instances")]
    beside = sorted(path for path in folder.glob("*.json") if _looks_like_coco(path))
    for candidates in ([path for path in roboflow if path.exists()], instances or annotations, beside):
        if candidates:
            return candidates
    return []


def _looks_like_coco(path: Path) -> bool:
    """Whether the beginning of a json names a list of COCO; large files are not read whole for this."""
    data = read_beginning(path, 2**20)
    beginning = data.decode(json.detect_encoding(data), errors="replace").lstrip("\ufeff \t\r\n")
    # Label Studio's YOLO has a notes.json with nothing but categories; other json files name such things otherwise.
    return beginning.startswith("{") and LIST_OF_COCO.search(beginning) is not None


def _load(path: Path) -> Record:
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = summarise(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} is not a COCO json: it must hold a list 'images'; it holds {found}")
    for key in ("images", "annotations", "categories"):
        content[key] = content.get(key) or []  # exporters write null, too
        if not isinstance(content[key], list) or not all(isinstance(item, dict) for item in content[key]):
            raise ValueError(f"{path} is not a COCO json: {key!r} must be a list of objects in braces")
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    for image in content["images"]:
        if not (isinstance(image.get("id"), IDS) and isinstance(image.get("file_name"), str) and image["file_name"]):
            values = summarise(f"{key}: {value!r:.40}" for key, value in image.items())
            raise ValueError(f"{path}: every image needs 'id' and 'file_name'; one has {values}")
    return content


def _image_ids(images: Sequence[Record], file: Path) -> list[int]:
    """The ids of the json where they are numbers, else positions."""
    ids = [image["id"] for image in images]
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} image ids are used more than once: {summarise(repeated)}")
    are_numbers = all(isinstance(image_id, int) and abs(image_id) < 2**63 for image_id in ids)
    return ids if are_numbers else list(range(len(ids)))


def _image_paths(images: Sequence[Record], file: Path, root: Path, split: str) -> list[Path]:
    """Paths of the images, in the folder that has most of them; those of missing ones are where they should be."""
    folders = list(dict.fromkeys(_image_folders(file, root, split)))
    names = [image["file_name"] for image in images]
    base = _base_folder(file)
    located = locate_names(names, folders, root if base.is_relative_to(root) else base, file)
    if located is None:
        raise ValueError(f"{file}: the image {names[0]} is in none of the folders {', '.join(map(str, folders))}")
    paths, missing = located
    if missing:
        logger.warning(
            "%s: %d of %d images are missing: %s; they count as images that cannot be read",
            file,
            len(missing),
            len(names),
            summarise(names[index] for index in missing),
        )
    return paths


def _base_folder(file: Path) -> Path:
    """The folder of a json and its images."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _image_folders(file: Path, root: Path, split: str) -> Iterator[Path]:
    """Where the images of a json may be, the likeliest first."""
    base = _base_folder(file)
    stem = file.stem.removeprefix("instances_")
    wanted = canonical_split(split)
    names = sorted(path.name for path in base.iterdir()) if can_list(base) else []
    split_folders = [name for name in names if canonical_split(name) == wanted]
    for name in (stem, *split_folders):
        yield base / "images" / name
        yield base / name
    yield base / "images"
    yield base


def _boxes(content: Record, file: Path, has_masks: bool) -> BoxedImages:
    annotations = content["annotations"]
    repeated = [name for name, n in Counter(image["file_name"] for image in content["images"]).items() if n > 1]
    if repeated:
        raise ValueError(
            f"{file}: {len(repeated)} images are listed more than once, with other ids: {summarise(repeated)}. Each "
            "would teach that the objects of the others are background; list an image once and give all its "
            "annotations that id"
        )
    row_of = {image["id"]: row for row, image in enumerate(content["images"])}
    used = {item["category_id"] for item in annotations if isinstance(item.get("category_id"), IDS)}
    names, category_of = _categories(content["categories"], used, file)
    for key, known in (("image_id", row_of), ("category_id", category_of)):
        unknown = [item for item in annotations if not isinstance(item.get(key), IDS) or item[key] not in known]
        if unknown:
            raise ValueError(
                f"{file}: {len(unknown)} annotations have a {key} that the json does not list: ids "
                f"{summarise(item.get('id') for item in unknown)}"
            )

    def name_of(index: int) -> str:
        return f"annotation {annotations[index].get('id')}"

    objects = normalise_objects(annotations, FIELDS, file, name_of=name_of, has_masks=has_masks)
    objects["category"] = [category_of[category] for category in objects["category"]]
    rows = np.array([row_of[item["image_id"]] for item in annotations])
    sizes = np.array([[_side(image.get(side)) for side in ("width", "height")] for image in content["images"]])
    return BoxedImages(names, objects, rows, sizes, name_of)


def _side(value: Any) -> float:
    """Width or height of an image; infinity where it is not given: zero is what tools write that do not know it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 < value < np.inf else np.inf


def _categories(categories: Sequence[Record], used: set[Any], file: Path) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes in the order of their ids, and the class of each id."""
    incomplete = [
        category for category in categories if not isinstance(category.get("id"), IDS) or "name" not in category
    ]
    if incomplete:
        raise ValueError(f"{file}: every category needs 'id' and 'name'; one is {incomplete[0]}")
    # Roboflow lists the group of all classes as a class of its own, sometimes with the name of one of them.
    groups = {category.get("supercategory") for category in categories}
    categories = sorted(
        (
            category
            for category in categories
            if category["id"] in used or category.get("supercategory") != "none" or category["name"] not in groups
        ),
        key=lambda category: (isinstance(category["id"], str), category["id"]),
    )
    names = [str(category["name"]) for category in categories]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} names of categories are used more than once: {summarise(repeated)}")
    return names, {category["id"]: index for index, category in enumerate(categories)}
