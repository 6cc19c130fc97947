"""The lock of a run's folder: a second run in it would mix logs and checkpoints."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "run_lock"]

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in an existing folder. The lock ends with the process, killed or not.

    It is a record lock: data workers, which outlive a killed process for seconds, do not inherit it as they would
    `flock`, and it holds between the machines of a network file system. Where there are no such locks a warning says
    so.

    Raises:
        ValueError: Another process has the lock; its number and machine are named.
    """
    path = folder / LOCK_FILE
    descriptor = _open_locked(path)
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock does not say whose it is
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that the run before has just deleted


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is None:
        _warn(path, "this system has no record locks")
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which of the two depends on the system
        raise ValueError(
            f"{path.parent} is in use: {_holder(os.read(descriptor, 1000))} trains there. Wait for its end, or name "
            "another folder with --output_dir."
        ) from error
    except OSError as error:
        _warn(path, f"the file system has no record locks ({error.strerror})")


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another process"


def _warn(path: Path, reason: str) -> None:
    logger.warning("%s is not locked: %s. See to it that no other run works there.", path.parent, reason)
