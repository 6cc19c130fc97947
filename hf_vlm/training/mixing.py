"""Mixes the images of each batch with each other, in the first part of training."""

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_vlm.tasks.task import BatchMixing

__all__ = ["MixBatches"]


class MixBatches(TrainerCallback):
    """A function from a batch on the device to a mixed one, which depends on seed, step, rank and batch alone."""

    def __init__(self, mixing: BatchMixing, args: TrainingArguments) -> None:
        self.mixing = mixing
        self.num_steps = round(mixing.fraction * args.max_steps)
        self.seed = [args.seed, args.process_index]
        self._step = self._num_batches = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step, self._num_batches = state.global_step, 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, mixed in the first steps."""
        if self._step >= self.num_steps:
            return batch
        self._num_batches += 1  # of this step, where gradients are accumulated
        return self.mixing(batch, np.random.default_rng([*self.seed, self._step, self._num_batches]))
