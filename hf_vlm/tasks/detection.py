"""Object detection: boxes with classes, evaluated by COCO metrics."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.tiles import Tiling
from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.metrics import best_f1, coco_detection_metrics, match_detections
from hf_vlm.metrics.coco import AREA_RANGES
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.tasks.calibration import threshold_of_best_f1
from hf_vlm.tasks.detector import (
    Find,
    TileTransform,
    detect,
    detect_in_tiles,
    detection_transform,
    original_size,
)
from hf_vlm.tasks.pseudo_labels import find_pseudo_labels
from hf_vlm.tasks.reports.detection import DetectionOutcomes, report_detection
from hf_vlm.tasks.task import Collate, Evaluation, ServedOutput, Task

__all__ = ["DETECTION", "choose_threshold", "evaluate_detection", "predict_detection"]

F1_NAMES = {  # of the metrics of `choose_threshold`
    "f1": "best F1 over all score thresholds (IoU 0.5)",
    "precision": "precision at the best F1",
    "recall": "recall at the best F1",
    "score_threshold": "score threshold of the best F1",
}
UNDEFINED = {  # why metrics of detections may be NaN
    **{f"{metric}_{size}": f"no {size} objects in this split" for metric in ("ap", "ar") for size in AREA_RANGES[1:]},
    **dict.fromkeys(("ap", "ap50", "ap75", "ar_1", "ar_10", "ar_100", "f1", "recall"), "no objects in this split"),
    **dict.fromkeys(("precision", "score_threshold"), "no prediction is right"),
    "ap/": "no objects of this class in this split",
}

logger = logging.getLogger(__name__)


def class_names(source: Source) -> list[str]:
    """The classes of the boxes; ValueError for data without boxes."""
    if source.object_names is None:
        raise ValueError(f"{source.name} has no boxes in split {source.split!r}: detection needs images with boxes.")
    return source.object_names


def minimum_fields(source: Source) -> dict[str, int]:
    """Half as many queries again as objects in the fullest image: each query finds one object at most."""
    return {} if source.max_objects is None else {"num_queries": math.ceil(1.5 * source.max_objects)}


def collate(**_: Any) -> Collate:
    """A function that stacks images and keeps one dict of labels per image."""
    return collate_detection


def predict_detection(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTDetectionImageProcessor,
    *,
    batch_size: int = 32,
    find: Find | None = None,
    in_tiles: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions (by `find`, see `detect`) and references of all images of a stream, in pixels, for COCO metrics.

    Args:
        in_tiles: Whether the stream gives tiles of images, in each of which is looked.
    """
    was_training = model.training
    model.eval()
    predictions, references, num_queries = [], [], []
    if in_tiles:
        batches = detect_in_tiles(model, stream, processor, batch_size=batch_size)
    else:
        batches = detect(model, stream, processor, batch_size=batch_size, find=find)
    for batch in tqdm(batches, desc="Evaluating", leave=False, disable=stream.rank != 0 or None):
        predictions += batch.found
        references += [_reference(labels, processor) for labels in batch.labels]
        num_queries += [batch.num_queries] * len(batch.labels)
    model.train(was_training)
    _warn_of_few_queries(num_queries, references)
    return predictions, references


def _warn_of_few_queries(num_queries: Sequence[int], references: Sequence[dict[str, Any]]) -> None:
    counts = [len(reference["boxes"]) for reference in references]
    crowded = [count for count, most in zip(counts, num_queries, strict=True) if count > most]
    if crowded:
        logger.warning(
            "%d of %d images hold more objects (up to %d) than the model has queries (%d), each of which finds one at "
            "most. Fine-tune with a larger model_config.num_queries; where that is larger already, there are no more "
            "locations: take a larger image_size, or num_neck_levels: 2.",
            len(crowded),
            len(references),
            max(crowded),
            min(num_queries),
        )


