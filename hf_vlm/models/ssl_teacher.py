"""Teachers: moving averages of a student that are part of the model, and the schedules of methods that have one."""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import initialization as init

from .ssl_state import Float32State, in_float32
from .stochastic_depth import StochasticDepth
from .vit_layers import VLMViTAttention

# Steps of the optimiser that `after_step` may miss: one that was interrupted, and the one that it is about to follow.
MOST_STEPS_BEHIND = 2


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine, `progress` from 0 to 1: DINO's schedule of momentum and decay."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def warm_up(start: float, end: float, progress: Tensor, fraction: float) -> Tensor:
    """From `start` to `end` along a line within the first `fraction` of training, then `end`; `progress` is ()."""
    return start + (end - start) * (progress / max(fraction, 1e-8)).clamp(max=1.0)


class Teacher(Float32State, nn.ModuleDict):
    """Copies of modules by name, in float32, divided among processes by the plans of what they are copies of."""

    @property
    def _tp_plan(self) -> dict[str, str]:
        return self._plan("_tp_plan")

    @property
    def _ep_plan(self) -> dict[str, str]:
        return self._plan("_ep_plan")

    @property
    def _fsdp_plan(self) -> dict[str, str]:
        return self._plan("_fsdp_plan")

    def _plan(self, kind: str) -> dict[str, str]:
        plans = {name: getattr(module, kind, None) or {} for name, module in self.items()}
        return {f"{name}.{key}": style for name, plan in plans.items() for key, style in plan.items()}


