"""Image processor of the detector: that of the encoder, COCO's annotations to labels, and boxes back to pixels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import BatchFeature

from .image_processing_vlm_vit import VLMViTImageProcessor, fitted_size


class VLMViTDetectionImageProcessor(VLMViTImageProcessor):
    """[`VLMViTImageProcessor`] with labels and post-processing of a [`VLMViTForObjectDetection`].

    Attributes:
        score_threshold: Lowest score that `post_process_object_detection` keeps where no other is given. Fine-tuning
            stores the one of the best F1 on held-out images here.
    """

    recipe_fields: ClassVar[tuple[str, ...]] = ("image_mean", "image_std", "do_pad")
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
            `boxes` (n, 4) (centre x, centre y, width, height) in fractions of `pixel_values`, with their padding,
            `area` (n,) in pixels of these, `iscrowd` (n,), `image_id` (1,), `orig_size` (2,) and `size` (2,), rows and
            columns, without padding. Boxes are clipped to the image; those of which nothing is left, and those of
            crowds, are dropped.

        Raises:
            ValueError: if annotations are not of this format, not one per image, or images are cropped.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess(self, images: list[Any], annotations: Any = None, **kwargs: Any) -> BatchFeature:
        encoded = super()._preprocess(images, **kwargs)
        if annotations is None:
            return encoded
        annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
        if len(annotations) != len(images):
            raise ValueError(f"{len(annotations)} annotations are given for {len(images)} images: give one per image.")
        if kwargs.get("do_center_crop"):
            raise ValueError("Boxes do not follow do_center_crop: set it to False to give annotations.")
        labels = [
            coco_labels(
                annotation, f"annotations[{i}]", image.shape[-2:], pixels.shape[-2:], bool(kwargs.get("do_pad"))
            )
            for i, (annotation, image, pixels) in enumerate(zip(annotations, images, encoded["pixel_values"]))
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
        Boxes are clipped to the image; those in its padding are none.

        Args:
            threshold: Scores above it are kept, 0 to 1; `score_threshold` when not given. transformers' pipeline gives
                0.5, unless it is called with `threshold=None`.
            target_sizes: (height, width) of each original image in pixels. Without it boxes are fractions
                of the model's input, with its padding.
            max_detections: Largest number of detections per image; as many as queries, and at least 300, when not
                given. COCO's evaluation counts up to 100 per image and class.

        Returns:
            One dict per image: `scores` (n,) falling, `labels` (n,), `boxes` (n, 4) (x0, y0, x1, y1) within the image.

        Raises:
            ValueError: if there are not as many target sizes as images.
        """
        scores, labels, _, corners = best_pairs(self, outputs, target_sizes, max_detections)
        keep = scores > (self.score_threshold if threshold is None else threshold)
        return [{"scores": s[k], "labels": i[k], "boxes": b[k]} for s, i, b, k in zip(scores, labels, corners, keep)]


def best_pairs(
    processor: VLMViTImageProcessor,
    outputs: Any,
    target_sizes: Tensor | Sequence[tuple[int, int]] | None,
    max_detections: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best pairs of query and class; for the arguments see `post_process_object_detection`.

    Returns:
        scores (batch, kept) falling, classes (batch, kept), queries (batch, kept) and boxes (batch, kept, 4).
    """
    corners = _corners(processor, outputs.pred_boxes.float(), target_sizes)  # (batch, queries, 4)
    scores = outputs.logits.float().sigmoid()
    if processor.do_pad:  # there is nothing in the padding
        scores = scores * (corners[..., 2:] > corners[..., :2]).all(dim=-1, keepdim=True)
    num_queries, num_labels = scores.shape[1:]
    limit = max(300, num_queries) if max_detections is None else max_detections
    scores, index = scores.flatten(1).topk(min(limit, num_queries * num_labels))  # (batch, kept)
    labels, queries = index % num_labels, index // num_labels
    return scores, labels, queries, corners.gather(1, queries[..., None].expand(-1, -1, 4))


def _corners(
    processor: VLMViTImageProcessor, boxes: Tensor, target_sizes: Tensor | Sequence[tuple[int, int]] | None
) -> Tensor:
    """Boxes (batch, queries, 4) as the model gives them to (x0, y0, x1, y1) within the images, in their pixels."""
    centre, extent = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1).clamp(0, 1)
    if target_sizes is None:
        return corners
    if len(target_sizes) != boxes.shape[0]:
        raise ValueError(f"{len(target_sizes)} target_sizes are given for {boxes.shape[0]} images.")
    sizes = [(int(height), int(width)) for height, width in target_sizes]
    covered, most = (
        torch.tensor(values, dtype=torch.float32, device=boxes.device).flip(1).repeat(1, 2)[:, None]
        for values in ([processor.covered_size(size) for size in sizes], sizes)
    )  # (batch, 1, 4) each
    return torch.minimum(corners * covered, most)


def coco_labels(
    annotation: Any, name: str, original_hw: tuple[int, int], input_hw: tuple[int, int], do_pad: bool
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
    resized_hw = fitted_size(original_hw, input_hw) if do_pad else input_hw
    shown = torch.tensor([part / full for part, full in zip(resized_hw, input_hw)]).flip(0)  # of the input
    return {
        "image_id": torch.tensor([annotation["image_id"]]),
        "class_labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64)[keep],
        "boxes": torch.cat([(low + high) / 2 / size * shown, (high - low) / size * shown], dim=1)[keep],
        "area": torch.tensor(area, dtype=torch.float32)[keep] * (resized_hw[0] / height * (resized_hw[1] / width)),
        "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
        "orig_size": torch.tensor(original_hw),
        "size": torch.tensor(resized_hw),
    }


__all__ = ["VLMViTDetectionImageProcessor", "best_pairs", "coco_labels"]
