"""Mixup, CutMix and random erasing: what is done to finished views of labelled images.

What is sampled, is sampled per image from the image's own generator, and a batch is mixed without any randomness: so
a resumed run mixes as the run without the interruption would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vlm.data.transforms.options import as_probability

__all__ = ["MixParameters", "MixSettings", "erase", "mix_labels", "mix_pixels", "sample_mix"]

CUTMIX_PROBABILITY = 0.5  # where both are on, as in timm
# Of the erased rectangle (arXiv 1708.04896): its area as a fraction of the image's, and its height / width.
ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 1 / 0.3)


@dataclass(frozen=True, kw_only=True)
class MixSettings:
    """How training images are mixed with each other. The defaults mix none.

    Args:
        mixup_alpha: Parameter of mixup's Beta distribution (arXiv 1710.09412), which pixels and labels of two images
            are blended by; 0 for no mixup. 0.8 is DeiT's and MAE's.
        cutmix_alpha: Parameter of CutMix's Beta distribution (arXiv 1905.04899), the area of the rectangle that is cut
            from another image; 0 for no CutMix. 1.0 is DeiT's and MAE's.
        mix_probability: Probability that an image is mixed; with both, half of them by CutMix.

    Raises:
        ValueError: for a value out of its range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mix_probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}.")
        object.__setattr__(self, "mix_probability", as_probability("mix_probability", self.mix_probability))

    @property
    def mixes(self) -> bool:
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class MixParameters:
    """How one image is mixed with another; the default changes nothing.

    Args:
        weight: 0 to 1, weight of the image's own label, and without a box of its own pixels.
        box: (top, left, bottom, right) in pixels, where the other image is shown; None for a blend.
    """

    weight: float = 1.0
    box: tuple[int, int, int, int] | None = None


def sample_mix(settings: MixSettings, size: tuple[int, int], rng: np.random.Generator) -> MixParameters:
    """Sample how an image of `size` (height, width) is mixed."""
    if rng.random() >= settings.mix_probability:
        return MixParameters()
    cuts = settings.cutmix_alpha > 0 and (settings.mixup_alpha == 0 or rng.random() < CUTMIX_PROBABILITY)
    if not cuts:
        return MixParameters(float(rng.beta(settings.mixup_alpha, settings.mixup_alpha)))
    side = np.sqrt(1 - rng.beta(settings.cutmix_alpha, settings.cutmix_alpha))  # fraction of the image's sides
    (top, bottom), (left, right) = (_cut(length, side, rng) for length in size)
    # The weight follows the part of the rectangle that lies within the image, as in the authors' code.
    area = (bottom - top) * (right - left) / (size[0] * size[1])
    return MixParameters(1 - area, (top, left, bottom, right))


def _cut(length: int, fraction: float, rng: np.random.Generator) -> tuple[int, int]:
    """A part of one axis around a random centre, clipped to the image."""
    extent, center = int(length * fraction), int(rng.integers(length))
    return max(center - extent // 2, 0), min(center + (extent + 1) // 2, length)


def mix_pixels(pixel_values: Tensor, other: Tensor, parameters: MixParameters) -> Tensor:
    """Mix an image (C, H, W) with another one; both stay as they are."""
    if parameters.box is None:
        return other.lerp(pixel_values, parameters.weight)
    top, left, bottom, right = parameters.box
    mixed = pixel_values.clone()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed


def mix_labels(labels: Tensor, parameters: Sequence[MixParameters]) -> Tensor:
    """Labels (batch, classes) float of images of which each is mixed with the next one, and the last with the first.

    Returns:
        (batch, classes), the weight of an image going to its own label and the rest to the next image's.
    """
    weights = torch.tensor([mixed.weight for mixed in parameters], dtype=labels.dtype)[:, None]  # (batch, 1)
    return weights * labels + (1 - weights) * labels.roll(-1, 0)


def erase(pixel_values: np.ndarray[Any, Any], rng: np.random.Generator) -> None:
    """Fill a random rectangle of a normalised image (C, H, W) float32 with normal noise, in place.

    Random erasing (arXiv 1708.04896) with the area and the shape of its authors, and noise in every pixel as in timm.
    """
    _, height, width = pixel_values.shape
    area = rng.uniform(*ERASED_AREA) * height * width
    ratio = np.exp(rng.uniform(*np.log(ERASED_RATIO)))
    rows = min(max(round(np.sqrt(area * ratio)), 1), height)
    columns = min(max(round(np.sqrt(area / ratio)), 1), width)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    part = pixel_values[:, top : top + rows, left : left + columns]
    part[:] = rng.standard_normal(part.shape, dtype=np.float32)
