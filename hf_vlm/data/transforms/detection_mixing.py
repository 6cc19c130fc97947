"""Mosaic and copy-paste: a batch of images with boxes, of which each may show parts of the others.

The images of a batch are mixed where they are trained on, so that no worker keeps images, and the mixing of a step
depends on nothing but its batch and its generator: a resumed run mixes as the run without the interruption would have.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vlm.data.transforms.options import as_probability

__all__ = ["DetectionMixSettings", "DetectionMixing", "mix_detection"]

Labels = dict[str, Any]

NUM_TILES = 4
NUM_TRIES = 5  # positions tried for a pasted object
MOST_COVERED = 0.3  # of the area of an object, by a pasted one


@dataclass(frozen=True, kw_only=True)
class DetectionMixSettings:
    """How the images of a batch are mixed. The defaults mix none.

    Args:
        mosaic_probability: Probability that an image becomes a window of one to two times its sides on four images set
            side by side (YOLOv4, arXiv 2004.10934), itself and three others of the batch.
        copy_paste_probability: Probability that an image without a mosaic gets objects of another one pasted in, at
            random positions (arXiv 2012.07177), each object with a probability of a half. Boxes are pasted whole.
        mixed_fraction: Fraction of the steps, from the first on, in which images are mixed: the last ones show images
            as they are (YOLOX, arXiv 2107.08430).

    Raises:
        ValueError: for a value out of its range.
    """

    mosaic_probability: float = 0.0
    copy_paste_probability: float = 0.0
    mixed_fraction: float = 0.85

    def __post_init__(self) -> None:
        for name in ("mosaic_probability", "copy_paste_probability", "mixed_fraction"):
            object.__setattr__(self, name, as_probability(name, getattr(self, name)))

    @property
    def mixes(self) -> bool:
        return self.mixed_fraction > 0 and (self.mosaic_probability > 0 or self.copy_paste_probability > 0)


@dataclass(frozen=True)
class DetectionMixing:
    """Mixes batches of `pixel_values` (B, C, H, W) and `labels`, in the first `fraction` of the steps."""

    settings: DetectionMixSettings
    min_visible: float

    @property
    def fraction(self) -> float:
        return self.settings.mixed_fraction

    def __call__(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        images, labels = mix_detection(**batch, settings=self.settings, rng=rng, min_visible=self.min_visible)
        return {"pixel_values": images, "labels": labels}


def mix_detection(
    pixel_values: Tensor,
    labels: list[Labels],
    settings: DetectionMixSettings,
    rng: np.random.Generator,
    *,
    min_visible: float,
) -> tuple[Tensor, list[Labels]]:
    """Mix the images (B, C, H, W) of a batch of two or more, and their `class_labels` and `boxes`.

    Args:
        labels: One dict per image: `class_labels` (n,), `boxes` (n, 4) as centre x, centre y, width, height in 0 to 1.
        min_visible: Fraction of its area that an object must show in a mosaic to be kept.

    Returns:
        A batch of the same shape, and new labels with these two entries; the arguments stay as they are.
    """
    mixed = []
    for index in range(len(labels)):
        others = rng.permutation(np.delete(np.arange(len(labels)), index))
        is_mosaic, pastes = rng.random(2) < (settings.mosaic_probability, settings.copy_paste_probability)
        if is_mosaic:
            chosen = rng.permutation([index, *np.resize(others, NUM_TILES - 1)]).tolist()
            mixed.append(_mosaic([pixel_values[i] for i in chosen], [labels[i] for i in chosen], rng, min_visible))
        elif pastes:
            mixed.append(_copy_paste(pixel_values[[index, others[0]]], labels[index], labels[others[0]], rng))
        else:
            mixed.append((pixel_values[index], _boxes_and_classes(labels[index])))
    images, labels_of_images = zip(*mixed)
    return torch.stack(images), list(labels_of_images)


def _boxes_and_classes(labels: Labels) -> Labels:
    return {name: labels[name] for name in ("class_labels", "boxes")}


def _mosaic(
    images: list[Tensor], labels: list[Labels], rng: np.random.Generator, min_visible: float
) -> tuple[Tensor, Labels]:
    """A random window on four images (C, H, W) set side by side, at their size."""
    height, width = images[0].shape[1:]
    scale = rng.uniform(1, 2)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (int(rng.integers(2 * full - part + 1)) for full, part in ((height, rows), (width, columns)))
    canvas = torch.cat([torch.cat(images[:2], dim=2), torch.cat(images[2:], dim=2)], dim=1)  # (C, 2 * H, 2 * W)
    window = canvas[None, :, top : top + rows, left : left + columns]
    shown = F.interpolate(window, size=(height, width), mode="bilinear", antialias=True)[0]
    boxes = torch.cat([of_tile["boxes"] for of_tile in labels])  # (n, 4)
    tiles = torch.repeat_interleave(torch.arange(NUM_TILES), torch.tensor([len(t["boxes"]) for t in labels]))
    tiles = tiles.to(boxes.device)
    offset = torch.stack([tiles % 2 * width - left, tiles // 2 * height - top], dim=-1)  # (n, 2) in pixels
    size = boxes.new_tensor([width, height])
    low, high = (
        ((boxes[:, :2] + sign * boxes[:, 2:] / 2) * size + offset) / boxes.new_tensor([columns, rows])
        for sign in (-1, 1)
    )
    shown_low, shown_high = low.clamp(0, 1), high.clamp(0, 1)
    extent = shown_high - shown_low
    kept = extent.prod(-1) >= (high - low).prod(-1) * max(min_visible, 1e-6)
    return shown, {
        "class_labels": torch.cat([of_tile["class_labels"] for of_tile in labels])[kept],
        "boxes": torch.cat([(shown_low + shown_high) / 2, extent], dim=-1)[kept],
    }


def _copy_paste(images: Tensor, labels: Labels, others: Labels, rng: np.random.Generator) -> tuple[Tensor, Labels]:
    """The first of two images (2, C, H, W) with objects of the second one."""
    image, other = images[0].clone(), images[1]
    height, width = image.shape[1:]
    size = np.array([width, height])
    pasted, classes = [], []
    present = _corners(labels["boxes"].cpu().numpy() * np.tile(size, 2))  # (n, 4) in pixels
    for box, label in zip(_corners(others["boxes"].cpu().numpy() * np.tile(size, 2)), others["class_labels"]):
        left, top, right, bottom = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int).clip(0)
        extent = np.minimum([right, bottom], size) - (left, top)
        if rng.random() < 0.5 or (extent < 1).any():
            continue
        for x, y in rng.integers(size - extent + 1, size=(NUM_TRIES, 2)):
            moved = box + np.tile((x - left, y - top), 2)
            if not len(present) or _covered(present, moved).max() <= MOST_COVERED:
                part = other[:, top : top + extent[1], left : left + extent[0]]
                image[:, y : y + extent[1], x : x + extent[0]] = part
                present = np.concatenate([present, moved[None]])
                pasted.append(
                    np.concatenate([moved[:2] + moved[2:], 2 * (moved[2:] - moved[:2])]) / np.tile(2 * size, 2)
                )
                classes.append(label)
                break
    new = labels["boxes"].new_tensor(np.array(pasted, dtype=np.float32).reshape(-1, 4))
    return image, {
        "class_labels": torch.cat([labels["class_labels"], labels["class_labels"].new_tensor(classes)]),
        "boxes": torch.cat([labels["boxes"], new]),
    }


def _corners(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    centre, extent = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)


def _covered(boxes: np.ndarray[Any, Any], by: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Fractions (n,) of the areas of boxes (n, 4) that another one (4,) covers."""
    extent = (np.minimum(boxes[:, 2:], by[2:]) - np.maximum(boxes[:, :2], by[:2])).clip(0)
    covered: np.ndarray[Any, Any] = extent.prod(1) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-9)
    return covered
