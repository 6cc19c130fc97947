"""Maps of patch features: principal components as colours, attention and similarities."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vlm.features.extraction import frozen
from hf_vlm.models.modeling_vlm_vit import VLMViTModel

__all__ = ["FeatureMaps", "feature_maps", "principal_components"]

Array = np.ndarray[Any, Any]

BATCH_SIZE = 8  # images whose attention is in memory
SHOWN = (0.05, 0.95)  # quantiles of a component that span the colour range: outliers would make all else grey


@dataclass(frozen=True, kw_only=True)
class FeatureMaps:
    """Values of the patches of n images, float32.

    Args:
        colors: (n, rows, columns, 3) red, green and blue, 0 to 1.
        attention: (n, heads, rows, columns), attention of the class token to the patches in the last layer; the rest,
            up to a sum of 1, goes to itself and to registers. None without a class token or for a chosen patch.
        similarity: (n, rows, columns), cosine similarity to the chosen patch, or to the mean of the image's patches;
            None where there is attention.
        patch: Row and column of the chosen patch.
    """

    colors: Array
    attention: Array | None
    similarity: Array | None
    patch: tuple[int, int] | None = None


def feature_maps(
    encoder: VLMViTModel,
    pixel_values: Tensor,
    *,
    patch: tuple[int, int] | None = None,
    foreground: bool = False,
) -> FeatureMaps:
    """Maps of the patches of images (n, channels, height, width), of any size that the patches divide.

    The colours are the first three principal components of the patch features of all images together, as in DINOv2
    (https://arxiv.org/abs/2304.07193, figures 1 and 9): equal colours mean similar features, also across images.

    Args:
        encoder: Encoder on any device.
        patch: Row and column of a patch: similarity to it replaces the class token's attention.
        foreground: Whether to leave the background black, as in DINOv2: the patches on the same side of the first
            component's mean as the images' borders. The colours are then the components of the other patches.

    Raises:
        ValueError: The size of the images does not fit the encoder, or there is no such patch.
    """
    ph, pw = encoder.config.patch_hw
    grid = pixel_values.shape[2] // ph, pixel_values.shape[3] // pw
    if patch is not None and not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
        raise ValueError(f"There is no patch {patch}: images have {grid[0]} rows and {grid[1]} columns of patches.")
    has_attention = patch is None and encoder.config.use_class_token
    features, attention = _patches(encoder, pixel_values, has_attention=has_attention)
    similarity = None if has_attention else _similarity(features, patch, grid)
    return FeatureMaps(
        colors=_colors(features.unflatten(1, grid), foreground=foreground),
        attention=attention.unflatten(2, grid).numpy() if attention is not None else None,
        similarity=similarity.unflatten(1, grid).numpy() if similarity is not None else None,
        patch=patch,
    )


def principal_components(values: Tensor, num_components: int = 3) -> Tensor:
    """Coordinates (n, num_components) of rows (n, D) along the directions of greatest variance, about their mean.

    Signs are fixed: the largest loading of each direction is positive, so that equal rows get equal components.
    """
    centred = values.double() - values.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # (D, D), columns by ascending variance
    directions = vectors.flip(1)[:, :num_components]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # (1, num_components)
    return centred @ (directions * largest.sign())


def _patches(encoder: VLMViTModel, pixel_values: Tensor, *, has_attention: bool) -> tuple[Tensor, Tensor | None]:
    """Features (n, patches, dim) of the patches, and attention (n, heads, patches) of the class token to them."""
    num_prefix = encoder.config.num_prefix_tokens
    features, attention = [], []
    with frozen(encoder):
        for images in pixel_values.split(BATCH_SIZE):
            if has_attention:
                with _last_attention(encoder) as weights:
                    tokens = encoder(pixel_values=images.to(encoder.device)).last_hidden_state
                attention.append(weights[0][:, :, 0, num_prefix:].float().cpu())
            else:
                tokens = encoder(pixel_values=images.to(encoder.device)).last_hidden_state
            features.append(tokens[:, num_prefix:].float().cpu())
    return torch.cat(features), torch.cat(attention) if has_attention else None


@contextmanager
def _last_attention(encoder: VLMViTModel) -> Iterator[list[Tensor]]:
    """A list that receives the attention weights (batch, heads, tokens, tokens) of the last layer alone.

    `output_attentions=True` would also keep those of all other layers: gigabytes for large images.
    """
    found: list[Tensor] = []
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")  # fused kernels have no weights to give
    attention: Any = encoder.layers[-1].attention
    hook = attention.register_forward_hook(lambda _, __, output: found.append(output[1]))
    try:
        yield found
    finally:
        hook.remove()
        encoder.set_attn_implementation(before)


def _similarity(features: Tensor, patch: tuple[int, int] | None, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity (n, patches) to the chosen patch, or to the mean of the patches."""
    chosen = features.mean(dim=1) if patch is None else features[:, patch[0] * grid[1] + patch[1]]  # (n, dim)
    return F.cosine_similarity(features, chosen[:, None], dim=2)


def _colors(features: Tensor, *, foreground: bool) -> Array:
    """Colours (n, rows, columns, 3), 0 to 1, of features (n, rows, columns, dim)."""
    is_shown = _foreground(features) if foreground else torch.ones(features.shape[:3], dtype=torch.bool)
    if not is_shown.any():  # all patches are equal
        return np.zeros((*is_shown.shape, 3), dtype=np.float32)
    components = principal_components(features[is_shown])  # (shown, 3)
    low, high = np.quantile(components, SHOWN, axis=0)  # (3,) each; torch refuses to sort that many
    spread = np.maximum(high - low, 1e-6 * max(float(components.abs().max()), 1e-6))  # noise about 0 is no colour
    colors = np.zeros((*is_shown.shape, 3), dtype=np.float32)
    colors[is_shown.numpy()] = np.clip((components.numpy() - low) / spread, 0, 1)
    return colors


def _foreground(features: Tensor) -> Tensor:
    """Foreground (n, rows, columns) bool: patches on the other side of the first component's mean than the borders."""
    first = principal_components(features.flatten(0, 2), 1).reshape(features.shape[:3])
    inner = first[:, 1:-1, 1:-1]
    border_sum = first.sum() - inner.sum()
    return first * border_sum < 0
