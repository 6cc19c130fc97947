"""Losses, features and weights that are not finite end a run before anything of them is saved."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["REMEDY", "not_finite_metric", "not_finite_weights"]

REMEDY = (
    "Lower the learning rate or lengthen the warm-up, set max_grad_norm to 1, and prefer bf16 to fp16 "
    "(--restart_schedule true applies other rates to a run that is resumed)."
)
# Evaluation may well have a NaN, as the AP of a class without objects; these may not.
MUST_BE_FINITE = {"loss": "the loss is", "probe_feature_std": "the features are"}


def not_finite_metric(logs: Mapping[str, float]) -> str | None:
    """The metric of a log entry that must be finite and is not, in words; None where all are."""
    for name, words in MUST_BE_FINITE.items():
        if not math.isfinite(logs.get(name, 0.0)):
            return f"{words} not finite ({name} {logs[name]})"
    return None


def not_finite_weights(model: nn.Module) -> list[str]:
    """Names of the model's weights, those that would be saved, with a NaN or an infinity; of a shard, this rank's.

    Waits once for the device.
    """
    weights = dict(_saved_weights(model))
    if not weights:
        return []
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
    return [name for name, is_finite in zip(weights, finite) if not is_finite]


def _saved_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None or not weight.is_floating_point() or name in module._non_persistent_buffers_set:
                continue
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            yield f"{prefix}.{name}".lstrip("."), local.detach()
