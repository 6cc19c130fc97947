"""Teachers: slow copies of a student that are part of the model, and the schedules of methods that have one."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` to `end` along half a cosine, `progress` from 0 to 1: DINO's schedule of momentum and decay."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def warm_up(start: float, end: float, progress: Tensor, share: float) -> Tensor:
    """From `start` to `end` along a line within the first `share` of training, then `end`; `progress` is ()."""
    return start + (end - start) * (progress / max(share, 1e-8)).clamp(max=1.0)


class TeacherMixin:
    """A model with a teacher: an exponential moving average of some of its modules.

    A subclass calls `build_teacher` in `__init__` and reads `self.teacher[name]`. The teacher is saved with the model
    and is never trained by gradients; stochastic depth and dropout are off in it. The trainer calls `after_step` once
    an optimiser step.

    Attributes:
        teacher: The copies (`nn.ModuleDict`).
        progress: () float32, the share of training that is done; for schedules that the loss reads on the device.
    """

    config: Any
    teacher: nn.ModuleDict
    progress: Tensor

    def build_teacher(self: Any, *names: str) -> None:
        """Makes copies of the modules of these names."""
        self.teacher = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in names})
        self.freeze()
        for module in self.teacher.modules():
            if hasattr(module, "drop_path_rate"):
                module.drop_path_rate = 0.0
            if hasattr(module, "config"):
                module.config.attention_dropout = 0.0
        self.register_buffer("progress", torch.zeros(()))

    def freeze(self: Any) -> None:
        """Keeps gradients from what they never change: the teacher, and what a subclass adds."""
        if hasattr(self, "teacher"):  # MAE has one for its perceptual loss alone
            self.teacher.requires_grad_(False)

    def train(self: Any, mode: bool = True) -> Any:
        """As of every module. `from_pretrained` lets all parameters learn, and then calls `eval`, which calls this."""
        super().train(mode)  # type: ignore[misc]
        self.freeze()
        return self

    def reset_teacher(self) -> None:
        """Makes the teacher equal to the student: at the start, and once weights were loaded into the student."""
        self.update_teacher(0.0)

    @torch.no_grad()
    def update_teacher(self: Any, momentum: float) -> None:
        """teacher = momentum x teacher + (1 - momentum) x student; buffers, as of batch norm, are copied."""
        for name, teacher in getattr(self, "teacher", {}).items():
            student = getattr(self, name)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
            for mine, theirs in zip(teacher.buffers(), student.buffers()):
                mine.copy_(theirs)

    def after_step(self: Any, progress: float) -> None:
        """Moves the teacher towards the student, by a momentum that rises to 1 (BYOL, arXiv 2006.07733)."""
        if not hasattr(self, "progress"):
            return
        self.progress.fill_(progress)
        self.update_teacher(cosine(self.config.momentum, 1.0, progress))


__all__ = ["TeacherMixin", "cosine", "warm_up"]
