"""The columns of a stream, and questions about them."""

from collections.abc import Sequence

import datasets

__all__ = ["COLUMNS", "class_names", "has_boxes", "image_feature", "objects_feature", "unlabelled"]

# Every column a stream may have; `image` and `image_id` are always there.
COLUMNS = ("image", "image_id", "label", "objects", "mask", "instance_mask")


def image_feature() -> datasets.Image:
    """Of `image`, `mask` and `instance_mask`: the encoded file as {"bytes", "path"}, one of them None."""
    return datasets.Image(decode=False)


def objects_feature(class_names: Sequence[str]) -> dict[str, datasets.List]:
    """Of `objects`: lists with one entry an object; `bbox` is x, y, width, height in absolute pixels."""
    return {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(class_names))),
        "area": datasets.List(datasets.Value("float32")),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }


def class_names(stream: datasets.IterableDataset) -> list[str] | None:
    """Names of the objects' categories, or else of the labels; None where a stream has neither."""
    features = stream.features or {}
    if "objects" in features:
        return list(features["objects"]["category"].feature.names)
    if "label" in features:
        return list(features["label"].names)
    return None


def has_boxes(stream: datasets.IterableDataset) -> bool:
    """Whether the stream has the column `objects`."""
    return "objects" in (stream.features or {})


def unlabelled(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream with nothing but `image` and `image_id`."""
    return stream.select_columns(["image", "image_id"])
