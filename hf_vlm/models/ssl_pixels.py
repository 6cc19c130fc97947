"""Pixels of patches as targets: their normalisation, and predictions put back into images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .vit_layers import gather_tokens, patch_grid, patchify, unpatchify


def normalise_patches(patches: Tensor) -> Tensor:
    """Standardises each patch (..., values) by its mean and unbiased deviation, eps 1e-6 within the root.

    Layer normalisation, whose variance is the biased one, does it in one pass when its scale and eps make up for that.
    """
    size = patches.shape[-1]
    ratio = (size - 1) / size  # of the biased to the unbiased variance
    return F.layer_norm(patches, (size,), patches.new_full((size,), math.sqrt(ratio)), eps=ratio * 1e-6)


def reconstruct_images(
    images: Tensor, predictions: Tensor, masked: Tensor, patch_hw: tuple[int, int], normalised: bool
) -> Tensor:
    """Puts predicted patches into images; gradients reach the predictions.

    Args:
        images: (batch, channels, height, width).
        predictions: (batch, predicted, channels x patch height x patch width).
        masked: (batch, predicted) indices of the patches, row-major.
        patch_hw: Height and width of a patch in pixels.
        normalised: Whether predictions are of normalised patches, and get the true patches' means and deviations.

    Returns:
        (batch, channels, height, width) float32, with the other patches of the images.
    """
    patches, predictions = patchify(images, patch_hw).float(), predictions.float()
    if normalised:
        var, mean = torch.var_mean(gather_tokens(patches, masked), dim=-1, keepdim=True)
        predictions = predictions * (var + 1e-6).sqrt() + mean
    reconstructed = patches.scatter(1, masked[:, :, None].expand_as(predictions), predictions)
    return unpatchify(reconstructed, patch_grid(images, patch_hw), patch_hw)


__all__ = ["normalise_patches", "reconstruct_images"]
