"""COCO average precision and recall of predicted masks, of their boundaries, and of the boxes beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

from hf_vlm.metrics.coco import CocoMetric, Entry, ImageObjects

__all__ = ["CocoInstanceMetric", "coco_instance_metrics", "encode_masks"]

IOU_TYPES = {"mask_": "segm", "boundary_": "boundary", "box_": "bbox"}  # by the prefix of the metrics' names


def coco_instance_metrics(
    predictions: Sequence[Entry],
    references: Sequence[Entry],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    max_detections: int = 100,
    per_class: bool = False,
) -> dict[str, float]:
    """COCO mask, boundary and box AP and AR of `predictions` against `references`, one entry per image.

    Overlaps are those of the masks; for the boundary metrics (arXiv 2103.16562) the smaller one of that and of the
    overlap of the masks' edges, as wide as 2 % of the image's diagonal, which large objects must match closely too.

    Args:
        predictions: `masks`, `scores` (n,) and `labels` (n,) of each image, and `boxes` (n, 4) as x1, y1, x2, y2 in
            pixels (default: those of the masks). Masks are (n, height, width) of 0 and 1, or n run-length encodings
            with `size` and `counts`.
        references: `masks`, `labels` and optionally `boxes` as above, `area` (n,) in pixels (default: the mask's) and
            `iscrowd` (n,).
        num_classes: Number of classes, where the classes have no names. Default: the labels that occur.
        class_names: Names of the classes 0, 1, ...; used for the keys of `per_class`.
        max_detections: Number of best-scored predictions that count, per image and class.
        per_class: Also return `mask_ap/<class name>`, `boundary_ap/<class name>` and `box_ap/<class name>`.

    Returns:
        The metrics of [`coco_detection_metrics`], by the names `mask_ap`, `boundary_ap`, `box_ap`, `mask_ap50`, ...

    Raises:
        ValueError: The two lists differ in length, or masks, boxes, scores or labels are malformed.
    """
    metric = CocoInstanceMetric(num_classes=num_classes, class_names=class_names, max_detections=max_detections)
    metric.add(predictions, references)
    return metric.compute(per_class=per_class)


class CocoInstanceMetric(CocoMetric):
    """Accumulates images by `add`, then computes the metrics of `coco_instance_metrics` over all of them."""

    def compute(self, *, per_class: bool = False) -> dict[str, float]:
        """The metrics over all images added so far, which are kept; see `coco_instance_metrics`."""
        return {
            f"{prefix}{name}": value
            for prefix, iou_type in IOU_TYPES.items()
            for name, value in self._compute(iou_type, per_class=per_class).items()
        }

    def _parse(
        self, entry: Entry, where: str, *, required: str | None = None, optional: Sequence[str] = ()
    ) -> ImageObjects:
        if entry.get("masks") is None:
            raise ValueError(f"{where} has no 'masks'; it has {sorted(entry)}.")
        masks = _as_encodings(entry["masks"], where)
        derived: dict[str, Any] = {"masks": masks}
        if entry.get("boxes") is None:
            derived["boxes"] = _boxes(masks)
        if "area" in optional and entry.get("area") is None:
            derived["area"] = coco_mask.area(masks) if masks else []
        parsed = super()._parse({**entry, **derived}, where, required=required, optional=optional)
        if len(masks) != len(parsed.labels):
            raise ValueError(f"{where}: there are {len(masks)} masks for {len(parsed.labels)} labels.")
        return parsed._replace(masks=masks)


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Masks (n, height, width) of 0 and 1 as COCO's compressed run-length encodings, `counts` as text."""
    if isinstance(masks, torch.Tensor):
        masks = masks.detach().cpu().numpy()
    stacked = np.asfortranarray(np.asarray(masks).astype(np.uint8).transpose(1, 2, 0))  # (height, width, n)
    encoded = coco_mask.encode(stacked) if stacked.shape[2] else []
    return [{"size": list(rle["size"]), "counts": _as_text(rle["counts"])} for rle in encoded]


def _as_encodings(masks: Any, where: str) -> list[dict[str, Any]]:
    if len(masks) == 0:
        return []
    if not isinstance(masks[0], Mapping):
        if np.ndim(masks) != 3:
            raise ValueError(f"{where}: masks has shape {np.shape(masks)}; expected (n, height, width).")
        return encode_masks(masks)
    try:
        encoded = [{"size": list(map(int, m["size"])), "counts": _as_text(m["counts"])} for m in masks]
        coco_mask.area(encoded)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: masks must be run-length encodings with 'size' [height, width] and compressed 'counts': {error}"
        ) from error
    if len({tuple(m["size"]) for m in encoded}) > 1:
        raise ValueError(f"{where}: the masks of an image must have one size, but have several.")
    return encoded


def _as_text(counts: Any) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _boxes(masks: list[dict[str, Any]]) -> NDArray[np.float64]:
    boxes = np.array(coco_mask.toBbox(masks) if masks else [], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
