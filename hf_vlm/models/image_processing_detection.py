"""Image processor of the detector: that of the encoder, and boxes back to pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .image_processing_vlm_vit import VLMViTImageProcessor


class VLMViTDetectionImageProcessor(VLMViTImageProcessor):
    """[`VLMViTImageProcessor`] with the post-processing of a [`VLMViTForObjectDetection`]."""

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        max_detections: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image from the `logits` and `pred_boxes` of a [`VLMViTForObjectDetection`].

        The best pairs of query and class are kept, so one query may give two classes, as COCO's evaluation wants it.

        Args:
            threshold: lowest score kept, 0 to 1.
            target_sizes: (height, width) of each original image in pixels. Without it boxes are fractions.
            max_detections: Largest number of detections per image; as many as queries, and at least 300, when not
                given. COCO's evaluation counts up to 100 per image and class.

        Returns:
            One dict per image: `scores` (n,) falling, `labels` (n,), `boxes` (n, 4) (x0, y0, x1, y1) within the image.

        Raises:
            ValueError: if there are not as many target sizes as images.
        """
        logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
        num_queries, num_labels = logits.shape[1:]
        limit = max(300, num_queries) if max_detections is None else max_detections
        scores, index = logits.sigmoid().flatten(1).topk(min(limit, num_queries * num_labels))  # (batch, kept)
        centre, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)
        corners = corners.gather(1, (index // num_labels)[..., None].expand(-1, -1, 4))  # (batch, kept, 4)
        if target_sizes is not None:
            if len(target_sizes) != len(logits):
                raise ValueError(f"{len(target_sizes)} target_sizes are given for {len(logits)} images.")
            height_width = torch.as_tensor(target_sizes, dtype=torch.float32, device=corners.device)  # (batch, 2)
            corners = corners * height_width.flip(1).repeat(1, 2)[:, None]
        keep = scores > threshold
        return [
            {"scores": s[k], "labels": i[k] % num_labels, "boxes": b[k]}
            for s, i, b, k in zip(scores, index, corners, keep)
        ]


__all__ = ["VLMViTDetectionImageProcessor"]
