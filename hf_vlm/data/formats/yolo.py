"""YOLO: one text file per image, with coordinates relative to the image."""

import contextlib
import logging
from pathlib import Path

import numpy as np

from hf_vlm.data.formats.annotations import MASK_FIELDS, normalise_objects
from hf_vlm.data.formats.box_conventions import CENTERS
from hf_vlm.data.formats.boxed_images import BoxedImages, boxed_images_source
from hf_vlm.data.formats.image_sizes import read_file_sizes
from hf_vlm.data.formats.splits import CANONICAL
from hf_vlm.data.formats.yolo_files import Description, describe, find_data_file, find_flat_folders
from hf_vlm.data.formats.yolo_labels import find_labels, read_labels, warn_of_unused
from hf_vlm.data.io.files import can_list, is_folder
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.source import Source

__all__ = ["looks_like_yolo", "open_yolo"]

logger = logging.getLogger(__name__)


def open_yolo(source: Path, split: str, *, num_samples: int | None = None, object_masks: bool = True) -> Source:
    """Stream the images and boxes of a YOLO data set, in the order of the image files' names.

    The source is a `data.yaml` with `train`, `val`, `test` (folders of images, text files that list images, or lists
    of these) and `names`, Darknet's `obj.data`, or a folder that holds one. Without them it is a folder with
    `images/<split>` and `labels/<split>`, with `<split>/images` and `<split>/labels`, or with labels beside the
    images; its classes are in `classes.txt`, else they are the numbers that occur. The labels of
    `.../images/.../a.jpg` are in `.../labels/.../a.txt` or beside it, one line per object: class, centre x, centre y,
    width, height, also with keypoints where the data.yaml has `kpt_shape`; or class and the points of a polygon, which
    is the mask where `object_masks` are wanted, and whose bounding box is the box. Images without labels have no
    objects; listed images that are missing stay, as ones that cannot be read.

    Opening reads the headers of the labelled images, since boxes in pixels need the images' sizes.

    Raises:
        ValueError: There is no such split, or none of its images; a line of labels makes no sense; or the boxes are of
            another convention.
    """
    file, folder = (find_data_file(source), source) if is_folder(source) else (source, source.parent)
    description = describe(file, folder)
    images, missing = description.images(split, source)
    images = images[:num_samples]
    missing &= set(images)
    if missing:
        logger.warning(
            "%s: %d listed images are missing: %s; they count as images that cannot be read",
            source,
            len(missing),
            summarise(sorted(missing)),
        )
    labels = find_labels(images, source)
    others = _other_images(description, split, source)
    if num_samples is None and can_list(source):
        warn_of_unused(images, labels, others, missing, source)
    lines = read_labels(labels, description.num_keypoint_values, source)
    objects = [(row, line) for row, found in enumerate(lines) for line in found]
    names = description.class_names
    if not objects and not names:
        return boxed_images_source(images, range(len(images)), None, source)
    categories = [line.category for _, line in objects]
    if not names:  # numbers, those of all splits, which must agree
        others_lines = read_labels(find_labels(others, source), description.num_keypoint_values, source)
        used = sorted({*categories, *(line.category for found in others_lines for line in found)})
        names, categories = [str(category) for category in used], [used.index(category) for category in categories]
    rows = np.array([row for row, _ in objects], dtype=np.int64)
    labelled = np.unique(rows).tolist()
    sizes = np.full((len(images), 2), np.inf)
    sizes[labelled] = read_file_sizes([images[row] for row in labelled]).shown
    scales = np.nan_to_num(sizes[rows], posinf=0.0)  # (n, 2)
    relative = np.array([line.box for _, line in objects], dtype=np.float64).reshape(-1, 4)
    stored = {"bbox": (relative * np.tile(scales, 2)).tolist(), "category": categories}
    if object_masks:
        polygons = (np.reshape(line.polygon, (-1, 2)) for _, line in objects)
        stored["segmentation"] = [(polygon * scale).tolist() for polygon, scale in zip(polygons, scales)]
    boxes = BoxedImages(
        class_names=names,
        objects=normalise_objects(stored, MASK_FIELDS, source, has_masks=object_masks),
        rows=rows,
        sizes=sizes,
        name_of=lambda index: f"{labels[rows[index]].name}, line {objects[index][1].number}",
        are_measured=True,
        convention=CENTERS,
    )
    return boxed_images_source(images, range(len(images)), boxes, source)


def _other_images(description: Description, split: str, source: Path) -> list[Path]:
    """The images of the other splits, as far as they are there."""
    images: list[Path] = []
    for name in description.folders:
        if name != split:
            with contextlib.suppress(ValueError, OSError):  # matters when it is opened
                images += description.images(name, source)[0]
    return images


def looks_like_yolo(folder: Path) -> bool:
    """Whether a folder holds a data file of YOLO beside images, or labels where `open_yolo` looks for them."""
    splits = [path for path in folder.iterdir() if path.name.lower() in CANONICAL and path.is_dir()]
    file = find_data_file(folder)
    if file is not None and (splits or file.suffix == ".data" or (folder / "images").is_dir()):
        return True
    # Masks may be in folders of that name too.
    patterns = [f"{name}/{inner}" for name in ("labels", "Labels") for inner in ("*.txt", "*/*.txt")]
    texts = (path for root in (folder, *splits) for pattern in patterns for path in root.glob(pattern))
    return next(texts, None) is not None or bool(find_flat_folders(folder))
