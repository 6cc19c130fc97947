"""What a run shows while it trains: one aligned line per log entry, and on a terminal a progress bar below them."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ConsoleLog", "format_duration", "format_entry"]

# What is shown of a value, by its name in the log; of other names the name and four digits.
UNITS: dict[str, Callable[[float], str]] = {
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:<8.3g}",
    "images_per_second": lambda value: f"{value:>8,.1f} images/s",
    "data_wait": lambda value: f"{value:>4.0%} waiting for data",
    "mfu": lambda value: f"{value:>6.1%} MFU",
    "peak_memory_gib": lambda value: f"{value:>6.2f} GiB",
    "train_runtime": lambda value: f"in {format_duration(value)}",
    "train_loss": lambda value: f"mean loss {value:.4g}",
}
HIDDEN = ("epoch", "total_flos", "train_samples_per_second", "train_steps_per_second", "probe_seconds")


def format_duration(seconds: float) -> str:
    """A duration with its two largest units, as `3 h 20 min`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((index for index, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number or first == 3)


def format_entry(entry: Mapping[str, Any]) -> str:
    """The values of a log entry on one line, with units; undefined ones (NaN metrics of no objects) are left out."""
    cells = []
    for name, value in entry.items():
        is_metric = name.startswith(("eval_", "probe_"))
        if name in HIDDEN or not isinstance(value, int | float) or (is_metric and math.isnan(value)):
            continue
        plain = name.removeprefix("eval_").removeprefix("probe_")
        cells.append(UNITS[name](value) if name in UNITS else f"{plain} {value:<8.4g}")
    prefix = "evaluated  " if any(name.startswith("eval_") for name in entry) else ""
    prefix = "probed     " if any(name.startswith("probe_") for name in entry) else prefix
    return prefix + "  ".join(cells).rstrip()


class ConsoleLog(TrainerCallback):
    """Prints log entries with step and remaining time, in place of transformers' dictionaries of strings."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm:
            options: Any = {
                "initial": state.global_step,
                "total": state.max_steps,
                "disable": None,
            }  # None: no terminal
            self._bar = self._stack.enter_context(tqdm(desc="Training", unit=" steps", dynamic_ncols=True, **options))
            self._stack.enter_context(logging_redirect_tqdm())  # else warnings would tear the bar

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the output may be redirected to a full disk, which ends no run
                self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            width = len(f"{state.max_steps:,}")
            line = f"step {state.global_step:>{width},}/{state.max_steps:,}  {format_entry(logs)}"
            with contextlib.suppress(OSError):
                tqdm.write(line + self._remaining(state) if "loss" in logs else line)

    def _remaining(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        per_step = (time.monotonic() - self._started) / done if done else 0.0
        return f"  {format_duration(per_step * (state.max_steps - state.global_step))} left" if per_step else ""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with contextlib.suppress(OSError):
            self._stack.close()
        self._bar = None
