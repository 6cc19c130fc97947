"""SIGTERM and SIGINT: a run saves at the end of its step, and ends with a status that says that it is not done."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_vlm.training.checkpoints import checkpoint_folder

__all__ = ["StopSignals", "StoppedBySignal", "outlive_signals"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BURST_SECONDS = 2.0  # signals of that time are one: a launcher passes on what its whole process group has got already
WORKER_SECONDS = 30  # that data workers outlive SIGTERM, in which a step ends


class StoppedBySignal(SystemExit):
    """A run was stopped by a signal and has saved a checkpoint; the exit status is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals(TrainerCallback):
    """A context in which SIGTERM and SIGINT end training after the step, with a checkpoint; a second ends it at once.

    Several ranks end together, a step later: whether any of them got a signal in a step is exchanged during the next
    one. `stopped_by` is then the number of the signal, else 0. A signal that comes after the last step acts as usual
    when the context is left.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        self._received, self._since = 0, 0.0
        self._handlers: dict[int, Any] = {}
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set in Python
        if self._received and not self.stopped_by and exception[0] is None:
            os.kill(os.getpid(), self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()
            name = signal.Signals(number).name  # not print nor logging: it may have come in the midst of these
            os.write(2, f"\n{name}: saving at the end of this step; a second one ends the run at once.\n".encode())
        elif time.monotonic() - self._since > BURST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # of processes: the device does not wait for it

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped_by = self._agree() if self._group is not None else self._received
        if self.stopped_by:
            control.should_save = control.should_training_stop = True

    def _agree(self) -> int:
        """The signal that any rank had got by the end of the step before."""
        agreed = self._wait()
        received = torch.tensor(self._received)
        self._pending = dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group, async_op=True), received
        return agreed

    def _wait(self) -> int:
        if self._pending is None:
            return 0
        work, received = self._pending
        work.wait()
        return int(received)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._wait()

    def raise_if_stopped(self, args: Any, state: TrainerState) -> None:
        """Raises `StoppedBySignal` where training was ended by a signal."""
        if not self.stopped_by:
            return
        if args.world_size > 1:
            dist.barrier()  # a launcher ends the processes that still save once the first has ended
        if state.is_world_process_zero:
            logger.warning(
                "Stopped by %s at step %d of %d. %s is saved; --resume_from_checkpoint last, or auto in a job script, "
                "continues from it.",
                signal.Signals(self.stopped_by).name,
                state.global_step,
                state.max_steps,
                checkpoint_folder(Path(args.output_dir), state.global_step),
            )
        raise StoppedBySignal(self.stopped_by)


def outlive_signals(worker_id: int) -> None:
    """Keeps a data worker alive while the main process, which has got the same signal, ends its step and saves."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
