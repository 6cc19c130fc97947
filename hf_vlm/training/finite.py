"""Losses, features and weights that are not finite end a run before anything of them is saved."""

import math
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_vlm.data.io.messages import summarise
from hf_vlm.training.checkpoints import last_checkpoint

__all__ = ["check_before_saving", "check_metrics", "not_finite_weights"]

REMEDY = (
    "Lower the learning rate or lengthen the warm-up, set max_grad_norm to 1, and prefer bf16 to fp16 "
    "(--restart_schedule true applies other rates to a run that is resumed)."
)
# Evaluation may well have a NaN, as the AP of a class without objects; these may not.
MUST_BE_FINITE = {"loss": "the loss is", "probe_feature_std": "the features are"}


def check_metrics(logs: Mapping[str, float], *, step: int, folder: str) -> None:
    """ValueError for a log entry, the same on all ranks, of which a metric that must be finite is not."""
    for name, words in MUST_BE_FINITE.items():
        if not math.isfinite(logs.get(name, 0.0)):
            _stop(f"{words} not finite ({name} {logs[name]})", step, folder)


def check_before_saving(model: nn.Module, loss: Tensor, accelerator: Accelerator, *, step: int, folder: str) -> None:
    """ValueError, on all ranks, where a weight or the loss that has added up on the device is not finite.

    It waits for the device, as the save does anyway.
    """
    names = not_finite_weights(model)
    num_faults = torch.tensor(len(names) + int(not loss.isfinite()), device=accelerator.device)
    if accelerator.reduce(num_faults, "sum").item():  # of any rank: its shard may be at fault, or its batch
        _stop(f"weights are not finite ({summarise(names)})" if names else "the loss is not finite", step, folder)


def _stop(what: str, step: int, folder: str) -> NoReturn:
    try:
        kept = f"the last good checkpoint is {last_checkpoint(folder)}"
    except ValueError:
        kept = "there is no checkpoint"
    raise ValueError(f"Step {step}: {what}. Nothing of it is saved; {kept}. {REMEDY}")


def not_finite_weights(model: nn.Module) -> list[str]:
    """Names of the model's weights, those that would be saved, with a NaN or an infinity; of a shard, this rank's.

    Waits once for the device.
    """
    weights = dict(_saved_weights(model))
    if not weights:
        return []
    device = next(iter(weights.values())).device  # weights that FSDP offloads are on the CPU, but buffers are not
    finite = torch.stack([weight.isfinite().all().to(device) for weight in weights.values()]).tolist()
    return [name for name, is_finite in zip(weights, finite) if not is_finite]


def _saved_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is None or not weight.is_floating_point() or name in module._non_persistent_buffers_set:
                continue
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            yield f"{prefix}.{name}".lstrip("."), local.detach()
