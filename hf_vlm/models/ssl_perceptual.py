"""Perceptual losses: how far images lie apart in the features of a network that does not learn from them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .ssl_frozen import Size, encode, try_on_meta


def perceptual_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Mean squared distance () of features scaled to length 1 at each position, over positions and layers.

    LPIPS (arXiv 1801.03924) with all of its weights 1, and the mean over layers instead of their sum. 0 where all
    directions are the same, 2 where they are unrelated.

    Args:
        features, others: One tensor (batch, positions, dim) per layer.
    """
    distances = [
        (F.normalize(one.float(), dim=-1) - F.normalize(other.float(), dim=-1)).square().sum(-1).mean()
        for one, other in zip(features, others, strict=True)
    ]
    return torch.stack(distances).mean()


def features_of_layers(encoder: PreTrainedModel, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Hidden states (batch, positions, dim) of layers; positions are all tokens, or the cells of a map.

    Args:
        encoder: An encoder of transformers or of this package.
        images: (batch, channels, height, width) in its normalisation and of a size that fits its patches.
        layers: Indices of hidden states: 0 is what enters the first layer.
    """
    states = encode(encoder, images, output_hidden_states=list(layers)).hidden_states
    return [states[layer].flatten(2).transpose(1, 2) if states[layer].ndim == 4 else states[layer] for layer in layers]


def choose_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers to compare: those given, else the ends of the four quarters, as PeCo (arXiv 2111.12710).

    Raises:
        ValueError: for a layer that the encoder does not have.
    """
    if layers is None:
        return sorted({max(1, round(num_layers * quarter / 4)) for quarter in (1, 2, 3, 4)})
    if wrong := [layer for layer in layers if not 0 <= layer <= num_layers]:
        raise ValueError(
            f"perceptual_layers: there is no layer {wrong[0]}; the perceptual encoder has layers 1 to {num_layers}, "
            "and 0 is what enters the first."
        )
    return list(layers)


def count_layers(config: PreTrainedConfig, size: Size) -> int:
    """Layers, or stages, whose output an encoder gives as hidden states; ValueError where it gives none."""

    def count(encoder: PreTrainedModel, images: Tensor) -> int:
        states = encode(encoder, images, output_hidden_states=True).hidden_states
        if not states:
            raise ValueError("it gives no hidden states.")
        return len(states) - 1

    return try_on_meta(config, size, count)


__all__ = ["choose_layers", "count_layers", "features_of_layers", "perceptual_distance"]
