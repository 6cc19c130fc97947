"""Workers that stop or refuse: training ends, with a message of one sentence."""

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import IterableDataset

from hf_vlm.data import loader
from hf_vlm.data.io.messages import OutsideError
from hf_vlm.data.loader import StreamLoader


class Numbers(IterableDataset):
    """0, 1, 2, ...; a worker stops itself or raises where it comes to a number."""

    def __init__(self, *, stops_at=None, raises_at=None, error=None):
        self.stops_at, self.raises_at, self.error = stops_at, raises_at, error

    def __iter__(self):
        for number in range(6):
            if number == self.stops_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            if number == self.raises_at:
                raise self.error
            yield number


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_through(num_workers):
    batches = StreamLoader(Numbers(), batch_size=2, num_workers=num_workers)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    first = StreamLoader(Numbers(), batch_size=2, num_workers=num_workers)
    next(iter(first))
    second = StreamLoader(Numbers(), batch_size=2, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == [[2, 3], [4, 5]]


def test_a_stopped_worker_ends_the_run_and_itself(monkeypatch):
    monkeypatch.setattr(loader, "BATCH_SECONDS", 60.0)
    batches = StreamLoader(Numbers(stops_at=4), batch_size=2, num_workers=1, prefetch_factor=1)
    iterator = iter(batches)
    assert [next(iterator).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    batches._iterator._timeout = 0.5  # from here on: to start the worker may take longer
    start = time.monotonic()
    (worker,) = batches._iterator._workers
    with pytest.raises(ValueError, match=r"gave no batch for 60 s: one was stopped, or waits .* resume from the last"):
        next(iterator)
    assert time.monotonic() - start < 10
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_message_of_a_worker_has_no_traceback(num_workers):
    error = OutsideError("a.parquet, row 3: there is no label: ValueError: x.\nGive one.")
    batches = StreamLoader(Numbers(raises_at=4, error=error), batch_size=2, num_workers=num_workers)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^a\.parquet, row 3: there is no label: ValueError: x\.\nGive one\.$"):
        list(batches)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 4.5  # which the stock loader waits for a worker that raised
    batches = StreamLoader(Numbers(raises_at=0, error=KeyError("x")), batch_size=2, num_workers=num_workers)
    with pytest.raises(KeyError):
        list(batches)
    batches.stop_workers()
