"""Parameter groups (layer-wise learning rates, no weight decay of vectors and tokens) and their schedules."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from hf_vlm.models.ssl_teacher import cosine

PATCH_PROJECTION = "backbone.embeddings.patch_projection."
ENCODER_INPUT = ("backbone.embeddings.", "mask_token")  # a mask token takes the place of patch embeddings


def layer_index(name: str, num_layers: int) -> int:
    """Depth of a parameter: 0 embeddings, 1..N encoder layers, N + 1 the final norm and everything on top of it."""
    if name.startswith(ENCODER_INPUT):
        return 0
    layer = re.match(r"backbone\.layers\.(\d+)\.", name)
    return int(layer.group(1)) + 1 if layer else num_layers + 1


def parameter_groups(
    model: nn.Module,
    *,
    num_layers: int,
    learning_rate: float,
    weight_decay: float,
    no_decay: Collection[str] = (),
    late_parameters: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
    encoder_lr_multiplier: float = 1.0,
    patch_projection_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for the optimiser, of the parameters with the same settings.

    The rate falls from layer to layer, as in BEiT (arXiv 2106.08254), MAE and DINOv2: `learning_rate x layer_decay` in
    the last encoder layer, `layer_decay` times that of the next one in each earlier layer and in the embeddings, and
    the whole rate on top of the layers. In the encoder, its final norm included, it is multiplied by
    `encoder_lr_multiplier`, in the patch projection by `patch_projection_lr_multiplier` (DINOv2, arXiv 2304.07193).
    Vectors, gains and the parameters named in `no_decay` (the model's `no_weight_decay()`) do not decay. Parameters
    without gradients, such as a teacher's, are in no group. The schedules read a group's `in_encoder`, `decays` and
    `starts_at`, which is the value of its parameters in `late_parameters` (the model's `late_parameters()`).
    """
    late_parameters = late_parameters or {}
    groups: dict[tuple[float, int, bool, float, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = name.startswith("backbone.")
            decays = parameter.ndim > 1 and name not in no_decay
            multiplier = patch_projection_lr_multiplier if name.startswith(PATCH_PROJECTION) else 1.0
            multiplier *= encoder_lr_multiplier if in_encoder else 1.0
            late = late_parameters.get(name, 0.0)
            groups[-late, layer_index(name, num_layers), not in_encoder, multiplier, decays].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * multiplier * layer_decay ** (num_layers + 1 - depth),
            "weight_decay": weight_decay if decays else 0.0,
            "in_encoder": not on_top,
            "decays": decays,
            "starts_at": -late,
        }
        for (late, depth, on_top, multiplier, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def split_by_mesh(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of which each has parameters that the same ranks divide: optimisers update many at once, but no mixture.

    Groups of a model that is whole, or that FSDP alone has sharded, stay as they are.
    """
    split = []
    for group in groups:
        of_mesh: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            of_mesh[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
        split += [group | {"params": parameters} for parameters in of_mesh.values()]
    return split


def late_schedule(scheduler: Any, num_steps: int, *, num_frozen_steps: int = 0, num_warmup_steps: int = 0) -> LambdaLR:
    """The schedule of an optimiser's groups, with a later start for some of them.

    The rate of a group is 0 for the fraction `starts_at` of the `num_steps`, that of the encoder's groups for
    `num_frozen_steps`, then multiplied by a linear warm-up from 0 to 1 over `num_warmup_steps`, as in transformers.
    Gradients are computed all the same: DDP needs every parameter in every step, and AdamW's moving averages are
    ready at the start. After gradients of zero they would not be: the first steps would be several times too large.

    Raises:
        ValueError: if the schedule is not a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            "frozen_encoder_steps, and parameters that learn later than others, need an lr_scheduler_type that is a "
            "function of the step, such as cosine."
        )

    def late(schedule: Callable[[int], float], start: float, num_warmup: int, step: int) -> float:
        since = step - start
        return 0.0 if since < 0 else schedule(step) * min(1.0, since / num_warmup if num_warmup else 1.0)

    optimizer = scheduler.optimizer
    schedules: list[Callable[[int], float]] = []
    for schedule, group in zip(scheduler.lr_lambdas, optimizer.param_groups):
        schedule = functools.partial(late, schedule, group["starts_at"] * num_steps, 0)
        if group["in_encoder"]:
            schedule = functools.partial(late, schedule, num_frozen_steps, num_warmup_steps if num_frozen_steps else 0)
        schedules.append(schedule)
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
    "late_schedule",
    "layer_index",
    "parameter_groups",
    "restore_group_settings",
    "weight_decay_at",
]
