"""Teachers: moving averages of a student that are part of the model, and the schedules of methods that have one."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .stochastic_depth import StochasticDepth
from .vit_layers import VLMViTAttention


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine, `progress` from 0 to 1: DINO's schedule of momentum and decay."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def warm_up(start: float, end: float, progress: Tensor, fraction: float) -> Tensor:
    """From `start` to `end` along a line within the first `fraction` of training, then `end`; `progress` is ()."""
    return start + (end - start) * (progress / max(fraction, 1e-8)).clamp(max=1.0)


class TeacherMixin:
    """A model with a teacher: an exponential moving average of some of its modules.

    A subclass calls `build_teacher` in `__init__`, reads `self.teacher[name]`, and has a field `momentum` in its
    configuration. The teacher is saved with the model and is never trained by gradients; stochastic depth and dropout
    are off in it.

    Attributes:
        teacher: The copies (`nn.ModuleDict`).
        progress: () float32, the fraction of training that is done, for schedules that the loss reads on the device.
    """

    config: Any
    teacher: nn.ModuleDict
    progress: Tensor

    def build_teacher(self: Any, *names: str) -> None:
        """Copies the modules of these names."""
        self.teacher = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in names})
        self.freeze()
        for module in self.teacher.modules():
            if isinstance(module, StochasticDepth):
                module.rate = 0.0
            elif isinstance(module, VLMViTAttention):
                module.config.attention_dropout = 0.0  # of the copied configuration
        self.register_buffer("progress", torch.zeros(()))

    def freeze(self: Any) -> None:
        """Keeps gradients from what they never change: the teacher, and what a subclass adds."""
        self.teacher.requires_grad_(False)

    def train(self: Any, mode: bool = True) -> Any:
        """Freezes the teacher again: `from_pretrained` lets all parameters learn, and then calls `eval`, so this."""
        super().train(mode)  # type: ignore[misc]
        self.freeze()
        return self

    def after_encoder_loaded(self) -> None:
        """Makes the teacher equal to the student."""
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self: Any, momentum: float) -> None:
        """teacher = momentum x teacher + (1 - momentum) x student; buffers, as of batch norm, are copied."""
        for name, teacher in self.teacher.items():
            student = getattr(self, name)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
            for mine, theirs in zip(teacher.buffers(), student.buffers()):
                mine.copy_(theirs)

    def after_step(self: Any, progress: float) -> None:
        """Moves the teacher towards the student, by a momentum that rises to 1 (BYOL, arXiv 2006.07733)."""
        self.progress.fill_(progress)
        self.update_teacher(cosine(self.config.momentum, 1.0, progress))


__all__ = ["TeacherMixin", "cosine", "warm_up"]
