"""One quick look at every image of a source: what is there, and what is wrong with it."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.boxes import clean_boxes
from hf_vlm.data.inspection.duplicates import (
    FINGERPRINT,
    THUMBNAIL_SIZE,
    exact_duplicates,
    fingerprint,
    near_duplicates,
)
from hf_vlm.data.inspection.issues import box_convention, box_issues, image_issues, label_issues, size_issues
from hf_vlm.data.inspection.mask_stats import PixelCounts, count_values
from hf_vlm.data.inspection.report import (
    BoxReport,
    ExampleSummary,
    Issue,
    MinMedianMax,
    Report,
    Unreadable,
    format_report,
)
from hf_vlm.data.inspection.splits import split_issues
from hf_vlm.data.io.decode import BadImageError, decode_image, image_size, read_image_bytes, used_bits
from hf_vlm.data.io.image_header import read_header
from hf_vlm.data.io.messages import collect_warnings, redact_url, shown_path
from hf_vlm.data.source import Source

__all__ = ["Report", "format_report", "image_name", "inspect_source"]

Array = np.ndarray[Any, Any]
Example = dict[str, Any]

NUM_THREADS = 8  # waiting for files, and decoders outside Python's lock
BATCH_SIZE = 64  # encoded images held at a time
NUM_EXAMPLES = 50  # that the report holds
BLANK_DEVIATION = 2.0  # levels of 255, below which an image is of one colour
SMALL_AREA, LARGE_AREA = 32**2, 96**2  # COCO's
MIN_SMALL_FRACTION = 0.05  # of the boxes, below which small ones are exceptions
SMALLEST_FRACTION = 0.1  # of the boxes, which are then taken as the small ones

IMAGE_DTYPE = np.dtype(
    [
        ("position", "i8"),  # in the source, of which unreadable images are no rows
        ("height", "i4"),
        ("width", "i4"),
        ("num_bytes", "i8"),
        *FINGERPRINT,
        ("is_blank", "?"),
        ("largest", "u1"),  # value of the decoded image
        ("used_bits", "u1"),  # of 16; 0 for images of other bits
        ("is_turned", "?"),  # by EXIF, by a quarter
        ("label", "i8"),
    ]
)
BOX_DTYPE = np.dtype([("image", "i8"), ("category", "i8"), ("box", "f8", (4,))])


@dataclass
class Accumulator:
    """What is kept of the images: a name, and some 150 bytes of statistics."""

    names: list[str] = field(default_factory=list)
    images: list[Array] = field(default_factory=list)  # pieces of IMAGE_DTYPE
    boxes: list[Array] = field(default_factory=list)  # pieces of BOX_DTYPE
    formats: Counter[str] = field(default_factory=Counter)
    unreadable: list[Unreadable] = field(default_factory=list)
    bad_masks: list[str] = field(default_factory=list)
    pixels: PixelCounts = field(default_factory=PixelCounts)
    num_object_masks: int = 0
    examples: list[ExampleSummary] = field(default_factory=list)


@dataclass(frozen=True)
class ImageStats:
    """Statistics of one image."""

    row: tuple[Any, ...]  # an IMAGE_DTYPE without its position
    format: str
    has_bad_mask: bool
    mask_values: dict[int, int] | None  # pixels by value, of the mask that gives each a class


def inspect_source(
    source: Source,
    num_examples: int | None = None,
    on_example: Callable[[Example], None] | None = None,
    other_splits: Sequence[Source] = (),
) -> Report:
    """Read every image of a source once, decoded small, and report on images, labels and boxes.

    Args:
        source: Source of the images.
        num_examples: Number of images to read, from the first on; None for all.
        on_example: Function called with each example whose image can be read, in their order.
        other_splits: Other splits of the same data, which should have none of its images.

    Raises:
        ValueError: The source gives no example, or num_examples is not positive.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be positive")
    accumulator = Accumulator()
    examples = iter(source)
    with collect_warnings() as findings, ThreadPoolExecutor(NUM_THREADS) as pool:
        for batch in _batches(itertools.islice(examples, num_examples)):
            results = list(pool.map(_image_stats, batch))
            _accumulate(accumulator, batch, results)
            if on_example is not None:
                for example, result in zip(batch, results, strict=True):
                    if isinstance(result, ImageStats):
                        on_example(example)
    if not accumulator.names and not accumulator.unreadable:
        raise ValueError("the data holds no example; check its path and its split")
    is_complete = num_examples is None or next(examples, None) is None
    report = _report(accumulator, source, [*source.findings, *findings], is_complete=is_complete)
    images = np.concatenate(accumulator.images)
    shared = [issue for other in other_splits for issue in split_issues(source, images, accumulator.names, other)]
    return replace(report, issues=[*report.issues, *shared])


