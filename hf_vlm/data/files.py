"""Files on disk and behind URLs."""

from typing import IO, Any

import fsspec

__all__ = ["is_remote", "open_binary"]

BLOCK_SIZE = 2**22  # bytes of a request: a pass over a file makes few of them


def is_remote(path: object) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def open_binary(path: object) -> IO[bytes]:
    """Open a path or a URL of any protocol that fsspec knows, for reading from front to back.

    Raises:
        OSError: It is not there or cannot be reached.
    """
    if not is_remote(path):
        return open(str(path), "rb")
    file: Any = fsspec.open(str(path), "rb", cache_type="readahead", block_size=BLOCK_SIZE)
    return file.open()  # type: ignore[no-any-return]
