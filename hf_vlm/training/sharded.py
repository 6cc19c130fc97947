"""Checkpoints of models that ranks divide, which resume on any number of ranks in any layout."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_vlm.training.saving import CommittingTrainer

__all__ = ["OPTIMIZER_FOLDER", "ShardedTrainer"]

OPTIMIZER_FOLDER = "optimizer"
GROUP_STATE = ("base_lrs", "lr_lambdas", "_last_lr")  # of a schedule, one per group of the optimiser


class ShardedTrainer(CommittingTrainer):
    """A Trainer whose checkpoints of sharded models can be resumed on other numbers of ranks and in other layouts.

    Weights are gathered into plain safetensors, as everywhere. The optimiser's state stays divided: each rank writes
    its part by torch's distributed checkpoint, whose entries are named after the parameters.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        """As the stock Trainer, which refuses to checkpoint models that transformers divides.

        It has no optimiser state of theirs to save; this class has.
        """
        only_model = args.save_only_model
        args.save_only_model |= getattr(model, "is_distributed_loading_by_transformers", False)
        super().__init__(model, args, **kwargs)
        self.args.save_only_model = only_model

    def create_accelerator_and_postprocess(self) -> None:
        """The stock method, in which accelerate hears nothing of tensor parallelism.

        It has no part in that of transformers, and would refuse CPUs.
        """
        size = getattr(self.model, "_tp_size", None) or 1
        if size == 1:
            super().create_accelerator_and_postprocess()
            return
        self.model._tp_size = None
        with patch_environment(ACCELERATE_USE_PARALLELISM_CONFIG="false"):
            super().create_accelerator_and_postprocess()
        self.model._tp_size = size

    @property
    def is_sharded(self) -> bool:
        """Whether a rank may hold parts of weights."""
        return bool(self.is_fsdp_enabled or self.is_distributed_loading_by_transformers)

    @property
    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper

    def whole_weights(self, module: nn.Module) -> dict[str, Any]:
        """Weights of a part of the model, which all ranks gather for the first one."""
        if self.is_distributed_loading_by_transformers:
            return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return self.accelerator.get_state_dict(module)

    def optimizer_names(self) -> list[str]:
        """Names of the parameters in the order of the optimiser of a model that is whole."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The stock method; of a sharded model each rank saves its part of the optimiser's state."""
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with _plain_errors():
            save_optimizer_distributed(self.model, self._plain_optimizer, str(Path(output_dir) / OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock method, and its equivalents where the model is sharded, or was when the checkpoint was saved."""
        if checkpoint is None:
            return
        whole, parts = Path(checkpoint) / OPTIMIZER_NAME, Path(checkpoint) / OPTIMIZER_FOLDER
        if not (parts.is_dir() or (self.is_sharded and whole.is_file())):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if parts.is_dir():
            with _plain_errors():
                load_optimizer_distributed(self.model, self._plain_optimizer, str(parts))
        else:
            self._divide_optimizer_state(torch.load(whole, map_location="cpu", weights_only=True))
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        own = self.lr_scheduler.state_dict()  # the groups of a sharded model are divided further
        self.lr_scheduler.load_state_dict(schedule | {name: own[name] for name in GROUP_STATE})

    def _divide_optimizer_state(self, state: dict[str, Any]) -> None:
        """Gives each rank its part of the state of a model that was whole, whose parameters are numbered."""
        names = self.optimizer_names()
        settings = {names[index]: group for group in state["param_groups"] for index in group["params"]}
        own = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [[own[id(each)] for each in group["params"]] for group in self._plain_optimizer.param_groups]
        state = {
            "state": {names[index]: value for index, value in state["state"].items()},
            "param_groups": [settings[group[0]] | {"params": group} for group in groups],
        }
        set_optimizer_state_dict(
            self.model, self._plain_optimizer, state, options=StateDictOptions(full_state_dict=True)
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The stock method; a sharded model takes its parts of the whole weights."""
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        if not self.is_sharded or not files:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights: dict[str, Any] = {name: weight for file in files for name, weight in load_file(file).items()}
        options = StateDictOptions(full_state_dict=True, strict=False)
        self._issue_warnings_after_load(set_model_state_dict(self.model, weights, options=options))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A context that raises the error of writing or reading that torch wraps in one of its own, on all ranks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: so it is meant
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