def image_name(example: Example) -> str:
    """The path of an example's image, or its id where it has none."""
    path = example["image"].get("path")
    return shown_path(path) if path else f"image_id {example['image_id']}"


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while batch := list(itertools.islice(iterator, BATCH_SIZE)):
        yield batch


def _image_stats(example: Example) -> ImageStats | str:
    """What is kept of an image, or why it cannot be read."""
    try:
        data = read_image_bytes(example["image"])
        array, (height, width) = decode_image(data, at_least=THUMBNAIL_SIZE)
    except BadImageError as error:
        return str(error.__cause__ or error).removeprefix(f"{image_name(example)}: ")
    header = read_header(data)
    row = (
        height,
        width,
        len(data),
        *fingerprint(data, array),
        cv2.meanStdDev(array)[1].max() < BLANK_DEVIATION,  # 30 times as fast as numpy
        array.max(),
        used_bits(data) or 0,
        header is not None and header.orientation >= 5,
        example.get("label", -1),
    )
    masks = (example[name] for name in ("mask", "instance_mask") if name in example)
    bad_mask = any(image_size(mask) != (height, width) for mask in masks)
    values = count_values(example["mask"]) if "mask" in example else None
    name = f"{header.format} {header.mode}".strip() if header is not None else "other"
    return ImageStats(row, name, bad_mask or ("mask" in example and values is None), values)


def _accumulate(accumulator: Accumulator, batch: list[Example], results: list[ImageStats | str]) -> None:
    rows, boxes = [], []
    for example, result in zip(batch, results, strict=True):
        name = image_name(example)
        if isinstance(result, str):
            accumulator.unreadable.append(Unreadable(name, result))
            continue
        objects = example.get("objects", {"category": [], "bbox": []})
        boxes += [(len(accumulator.names), *box) for box in zip(objects["category"], objects["bbox"], strict=True)]
        accumulator.num_object_masks += sum(map(bool, objects.get("segmentation", ())))
        if result.mask_values is not None:
            accumulator.pixels.add(name, result.mask_values)
        rows.append((len(accumulator.names) + len(accumulator.unreadable), *result.row))
        accumulator.names.append(name)
        accumulator.formats[result.format] += 1
        if len(accumulator.examples) < NUM_EXAMPLES:
            accumulator.examples.append(_summary(example, *result.row[:2]))
        if result.has_bad_mask:
            accumulator.bad_masks.append(name)
    accumulator.images.append(np.array(rows, dtype=IMAGE_DTYPE))
    accumulator.boxes.append(np.array(boxes, dtype=BOX_DTYPE))


def _summary(example: Example, height: int, width: int) -> ExampleSummary:
    path, label, objects = example["image"].get("path"), example.get("label"), example.get("objects")
    return ExampleSummary(
        file=redact_url(path) if path else None,
        width=width,
        height=height,
        label=label if label is not None and label >= 0 else None,
        boxes=None if objects is None else objects["bbox"],
        categories=None if objects is None else objects["category"],
    )


