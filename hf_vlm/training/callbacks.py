"""Callbacks of training: model state that advances, weight decay, and a log file readable while training runs."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_vlm.training.data_state import clear_run_folder
from hf_vlm.training.optim import weight_decay_at


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


class LogFile(TrainerCallback):
    """Appends each log entry as a line of JSON to `log.jsonl` in the run's folder."""

    name = "log.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0:
            clear_run_folder(path.parent)
        kept = [entry for entry in read_log(path) if entry["step"] <= state.global_step] if state.global_step else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(entry) + "\n" for entry in kept))  # a resumed run logs no step twice
        rewritten.replace(path)  # atomic: a run that is killed here keeps its log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with (Path(args.output_dir) / self.name).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """Entries of a `log.jsonl`, without a last line that is incomplete after a kill; empty without a file."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


__all__ = ["AfterStep", "LogFile", "WeightDecaySchedule", "read_log"]
