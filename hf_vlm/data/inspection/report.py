"""What a data set holds and what is wrong with it, as statistics and as text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from hf_vlm.data.io.messages import one_line

__all__ = [
    "MAX_BAD_FRACTION",
    "BoxReport",
    "ExampleSummary",
    "Issue",
    "MinMedianMax",
    "Report",
    "Unreadable",
    "format_report",
]

MAX_BAD_FRACTION = 0.01  # of the images: the default of training, which skips as many

PATCH_SIZES = (16, 8)
MIN_PATCHES = 2  # that an object should span, along its side
MAX_GRID = 64  # patches per side; more are slow to train
NUM_CLASSES_SHOWN = 15
BAR_WIDTH = 24  # characters
NAMES_SHOWN = 3


@dataclass(frozen=True)
class MinMedianMax:
    """Smallest, median and largest of some values."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray[Any, Any]) -> Self | None:
        """Statistics of an array of values; None if it is empty."""
        if not len(values):
            return None
        return cls(*(float(value) for value in (values.min(), np.median(values), values.max())))


@dataclass(frozen=True)
class Issue:
    """A problem: what it is, how often it occurs, and the images or classes it occurs in."""

    what: str
    count: int
    where: list[str]


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    name: str
    reason: str


@dataclass(frozen=True)
class BoxReport:
    """Boxes of the readable images; sizes are of the part in the image, where there is one."""

    num_boxes: int
    num_images_without: int
    per_image: MinMedianMax | None
    class_counts: dict[str, int]
    size_fractions: dict[str, float]  # small, medium and large, by width x height and COCO's limits
    relative_size: MinMedianMax | None  # sqrt(area / area of the image)
    small_relative_size: float | None  # median of the small boxes; of the smallest tenth where next to none are small
    num_masks: int | None = None  # objects with a mask; None where the source has none

    @property
    def patches_wanted(self) -> int | None:
        """Patches per side of the resized image from which on half of the small objects span at least two."""
        return None if self.small_relative_size is None else math.ceil(MIN_PATCHES / self.small_relative_size)


@dataclass(frozen=True)
class MaskReport:
    """Masks with the class of each pixel, of the readable images."""

    class_pixels: dict[str, int]  # by name, or by value where names are not known
    class_images: dict[str, int]  # that have a pixel of the class
    pixels_without_class: int


@dataclass(frozen=True)
class ExampleSummary:
    """An image as it is decoded, with its labels."""

    file: str | None  # its path, where it has one
    width: int
    height: int
    label: int | None  # index of `label_names`
    boxes: list[list[float]] | None  # x, y, width, height in pixels
    categories: list[int] | None  # indices of `class_names`


@dataclass(frozen=True)
class Report:
    """What `inspect_source` found. Sizes are in pixels, of upright images; names of images are paths or ids."""

    num_images: int  # that can be read
    is_complete: bool  # whether the whole source was read
    columns: list[str]
    formats: dict[str, int]
    median_bytes: float | None
    total_bytes: int
    height: MinMedianMax | None
    width: MinMedianMax | None
    aspect_ratio: MinMedianMax | None  # width / height
    total_pixels: int
    label_counts: dict[str, int] | None
    boxes: BoxReport | None
    masks: MaskReport | None
    exact_duplicates: list[list[str]]
    near_duplicates: list[list[str]]  # without those of which every byte is equal
    unreadable: list[Unreadable]
    issues: list[Issue]

    findings: list[str]  # what was logged as a warning when the source was opened and read
    label_names: list[str] | None
    class_names: list[str] | None  # of boxes
    examples: list[ExampleSummary]  # the first that can be read

    @property
    def bad_fraction(self) -> float:
        """Fraction of the images that cannot be read."""
        return len(self.unreadable) / max(self.num_images + len(self.unreadable), 1)

    def as_json(self) -> dict[str, Any]:
        """As values that `json` can write."""
        return dataclasses.asdict(self)


def format_report(report: Report) -> str:
    """A text of aligned lines for people."""
    sections = {
        "Images": _image_lines(report),
        "Labels": _class_lines(report.label_counts, "images") if report.label_counts is not None else [],
        "Boxes": _box_lines(report.boxes) if report.boxes is not None else [],
        "Masks": _mask_lines(report.masks) if report.masks is not None else [],
        "To look at": _issue_lines(report),
    }
    lines = []
    for title, entries in sections.items():
        if entries:
            lines += [title, *(one_line(f"  {name:<14}  {text}".rstrip()) for name, text in entries), ""]
    return "\n".join(lines)


Lines = list[tuple[str, str]]


def _image_lines(report: Report) -> Lines:
    scope = "" if report.is_complete else ", the first of the data"
    lines = [("number", f"{report.num_images + len(report.unreadable):,}{scope}")]
    lines.append(("columns", ", ".join(report.columns)))
    if not report.num_images:
        return lines
    formats = sorted(report.formats.items(), key=lambda item: -item[1])
    lines.append(("format", ", ".join(f"{name} ({count:,})" for name, count in formats)))
    lines.append(("width", _min_median_max(report.width, "px")))
    lines.append(("height", _min_median_max(report.height, "px")))
    lines.append(("width / height", _min_median_max(report.aspect_ratio)))
    lines.append(("pixels", f"{_count(report.total_pixels)} in all"))
    size = _count(report.median_bytes or 0)
    lines.append(("file size", f"{size}B in the median, {_count(report.total_bytes)}B in all"))
    return lines


