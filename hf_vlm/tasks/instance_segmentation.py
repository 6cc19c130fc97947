"""Instance segmentation: boxes and masks with classes, evaluated by COCO metrics of masks, boundaries and boxes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.data.transforms.detection import DetectionTransform
from hf_vlm.metrics.coco import best_per_class
from hf_vlm.metrics.instance_segmentation import coco_instance_metrics, encode_masks
from hf_vlm.models.image_processing_instance_segmentation import VLMViTInstanceSegmentationImageProcessor
from hf_vlm.tasks.calibration import threshold_of_best_f1
from hf_vlm.tasks.detection import F1_NAMES, UNDEFINED, choose_threshold, collate, minimum_fields, predict_detection
from hf_vlm.tasks.detector import detection_transform
from hf_vlm.tasks.pseudo_labels import find_pseudo_labels
from hf_vlm.tasks.reports.detection import report_detection
from hf_vlm.tasks.task import Evaluation, ServedOutput, Task

__all__ = ["INSTANCE_SEGMENTATION", "evaluate_instance_segmentation", "predict_instances"]

MAX_DETECTIONS = 100  # per image and class, as COCO counts them; no others get a mask


def class_names(source: Source) -> list[str]:
    """The classes of the objects; ValueError for data whose objects have no masks."""
    if source.object_names is None or not source.has_object_masks:
        what = "no objects" if source.object_names is None else "boxes without masks"
        raise ValueError(
            f"{source.name} has {what} in split {source.split!r}: instance segmentation needs a mask of each object, "
            "as polygons or run lengths."
        )
    return source.object_names


def instance_transform(
    processor: VLMViTInstanceSegmentationImageProcessor,
    *,
    train: bool,
    class_names: Sequence[str],
    augmentation: dict[str, Any] | None = None,
) -> DetectionTransform:
    """The detector's transform, with the masks of the objects."""
    return detection_transform(processor, train=train, class_names=class_names, augmentation=augmentation, masks=True)


def predict_instances(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTInstanceSegmentationImageProcessor,
    *,
    batch_size: int = 32,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions and references of all images of a stream, with masks as run lengths, for `coco_instance_metrics`."""

    def find(outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        found = processor.find_instances(outputs, threshold=0.0, target_sizes=sizes)
        return [_with_encoded_masks(processor, image) for image in found]

    return predict_detection(model, stream, processor, batch_size=batch_size, find=find)


def _with_encoded_masks(
    processor: VLMViTInstanceSegmentationImageProcessor, image: Mapping[str, Any]
) -> dict[str, Any]:
    """The detections of an image that can count, their masks encoded: no other masks are resized."""
    kept = torch.from_numpy(best_per_class(image["scores"].cpu(), image["labels"].cpu(), MAX_DETECTIONS))
    best = {name: image[name].cpu()[kept] for name in ("scores", "labels", "boxes")}
    chunks = processor.binary_masks(image["mask_logits"][kept.to(image["mask_logits"].device)], image["size"])
    return best | {"masks": [encoded for chunk in chunks for encoded in encode_masks(chunk)]}


def evaluate_instance_segmentation(
    model: nn.Module,
    stream: ExampleStream,
    processor: VLMViTInstanceSegmentationImageProcessor,
    *,
    class_names: Sequence[str],
    batch_size: int = 32,
    per_class: bool = False,
    fit_stream: ExampleStream | None = None,
) -> Evaluation:
    """COCO metrics of masks, their boundaries and boxes over a stream, gathered from all ranks, and the best F1 of
    the boxes, as a detector's evaluation has it.

    Raises:
        ValueError: The stream has no images.
    """
    predictions, references = predict_instances(model, stream, processor, batch_size=batch_size)
    if stream.world_size > 1:
        predictions, references = gather_object(predictions), gather_object(references)
    options: dict[str, Any] = {"class_names": class_names, "per_class": per_class, "max_detections": MAX_DETECTIONS}
    metrics = coco_instance_metrics(predictions, references, **options)
    best, outcomes = choose_threshold(predictions, references, processor)
    return Evaluation(metrics=metrics | best, class_names=class_names, outcomes=outcomes)


def post_process(
    processor: VLMViTInstanceSegmentationImageProcessor,
    outputs: Any,
    *,
    threshold: float | None,
    sizes: Sequence[tuple[int, int]],
    model: nn.Module,
) -> list[dict[str, Tensor]]:
    """Boxes in pixels, scores, labels and `masks` (n, height, width) of each image; the threshold is the processor's
    where none is given.
    """
    found = processor.find_instances(outputs, threshold=threshold, target_sizes=sizes)
    return [
        {name: image[name] for name in ("scores", "labels", "boxes")}
        | {"masks": torch.cat(list(processor.binary_masks(image["mask_logits"], image["size"])))}
        for image in found
    ]


INSTANCE_SEGMENTATION = Task(
    name="instance-segmentation",
    pipeline="image-segmentation",
    class_names=class_names,
    transform=instance_transform,
    minimum_fields=minimum_fields,
    collate=collate,
    evaluate=evaluate_instance_segmentation,
    post_process=post_process,
    calibrate=threshold_of_best_f1,
    report=functools.partial(report_detection, prefix="box_"),
    served=ServedOutput(
        output_class="transformers.models.detr.modeling_detr.DetrSegmentationOutput",
        fields=("logits", "pred_boxes", "pred_masks"),
        is_set=True,
    ),
    headline={"mask_ap": "mask AP", "mask_ap50": "mask AP50", "boundary_ap": "boundary AP", "box_ap": "box AP"},
    metric_names={
        "mask_ap/": "mask AP",
        "boundary_ap/": "boundary AP",
        "box_ap/": "box AP",
        "mask_ap": "mask AP (IoU 0.50:0.95)",
        "mask_ap50": "mask AP50",
        "mask_ap75": "mask AP75",
        "boundary_ap": "boundary AP",
        "boundary_ap50": "boundary AP50",
        "box_ap": "box AP",
        "box_ap50": "box AP50",
        **F1_NAMES,
    },
    undefined={
        name if name in F1_NAMES else f"{kind}_{name}": reason
        for kind in ("mask", "boundary", "box")
        for name, reason in UNDEFINED.items()
    },
    recipes={"nano": "instance_segmentation/vit_nano_cpu.yaml", "small": "instance_segmentation/vit_small.yaml"},
    card="instance_segmenter.md",
    find_labels=functools.partial(find_pseudo_labels, masks=True),
    reads_object_masks=True,
)
