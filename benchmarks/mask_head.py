"""What each part of the mask head is worth: alike objects of simple shapes, a small model, few steps, from scratch.

    python benchmarks/mask_head.py --seeds 2

Up to nine discs, rectangles and triangles, equally bright in noise, lie in images of 48 x 48 pixels; patches have 6.
A variant trains on 400 images and is compared on 40 others: each object with the best overlapping box among as many of
the best scored queries as there are objects, and with the mask of that query. The last line of stdout is one JSON
object.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor
from transformers import set_seed

from hf_vlm.models import loss_instance_segmentation, mask_layers
from hf_vlm.models.loss_detection import iou_and_giou, to_corners
from hf_vlm.registry import find_model

SIZE = 48
BATCH_SIZE = 8
ENCODER = {"image_size": SIZE, "patch_size": 6, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEAD = {"hidden_size": 64, "intermediate_size": 128, "num_decoder_layers": 2, "num_cross_attention_heads": 8}
HEAD |= {"num_queries": 16, "neck_num_blocks": 1}
MASKS = {"mask_stride": 2, "mask_point_ratio": 4, "mask_feature_size": 16}


@dataclass(frozen=True)
class Variant:
    """A model, some parts of whose masks may be missing."""

    method: str = "instance_segmentation"
    has_prior: bool = True
    has_image: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "detector": Variant("detection"),
    "masks": Variant(),
    "masks without the image": Variant(has_image=False),
    "masks without the ellipse": Variant(has_prior=False),
    "masks without both": Variant(has_prior=False, has_image=False),
    "masks, losses of weight 5": Variant(fields={"mask_loss_weight": 5, "dice_loss_weight": 5}),
    "masks without both, losses of weight 5": Variant(
        has_prior=False, has_image=False, fields={"mask_loss_weight": 5, "dice_loss_weight": 5}
    ),
}


def sample_mask(generator: torch.Generator) -> Tensor:
    """A disc, a rectangle or a triangle somewhere in an image: (size, size) bool."""
    y, x = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    half_width, flatness, left, top, shape = torch.rand(5, generator=generator).tolist()
    half_width = 4 + 4 * half_width
    half_height = half_width * (0.6 + 0.4 * flatness)
    x = x - half_width - left * (SIZE - 2 * half_width)
    y = y - half_width - top * (SIZE - 2 * half_width)
    if shape < 1 / 3:
        return (x / half_width) ** 2 + (y / half_height) ** 2 < 1
    if shape < 2 / 3:
        return (x.abs() < half_width) & (y.abs() < half_height)
    return (y.abs() < half_height) & (x.abs() < (y + half_height) / 2)


def sample_scene(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, size, size) and its labels; objects do not overlap."""
    masks: list[Tensor] = []
    for _ in range(int(torch.randint(3, 10, (), generator=generator))):
        mask = sample_mask(generator)
        if mask.any() and not any((mask & other).any() for other in masks):
            masks.append(mask)
    truth = torch.stack(masks)
    image = 0.3 * torch.randn(3, SIZE, SIZE, generator=generator) + 1.5 * truth.any(dim=0)
    edges = []
    for axis in (1, 2):  # columns, then rows, that show something
        shown = truth.any(dim=axis).float()
        edges.append((shown.argmax(1), SIZE - shown.flip(1).argmax(1)))
    (left, right), (top, bottom) = edges
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1) / SIZE
    return image, {"class_labels": torch.zeros(len(truth), dtype=torch.int64), "boxes": boxes, "masks": truth}


def sample_scenes(seed: int, number: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [sample_scene(generator) for _ in range(number)]


@contextlib.contextmanager
def without_prior(is_without: bool) -> Iterator[None]:
    """A context in which masks are made of features alone."""
    if not is_without:
        yield
        return

    def nothing(boxes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(torch.broadcast_shapes(boxes.shape[:-1], x.shape, y.shape))

    with (
        mock.patch.object(mask_layers, "box_prior", nothing),
        mock.patch.object(loss_instance_segmentation, "box_prior", nothing),
    ):
        yield


def train(variant: Variant, seed: int, num_steps: int) -> Any:
    set_seed(seed)
    model_class = find_model(variant.method).model_class
    fields = HEAD | (MASKS if variant.method == "instance_segmentation" else {}) | variant.fields
    model = model_class(model_class.config_class(backbone_config=ENCODER, num_labels=1, **fields))
    if not variant.has_image:
        torch.nn.init.zeros_(model.mask_head.image_projection.weight).requires_grad_(False)
    scenes, generator = sample_scenes(0, 400), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps)
    for _ in range(num_steps):
        batch = [scenes[i] for i in torch.randint(len(scenes), (BATCH_SIZE,), generator=generator)]
        images, labels = zip(*batch)
        model(torch.stack(images), labels=list(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def measure(model: Any) -> dict[str, float]:
    """Mean IoU of boxes and masks on images of their own, and the fraction of masks above an IoU of 0.75."""
    images, labels = zip(*sample_scenes(1, 40))
    output = model(torch.stack(images))
    box_ious, mask_ious = [], []
    for i, label in enumerate(labels):
        best = output.logits[i].amax(dim=-1).topk(len(label["boxes"])).indices
        boxes = to_corners(output.pred_boxes[i, best])[:, None]
        overlap, query = iou_and_giou(boxes, to_corners(label["boxes"]))[0].max(dim=0)
        box_ious += overlap.tolist()
        if "pred_masks" in output:
            logits = output.pred_masks[i, best[query]][None]
            found = F.interpolate(logits, (SIZE, SIZE), mode="bilinear")[0] > 0
            shared, joined = found & label["masks"], found | label["masks"]
            mask_ious += (shared.sum(dim=(1, 2)) / joined.sum(dim=(1, 2))).tolist()
    metrics = {"box_iou": statistics.mean(box_ious)}
    if mask_ious:
        metrics["mask_iou"] = statistics.mean(mask_ious)
        metrics["masks_above_75"] = statistics.mean(iou > 0.75 for iou in mask_ious)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num_steps", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="One seed, 50 steps: nothing is learned.")
    options = parser.parse_args()
    seeds, num_steps = (1, 50) if options.quick else (options.seeds, options.num_steps)
    print(describe(torch.device("cpu")))
    found_metrics: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for name, variant in VARIANTS.items():
            started = time.process_time()
            with without_prior(not variant.has_prior):
                metrics = measure(train(variant, seed, num_steps))
            found_metrics.setdefault(name, []).append(metrics)
            shown = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())
            print(f"{name}, seed {seed}: {shown}, {time.process_time() - started:.0f} s of one core", flush=True)
    print(json.dumps(found_metrics))


if __name__ == "__main__":
    main()