def _box_lines(boxes: BoxReport) -> Lines:
    lines = [("number", f"{boxes.num_boxes:,}"), ("per image", _min_median_max(boxes.per_image))]
    lines.append(("empty images", f"{boxes.num_images_without:,}"))
    if boxes.num_masks is not None:
        lines.append(("masks", f"of {boxes.num_masks:,} objects"))
    lines += _class_lines(boxes.class_counts, "boxes")
    if boxes.relative_size is None or boxes.patches_wanted is None:
        return lines
    limits = {"small": "below 32 x 32 px", "medium": "up to 96 x 96 px", "large": "above"}
    fractions = ", ".join(f"{name} {fraction:.0%} ({limits[name]})" for name, fraction in boxes.size_fractions.items())
    lines.append(("sizes", fractions))
    lines.append(("relative size", f"{_min_median_max(boxes.relative_size)}; 1 is as large as the image"))
    grid = boxes.patches_wanted
    if grid > MAX_GRID:
        advice = (
            f"to show the small objects an image would need {grid} patches per side; cut the images into tiles first"
        )
    else:
        sizes = (f"{_image_size(grid, patch)} with patches of {patch}" for patch in PATCH_SIZES)
        advice = f"the small objects need --image_size {' or '.join(sizes)}, or more"
    return [*lines, ("advice", advice)]


def _mask_lines(masks: MaskReport) -> Lines:
    total = sum(masks.class_pixels.values()) + masks.pixels_without_class
    lines = [("pixels", f"{_count(total)} in all, {masks.pixels_without_class / total:.1%} without a class")]
    return lines + _class_lines(masks.class_pixels, "pixels", show=lambda count: f"{count / total:.2%}")


def _image_size(grid: int, patch_size: int) -> int:
    """The smallest usual size, a multiple of two patches, that holds this many patches per side."""
    return math.ceil(grid / 2) * 2 * patch_size


def _class_lines(counts: Mapping[str, int], unit: str, *, show: Callable[[int], str] = "{:,}".format) -> Lines:
    """The classes with bars, the largest first; of many classes the largest and the smallest."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    if not ranked:
        return [("classes", "none")]
    hidden = len(ranked) - NUM_CLASSES_SHOWN
    head = NUM_CLASSES_SHOWN - NUM_CLASSES_SHOWN // 3
    shown = ranked if hidden <= 0 else [*ranked[:head], *ranked[head + hidden :]]
    width, largest = max(len(name) for name, _ in shown), max(ranked[0][1], 1)
    lines = []
    for name, count in shown:
        bar = "#" * math.ceil(BAR_WIDTH * count / largest)
        lines.append(("", f"{name:<{width}}  {show(count):>{len(show(largest))}}  {bar}"))
    if hidden > 0:
        lines.insert(head, ("", f"... {hidden} more classes"))
    present = [count for _, count in ranked if count]
    balance = ""
    if len(present) > 1:
        balance = f"; the largest has {present[0] / present[-1]:.3g} times the {unit} of the smallest"
    return [("classes", f"{len(ranked)}{balance}"), *lines]


def _issue_lines(report: Report) -> Lines:
    lines = [("warning", finding) for finding in report.findings]
    if report.unreadable:
        what = "training skips them"
        if report.bad_fraction > MAX_BAD_FRACTION:
            skipped = f"more than the {MAX_BAD_FRACTION:.0%} that training skips"
            what = f"{skipped}: fix or remove them, or accept them by --max_bad_fraction"
        lines.append((f"{len(report.unreadable):,}", f"images that cannot be read; {what}"))
        lines += _where(f"{image.name}: {image.reason}" for image in report.unreadable)
    groups = {
        "images too many, equal byte for byte to others": report.exact_duplicates,
        "images too many, that look the same as others": report.near_duplicates,
    }
    for what, names in groups.items():
        if names:
            lines.append((f"{sum(map(len, names)) - len(names):,}", what))
            lines += _where(_equation(group) for group in names)
    for issue in report.issues:
        lines.append((f"{issue.count:,}", issue.what))
        lines += _where(issue.where)
    return lines or [("nothing", "no unreadable images, no duplicates, no labels that make no sense")]


def _equation(names: list[str]) -> str:
    more = f" = {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return " = ".join(names[:NAMES_SHOWN]) + more


def _where(found: Iterable[str]) -> Lines:
    names = list(found)
    more = [f"... {len(names) - NAMES_SHOWN:,} more"] if len(names) > NAMES_SHOWN else []
    return [("", f"  {name}") for name in [*names[:NAMES_SHOWN], *more]]


def _min_median_max(values: MinMedianMax | None, unit: str = "") -> str:
    if values is None:
        return "none"
    if values.min == values.max:
        return f"{_number(values.min)} {unit}".strip() + ", all the same"
    text = f"{_number(values.min)} to {_number(values.max)} {unit}".strip()
    return f"{text}, median {_number(values.median)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _count(value: float) -> str:
    """With three digits and a prefix of a thousand."""
    for prefix in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{prefix or ' '}"
        value /= 1000
    return f"{value:,.3g} T"
