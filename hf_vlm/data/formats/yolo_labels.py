"""Files of labels of YOLO: where they are, and what their lines say."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_vlm.data.formats.pairing import find_files
from hf_vlm.data.io.files import can_list, map_files, read_lines
from hf_vlm.data.io.messages import summarise

__all__ = ["Line", "find_labels", "holds_labels", "read_labels", "warn_of_unused"]

logger = logging.getLogger(__name__)

TOLERANCE = 0.01  # by which coordinates may leave 0 to 1: tools round
NUM_OBB = 8  # numbers of a box that is turned: its four corners
MIN_ALIKE = 10  # rows of one length, from which on that is no chance


class Line(NamedTuple):
    """An object in a file of labels."""

    number: int  # of the line
    category: int
    box: tuple[float, ...]  # x, y, width, height in fractions of the image
    num_values: int  # after the category
    polygon: tuple[float, ...] = ()  # x1, y1, x2, y2, ... in fractions of the image; of a box there is none


def find_labels(images: Sequence[Path], source: object) -> list[Path | None]:
    """The file of labels of each image; None where it has none.

    The last folder `images` of its path is `labels` for them; else they are beside the image, or in a folder `labels`
    beside it.

    Raises:
        ValueError: Images share one, as `a.jpg` and `a.png` in one folder do.
    """
    labels = _find(images)
    images_of = defaultdict(list)
    for image, path in zip(images, labels):
        if path is not None:
            images_of[path].append(image)
    shared = [f"{path.name} of {summarise(several)}" for path, several in images_of.items() if len(set(several)) > 1]
    if shared:
        raise ValueError(f"{source}: {len(shared)} files of labels belong to several images: {summarise(shared)}")
    return labels


def _find(images: Sequence[Path]) -> list[Path | None]:
    candidates = [_label_paths(image) for image in images]
    found = find_files(path for paths in candidates for path in paths)
    return [next((found[path] for path in paths if path in found), None) for paths in candidates]


def _label_paths(image: Path) -> list[Path]:
    """Where the labels of an image may be, the likeliest first."""
    name, parts = f"{image.stem}.txt", image.parts
    paths = [image.parent / name, image.parent / "labels" / name]
    for index in reversed(range(len(parts) - 1)):
        if parts[index] in ("images", "Images"):
            base, inner = image.parents[len(parts) - 1 - index], parts[index + 1 : -1]
            return [base.joinpath(folder, *inner, name) for folder in ("labels", "Labels")] + paths
    return paths


def warn_of_unused(
    images: Sequence[Path],
    labels: Sequence[Path | None],
    others: Sequence[Path],
    missing: Collection[Path],
    source: object,
) -> None:
    """Name the images without a file of labels, and the files of labels without an image.

    Args:
        images: Images of the split.
        labels: The file of labels of each of them.
        others: Images of the other splits, whose labels may lie in the same folders.
        missing: Images that are not there.
        source: Name of the source, for messages.
    """
    background = [image for image, path in zip(images, labels) if path is None and image not in missing]
    if images and len(background) == len(images):
        logger.warning(
            "%s: no image has a file of labels; looked for %s",
            source,
            summarise(_label_paths(images[0])[:2], num_shown=2),
        )
    elif background:
        logger.warning(
            "%s: %d of %d images have no file of labels and count as background: %s",
            source,
            len(background),
            len(images),
            summarise(background),
        )
    paths = {path for image in (*images, *others) for path in _label_paths(image)}
    used = {path for path in (*labels, *_find(others)) if path is not None}
    there = {path for folder in {path.parent for path in paths} if can_list(folder) for path in folder.glob("*.txt")}
    unused = [path for path in sorted(there - used) if holds_labels(path)]
    if unused:
        logger.warning(
            "%s: %d files of labels are not used, for they are of no image or its labels are elsewhere: %s",
            source,
            len(unused),
            summarise(unused),
        )


def holds_labels(path: Path) -> bool:
    """Whether a text file begins with a line of labels."""
    try:
        first = next((line for line in read_lines(path) if line), "")
        return bool(first) and len(_parse_line(first, "", 0).box) == 4
    except (OSError, ValueError):
        return False


def read_labels(labels: Sequence[Path | None], num_keypoint_values: int, source: object) -> list[list[Line]]:
    """The lines of each file of labels; none where there is no file.

    Args:
        labels: Files of labels.
        num_keypoint_values: How many numbers follow the box of an object with keypoints; 0 without them.
        source: Name of the source, for messages.

    Raises:
        ValueError: A line makes no sense; the message names the first ones.
    """
    results = map_files(lambda path: _read_labels(path, num_keypoint_values), labels, "Reading labels")
    problems = [problem for _, found in results for problem in found]
    if problems:
        raise ValueError(f"{source}: {len(problems)} lines of labels make no sense: {summarise(problems)}")
    lengths = Counter(line.num_values for lines, _ in results for line in lines if line.num_values > 4)
    if not num_keypoint_values and len(lengths) == 1 and NUM_OBB not in lengths and lengths.total() >= MIN_ALIKE:
        logger.warning(
            "%s: all %d lines that are longer than a box have %d numbers after the class; they are read as polygons. "
            "If they are keypoints, give their kpt_shape in data.yaml",
            source,
            lengths.total(),
            *lengths,
        )
    return [lines for lines, _ in results]


def _read_labels(path: Path | None, num_keypoint_values: int) -> tuple[list[Line], list[str]]:
    """The lines of a file that make sense, and what is wrong with the others."""
    lines: list[Line] = []
    problems = []
    try:
        texts = read_lines(path) if path is not None else []
    except FileNotFoundError:  # on a web server, where this is known only now
        return [], []
    except ValueError as error:
        return [], [str(error)]
    for number, text in enumerate(texts, start=1):
        if text:
            try:
                lines.append(_parse_line(text, f"{path}, line {number}", num_keypoint_values)._replace(number=number))
            except ValueError as error:
                problems.append(str(error))
    return lines, problems


def _parse_line(line: str, location: str, num_keypoint_values: int) -> Line:
    try:
        category, *values = (float(word) for word in line.split())
    except ValueError:
        raise ValueError(f"{location}: {line!r} must be numbers: class, centre x, centre y, width, height") from None
    if not (category >= 0 and category.is_integer() and math.isfinite(category)):
        raise ValueError(f"{location}: the class {category:g} must be a number from 0 on")
    number = len(values)
    is_box = number in (4, 4 + num_keypoint_values)
    if not is_box and num_keypoint_values:
        raise ValueError(
            f"{location}: {line!r} must have a class and 4 numbers, or {4 + num_keypoint_values} with the keypoints "
            "that kpt_shape says"
        )
    coordinates = values[:4] if is_box else values  # keypoints may lie outside, and have a visibility
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in coordinates):
        hint = "; keypoints need kpt_shape in data.yaml" if number > 4 else ""
        raise ValueError(f"{location}: {line!r} must have coordinates of 0 to 1, relative to the image's sides{hint}")
    if is_box:
        x, y, width, height = coordinates
        return Line(0, int(category), (x - width / 2, y - height / 2, width, height), number)
    if number >= 6 and number % 2 == 0:
        x, y = min(values[::2]), min(values[1::2])
        box = (x, y, max(values[::2]) - x, max(values[1::2]) - y)
        return Line(0, int(category), box, number, tuple(values))
    raise ValueError(f"{location}: {line!r} must have a class and 4 numbers, or a class and the points of a polygon")
