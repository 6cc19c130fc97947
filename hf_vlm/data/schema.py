"""The columns of a stream and their types."""

from collections.abc import Sequence

import datasets

__all__ = ["COLUMNS", "captions_feature", "image_feature", "objects_feature"]

# Every column a stream may have; `image` and `image_id` are always there.
COLUMNS = ("image", "image_id", "label", "objects", "mask", "instance_mask", "text")


def image_feature() -> datasets.Image:
    """Type of `image`, `mask` and `instance_mask`: the encoded file as {"bytes", "path"}, one of them None."""
    return datasets.Image(decode=False)


def captions_feature() -> datasets.List:
    """Type of `text`: the captions of an image, any of which describes it."""
    return datasets.List(datasets.Value("string"))


def objects_feature(class_names: Sequence[str], *, has_masks: bool = False) -> dict[str, datasets.List]:
    """Type of `objects`: lists with one entry per object; `bbox` is x, y, width, height in absolute pixels.

    Args:
        class_names: Names of the categories.
        has_masks: Whether objects have their `segmentation`, as text (see `hf_vlm.data.segmentations`).
    """
    feature = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(class_names))),
        "area": datasets.List(datasets.Value("float32")),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }
    return feature | {"segmentation": datasets.List(datasets.Value("string"))} if has_masks else feature
