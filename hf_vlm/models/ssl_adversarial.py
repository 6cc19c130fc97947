"""Adversarial losses: a discriminator of real and reconstructed images, trained in the same step."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .self_initialised import SelfInitialised

NEGATIVE_SLOPE = 0.2


class EqualisedConv2d(SelfInitialised):
    """A convolution whose weights have deviation 1 and are scaled where they are used (arXiv 1710.10196).

    At a learning rate of 0.001 a step of Adam then changes them by a thousandth, where it would change weights of
    deviation 0.02 by a twentieth: with one optimiser of one rate a discriminator keeps pace with the decoder. Values
    keep their size from layer to layer, so that it is not idle at first.

    Args:
        in_channels, out_channels, kernel_size, stride: Shape, as of every convolution; the padding is one pixel.
        gain: Factor of the scale that compensates for the activation that follows.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride, self.scale = stride, gain / math.sqrt(in_channels * kernel_size**2)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        init.normal_(self.weight)
        init.zeros_(self.bias)

    def forward(self, images: Tensor, learns: bool = True) -> Tensor:
        """Maps of images; without `learns` no gradient reaches the weights."""
        weight, bias = (value if learns else value.detach() for value in (self.weight, self.bias))
        return F.conv2d(images, self.scale * weight, bias, self.stride, padding=1)


class PatchDiscriminator(nn.Module):
    """Convolutions that score overlapping parts of an image, each by itself (PatchGAN, arXiv 1611.07004).

    Its batch norm is left out: statistics would tie the images of a batch, and of all ranks, to each other.

    Args:
        num_channels: Channels of the images.
        width: Channels after the first layer; each layer doubles them, up to eight times as many.
        num_layers: Layers that halve the resolution: with 3 a part is 38 pixels wide.
    """

    def __init__(self, num_channels: int, width: int, num_layers: int):
        super().__init__()
        sizes = [num_channels, *(width * 2 ** min(layer, 3) for layer in range(num_layers))]
        gain = math.sqrt(2 / (1 + NEGATIVE_SLOPE**2))
        self.layers = nn.ModuleList(
            EqualisedConv2d(*pair, kernel_size=4, stride=2, gain=gain) for pair in pairwise(sizes)
        )
        self.judge = EqualisedConv2d(sizes[-1], 1, kernel_size=3)

    def forward(self, images: Tensor, learns: bool = True) -> Tensor:
        """Scores (batch, 1, rows, columns) of images; without `learns` no gradient reaches the weights."""
        images = images.to(self.judge.weight.dtype)
        for layer in self.layers:
            images = F.leaky_relu(layer(images, learns), NEGATIVE_SLOPE)
        scores: Tensor = self.judge(images, learns)
        return scores


def adversarial_losses(discriminator: nn.Module, real: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge losses (arXiv 1705.02894) of the generator, here a decoder, and of the discriminator, () each.

    No gradient is of both: that of the first reaches the reconstructed images alone, that of the second the
    discriminator's weights alone. So generator and discriminator learn from one backward pass of a sum of the two and
    with one optimiser, as by the reversal of gradients (arXiv 1505.07818), but the generator's loss need not be the
    negative of the discriminator's, whose gradient vanishes where the discriminator is sure.

    Args:
        discriminator: Module that takes images, and whether its weights learn from them.
        real: Images (batch, channels, height, width).
        reconstructed: Images (batch, channels, height, width).
    """
    of_real, of_reconstructed = discriminator(torch.cat([real, reconstructed.detach()])).float().chunk(2)
    of_discriminator = (F.relu(1 - of_real) + F.relu(1 + of_reconstructed)).mean()
    return -discriminator(reconstructed, learns=False).float().mean(), of_discriminator


__all__ = ["EqualisedConv2d", "PatchDiscriminator", "adversarial_losses"]
