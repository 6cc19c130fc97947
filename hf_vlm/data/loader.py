"""The loader of batches: its workers may not keep training waiting for ever, and their errors read as they were."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

__all__ = ["StreamLoader"]

# A worker reads a block of examples before its first batch, of servers that are waited for; this is far beyond.
BATCH_SECONDS = 1800.0


class StreamLoader(StatefulDataLoader[Any]):
    """A `StatefulDataLoader` that gives up when no batch comes for `BATCH_SECONDS`.

    Raises:
        ValueError: No batch came in time, or a worker raised one, whose message is that of the worker.
    """

    _iterator: Any  # of the stock loader

    def __init__(self, *args: Any, num_workers: int = 0, **kwargs: Any) -> None:
        timeout = BATCH_SECONDS if num_workers else 0  # without workers there is nobody to wait for
        super().__init__(*args, num_workers=num_workers, timeout=timeout, **kwargs)

    def __iter__(self) -> Any:
        try:
            iterator = super().__iter__()  # not within the generator: the state must be right before the first batch
        except ValueError as error:
            raise ValueError(_worker_message(error)) from error
        return self._batches(iterator)

    def stop_workers(self) -> None:
        """Ends the data workers, which would live as long as the loader does, and make the end of a program wait."""
        iterator, self._iterator = self._iterator, None
        if not self.num_workers or iterator is None:
            return
        iterator._workers_done_event.set()
        for queue, is_available in zip(iterator._index_queues, iterator._workers_status):
            if not is_available:  # one that raised waits for this, which the stock loader does not send it
                queue.put(None)
        iterator._shutdown_workers()

    def _batches(self, iterator: Any) -> Iterator[Any]:
        try:
            yield from iterator
        except ValueError as error:
            self.stop_workers()
            raise ValueError(_worker_message(error)) from error
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
            for worker in iterator._workers:
                with contextlib.suppress(RuntimeError):  # by which torch's signal handler reports a killed worker
                    worker.kill()  # one that is stopped would keep this process from ending
                    worker.join(10)
            raise ValueError(
                f"The data workers gave no batch for {self.timeout:g} s: one was stopped, or waits for a disk or "
                "server that hangs. See whether the data can be read, then resume from the last checkpoint."
            ) from error


def _worker_message(error: ValueError) -> str:
    """The message of an error; of a worker's, without the traceback that torch writes into it."""
    text = str(error)
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text:
        return text
    name = re.escape(text.split()[1])
    return re.split(rf"^(?:[\w.]+\.)?{name}: ", text, flags=re.MULTILINE)[-1].strip()
