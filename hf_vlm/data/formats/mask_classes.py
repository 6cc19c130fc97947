"""Names of the classes of masks, and the colours that stand for them, from a text file beside the data."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from hf_vlm.data.io.decode import BadImageError, decode_mask
from hf_vlm.data.io.files import can_list, is_folder
from hf_vlm.data.io.messages import summarise
from hf_vlm.data.masks import IGNORED
from hf_vlm.data.source import Source

__all__ = ["MASK_CLASSES_FILE", "find_mask_classes", "name_mask_classes"]

Color = tuple[int, int, int]

MASK_CLASSES_FILE = "mask_classes.txt"
LABELMAP_FILE = "labelmap.txt"  # of CVAT and Datumaro: name:red,green,blue:parts:actions
CLASS_DICT_FILE = "class_dict.csv"  # of CamVid: name,r,g,b
# What a map of colours calls pixels that have no class.
NO_CLASS = frozenset(("void", "ignore", "ignored", "unlabeled", "unlabelled"))


class MaskClasses(NamedTuple):
    """The classes of masks."""

    names: tuple[str, ...]
    of_color: Mapping[int, int] | None = None  # by 65536 red + 256 green + blue; None: masks hold 0, 1, 2, ...


def find_mask_classes(path: Path) -> Path | None:
    """The file that names the classes of masks: in a folder, or beside a file; None where there is none."""
    if not can_list(path):
        return None
    folder = path if is_folder(path) else path.parent
    files = (folder / name for name in (MASK_CLASSES_FILE, LABELMAP_FILE, CLASS_DICT_FILE))
    return next((file for file in files if file.exists()), None)


def name_mask_classes(source: Source, path: Path) -> Source:
    """A source of a folder or a file, with the names of its masks' classes where a text file gives them.

    The lines of `mask_classes.txt` name the values 0, 1, 2, ...; `labelmap.txt` and `class_dict.csv` give classes
    colours: masks in these become masks of class indices as they are read, and a class that is called void, ignore or
    unlabelled is none.

    Raises:
        ValueError: The file makes no sense; or, while streaming, a mask has a colour that it does not name.
    """
    file = find_mask_classes(path) if "mask" in source.features else None
    if file is None:
        return source
    classes = _read(file)
    if classes.of_color is None:
        return replace(source, mask_class_names=classes.names)
    dataset = source.dataset.map(_ClassesOfColors(classes.of_color, file.name), features=source.features)
    return replace(source, dataset=dataset, mask_class_names=classes.names)


def _read(file: Path) -> MaskClasses:
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if file.name == MASK_CLASSES_FILE:
        if not lines or not all(lines):
            line = lines.index("") + 1 if lines else 1
            raise ValueError(f"{file}: line {line} is empty; each line names one value of the masks, 0, 1, 2, ...")
        _check_once(lines, file)
        return MaskClasses(tuple(lines))
    colors = _read_labelmap(lines, file) if file.name == LABELMAP_FILE else _read_class_dict(lines, file)
    names = [name for name, _ in colors if name.lower() not in NO_CLASS]
    _check_once([name for name, _ in colors], file)
    _check_once([f"{red},{green},{blue}" for _, (red, green, blue) in colors], file)
    index_of = {name: index for index, name in enumerate(names)}
    return MaskClasses(tuple(names), {_packed(color): index_of.get(name, IGNORED) for name, color in colors})


def _check_once(values: Sequence[str], file: Path) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{file} names {summarise(repeated)} more than once")


def _read_labelmap(lines: Sequence[str], file: Path) -> list[tuple[str, Color]]:
    fields = [line.split(":") for line in lines if line and not line.startswith("#")]
    return [_named_color([parts[0], *(parts[1:2] or [""])[0].split(",")], file) for parts in fields]


def _read_class_dict(lines: Sequence[str], file: Path) -> list[tuple[str, Color]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    has_header = bool(rows) and rows[0][1:4] != [] and not rows[0][1].isdigit()
    return [_named_color(row[:4], file) for row in rows[has_header:]]


def _named_color(cells: Sequence[str], file: Path) -> tuple[str, Color]:
    numbers = [int(cell) for cell in cells[1:] if cell.strip().isdigit() and int(cell) <= 255]
    if len(cells) != 4 or len(numbers) != 3 or not cells[0]:
        raise ValueError(f"{file}: {', '.join(cells)!r} must be a name and red, green and blue, 0 to 255")
    return cells[0], (numbers[0], numbers[1], numbers[2])


def _packed(color: Color) -> int:
    return (color[0] << 16) + (color[1] << 8) + color[2]


@dataclass(frozen=True)
class _ClassesOfColors:
    """Turns a mask of colours into one of class indices."""

    of_color: Mapping[int, int]
    file: str  # that names them, for messages

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        try:
            colors = decode_mask(example["mask"], as_colors=True)  # (height, width)
        except BadImageError:  # which whoever reads the mask counts
            return example
        known = np.array(sorted(self.of_color))
        positions = np.searchsorted(known, colors).clip(max=len(known) - 1)
        is_known = known[positions] == colors
        if not is_known.all():
            found, counts = np.unique(colors[~is_known], return_counts=True)
            unknown = [f"{c >> 16},{c >> 8 & 255},{c & 255}" for c in found[counts.argsort()[::-1]].tolist()]
            raise ValueError(
                f"The mask of image {example['image_id']} has {len(unknown)} colours that {self.file} does not name, "
                f"in {counts.sum()} pixels: {summarise(unknown)}. Add them, the class 'void' for pixels without one; "
                "colours between those of two classes come of resizing or of lossy compression"
            )
        values = np.array([self.of_color[color] for color in known.tolist()], dtype=np.uint8)[positions]
        return {**example, "mask": {"bytes": cv2.imencode(".png", values)[1].tobytes(), "path": None}}
