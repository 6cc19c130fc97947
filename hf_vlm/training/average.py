"""A moving average of the weights, which is evaluated and saved in place of the last ones."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_vlm.training.lora import LoRATrainer

__all__ = ["LAST_WEIGHTS_FILE", "AveragingTrainer", "WeightAverage", "decay_at"]

LAST_WEIGHTS_FILE = "last_weights.safetensors"  # in a checkpoint, whose model holds the average


def decay_at(step: int, decay: float) -> float:
    """Decay after `step` steps: it rises to `decay`, so that the average spans about a tenth of the steps at most.

    This is the rule of TensorFlow's ExponentialMovingAverage; without it, a short run would end with an average over
    its initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights that are trained (Polyak and Juditsky, 1992), with a `decay` per step.

    Within `in_use`, which does nothing before and after training, the model has the averaged weights, and from the
    end of training on. Other state of the model, such as the buffers of batch norm, is that of the last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._average: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._average = self._average or _copies(self.weights.values())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = [weight.detach() for weight in self.weights.values()]
        torch._foreach_lerp_(self._average, weights, 1 - decay_at(state.global_step, self.decay))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set(self._average)
        self.discard()

    def discard(self) -> None:
        """Leaves the model as it is, from here on: it has averaged weights already."""
        self._average = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        last = _copies(self.weights.values()) if self._average else []
        self._set(self._average)
        try:
            yield
        finally:
            self._set(last)

    def save_last(self, checkpoint: Path) -> None:
        """Saves the weights of the last step beside a model that holds the average."""
        save_file({name: weight.detach().contiguous() for name, weight in self.weights.items()}, _file(checkpoint))

    def resume(self, checkpoint: Path) -> None:
        """Takes the average from the model, which a checkpoint was loaded into, and gives it its last weights."""
        self._average = _copies(self.weights.values())
        last = load_file(_file(checkpoint))
        self._set([last[name] for name in self.weights])

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights.values(), values):  # none where there is no average
            weight.copy_(value)


class AveragingTrainer(LoRATrainer):
    """A Trainer that evaluates and saves the average of the weights where its arguments have an `ema_decay`.

    Raises:
        ValueError: if the weights are sharded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._average: WeightAverage | None = None
        if self.args.ema_decay is not None:
            if self.is_sharded or self.is_deepspeed_enabled:
                raise ValueError(
                    "ema_decay needs whole weights on each process: leave it out with FSDP, tp_size, ep_size and "
                    "DeepSpeed."
                )
            self._average = WeightAverage(self.model, self.args.ema_decay)
            self.add_callback(self._average)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_use()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method, by which a model is evaluated while it is trained."""
        with self._averaged():
            return super()._evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._averaged():
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        """The stock method, called for each checkpoint; adds the weights to resume from."""
        with self._averaged():  # for what is saved beside a model that holds the average
            super()._save_rng_state(output_dir)
        if self._average is not None and self.args.should_save:
            self._average.save_last(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.resume(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._average is not None:
            self._average.discard()


def _copies(weights: Iterable[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]


def _file(checkpoint: Path) -> Path:
    return checkpoint / LAST_WEIGHTS_FILE