class TeacherMixin:
    """A model with a teacher: an exponential moving average of some of its modules.

    A subclass calls `build_teacher` in `__init__`, before `post_init`; reads `self.teacher[name]` within
    `self.teaching()`; and has a field `momentum` in its configuration. The teacher is saved with the model and is
    never trained by gradients; stochastic depth and dropout are off in it. Where weights of it are missing, it takes
    its student's. It and `progress` stay in float32 whatever the model is cast to.

    Whoever trains the model has to call `after_step` after each step of the optimiser, as the callback
    `hf_vlm.AfterStep` does in any Trainer. Training that does not do so raises a ValueError in its third step.

    Attributes:
        teacher: The copies (`nn.ModuleDict`).
        progress: () float32, the fraction of training that is done, for schedules that the loss reads on the device.
    """

    config: Any
    teacher: nn.ModuleDict
    progress: Tensor
    num_steps_behind = 0  # steps of the optimiser since `after_step` was called

    def build_teacher(self: Any, *names: str) -> None:
        """Copies the modules of these names."""
        self.teacher = Teacher({name: copy.deepcopy(getattr(self, name)) for name in names})
        self.teacher._apply(lambda tensor: tensor)  # a student of fewer bits has a teacher in float32
        self.freeze()
        for module in self.teacher.modules():
            module._is_hf_initialized = True  # by `finish_init` alone
            if isinstance(module, StochasticDepth):
                module.rate = 0.0
            elif isinstance(module, VLMViTAttention):
                module.config.attention_dropout = 0.0  # of the copied configuration
        self.register_buffer("progress", torch.zeros((), dtype=torch.float32))
        _TRAINED.add(self)

    def finish_init(self: Any) -> None:
        """Sets what no checkpoint gave of the state: the teacher is its student, and training is at its start."""
        super().finish_init()  # type: ignore[misc]
        init.zeros_(self.progress)
        for name, teacher in self.teacher.items():
            of_student = getattr(self, name).state_dict()
            for key, value in teacher.state_dict(keep_vars=True).items():
                init.copy_(value, of_student[key])

    def freeze(self: Any) -> None:
        """Keeps gradients from what they never change: the teacher, and what a subclass adds."""
        self.teacher.requires_grad_(False)

    def train(self: Any, mode: bool = True) -> Any:
        """Freezes the teacher again: `from_pretrained` lets all parameters learn, and then calls `eval`, so this."""
        super().train(mode)  # type: ignore[misc]
        self.freeze()
        _TRAINED.add(self)  # a copy of a model is not yet among them
        return self

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        progress = self.progress
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.progress = in_float32(fn, progress)
        return self

    def teaching(self: Any) -> Any:
        """A context in which the teacher's float32 weights compute in the precision of a student of fewer bits."""
        device, dtype = self.progress.device.type, self.backbone.compute_dtype
        if dtype.itemsize >= torch.float32.itemsize or torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, dtype)

    def after_encoder_loaded(self) -> None:
        """Makes the teacher equal to the student."""
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self: Any, momentum: float) -> None:
        """teacher = momentum x teacher + (1 - momentum) x student; buffers, as of batch norm, are copied.

        The student's weights are those that it computes with: LoRA adapters of the student are added to what they
        adapt, and the teacher has none.

        Raises:
            ValueError: if the teacher has other parameters than the student, such as adapters of its own.
        """
        self.num_steps_behind = 0
        for name, teacher in self.teacher.items():
            student, mine = getattr(self, name), dict(teacher.named_parameters())
            theirs = adapted_parameters(student)
            if mine.keys() != theirs.keys():
                different = min(mine.keys() ^ theirs.keys())
                raise ValueError(
                    f"{type(self).__name__}: the teacher cannot follow the student, as not both have the parameter "
                    f"{name}.{different}. Of adapters it follows those of LoRA, without DoRA and biases, where they "
                    r"are the student's alone: LoraConfig(..., exclude_modules=r'teacher\..*')."
                )
            for keys in _by_mesh(mine):
                values = [theirs[key].to(mine[key].dtype) for key in keys]
                torch._foreach_lerp_([mine[key] for key in keys], values, 1 - momentum)
            buffers = dict(student.named_buffers())
            for key, buffer in teacher.named_buffers():
                buffer.copy_(buffers[key])

    def after_step(self: Any, progress: float) -> None:
        """Moves the teacher towards the student, by a momentum that rises to 1 (BYOL, arXiv 2006.07733)."""
        self.progress.fill_(progress)
        self.update_teacher(cosine(self.config.momentum, 1.0, progress))

    def note_step(self: Any, trained: set[int]) -> None:
        """Counts a step of an optimiser of the parameters with these ids; ValueError where `after_step` is missing.

        Steps of parts of the model for another aim, such as fine-tuning its encoder, do not count.
        """
        first = next((parameter for parameter in self.parameters() if parameter.requires_grad), None)
        if id(first) not in trained or not self.is_pretraining:
            return
        self.is_pretraining = False
        self.num_steps_behind += 1
        if self.num_steps_behind > MOST_STEPS_BEHIND:
            raise ValueError(
                f"{type(self).__name__} is trained without after_step: its teacher and its schedules would stay as "
                "they were at the start. Give the Trainer callbacks=[hf_vlm.AfterStep()], or call "
                "model.after_step(progress) after each step of the optimiser in a loop of your own, progress being "
                "the fraction of the training that is done."
            )


def _by_mesh(parameters: dict[str, Tensor]) -> list[list[str]]:
    """Names of parameters, those apart that other ranks divide: one operation on several tensors takes no mixture."""
    groups: dict[Any, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(name)
    return list(groups.values())


def adapted_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, as a module computes with them: LoRA adapters (of peft) added to the weights they adapt."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    for name, layer in module.named_modules():
        if not hasattr(layer, "lora_A") or any(layer.lora_variant) or any(layer.lora_bias.values()):
            continue
        own = {key: parameters.pop(key) for key in list(parameters) if key.startswith(f"{name}.")}
        base = f"{name}.base_layer."
        parameters |= {f"{name}.{key.removeprefix(base)}": own[key] for key in own if key.startswith(base)}
        used = set() if layer.disable_adapters else set(layer.active_adapters) - set(layer.merged_adapters)
        for adapter in used & layer.lora_A.keys():
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return parameters


# Optimisers do not know which models they train, nor models by which they are trained.
_TRAINED: "weakref.WeakSet[TeacherMixin]" = weakref.WeakSet()


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if models := list(_TRAINED):
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model in models:
            model.note_step(trained)


register_optimizer_step_post_hook(_note_step)


__all__ = ["TeacherMixin", "cosine", "warm_up"]
