"""Image processor of the detector: that of the encoder, COCO's annotations to labels, and boxes back to pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import BatchFeature

from .image_processing_vlm_vit import VLMViTImageProcessor


class VLMViTDetectionImageProcessor(VLMViTImageProcessor):
    """[`VLMViTImageProcessor`] with labels and post-processing of a [`VLMViTForObjectDetection`].

    Attributes:
        score_threshold: Lowest score that `post_process_object_detection` keeps where no other is given. Fine-tuning
            stores the one of the best F1 on held-out images here.
    """

    score_threshold = 0.5

    def preprocess(
        self,
        images: Any,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Images to `pixel_values`, and COCO's annotations, if given, to the `labels` that the detector learns from.

        Args:
            images: One image, or a list of them.
            annotations: `{"image_id": int, "annotations": [{"bbox": [x, y, width, height] in pixels, "category_id":
                int, ...}, ...]}` for an image, or a list of these, as transformers' detectors take them. A
                `category_id` is a class of the model, from 0.
            kwargs: Settings that this call changes.

        Returns:
            `pixel_values` (batch, channels, height, width), and `labels`: one dict per image with `class_labels` (n,),
            `boxes` (n, 4) (centre x, centre y, width, height) in fractions of the image, `area` (n,) in pixels of
            `pixel_values`, `iscrowd` (n,), `image_id` (1,), `orig_size` (2,) and `size` (2,), rows and columns. Boxes
            are clipped to the image; those of which nothing is left, and those of crowds, are dropped.

        Raises:
            ValueError: if annotations are not of this format, not one per image, or images are cropped or padded.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess(self, images: list[Any], annotations: Any = None, **kwargs: Any) -> BatchFeature:
        encoded = super()._preprocess(images, **kwargs)
        if annotations is None:
            return encoded
        annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
        if len(annotations) != len(images):
            raise ValueError(f"{len(annotations)} annotations are given for {len(images)} images: give one per image.")
        if kwargs.get("do_center_crop") or kwargs.get("do_pad"):
            raise ValueError("Boxes do not follow do_center_crop and do_pad: set both to False to give annotations.")
        labels = [
            coco_labels(annotation, f"annotations[{i}]", original.shape[-2:], resized.shape[-2:])
            for i, (annotation, original, resized) in enumerate(zip(annotations, images, encoded["pixel_values"]))
        ]
        encoded["labels"] = [BatchFeature(label, tensor_type=kwargs.get("return_tensors")) for label in labels]
        return encoded

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float | None = None,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image from the `logits` and `pred_boxes` of a [`VLMViTForObjectDetection`].

        The best pairs of query and class are kept, so one query may give two classes, as COCO's evaluation wants it.

        Args:
            threshold: Scores above it are kept, 0 to 1; `score_threshold` when not given. transformers' pipeline gives
                0.5, unless it is called with `threshold=None`.
            target_sizes: (height, width) of each original image in pixels. Without it boxes are fractions.
            max_detections: Largest number of detections per image; as many as queries, and at least 300, when not
                given. COCO's evaluation counts up to 100 per image and class.

        Returns:
            One dict per image: `scores` (n,) falling, `labels` (n,), `boxes` (n, 4) (x0, y0, x1, y1) within the image.

        Raises:
            ValueError: if there are not as many target sizes as images.
        """
        scores, labels, _, corners = best_pairs(outputs, target_sizes, max_detections)
        keep = scores > (self.score_threshold if threshold is None else threshold)
        return [{"scores": s[k], "labels": i[k], "boxes": b[k]} for s, i, b, k in zip(scores, labels, corners, keep)]


def best_pairs(
    outputs: Any, target_sizes: Tensor | Sequence[tuple[int, int]] | None, max_detections: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best pairs of query and class; for the arguments see `post_process_object_detection`.

    Returns:
        scores (batch, kept) falling, classes (batch, kept), queries (batch, kept) and boxes (batch, kept, 4).
    """
    logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
    num_queries, num_labels = logits.shape[1:]
    limit = max(300, num_queries) if max_detections is None else max_detections
    scores, index = logits.sigmoid().flatten(1).topk(min(limit, num_queries * num_labels))  # (batch, kept)
    labels, queries = index % num_labels, index // num_labels
    centre, size = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)
    corners = corners.gather(1, queries[..., None].expand(-1, -1, 4))  # (batch, kept, 4)
    if target_sizes is not None:
        if len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target_sizes are given for {len(logits)} images.")
        height_width = torch.as_tensor(target_sizes, dtype=torch.float32, device=corners.device)  # (batch, 2)
        corners = corners * height_width.flip(1).repeat(1, 2)[:, None]
    return scores, labels, queries, corners


def coco_labels(
    annotation: Any, name: str, original_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> dict[str, Tensor]:
    """The labels of an image, as transformers' DETR makes them, from its annotation; see `preprocess`."""
    objects = annotation.get("annotations") if isinstance(annotation, Mapping) else None
    if not isinstance(objects, list | tuple) or "image_id" not in annotation:
        raise ValueError(f"{name} must be {{'image_id': ..., 'annotations': [...]}}, with one dict per object.")
    for i, item in enumerate(objects):
        if not {"bbox", "category_id"} <= item.keys() or len(item["bbox"]) != 4:
            raise ValueError(
                f"{name}['annotations'][{i}] needs 'category_id' and 'bbox' [x, y, width, height], but has "
                f"{', '.join(f'{key}: {value}' for key, value in item.items())}."
            )
    objects = [item for item in objects if not item.get("iscrowd", 0)]
    (height, width), size = original_hw, torch.tensor(original_hw[::-1])
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
    low = torch.minimum(boxes[:, :2].clamp(min=0), size)
    high = torch.minimum((boxes[:, :2] + boxes[:, 2:]).clamp(min=0), size)
    keep = (high > low).all(dim=1)  # (n,)
    area = [item.get("area", item["bbox"][2] * item["bbox"][3]) for item in objects]
    return {
        "image_id": torch.tensor([annotation["image_id"]]),
        "class_labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64)[keep],
        "boxes": torch.cat([(low + high) / 2 / size, (high - low) / size], dim=1)[keep],
        "area": torch.tensor(area, dtype=torch.float32)[keep] * (resized_hw[0] / height * (resized_hw[1] / width)),
        "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
        "orig_size": torch.tensor(original_hw),
        "size": torch.tensor(resized_hw),
    }


__all__ = ["VLMViTDetectionImageProcessor", "best_pairs", "coco_labels"]
