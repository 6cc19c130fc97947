"""A detector and the images that it is run on: how they are prepared, and what it finds in them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.loader import StreamLoader
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.tiles import Tiling, merge_tiles
from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor

__all__ = [
    "DetectedBatch",
    "Find",
    "TileTransform",
    "detect",
    "detect_in_tiles",
    "detection_transform",
    "original_size",
]

Find = Callable[[Any, Sequence[tuple[int, int]]], list[dict[str, Any]]]


def detection_transform(
    processor: VLMViTDetectionImageProcessor,
    *,
    train: bool,
    class_names: Sequence[str],
    augmentation: dict[str, Any] | None = None,
    masks: bool = False,
) -> DetectionTransform:
    """The transform that prepares images as the processor does, and augments them in training.

    Args:
        masks: Whether it gives the masks of the objects too.
    """
    return DetectionTransform.from_dict(
        augmentation or {},
        size=processor.input_hw,
        train=train,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
        num_classes=len(class_names),
        masks=masks,
        letterbox=bool(processor.do_pad),
    )


class TileTransform:
    """A detector's transform for evaluation whose `pixel_values` (tiles, C, H, W) are those of the image's tiles.

    `labels` are those of the whole image, and `tiles` says where the tiles are.
    """

    def __init__(
        self, transform: DetectionTransform, processor: VLMViTDetectionImageProcessor, tiling: Tiling
    ) -> None:
        self.transform, self.processor, self.tiling = transform, processor, tiling

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, size = decode_image(example["image"], num_channels=self.processor.num_channels)
        tiles = self.tiling.tiles(size)
        windows = [np.ascontiguousarray(image[tile.slices]) for tile in tiles]
        inputs = self.processor(windows, return_tensors="pt", input_data_format="channels_last")
        return {**self.transform(example, rng), "pixel_values": inputs["pixel_values"], "tiles": tiles}


class DetectedBatch(NamedTuple):
    """What a detector finds in the images of a batch, on the CPU."""

    found: list[dict[str, Any]]  # of all scores, as `find` gives them, in pixels
    labels: list[dict[str, Any]]  # as the transform made them
    num_queries: int  # of each image


def detect(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTDetectionImageProcessor,
    *,
    batch_size: int,
    num_workers: int = 0,
    find: Find | None = None,
) -> Iterator[DetectedBatch]:
    """Runs a detector, which is in evaluation mode, on all images of a stream.

    Args:
        find: Function `(outputs, sizes)` from the outputs of a batch, and the height and width of its images, to what
            is found in each, on the CPU; the processor's `post_process_object_detection` by default.
    """
    device = next(model.parameters()).device
    find = find or functools.partial(_find_boxes, processor)
    for batch in StreamLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_detection):
        with torch.inference_mode():
            outputs = model(pixel_values=batch["pixel_values"].to(device))
            sizes = [original_size(labels) for labels in batch["labels"]]
            found = find(outputs, sizes)
        yield DetectedBatch(found, batch["labels"], outputs.logits.shape[1])


def detect_in_tiles(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTDetectionImageProcessor,
    *,
    batch_size: int,
) -> Iterator[DetectedBatch]:
    """As `detect`, of a stream with a [`TileTransform`]: in the tiles of each image, merged. `batch_size` is that of
    tiles."""
    device = next(model.parameters()).device
    for image in StreamLoader(stream, batch_size=None):
        found, tiles = [], image["tiles"]
        for first in range(0, len(tiles), batch_size):
            part = slice(first, first + batch_size)
            with torch.inference_mode():
                outputs = model(pixel_values=image["pixel_values"][part].to(device))
                sizes = [(tile.bottom - tile.top, tile.right - tile.left) for tile in tiles[part]]
                found += _find_boxes(processor, outputs, sizes)
        in_tiles = [{name: value.numpy() for name, value in one.items()} for one in found]
        merged = merge_tiles(in_tiles, tiles, image_size=original_size(image["labels"]))
        in_image = {name: torch.from_numpy(value) for name, value in merged.items()}
        yield DetectedBatch([in_image], [image["labels"]], outputs.logits.shape[1] * len(tiles))


def _find_boxes(
    processor: VLMViTDetectionImageProcessor, outputs: Any, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    return [{name: value.cpu() for name, value in image.items()} for image in found]


def original_size(labels: dict[str, Tensor]) -> tuple[int, int]:
    """Height and width in pixels of the image that labels are of, as it is displayed."""
    height, width = labels["orig_size"].tolist()
    return height, width
