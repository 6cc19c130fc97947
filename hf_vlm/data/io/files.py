"""Files on disk and behind URLs."""

import functools
import io
import math
import os
import posixpath
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

import fsspec
from tqdm.auto import tqdm
from upath import UPath

from hf_vlm.data.io.messages import OutsideError, error_causes, redact_url
from hf_vlm.data.io.remote import REQUEST_BYTES, file_system, http_options
from hf_vlm.data.io.retries import retried
from hf_vlm.models.nearest_name import did_you_mean

__all__ = [
    "as_path",
    "can_list",
    "existing_paths",
    "exists",
    "expand_braces",
    "find_paths",
    "is_folder",
    "is_remote",
    "join",
    "map_files",
    "near_path",
    "open_binary",
    "read_beginning",
    "read_bytes",
    "read_lines",
    "walk",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_REMOTE_BYTES = 2**31  # of a file that is read whole; a server may send without end
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

BLOCK_SIZE = 2**22  # bytes of a request: a pass over a file makes few of them
NUM_THREADS = 8  # they wait for disks and servers
BATCH_SIZE = 32  # files that a thread reads at a time
MIN_FILES_FOR_BAR = 5000  # files; fewer are read in a moment


def is_remote(path: object) -> bool:
    """Whether a path is a URL."""
    return not isinstance(path, list) and "://" in str(path)


def can_list(path: object) -> bool:
    """Whether folders can be listed where a path is: web servers alone cannot."""
    return not str(path).startswith(("http://", "https://"))


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; not asked for a web page with a file's extension, which may be sent whole."""
    if not can_list(path) and PurePosixPath(redact_url(path)).suffix:
        return False
    return path.is_dir()


def exists(path: Path, *, same_server: bool = False) -> bool:
    """Whether a path or URL is there. `Path.exists` is false, too, where a web server is busy.

    Args:
        same_server: See `http_options`.

    Raises:
        OutsideError: Its server redirects to where it may not.
    """
    if can_list(path):
        return path.exists()
    system, inner = file_system(path, same_server=same_server)
    try:
        return bool(retried(path, lambda: system.info(inner)))
    except FileNotFoundError as error:
        refused = [cause for cause in error_causes(error) if isinstance(cause, OutsideError)]
        if refused:  # which is not to be missing
            raise refused[0] from error
        return False


def existing_paths(paths: Iterable[Path]) -> set[Path]:
    """The paths that exist, found by listing each folder once; on web servers, which cannot list, all."""
    paths = set(paths)
    folders = {path.parent for path in paths}
    unlisted = {folder for folder in folders if not can_list(folder)}
    there = {path for folder in folders - unlisted if folder.is_dir() for path in folder.iterdir()}
    return {path for path in paths if path in there or path.parent in unlisted}


def near_path(path: Path) -> str:
    """The end of a sentence, a question that offers the path in the folder of a missing one that it may have meant."""
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names, offered=lambda name: str(path.with_name(name)))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below one on disk, with the names of its files; without hidden ones, and following links once."""
    seen = {folder.resolve()}
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [name for name in folders if os.path.islink(os.path.join(parent, name))]:
            target = Path(parent, name).resolve()
            if target in seen or Path(parent).resolve().is_relative_to(target):  # a loop
                folders.remove(name)
            seen.add(target)
        yield parent, [name for name in files if not name.startswith(".")]


def join(folder: str, name: str) -> str:
    """The path or URL of what a file in a folder names, unless that is an absolute path or a URL itself."""
    if not is_remote(folder) or is_remote(name) or name.startswith("/"):
        return name if is_remote(name) else str(Path(folder, name))
    protocol, _, inner = folder.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(inner, name))}"


def expand_braces(text: str) -> Iterator[str]:
    """The names that braces expand to: `a-{00..10}.tar` numbers, `{a,b}.tar` alternatives."""
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


def as_path(name: str) -> Path:
    """A path on disk or remote, whose requests to web servers have an end."""
    return cast(Path, UPath(name, **http_options(name)))


def find_paths(source: str) -> list[Path]:
    """The path or URL that a source names, or several that it names by braces or stars.

    Raises:
        ValueError: Nothing matches the stars.
    """
    names = [os.path.expanduser(name) for name in expand_braces(source)]
    paths = [as_path(name) for name in names if "*" not in name]
    for pattern in (name for name in names if "*" in name):
        system, path = file_system(pattern)
        paths += [
            as_path(system.unstrip_protocol(found) if is_remote(pattern) else found)
            for found in sorted(retried(pattern, functools.partial(system.glob, path)))
        ]
    if not paths:
        raise ValueError(f"no file matches {redact_url(source)}")
    return paths


def open_binary(path: object, *, read_ahead: bool = True) -> IO[bytes]:
    """Open a path or a URL of any protocol that fsspec knows; errors of the network that may pass are waited for.

    Args:
        read_ahead: Whether to ask a server for more than is read, which suits reading from front to back.

    Raises:
        OSError: It is not there or cannot be reached.
    """
    path = _on_disk(path)
    return cast(IO[bytes], _RemoteFile(str(path), read_ahead)) if is_remote(path) else _open_regular(str(path))


def read_bytes(
    path: object,
    *,
    limit: int | None = None,
    num_waits: int | None = None,
    seconds: float = math.inf,
    same_server: bool = False,
) -> bytes:
    """All bytes of a file on disk or behind a URL.

    Args:
        limit: Largest number of bytes it may have; None for any on disk, and `MAX_REMOTE_BYTES` behind a URL.
        num_waits: Number of waits for a server; see `retried`.
        seconds: Time after which nothing more is asked of a server.
        same_server: See `http_options`.

    Raises:
        OSError: It is not there, cannot be reached, or is no regular file.
        ValueError: It has more bytes than the limit.
    """
    path = _on_disk(path)
    if is_remote(path):
        deadline = time.monotonic() + seconds
        most = MAX_REMOTE_BYTES if limit is None else limit
        read = functools.partial(_read_remote, str(path), most, deadline, same_server)
        return retried(path, read, num_waits=num_waits, seconds=seconds)
    with _open_regular(str(path)) as file:
        _check_size(os.fstat(file.fileno()).st_size, limit)
        return file.read()


def read_beginning(path: object, num_bytes: int, *, same_server: bool = False) -> bytes:
    """The first bytes of a file on disk or behind a URL; all of a shorter one.

    Args:
        same_server: See `http_options`.

    Raises:
        OSError: It is not there, cannot be reached, or is no regular file.
    """
    path = _on_disk(path)
    if is_remote(path):  # opened, it would fetch megabytes ahead
        system, inner = file_system(path, same_server=same_server)
        return bytes(retried(path, lambda: system.cat_file(inner, start=0, end=num_bytes)))
    with _open_regular(str(path)) as file:
        return file.read(num_bytes)


def _on_disk(path: object) -> object:
    """A URL of the protocol `file` as the path that it is, so that the same checks hold."""
    return str(path).removeprefix("file://") if str(path).startswith("file:///") else path


def _open_regular(path: str) -> IO[bytes]:
    """Open a file on disk; not a pipe, a device or a socket, of which reading may wait for ever or never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a pipe, a device or a socket, and no regular file")
    return open(path, "rb")


