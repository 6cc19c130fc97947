"""A detector without training, an arm of `label_efficiency.py`: boxes of a one-class detector, classes of prototypes.

    python benchmarks/prototypes.py detection/vit_nano_cpu.yaml --data D --encoder runs/objects --output_dir runs/out

The words are those of `hf-vlm finetune`. The encoder is part of a detector that was pretrained without labels, and
stays as it is. The feature of a box is the mean of the last feature map inside it; the prototype of a class is the
mean of its labelled boxes, that of the background the mean of the patches outside of all of them, each of unit length
and relative to the mean of all patches. A box scores for a class what the detector gives it, times the softmax of the
cosines to the prototypes at DINO's temperature of its kNN classifier. With one class that only tells objects from
background. Nothing is learned, so what it needs is one pass over the labelled images.

`output_dir` holds `run.json` with the metrics on `eval_split`, the seconds and the images seen.
"""

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from detection_arm import open_arm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_vlm.data.transforms.collate import collate_detection
from hf_vlm.features.boxes import box_features
from hf_vlm.features.loading import load_model
from hf_vlm.models.image_processing_detection import VLMViTDetectionImageProcessor
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.tasks.evaluation import eval_stream

TEMPERATURE = 0.07


def is_outside(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns): whether the centre of a patch lies in none of the boxes (n, 4), cxcywh in 0..1."""
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in (rows, columns))
    inside_x = (x[:, None] - boxes[:, 0]).abs() <= boxes[:, 2] / 2  # (columns, n)
    inside_y = (y[:, None] - boxes[:, 1]).abs() <= boxes[:, 3] / 2  # (rows, n)
    return ~(inside_y[:, None] & inside_x[None]).any(-1)


class PrototypeDetector(nn.Module):
    """Boxes of a frozen detector, with the classes of prototypes; gives what an image processor post-processes.

    Args:
        detector: Detector of one class, or of several, of which the best counts.
        num_classes: Number of classes of the labels.
    """

    def __init__(self, detector: Any, num_classes: int):
        super().__init__()
        self.detector, self.num_classes = detector.eval(), num_classes
        dim = detector.config.backbone_config.hidden_size
        self.register_buffer("sums", torch.zeros(num_classes + 1, dim))  # the last is that of the background
        self.register_buffer("counts", torch.zeros(num_classes + 1))

    @torch.no_grad()
    def add(self, pixel_values: Tensor, labels: list[dict[str, Tensor]]) -> None:
        """Adds labelled images (batch, channels, height, width) to the prototypes."""
        maps = self.detector.backbone(pixel_values).feature_maps[-1]
        for image, objects in zip(maps, labels):
            found = box_features(image[None], objects["boxes"][None])[0]  # (n, dim)
            outside = image[:, is_outside(objects["boxes"], *image.shape[1:])].T  # (patches, dim)
            classes = [objects["class_labels"], torch.full((len(outside),), self.num_classes)]
            index = torch.cat(classes)
            self.sums.index_add_(0, index, torch.cat([found, outside]))
            self.counts += torch.bincount(index, minlength=self.num_classes + 1)

    def cosines(self, features: Tensor) -> Tensor:
        """Cosines (..., classes + 1) of features (..., dim) to the prototypes; -1 for a class without labels."""
        centre = self.sums.sum(0) / self.counts.sum()
        prototypes = F.normalize(self.sums / self.counts.clamp(min=1)[:, None] - centre, dim=-1)
        cosines = F.normalize(features - centre, dim=-1) @ prototypes.T
        return cosines.masked_fill(self.counts == 0, -1.0)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """`logits` (batch, queries, classes) and `pred_boxes` (batch, queries, 4)."""
        found = self.detector(pixel_values)
        maps = self.detector.backbone(pixel_values).feature_maps[-1]
        probabilities = (self.cosines(box_features(maps, found.pred_boxes)) / TEMPERATURE).softmax(-1)
        scores = found.logits.sigmoid().amax(-1, keepdim=True) * probabilities[..., :-1]
        return SimpleNamespace(logits=scores.logit(eps=1e-6), pred_boxes=found.pred_boxes)


def main() -> None:
    """Makes prototypes of the labelled images and evaluates."""
    arm = open_arm(sys.argv[1:])
    args, loaded = arm.args, load_model(str(arm.args.encoder))
    if loaded.entry.task != DETECTION.name:
        raise ValueError(f"encoder: {args.encoder} is no detector, and prototypes need boxes to classify.")
    started = time.perf_counter()
    height, width = args.image_hw
    processor = VLMViTDetectionImageProcessor(
        size={"height": height, "width": width},
        image_mean=loaded.processor.image_mean,
        image_std=loaded.processor.image_std,
    )
    transform = DETECTION.transform(processor, train=False, class_names=arm.class_names)
    model, num_images = PrototypeDetector(loaded.model, len(arm.class_names)), 0
    stream = eval_stream(arm.source, transform, max_bad_fraction=0.0)
    for batch in DataLoader(stream, batch_size=args.per_device_eval_batch_size, collate_fn=collate_detection):
        model.add(batch["pixel_values"], batch["labels"])
        num_images += len(batch["labels"])
    seconds = round(time.perf_counter() - started, 1)
    arm.finish(model, processor, transform, num_images_seen=num_images, seconds=seconds)


if __name__ == "__main__":
    main()