def _report(accumulator: Accumulator, source: Source, findings: list[str], *, is_complete: bool) -> Report:
    images = np.concatenate([np.zeros(0, IMAGE_DTYPE), *accumulator.images])
    boxes = np.concatenate([np.zeros(0, BOX_DTYPE), *accumulator.boxes])
    exact, near = _duplicates(images, accumulator.names)
    issues = image_issues(images, accumulator.names, accumulator.bad_masks)
    issues += size_issues(images, source, accumulator.names)
    label_counts, box_report = None, None
    if source.label_names is not None:
        label_counts = _counts(images["label"], source.label_names)
        issues += label_issues(images, label_counts, accumulator.names)
    if source.object_names is not None:
        box_report = _box_report(images, boxes, source.object_names)
        if source.has_object_masks:
            box_report = replace(box_report, num_masks=accumulator.num_object_masks)
        finding, is_certain = box_convention(images, boxes, source.name)
        if finding is not None:
            issues.append(Issue(f"boxes; {finding}", len(boxes), []))
        if is_certain:  # sizes of boxes that are something else say nothing
            box_report = replace(box_report, small_relative_size=None)
        issues += box_issues(images, boxes, box_report, accumulator.names)
    issues += accumulator.pixels.issues(source.mask_names)
    return Report(
        num_images=len(images),
        is_complete=is_complete,
        columns=list(source.features),
        formats=dict(accumulator.formats),
        median_bytes=float(np.median(images["num_bytes"])) if len(images) else None,
        total_bytes=int(images["num_bytes"].sum()),
        height=MinMedianMax.of(images["height"]),
        width=MinMedianMax.of(images["width"]),
        aspect_ratio=MinMedianMax.of(images["width"] / images["height"]),
        total_pixels=int((images["width"].astype(np.int64) * images["height"]).sum()),
        label_counts=label_counts,
        boxes=box_report,
        masks=accumulator.pixels.report(source.mask_names),
        exact_duplicates=exact,
        near_duplicates=near,
        unreadable=accumulator.unreadable,
        issues=issues,
        findings=list(dict.fromkeys(findings)),
        label_names=source.label_names,
        class_names=source.object_names,
        examples=accumulator.examples,
    )


def _duplicates(images: Array, names: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    exact = exact_duplicates(images["digest"])
    is_first = np.ones(len(images), dtype=bool)
    for group in exact:
        is_first[group[1:]] = False
    compared = np.flatnonzero(is_first & images["has_structure"])
    near = near_duplicates(images["hash"][compared], images["colors"][compared])
    near = [compared[group].tolist() for group in near]
    return [[names[index] for index in group] for group in exact], [
        [names[index] for index in group] for group in near
    ]


def _counts(indices: Array, names: list[str]) -> dict[str, int]:
    known = indices[(indices >= 0) & (indices < len(names))]
    return dict(zip(names, np.bincount(known, minlength=len(names)).tolist(), strict=True))


def _box_report(images: Array, boxes: Array, class_names: list[str]) -> BoxReport:
    height, width = (images[side][boxes["image"]].astype(np.float64) for side in ("height", "width"))
    clipped, keep = clean_boxes(boxes["box"], width=width, height=height)
    area = clipped[keep, 2].astype(np.float64) * clipped[keep, 3]
    relative = np.sqrt(area / (width * height)[keep])
    num_boxes = np.bincount(boxes["image"], minlength=len(images))  # (images,)
    is_small, is_large = area < SMALL_AREA, area >= LARGE_AREA
    sizes = {"small": is_small, "medium": ~is_small & ~is_large, "large": is_large}
    judged = relative[is_small]
    if len(area) and is_small.mean() < MIN_SMALL_FRACTION:
        judged = np.sort(relative)[: max(round(SMALLEST_FRACTION * len(relative)), 1)]
    return BoxReport(
        num_boxes=len(boxes),
        num_images_without=int((num_boxes == 0).sum()),
        per_image=MinMedianMax.of(num_boxes),
        class_counts=_counts(boxes["category"], class_names),
        size_fractions={name: float(is_size.mean()) if len(area) else 0.0 for name, is_size in sizes.items()},
        relative_size=MinMedianMax.of(relative),
        small_relative_size=float(np.median(judged)) if len(judged) else None,
    )
