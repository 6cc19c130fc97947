"""A Trainer with layer-wise parameter groups and the schedules that these need."""

from typing import Any

import torch
from torch import nn

from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.average import AveragingTrainer
from hf_vlm.training.optim import (
    group_settings,
    late_schedule,
    parameter_groups,
    restore_group_settings,
    split_by_mesh,
)

__all__ = ["GroupedTrainer"]


class GroupedTrainer(AveragingTrainer):
    """The stock Trainer's optimiser over `parameter_groups`, with late starts of some of them."""

    args: VisionTrainingArguments
    optimizer: Any
    lr_scheduler: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments over layer-wise parameter groups; ValueError where its package is missing."""
        if self.optimizer is None:
            model = self.model if model is None else model
            try:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            except ImportError as error:
                raise ValueError(f"optim {self.args.optim.value}: {error}") from error
            self.optimizer = optimizer_class(split_by_mesh(self._parameter_groups(model)), **options)
        return self.optimizer

    def optimizer_names(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(each)] for group in self._parameter_groups(self.model) for each in group["params"]]

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        config = self.model.config
        return parameter_groups(
            model,
            num_layers=getattr(config, "backbone_config", config).num_hidden_layers,
            learning_rate=self.args.scaled_learning_rate,
            weight_decay=self.args.weight_decay,
            no_decay=self.model.no_weight_decay(),
            late_parameters=self.model.late_parameters(),
            layer_decay=self.args.layer_decay,
            encoder_lr_multiplier=self.args.encoder_lr_multiplier,
            patch_projection_lr_multiplier=self.args.patch_projection_lr_multiplier,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The stock schedule, with a later start of the encoder (`frozen_encoder_steps`) and of `late_parameters`."""
        is_new = self.lr_scheduler is None
        super().create_scheduler(num_training_steps, optimizer)
        if is_new and (self.args.num_frozen_encoder_steps or any(self.model.late_parameters().values())):
            self.lr_scheduler = late_schedule(
                self.lr_scheduler,
                num_training_steps,
                num_frozen_steps=self.args.num_frozen_encoder_steps,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            )
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock method; with `restart_schedule` the settings of the groups stay those of the arguments."""
        restores = checkpoint is not None and self.args.restart_schedule
        settings = group_settings(self.optimizer) if restores else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if settings is not None:
            restore_group_settings(self.optimizer, self.lr_scheduler, settings)

    def _get_learning_rate(self) -> float:
        """The logged learning rate: that of the head; the encoder's layers may have lower ones."""
        return float(self.optimizer.param_groups[-1]["lr"])