def read_lines(path: object) -> list[str]:
    """Lines of a text file with their ends stripped.

    Raises:
        OSError: It is not there or cannot be reached.
        ValueError: It is not UTF-8.
    """
    try:
        return [line.strip() for line in read_bytes(path).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def map_files(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """Results of a function that reads files, in order; a bar shows when it takes long."""
    batches = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    results: list[Result] = []
    with (
        ThreadPoolExecutor(NUM_THREADS) as threads,
        tqdm(desc=description, total=len(items), disable=len(items) < MIN_FILES_FOR_BAR or None) as bar,
    ):
        for batch in threads.map(lambda batch: [function(item) for item in batch], batches):
            results += batch
            bar.update(len(batch))
    return results


def _read_remote(path: str, limit: int, deadline: float, same_server: bool) -> bytes:
    with _open_remote(path, "readahead", same_server) as file:
        size = getattr(file, "size", None)
        _check_size(size or 0, limit)
        content = bytearray()
        while chunk := file.read(BLOCK_SIZE if size is None else min(size, REQUEST_BYTES)):
            content += chunk
            _check_size(len(content), limit)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(content)} bytes when its time was over")
    _check_complete(len(content), size or 0)
    return bytes(content)


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise ValueError(f"{size} bytes are more than the {limit} that one file may have")


def _check_complete(num_read: int, num_expected: int) -> None:
    """A connection that ends early may look like the end of the file."""
    if num_read < num_expected:
        raise ConnectionError(f"the connection ended after {num_read} of {num_expected} bytes")


def _open_remote(path: str, cache: str, same_server: bool = False) -> Any:
    options = http_options(path, same_server=same_server)
    return fsspec.open(path, "rb", cache_type=cache, block_size=BLOCK_SIZE, **options).open()


class _RemoteFile(io.RawIOBase):
    """A file behind a URL, opened again at its position when reading fails."""

    def __init__(self, path: str, read_ahead: bool) -> None:
        self.path, self.cache = path, "readahead" if read_ahead else "none"
        self.file = retried(path, lambda: _open_remote(path, self.cache))
        self.is_broken = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.file.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        content = bytearray()
        while size < 0 or len(content) < size:
            wanted = REQUEST_BYTES if size < 0 else min(size - len(content), REQUEST_BYTES)
            chunk = retried(self.path, functools.partial(self._read_at, self.tell(), wanted))
            content += chunk
            if not chunk:  # a server that gives no length sends pieces of any size
                break
        return bytes(content)

    def _read_at(self, position: int, size: int) -> bytes:
        if self.is_broken:
            self.file = _open_remote(self.path, self.cache)
            self.file.seek(position)
        self.is_broken = True
        content: bytes = self.file.read(size)
        remaining = max((getattr(self.file, "size", None) or 0) - position, 0)
        _check_complete(len(content), min(size, remaining))
        self.is_broken = False
        return content

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
