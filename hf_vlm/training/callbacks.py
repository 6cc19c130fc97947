"""Callbacks of training: model state that advances, weight decay, the run's folder, and a log file in it."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_vlm.data.io.durable import PARTIAL_FOLDER, disk_errors, replace_text
from hf_vlm.training.checkpoints import abandon_later_checkpoints, clear_run_folder, resume_advice
from hf_vlm.training.optim import weight_decay_at

logger = logging.getLogger(__name__)


class AfterStep(TrainerCallback):
    """Calls the model's `after_step(progress)` once per optimiser step (teachers, schedules), in any Trainer."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        inner = getattr(model, "module", model)
        inner.after_step(state.global_step / state.max_steps)


class WeightDecaySchedule(TrainerCallback):
    """Sets the weight decay of each step, a function of the step alone, so that a resumed run continues it."""

    def __init__(self, start: float, end: float):
        self.start, self.end = start, end

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        decay = weight_decay_at(state.global_step, state.max_steps, start=self.start, end=self.end)
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = decay


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count of evaluations without a better metric a resumed run continues."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks[type(self).__name__]
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


class RunFolder(TrainerCallback):
    """Takes out of the run's folder what is not of this run, once everything is ready for its first step.

    `continues` says whether the run continues from a checkpoint of its own folder.
    """

    continues = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(args.output_dir)
        if not args.should_save:
            return
        with disk_errors("The run", folder, lambda: resume_advice(folder)):
            if self.continues:
                shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)  # of a run that was killed while it saved
                abandon_later_checkpoints(folder, state.global_step)
            else:
                clear_run_folder(folder)


class LogFile(TrainerCallback):
    """Appends each log entry as a line of JSON to `log.jsonl` in the run's folder.

    Entries for which there is no space wait in memory for the next one; training continues.
    """

    name = "log.jsonl"

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / self.name
        kept = [entry for entry in read_log(path) if entry["step"] <= state.global_step] if state.global_step else []
        with disk_errors("The log", path.parent, lambda: resume_advice(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))  # a resumed run logs no step twice

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self._waiting.append(json.dumps({"step": state.global_step, **logs}) + "\n")
            self._write(Path(args.output_dir) / self.name)

    def _write(self, path: Path) -> None:
        size = None
        try:
            with path.open("a") as file:
                size = file.tell()
                file.write("".join(self._waiting))
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)  # no half line, to which the next would be appended
            if not self._has_warned:
                logger.warning("%s cannot be written: %s. Training continues; its entries wait.", path, error.strerror)
            self._has_warned = True
        else:
            self._waiting.clear()
            self._has_warned = False


def read_log(path: Path) -> list[dict[str, float]]:
    """Entries of a `log.jsonl`, without a last line that is incomplete after a kill; empty without a file."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


__all__ = [
    "AfterStep",
    "EarlyStopping",
    "LogFile",
    "RunFolder",
    "WeightDecaySchedule",
    "read_log",
]
