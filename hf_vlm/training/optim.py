"""Parameter groups (layer-wise learning rates, no weight decay of vectors and tokens) and their schedules."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_vlm.models.ssl_teacher import cosine

PATCH_PROJECTION = "backbone.embeddings.patch_projection."


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
    no_decay: Collection[str] = (),
    layer_decay: float = 1.0,
    encoder_lr_multiplier: float = 1.0,
    patch_projection_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for the optimiser: one per depth and per weight decay.

    The last encoder layer has the rate `learning_rate x encoder_lr_multiplier`, each earlier layer `layer_decay` times
    that of the next one (BEiT, arXiv 2106.08254), all else `learning_rate`. The rate of the patch projection is
    that of its depth x `patch_projection_lr_multiplier` (DINOv2, arXiv 2304.07193). Vectors, gains and
    the parameters named in `no_decay` (the model's `no_weight_decay()`) do not decay. Parameters without gradients,
    such as a teacher's, are in no group. The schedules read a group's `in_encoder` and `decays`.
    """
    groups: dict[tuple[int, float, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in no_decay
            multiplier = patch_projection_lr_multiplier if name.startswith(PATCH_PROJECTION) else 1.0
            groups[layer_index(name, num_layers), multiplier, decays].append(parameter)

    def rate(depth: int) -> float:
        if depth > num_layers:
            return learning_rate
        return learning_rate * encoder_lr_multiplier * layer_decay ** (num_layers - depth)

    return [
        {
            "params": parameters,
            "lr": rate(depth) * multiplier,
            "weight_decay": weight_decay if decays else 0.0,
            "in_encoder": depth <= num_layers,
            "decays": decays,
        }
        for (depth, multiplier, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def late_encoder_schedule(scheduler: Any, *, num_frozen_steps: int, num_warmup_steps: int) -> LambdaLR:
    """The schedule of an optimiser's groups, with a later start for the encoder's.

    Their rate is multiplied by 0 for `num_frozen_steps`, then by a linear warm-up from 0 to 1 over
    `num_warmup_steps`, as in transformers. Gradients of the encoder are computed all the same: DDP needs every
    parameter in every step, and AdamW's moving averages are ready when the encoder starts.

    Raises:
        ValueError: if the schedule is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            "frozen_encoder_steps needs an lr_scheduler_type that is a function of the step, such as cosine."
        )

    def late(schedule: Callable[[int], float], step: int) -> float:
        since = step - num_frozen_steps
        return 0.0 if since < 0 else schedule(step) * min(1.0, since / num_warmup_steps if num_warmup_steps else 1.0)

    optimizer = scheduler.optimizer
    schedules = [
        functools.partial(late, schedule) if group["in_encoder"] else schedule
        for schedule, group in zip(scheduler.lr_lambdas, optimizer.param_groups)
    ]
    return LambdaLR(optimizer, schedules)


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Rates, weight decay and all other settings of an optimiser's groups, without their parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_group_settings(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Puts settings back in which the state of a checkpoint has replaced; the rates are those of its step.

    Args:
        optimizer: Optimiser with the state of the checkpoint.
        scheduler: Its schedule, which has come to the step of the checkpoint.
        settings: What `group_settings` gave before that.

    Raises:
        ValueError: if the schedule is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError("restart_schedule needs an lr_scheduler_type that is a function of the step, such as cosine.")
    scheduler.base_lrs = [group["initial_lr"] for group in settings]
    for group, restored, schedule in zip(optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True):
        group.update(restored)
        group["lr"] = restored["initial_lr"] * schedule(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def weight_decay_at(step: int, num_steps: int, *, start: float, end: float) -> float:
    """Weight decay of a step counted from 0: half a cosine from `start` to `end` (DINO, arXiv 2104.14294)."""
    return cosine(start, end, step / num_steps)


__all__ = [
    "group_settings",
    "late_encoder_schedule",
    "layer_index",
    "parameter_groups",
    "restore_group_settings",
    "weight_decay_at",
]
