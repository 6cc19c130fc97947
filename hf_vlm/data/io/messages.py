"""What messages show: names in short, URLs without secrets, errors of servers.

Names come from data and may hold anything: `printable` is what may reach a terminal of them.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "FindingsOnce",
    "OutsideError",
    "PrintableFormatter",
    "UnreachableError",
    "collect_warnings",
    "error_causes",
    "error_text",
    "one_line",
    "printable",
    "redact",
    "redact_url",
    "server_status",
    "shown_path",
    "summarise",
]

AUTHORITY = re.compile(r"[^/?#]*")  # of a URL, after its "://": user, password, host and port
MAX_NAME = 1000  # characters; a path is shorter, and a cell of bytes taken for one may have millions
# Loggers of what opens data and looks at it before training.
FINDERS = ("hf_vlm.data.formats", "hf_vlm.data.sources", "hf_vlm.data.inspection.pixel_range")

# What moves the cursor, colours or hides text, or turns its direction; and halves of characters, which cannot be
# encoded. Newlines and tabs are layout of ours.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


class OutsideError(ValueError):
    """Data name a file or address outside of their own place; the message is complete in itself."""


class FindingsOnce(logging.Filter):
    """Of a handler: lets what is found in data pass once, for all splits are opened and share their files.

    Servers that are waited for and images that are skipped are events, which may repeat.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(FINDERS):
            return True
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


class PrintableFormatter(logging.Formatter):
    """Formats log entries without what would act on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def printable(text: str) -> str:
    """A text in which control characters and halves of surrogate pairs are written as escapes, such as `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def one_line(name: object) -> str:
    """A name in one line and without what would act on a terminal."""
    return printable(str(name)).replace("\n", "\\n").replace("\t", "\\t")


def summarise(names: Iterable[object], *, num_shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    texts = list(map(one_line, names))
    more = f" and {len(texts) - num_shown} more" if len(texts) > num_shown else ""
    return ", ".join(texts[:num_shown]) + more


def redact_url(path: object) -> str:
    """A path or URL for messages and records: without a password, and without the query, which may hold a key."""
    if isinstance(path, list):
        return ", ".join(map(redact_url, path))
    return "::".join(map(_redact_one, str(path).split("::")))  # zip://a.jpg::https://host/b.zip holds two URLs


def shown_path(path: object) -> str:
    """A path or URL that data name, as messages show it: redacted, and cut where no path is as long."""
    text = one_line(redact_url(path))
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME // 4]}... ({len(text):,} characters)"


def _redact_one(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    authority = AUTHORITY.match(rest)
    assert authority is not None  # it may be empty
    host = authority[0].rpartition("@")[2]
    return scheme + separator + re.split("[?#]", host + rest[authority.end() :], maxsplit=1)[0]


def redact(text: str) -> str:
    """A text whose URLs are shown as `redact_url` shows them, and whose longest words are cut."""
    if "://" not in text and len(text) <= MAX_NAME:
        return text
    words = re.split(r"(\s+)", text)
    return "".join(shown_path(word) if "://" in word or len(word) > MAX_NAME else word for word in words)


def error_text(error: Exception) -> str:
    """The message of a file system's error, with its URLs redacted; the status where a server answered with one."""
    causes = list(error_causes(error))
    complete = next((cause for cause in causes if isinstance(cause, OutsideError | UnreachableError)), None)
    status = server_status(error)
    if complete is not None:
        text = str(complete)
    elif status is not None:
        text = f"the server answers with the status {status}"
    elif any(isinstance(cause, TimeoutError) for cause in causes):
        text = "the server gives no answer, or a slow one"
    else:
        text = str(error)
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
