"""Parameter groups: layer-wise learning rates, and weight decay only where it belongs."""

import re
from collections import defaultdict
from typing import Any

from torch import Tensor, nn

# Not matrices in spirit, though stored with leading axes of one: decaying them only shrinks what they learn.
NO_DECAY_NAMES = ("class_token", "register_tokens", "mask_token", "position_embedding")


def layer_index(name: str, num_layers: int) -> int:
    """Depth of a parameter: 0 embeddings, 1..N encoder layers and the final norm, N + 1 everything on top of it."""
    if not name.startswith("backbone."):
        return num_layers + 1
    if name.startswith("backbone.embeddings."):
        return 0
    layer = re.match(r"backbone\.layers\.(\d+)\.", name)
    return int(layer.group(1)) + 1 if layer else num_layers


def parameter_groups(
    model: nn.Module,
    *,
    num_layers: int,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    encoder_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for the optimiser: one a depth and kind of decay.

    The top encoder layer learns at `learning_rate x encoder_lr_multiplier`, each layer below at `layer_decay` times
    the rate above it (BEiT, arXiv 2106.08254), all else at `learning_rate`. Vectors, gains and tokens do not decay.
    """
    groups: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(NO_DECAY_NAMES)
            groups[layer_index(name, num_layers), decays].append(parameter)

    def rate(depth: int) -> float:
        if depth > num_layers:
            return learning_rate
        return learning_rate * encoder_lr_multiplier * layer_decay ** (num_layers - depth)

    return [
        {"params": parameters, "lr": rate(depth), "weight_decay": weight_decay if decays else 0.0}
        for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


__all__ = ["layer_index", "parameter_groups"]
