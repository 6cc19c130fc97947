"""Adversarial losses: a discriminator that tells painted images from real ones, trained in the same step."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping parts of an image each by itself (PatchGAN, arXiv 1611.07004).

    Its batch norm is left out: statistics would tie the images of a batch, and of all ranks, to each other.

    Args:
        num_channels: Of the images.
        width: Channels after the first layer; each layer doubles them, up to eight times as many.
        num_layers: Layers that halve the resolution: with 3 a part is 38 pixels wide.
    """

    def __init__(self, num_channels: int, width: int, num_layers: int):
        super().__init__()
        sizes = [num_channels, *(width * 2 ** min(layer, 3) for layer in range(num_layers))]
        self.layers = nn.ModuleList([nn.Conv2d(*pair, kernel_size=4, stride=2, padding=1) for pair in pairwise(sizes)])
        self.judge = nn.Conv2d(sizes[-1], 1, kernel_size=3, padding=1)

    def forward(self, images: Tensor, learns: bool = True) -> Tensor:
        """Scores (batch, 1, rows, columns) of images; without `learns` no gradient reaches the weights."""
        images = images.to(self.judge.weight.dtype)
        for layer in self.layers:
            images = F.leaky_relu(_convolve(layer, images, learns), 0.2)
        return _convolve(self.judge, images, learns)


def _convolve(layer: Any, images: Tensor, learns: bool) -> Tensor:
    weight, bias = (value if learns else value.detach() for value in (layer.weight, layer.bias))
    return F.conv2d(images, weight, bias, layer.stride, layer.padding)


def adversarial_losses(discriminator: nn.Module, real: Tensor, painted: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge losses (arXiv 1705.02894) of who paints and of the discriminator, () each.

    Their gradients meet nowhere: the first reaches the painted images alone, the second the discriminator's weights
    alone. So both players learn from one backward pass of a sum of the two and with one optimiser, as by the reversal
    of gradients (arXiv 1505.07818), but the painter's loss need not be the other's negative, whose gradient vanishes
    where the discriminator is sure.

    Args:
        discriminator: Takes images, and whether its weights learn from them.
        real: (batch, channels, height, width).
        painted: Likewise.
    """
    of_real, of_painted = discriminator(torch.cat([real, painted.detach()])).float().chunk(2)
    of_discriminator = (F.relu(1 - of_real) + F.relu(1 + of_painted)).mean()
    return -discriminator(painted, learns=False).float().mean(), of_discriminator


__all__ = ["PatchDiscriminator", "adversarial_losses"]
