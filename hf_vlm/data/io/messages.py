"""What messages show: names in short, the nearest name to a mistyped one, URLs without secrets, errors of servers."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "UnreachableError",
    "collect_warnings",
    "did_you_mean",
    "error_causes",
    "error_text",
    "redact",
    "redact_url",
    "server_status",
    "summarise",
]

URL = re.compile(r"(\w[\w+.-]*://)(?:[^/?#]*@)?([^?#]*).*", re.DOTALL)  # without user and password; without query


class UnreachableError(OSError):
    """A server did not give a file in any of several attempts; the message is complete in itself."""


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if not logging.getLogger("hf_vlm").hasHandlers() and logging.lastResort is not None:
            logging.lastResort.handle(record)  # as without this handler


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """A list that gets the text of every warning that `hf_vlm.data` logs meanwhile; they are logged all the same."""
    collector, logger = _Collector(), logging.getLogger("hf_vlm.data")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


def summarise(names: Iterable[object], *, num_shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - num_shown} more" if len(texts) > num_shown else ""
    return ", ".join(texts[:num_shown]) + more


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that offers the most similar name, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def redact_url(path: object) -> str:
    """A path or URL for messages and records: without a password, and without the query, which may hold a key."""
    return ", ".join(map(redact_url, path)) if isinstance(path, list) else URL.sub(r"\1\2", str(path))


def redact(text: str) -> str:
    """A text whose URLs are shown as `redact_url` shows them."""
    return re.sub(r"\w+://\S+", lambda found: redact_url(found[0]), text)


def error_text(error: Exception) -> str:
    """The message of a file system's error, with its URLs redacted; the status where a server answered with one."""
    status = None if isinstance(error, UnreachableError) else server_status(error)
    text = str(error) if status is None else f"the server answers with the status {status}"
    return redact(text or type(error).__name__)


def server_status(error: Exception) -> int | None:
    """The HTTP status behind an error; None where no server answered."""
    statuses = (getattr(cause, "status", None) for cause in error_causes(error))
    return next((status for status in statuses if isinstance(status, int)), None)


def error_causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = None if isinstance(cause, ImportError) else cause.__cause__
