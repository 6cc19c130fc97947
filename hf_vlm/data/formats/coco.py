"""COCO json files with their images."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_vlm.data.formats.annotations import normalise_objects
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.splits import canonical_split, choose_split, describe_folder, group_by_split
from hf_vlm.data.io.files import can_list, existing_paths, exists, is_folder, read_beginning, read_bytes
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.data.io.trust import check_inside
from hf_vlm.data.source import Source

__all__ = ["find_coco_files", "open_coco"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

ROBOFLOW_NAME = "_annotations.coco.json"
FIELDS = {"bbox": "bbox", "category": "category_id", "area": "area", "iscrowd": "iscrowd"}


def open_coco(source: Path, split: str, *, num_samples: int | None = None) -> Source:
    """Stream the images and boxes of a COCO json, in the order of the json.

    Layouts: one json beside its images or beside a folder `images`; `annotations/instances_<split>*.json` with a
    folder of images per split (`train2017/`, `images/`, `images/train/`); `<split>/_annotations.coco.json` with the
    images beside it (Roboflow). Category ids become 0, 1, 2, ... in their order, with their names kept.

    Raises:
        ValueError: There is no such split; the json is not COCO; its ids do not fit each other; or images are missing.
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
    content = _load(chosen[0])
    images = content["images"][:num_samples]
    paths = _image_paths(images, chosen[0], root, split)
    image_ids = _image_ids(content["images"], chosen[0])[:num_samples]
    if not content["annotations"]:
        logger.warning("%s has no annotations: its images are used without labels", chosen[0])
    boxes = _boxes(content, chosen[0]) if content["annotations"] else None
    return boxed_images_source(paths, image_ids, boxes, chosen[0])


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
    beginning = read_beginning(path, 2**20).decode(errors="replace").lstrip()
    return beginning.startswith("{") and any(
        f'"{key}"' in beginning for key in ("images", "annotations", "categories")
    )


def _load(path: Path) -> Record:
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = summarise(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} is not a COCO json: it must hold a list 'images'; it holds {found}")
    content.setdefault("annotations", [])
    content.setdefault("categories", [])
    if not content["images"]:
        raise ValueError(f"{path} lists no images")
    for image in content["images"]:
        if "id" not in image or "file_name" not in image:
            raise ValueError(f"{path}: every image needs 'id' and 'file_name'; one has {summarise(image)}")
    return content


def _image_ids(images: Sequence[Record], file: Path) -> list[int]:
    """The ids of the json where they are numbers, else positions."""
    ids = [image["id"] for image in images]
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} image ids are used more than once: {summarise(repeated)}")
    return ids if all(isinstance(image_id, int) for image_id in ids) else list(range(len(ids)))


def _image_paths(images: Sequence[Record], file: Path, root: Path, split: str) -> list[str]:
    """Paths of the images, in the first folder that has the first of them."""
    folders = list(_image_folders(file, root, split))
    names = [image["file_name"] for image in images]
    folder = next((folder for folder in folders if exists(folder / names[0])), None)
    if folder is None:
        # The first image alone may be missing: then the message should name it, not the folder.
        folder = next((folder for folder in folders if any(exists(folder / name) for name in names[:100])), None)
    if folder is None:
        raise ValueError(f"{file}: the image {names[0]} is in none of the folders {', '.join(map(str, folders))}")
    paths = [folder / name for name in names]
    check_inside(paths, root.parent if file.parent == root and root.name == "annotations" else root, file)
    there = existing_paths(paths)
    missing = [name for name, path in zip(names, paths) if path not in there]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(paths)} images are missing in {folder}: {summarise(missing)}"
        )
    return [str(path) for path in paths]


def _image_folders(file: Path, root: Path, split: str) -> Iterator[Path]:
    """Where the images of a json may be, the likeliest first."""
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    stem = file.stem.removeprefix("instances_")
    wanted = canonical_split(split)
    names = sorted(path.name for path in base.iterdir()) if can_list(base) else []
    split_folders = [name for name in names if canonical_split(name) == wanted]
    for name in (stem, *split_folders):
        yield base / "images" / name
        yield base / name
    yield base / "images"
    yield base


def _boxes(content: Record, file: Path) -> BoxedImages:
    annotations = content["annotations"]
    names, category_of = _categories(content["categories"], {item.get("category_id") for item in annotations}, file)
    row_of = {image["id"]: row for row, image in enumerate(content["images"])}
    for key, known in (("image_id", row_of), ("category_id", category_of)):
        unknown = [item.get("id") for item in annotations if item.get(key) not in known]
        if unknown:
            raise ValueError(
                f"{file}: {len(unknown)} annotations have a {key} that the json does not list: ids "
                f"{summarise(unknown)}"
            )

    def name_of(index: int) -> str:
        return f"annotation {annotations[index].get('id')}"

    objects = normalise_objects(annotations, FIELDS, file, name_of=name_of)
    objects["category"] = [category_of[category] for category in objects["category"]]
    rows = np.array([row_of[item["image_id"]] for item in annotations])
    sizes = np.array([[image.get("width") or np.inf, image.get("height") or np.inf] for image in content["images"]])
    return BoxedImages(names, objects, rows, sizes[rows], name_of)


def _categories(categories: Sequence[Record], used: set[Any], file: Path) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes in the order of their ids, and the class of each id."""
    incomplete = [category for category in categories if "id" not in category or "name" not in category]
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
        key=lambda category: category["id"],
    )
    names = [str(category["name"]) for category in categories]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{file}: {len(repeated)} names of categories are used more than once: {summarise(repeated)}")
    return names, {category["id"]: index for index, category in enumerate(categories)}
