"""A detector and the images that it is run on: how they are prepared, and what it finds in them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_vlm.data.loader import StreamLoader
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor

__all__ = ["DetectedBatch", "detect", "detection_transform", "original_size"]


def detection_transform(
    processor: VLMViTDetectionImageProcessor,
    *,
    train: bool,
    class_names: Sequence[str],
    augmentation: dict[str, Any] | None = None,
) -> DetectionTransform:
    """The transform that prepares images as the processor does, and augments them in training."""
    return DetectionTransform.from_dict(
        augmentation or {},
        size=(processor.size["height"], processor.size["width"]),
        train=train,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=len(processor.image_mean),
        num_classes=len(class_names),
    )


class DetectedBatch(NamedTuple):
    """What a detector finds in the images of a batch, on the CPU."""

    found: list[dict[str, Tensor]]  # of all scores, as `post_process_object_detection` gives them, in pixels
    labels: list[dict[str, Tensor]]  # as the transform made them
    num_queries: int  # of an image


def detect(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTDetectionImageProcessor,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[DetectedBatch]:
    """Runs a detector, which is in evaluation mode, on all images of a stream."""
    device = next(model.parameters()).device
    for batch in StreamLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_detection):
        with torch.inference_mode():
            outputs = model(pixel_values=batch["pixel_values"].to(device))
            sizes = [original_size(labels) for labels in batch["labels"]]
            found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        found = [{name: value.cpu() for name, value in image.items()} for image in found]
        yield DetectedBatch(found, batch["labels"], outputs.logits.shape[1])


def original_size(labels: dict[str, Tensor]) -> tuple[int, int]:
    """Height and width in pixels of the image that labels are of, as it is displayed."""
    height, width = labels["orig_size"].tolist()
    return height, width
