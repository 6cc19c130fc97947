"""Datasets on the Hugging Face Hub, streamed."""

import logging
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hf_vlm.data.formats.box_conventions import warn_of_convention
from hf_vlm.data.formats.categories import Categories, read_categories
from hf_vlm.data.formats.columns import ColumnMap, RowReader, category_feature, find_columns
from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE, name_mask_classes
from hf_vlm.data.formats.repeated_images import check_repeated_images
from hf_vlm.data.formats.splits import choose_split
from hf_vlm.data.io.decode import image_size
from hf_vlm.data.io.files import near_path
from hf_vlm.data.source import Source
from hf_vlm.models.nearest_name import did_you_mean

__all__ = ["open_hub"]

logger = logging.getLogger(__name__)

SAMPLE_SIZE = 32  # images whose sizes are read to see what boxes are


def open_hub(
    source: str,
    split: str,
    *,
    num_samples: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    object_masks: bool = True,
) -> Source:
    """Stream a split of a dataset on the Hub, whose columns are found by name and type (see `find_columns`).

    Classes are those that the features declare; labels without declared classes are left out.

    Args:
        source: Id of the dataset.
        split: Name of the split.
        num_samples: Number of examples to read, from the first on; None for all.
        name: Name of the dataset's configuration.
        revision: Branch, tag or commit of the dataset.
        object_masks: Whether to read the masks of objects.

    Raises:
        ValueError: There is no such dataset or split, it cannot be reached, it has no column of images, its boxes are
            of another convention, or an image with several objects has several rows.
    """
    # A stream that is closed early would sleep for seconds; nothing here needs that.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    try:
        splits = datasets.load_dataset(source, name, revision=revision, streaming=True)
    except Exception as error:  # many types: no such dataset, no network, a gate, a missing configuration
        hint = did_you_mean(source, ["scenes"]) or near_path(Path(source)) or "."
        raise ValueError(
            f"{source} is no folder or file here, and as a dataset on the Hub it cannot be opened: {error}{hint} "
            f"For a private or gated one, accept its terms at https://huggingface.co/datasets/{source} and log in: "
            "hf auth login"
        ) from error
    stream = choose_split(splits, split, source).decode(False)
    features = stream.features if stream.features is not None else stream._resolve_features().features
    columns = find_columns(features, source)
    columns = columns if object_masks else columns.without_object_masks()
    reader = RowReader(
        map=columns,
        label=_declared(features, columns, "label", source),
        category=_declared(features, columns, "objects", source),
        source=source,
        folder=_place(source, revision),
    )
    declared = (stream.info.splits or {}).get(str(stream.split))
    if num_samples is not None:
        stream = stream.take(num_samples)
    raw = list(columns.source_names)
    examples = stream.select_columns(raw).map(reader, remove_columns=raw, features=reader.features)
    if reader.category is not None:
        _judge_boxes(examples, columns, source)
    num_examples = (declared.num_examples if declared is not None else None) or None
    if num_examples is not None and num_samples is not None:
        num_examples = min(num_examples, num_samples)
    opened = Source(dataset=examples, num_examples=num_examples)
    path = _mask_classes(source, revision) if "mask" in reader.features else None
    return opened if path is None else name_mask_classes(opened, path)


def _place(source: str, revision: str | None) -> str:
    """The folder or URL that paths in rows are relative to; `datasets` opens folders on disk too."""
    if Path(source).exists():
        return source
    return f"hf://datasets/{source}" if revision is None else f"hf://datasets/{source}@{revision}"


def _mask_classes(source: str, revision: str | None) -> Path | None:
    """The file that names the values of masks, or the folder on disk to look for it; None where there is none."""
    if Path(source).exists():
        return Path(source)
    try:
        return Path(hf_hub_download(source, MASK_CLASSES_FILE, repo_type="dataset", revision=revision))
    except EntryNotFoundError:
        return None


def _judge_boxes(examples: datasets.IterableDataset, columns: ColumnMap, source: str) -> None:
    """See by the first images whether boxes are what they should be; others are not read to open a data set."""
    first = list(examples.take(SAMPLE_SIZE))
    rows = [row for row, example in enumerate(first) for _ in example["objects"]["bbox"]]
    boxes = [box for example in first for box in example["objects"]["bbox"]]
    if not boxes:
        return
    if len(set(rows)) == len(rows):
        images = (first[row]["image"] for row in rows)
        objects = ((tuple(box), *first[row]["objects"]["category"]) for row, box in zip(rows, boxes))
        check_repeated_images((image["bytes"] or image["path"] for image in images), objects, rows, columns, source)
    sizes = [image_size(example["image"]) or (np.inf, np.inf) for example in first]
    shown = np.array([sizes[row][::-1] for row in rows], dtype=np.float64).T  # (2, boxes), width and height
    warn_of_convention(np.array(boxes, dtype=np.float64), shown, source)


def _declared(features: datasets.Features, columns: ColumnMap, column: str, source: str) -> Categories | None:
    """The classes that the features of a column declare: the values of a remote source are not read to find them."""
    if column not in columns.columns and not (column == "objects" and columns.objects):
        return None
    name = columns.columns["label"] if column == "label" else columns.objects_name
    categories = read_categories(features[name] if column == "label" else category_feature(features, columns))
    if categories is None:
        logger.warning("%s: the column %r is left out: without ClassLabel its classes are not known", source, name)
    return categories
