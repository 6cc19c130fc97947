"""Files on disk and behind URLs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
from upath import UPath

__all__ = ["display", "expand_braces", "find_paths", "is_folder", "is_remote", "open_binary", "reason"]

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

BLOCK_SIZE = 2**22  # bytes of a request: a pass over a file makes few of them


def is_remote(path: object) -> bool:
    """Whether a path is a URL."""
    return not isinstance(path, list) and "://" in str(path)


def display(path: object) -> str:
    """A path or URL for messages and records: without a password, and without the query, which may hold a key."""
    if not is_remote(path):
        return ", ".join(map(display, path)) if isinstance(path, list) else str(path)
    parts = urlsplit(str(path))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def reason(error: Exception) -> str:
    """What an error of a file system says; URLs in it are shown as `display` shows them."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "status", None) is None:
        cause = None if isinstance(cause, ImportError) else cause.__cause__
    text = str(error) if cause is None else f"the server answers with the status {getattr(cause, 'status', None)}"
    return re.sub(r"\w+://\S+", lambda found: display(found[0]), text or type(error).__name__)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; of a URL with the ending of a file this is not asked: a server might send it all."""
    if is_remote(path) and PurePosixPath(display(path)).suffix:
        return False
    return path.is_dir()


def expand_braces(text: str) -> Iterator[str]:
    """The names that braces stand for: `a-{00..10}.tar` numbers, `{a,b}.tar` alternatives."""
    found = BRACES.search(text)
    if found is None:
        yield text
        return
    numbers = RANGE.fullmatch(found[1])
    choices = found[1].split(",")
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    for choice in choices:
        yield from expand_braces(text[: found.start()] + choice + text[found.end() :])


def find_paths(source: str) -> list[Path]:
    """The path or URL that a source names, or several that it names by braces or stars.

    Raises:
        ValueError: Nothing matches the stars.
    """
    names = [os.path.expanduser(name) for name in expand_braces(source)]
    paths = [cast(Path, UPath(name)) for name in names if "*" not in name]
    for pattern in (name for name in names if "*" in name):
        file_system, path = fsspec.core.url_to_fs(pattern)
        paths += [
            cast(Path, UPath(file_system.unstrip_protocol(found)) if is_remote(pattern) else UPath(found))
            for found in sorted(file_system.glob(path))
        ]
    if not paths:
        raise ValueError(f"no file matches {display(source)}")
    return paths


def open_binary(path: object, *, read_ahead: bool = True) -> IO[bytes]:
    """Open a path or a URL of any protocol that fsspec knows.

    Args:
        read_ahead: Ask a server for more than is read, as suits reading from front to back.

    Raises:
        OSError: It is not there or cannot be reached.
    """
    if not is_remote(path):
        return open(str(path), "rb")
    cache = "readahead" if read_ahead else "none"
    file: Any = fsspec.open(str(path), "rb", cache_type=cache, block_size=BLOCK_SIZE)
    return file.open()  # type: ignore[no-any-return]