def _reference(labels: dict[str, Any], processor: VLMViTDetectionImageProcessor) -> dict[str, Any]:
    centre, extent = labels["boxes"].cpu().split(2, dim=-1)
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1)  # (n, 4) in 0..1
    height, width = processor.covered_size(original_size(labels))
    return {
        "boxes": corners * torch.tensor([width, height, width, height]),
        "labels": labels["class_labels"].cpu(),
        "area": labels["area"].cpu(),
        "iscrowd": labels["iscrowd"].cpu(),
        **({"masks": labels["segmentation"]} if "segmentation" in labels else {}),
    }


def evaluate_detection(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTDetectionImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 32,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
    in_tiles: bool = False,
) -> Evaluation:
    """COCO metrics over a stream, gathered from all ranks; ValueError for a stream without images.

    Also the best F1, see `choose_threshold`.
    """
    predictions, references = predict_detection(model, stream, processor, batch_size=batch_size, in_tiles=in_tiles)
    if stream.world_size > 1:
        predictions, references = gather_object(predictions), gather_object(references)
    metrics = coco_detection_metrics(predictions, references, class_names=class_names, per_class=per_class)
    best, outcomes = choose_threshold(predictions, references, processor)
    return Evaluation(metrics=metrics | best, class_names=class_names, outcomes=outcomes)


def choose_threshold(
    predictions: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    processor: VLMViTDetectionImageProcessor,
) -> tuple[dict[str, float], DetectionOutcomes]:
    """The best `f1` over all score thresholds, at IoU 0.5 of the boxes and of all classes together, with its
    `precision`, `recall` and `score_threshold`; and the matches of which they are, for the report.
    """
    matches = match_detections(predictions, references)
    counted = matches.counts
    best = best_f1(matches.scores[counted], matches.is_right[counted], len(matches.object_labels))
    metrics = {"f1": best.f1, "precision": best.precision, "recall": best.recall, "score_threshold": best.threshold}
    return metrics, DetectionOutcomes(matches, processor.score_threshold)


def post_process(
    processor: VLMViTDetectionImageProcessor,
    outputs: Any,
    *,
    threshold: float | None,
    sizes: Sequence[tuple[int, int]],
    model: nn.Module,
) -> list[dict[str, Tensor]]:
    """Boxes in pixels, scores and labels of each image; the threshold is the processor's where none is given."""
    return processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)


def detection_in_tiles(tiling: Tiling) -> Task:
    """The task whose evaluation, and transform for it, is of tiles."""

    def transform(
        processor: VLMViTDetectionImageProcessor, *, train: bool, class_names: Sequence[str], **options: Any
    ) -> Transform:
        whole = detection_transform(processor, train=train, class_names=class_names, **options)
        return whole if train else TileTransform(whole, processor, tiling)

    evaluate = functools.partial(evaluate_detection, in_tiles=True)
    return dataclasses.replace(DETECTION, transform=transform, evaluate=evaluate)


DETECTION = Task(
    name="object-detection",
    class_names=class_names,
    transform=detection_transform,
    minimum_fields=minimum_fields,
    collate=collate,
    evaluate=evaluate_detection,
    post_process=post_process,
    calibrate=threshold_of_best_f1,
    report=report_detection,
    tile=detection_in_tiles,
    find_labels=find_pseudo_labels,
    served=ServedOutput(
        output_class="transformers.models.detr.modeling_detr.DetrObjectDetectionOutput",
        fields=("logits", "pred_boxes"),
        is_set=True,
    ),
    headline={"ap": "AP", "ap50": "AP50"},
    metric_names={
        "ap/": "AP",
        "ap": "AP (IoU 0.50:0.95)",
        "ap50": "AP50",
        "ap75": "AP75",
        "ap_small": "AP, small objects (under 32 x 32 pixels)",
        "ap_medium": "AP, medium objects",
        "ap_large": "AP, large objects (96 x 96 pixels and more)",
        "ar_1": "AR, 1 detection per image",
        "ar_10": "AR, 10 detections",
        "ar_100": "AR, 100 detections",
        "ar_small": "AR, small objects",
        "ar_medium": "AR, medium objects",
        "ar_large": "AR, large objects",
        **F1_NAMES,
    },
    undefined=UNDEFINED,
    recipes={"nano": "detection/vit_nano_cpu.yaml", "small": "detection/vit_small.yaml"},
    card="detector.md",
)
