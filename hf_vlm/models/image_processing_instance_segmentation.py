"""Image processor of instance segmentation: that of the detector, and masks back to pixels."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .image_processing_detection import VLMViTDetectionImageProcessor, best_pairs

CHUNK = 32  # masks that are resized at a time: of hundreds of queries at an image's size there is no room for all


class VLMViTInstanceSegmentationImageProcessor(VLMViTDetectionImageProcessor):
    """[`VLMViTDetectionImageProcessor`] with post-processing of a [`VLMViTForInstanceSegmentation`].

    transformers' pipeline takes instances, and not a class per pixel, because of the method's name.
    """

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        return_binary_maps: bool = False,
        return_coco_annotation: bool = False,
    ) -> list[dict[str, Any]]:
        """The instances in each image, from the outputs of a [`VLMViTForInstanceSegmentation`].

        Args:
            threshold: Scores above it are kept, 0 to 1; `score_threshold` when not given. That of transformers'
                pipeline is 0.9 unless it is given another, which a model that learned from few images seldom reaches.
            mask_threshold: Probability above which a pixel belongs to an instance.
            overlap_mask_area_threshold: Fraction of its mask that an instance must show in the map of ids, where
                better ones cover it, to be kept.
            target_sizes: (height, width) of each original image in pixels. Without it masks are as the model gives
                them.
            return_binary_maps: Return one binary mask per instance instead of one map of ids, which has no overlaps.
            return_coco_annotation: Return one mask per instance as run lengths.

        Returns:
            One dict per image: `segments_info`, a list of dicts with `id`, `label_id` and `score`, best first; and
            `segmentation`: (height, width) int32 ids, -1 where there is nothing; or (n, height, width) bool masks; or
            n dicts with COCO's `size` (height, width) and `counts`. Instances whose mask is empty are left out.

        Raises:
            ValueError: if there are not as many target sizes as images, or both forms of masks are asked for.
        """
        if return_binary_maps and return_coco_annotation:
            raise ValueError("return_binary_maps and return_coco_annotation exclude each other: set one of them.")
        results = []
        for image in self.find_instances(outputs, threshold=threshold, target_sizes=target_sizes):
            masks = torch.cat(list(self.binary_masks(image["mask_logits"], image["size"], mask_threshold)))
            kept = masks.flatten(1).any(dim=1)
            segmentation: Tensor | list[dict[str, list[int]]]
            if not (return_binary_maps or return_coco_annotation):
                segmentation, kept = paint(masks, overlap_mask_area_threshold)
            elif return_binary_maps:
                segmentation = masks[kept]
            else:
                segmentation = [run_lengths(mask) for mask in masks[kept]]
            pairs = zip(image["labels"][kept].tolist(), image["scores"][kept].tolist())
            segments = [{"id": i, "label_id": label, "score": score} for i, (label, score) in enumerate(pairs)]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def find_instances(
        self,
        outputs: Any,
        threshold: float | None = None,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Any]]:
        """As `post_process_object_detection`, with the masks of the detections as the model gives them.

        Returns:
            One dict per image: `scores` (n,) falling, `labels` (n,), `boxes` (n, 4) (x0, y0, x1, y1), `mask_logits`
            (n, rows, columns), and `size`, the height and width for `binary_masks`.
        """
        threshold = self.score_threshold if threshold is None else threshold
        scores, labels, queries, boxes = best_pairs(self, outputs, target_sizes, max_detections)
        sizes = [outputs.pred_masks.shape[2:]] * scores.shape[0] if target_sizes is None else target_sizes
        return [
            {
                "scores": s[s > threshold],
                "labels": i[s > threshold],
                "boxes": b[s > threshold],
                "mask_logits": masks[q[s > threshold]],
                "size": (int(size[0]), int(size[1])),
            }
            for s, i, q, b, masks, size in zip(scores, labels, queries, boxes, outputs.pred_masks, sizes)
        ]

    def binary_masks(
        self, mask_logits: Tensor, size: tuple[int, int], mask_threshold: float = 0.5
    ) -> Iterator[Tensor]:
        """Masks (n, rows, columns) of the model's input at an image's size, in chunks (up to 32, height, width) bool;
        at least one."""
        lowest = torch.tensor(mask_threshold).logit().item()
        for chunk in mask_logits.float().split(CHUNK):
            yield self.resize_maps(chunk[:, None], size)[:, 0] > lowest


def paint(masks: Tensor, min_visible: float) -> tuple[Tensor, Tensor]:
    """Masks (n, height, width), best first, on one map of ids: a pixel belongs to the best of the masks on it.

    Returns:
        (height, width) int32, -1 where there is no mask, and which masks are on it (n,): those that show more than a
        fraction `min_visible` of their area. These are numbered from 0.
    """
    ids = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    kept = torch.zeros(masks.shape[0], dtype=torch.bool, device=masks.device)
    number = 0
    for i, mask in enumerate(masks):
        visible = mask & (ids < 0)
        if visible.any() and visible.sum() > min_visible * mask.sum():
            ids[visible] = number
            kept[i] = True
            number += 1
    return ids, kept


def run_lengths(mask: Tensor) -> dict[str, list[int]]:
    """A mask (height, width) as COCO's uncompressed run lengths: down the columns, beginning with zeros."""
    flat = mask.T.flatten().bool()
    changes = (flat[1:] != flat[:-1]).nonzero()[:, 0] + 1
    edges = torch.cat([changes.new_zeros(1), changes, changes.new_tensor([flat.shape[0]])])
    counts = edges.diff().tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


__all__ = ["VLMViTInstanceSegmentationImageProcessor", "paint", "run_lengths"]
