"""Semantic segmentation: a class for each pixel, evaluated by mean IoU at the size of the masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE
from hf_vlm.data.masks import IGNORED
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.segmentation import (
    SegmentationEvalTransform,
    SegmentationTransform,
    collate_segmentation,
)
from hf_vlm.metrics.segmentation import confusion_segmentation_metrics, pixel_confusion
from hf_vlm.models.image_processing_semantic_segmentation import VLMViTSemanticSegmentationImageProcessor
from hf_vlm.tasks.reports.segmentation import SegmentationOutcomes, report_segmentation
from hf_vlm.tasks.task import Collate, Evaluation, ServedOutput, Task

__all__ = ["SEMANTIC_SEGMENTATION", "count_pixels", "evaluate_segmentation"]


def class_names(source: Source) -> list[str]:
    """The names of the values of a source's masks.

    Raises:
        ValueError: The source has no masks, or their names are not known, or are too few or too many.
    """
    if "mask" not in source.features:
        raise ValueError(
            f"{source.name} has no masks in split {source.split!r}: semantic segmentation needs a column 'mask' with "
            "a class for each pixel."
        )
    names = source.mask_names
    if names is None:
        raise ValueError(
            f"{source.name} has masks in split {source.split!r}, but the names of their values are not known: put "
            f"a file {MASK_CLASSES_FILE} into its folder, whose lines name the values 0, 1, 2, ..."
        )
    if not 2 <= len(names) <= IGNORED:
        raise ValueError(
            f"{source.name} has {len(names)} classes of pixels in split {source.split!r}, but semantic segmentation "
            f"takes 2 to {IGNORED}, one of which may be the background."
        )
    return names


def segmentation_transform(
    processor: VLMViTSemanticSegmentationImageProcessor,
    *,
    train: bool,
    class_names: Sequence[str],
    augmentation: Mapping[str, Any] | None = None,
) -> Transform:
    """The transform that augments images with their masks in training, and else prepares them by the processor."""
    if not train:
        return SegmentationEvalTransform(processor, num_classes=len(class_names))
    return SegmentationTransform.from_dict(
        augmentation or {},
        size=processor.input_hw,
        num_classes=len(class_names),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        num_channels=processor.num_channels,
        letterbox=bool(processor.do_pad),
    )


def collate(**_: Any) -> Collate:
    """A function that stacks training images and their masks."""
    return collate_segmentation


@torch.inference_mode()
def count_pixels(
    model: PreTrainedModel,
    stream: ExampleStream,
    processor: VLMViTSemanticSegmentationImageProcessor,
    *,
    num_classes: int,
    batch_size: int = 32,
) -> tuple[NDArray[np.int64], SegmentationOutcomes]:
    """Pixels (classes, classes) of this rank's images by true class (rows) and predicted class, at the masks' size;
    and how good each image is.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    counts, outcomes = np.zeros((num_classes, num_classes), dtype=np.int64), SegmentationOutcomes()
    loader = DataLoader(stream, batch_size=batch_size, collate_fn=list)
    for examples in tqdm(loader, desc="Evaluating", leave=False, disable=stream.rank != 0 or None):
        inputs = torch.cat([example["pixel_values"] for example in examples])  # (images or windows, C, H, W)
        logits = torch.cat([model(pixel_values=part.to(device)).logits for part in inputs.split(batch_size)])
        masks = [example["labels"] for example in examples]
        found = processor.post_process_semantic_segmentation(
            SemanticSegmenterOutput(logits=logits), target_sizes=[tuple(mask.shape) for mask in masks]
        )
        for mask, classes in zip(masks, found, strict=True):
            of_image = pixel_confusion(mask, classes.cpu(), num_classes, ignore_index=IGNORED)
            outcomes.add(of_image, classes.cpu().numpy(), mask.numpy())
            counts += of_image
    model.train(was_training)
    return counts, outcomes


def evaluate_segmentation(
    model: PreTrainedModel,
    stream: ExampleStream,
    processor: VLMViTSemanticSegmentationImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 32,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
) -> Evaluation:
    """Mean IoU and accuracies over the pixels of a stream, summed over all ranks; whole images or windows, as the
    processor's `inference` says.

    Raises:
        ValueError: The stream has no pixel with a class.
    """
    counts, outcomes = count_pixels(model, stream, processor, num_classes=len(class_names), batch_size=batch_size)
    if stream.world_size > 1:
        counts = np.sum(gather_object([counts]), axis=0)
    return Evaluation(
        metrics=confusion_segmentation_metrics(counts, class_names=class_names, per_class=per_class),
        class_names=class_names,
        confusion=counts,
        counted="pixels",
        outcomes=outcomes,
    )


def has_confusion(model: PreTrainedModel) -> bool:
    """True: every model gives one class per pixel."""
    return True


def post_process(
    processor: VLMViTSemanticSegmentationImageProcessor,
    outputs: Any,
    *,
    threshold: float | None,
    sizes: Sequence[tuple[int, int]],
    model: PreTrainedModel,
) -> list[dict[str, Tensor]]:
    """One dict per image: `segmentation` (height, width), and of the classes in it that cover at least a fraction
    `threshold` of the image (0 where none is given), largest first, `labels`, and as `scores` these fractions.
    """
    results = []
    for classes in processor.post_process_semantic_segmentation(outputs, target_sizes=sizes):
        fractions = classes.flatten().bincount(minlength=model.config.num_labels) / classes.numel()
        scores, labels = fractions.sort(descending=True, stable=True)
        is_shown = (scores > 0) & (scores >= (threshold or 0.0))
        results.append({"segmentation": classes, "scores": scores[is_shown], "labels": labels[is_shown]})
    return results


SEMANTIC_SEGMENTATION = Task(
    name="semantic-segmentation",
    pipeline="image-segmentation",
    class_names=class_names,
    transform=segmentation_transform,
    collate=collate,
    evaluate=evaluate_segmentation,
    has_confusion=has_confusion,
    post_process=post_process,
    report=report_segmentation,
    served=ServedOutput(output_class="transformers.modeling_outputs.SemanticSegmenterOutput", fields=("logits",)),
    headline={"miou": "mIoU", "pixel_accuracy": "pixel accuracy"},
    metric_names={
        "iou/": "IoU",
        "miou": "mIoU (mean intersection over union of the classes)",
        "mean_accuracy": "mean accuracy of the classes",
        "pixel_accuracy": "pixel accuracy",
    },
    undefined={"iou/": "neither in this split nor predicted"},
    recipes={"nano": "segmentation/vit_nano_cpu.yaml", "small": "segmentation/vit_small.yaml"},
    card="segmenter.md",
)
