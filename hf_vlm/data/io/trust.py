"""Where data may point: into their own folder or to their own host, unless the user trusts them with more.

Annotations and tables name files. Whoever wrote them may name any file of this machine and any server that it reaches,
so names are followed inside the source alone. Symbolic links are followed: whoever unpacked the data made them.
"""

import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from yarl import URL

from hf_vlm.data.io.messages import OutsideError, redact_url, shown_path, summarise

__all__ = [
    "TrustedRows",
    "check_inside",
    "is_inside",
    "outside_allowed",
    "outside_is_allowed",
    "redirects_are_allowed",
    "server_of",
]

ARCHIVES = ("zip", "tar")  # what may be read through, as in zip://a.jpg::https://host/b.zip
LOCAL = ("file", "local")
# Leading parts of a path that are one owner's: a bucket or host, but hf://datasets/<owner>/<name>.
NUM_PARTS = {"hf": 3}

IMAGE_COLUMNS = ("image", "mask", "instance_mask")

Server = tuple[str | None, int | None]

_allowed: ContextVar[bool] = ContextVar("outside_allowed", default=False)
_trusted_servers: set[Server] = set()  # which rows of trusted sources name, of those that this process has read


@contextmanager
def outside_allowed(allowed: bool) -> Iterator[None]:
    """Whether sources that are opened in this context may name files outside of themselves."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def outside_is_allowed() -> bool:
    """Whether a source that is opened now may name files outside of itself."""
    return _allowed.get()


def redirects_are_allowed(url: object) -> bool:
    """Whether a server that data name may redirect to others: where the user trusts the author of the data."""
    return outside_is_allowed() or server_of(str(url).rpartition("::")[2]) in _trusted_servers


class TrustedRows:
    """Passes rows on, and lets the servers of their images redirect to others.

    A step of the stream of a source that is opened with `allow_outside`: workers that read rows learn it from them.
    """

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in IMAGE_COLUMNS:
            path = (row.get(name) or {}).get("path")
            if path and "://" in path:
                _trusted_servers.add(server_of(path.rpartition("::")[2]) or (None, None))
        return row


def check_inside(paths: Iterable[object], root: object, named_by: object, *, allowed: bool | None = None) -> None:
    """Refuse what data name outside of their source.

    Args:
        paths: Paths or URLs, joined with the folder that they are relative to.
        root: Folder of the source, or a URL on its host.
        named_by: File that names them, for the message.
        allowed: Whether the user allowed it; None to ask the context in which the source is opened.

    Raises:
        OutsideError: One of them is outside.
    """
    if outside_is_allowed() if allowed is None else allowed:
        return
    outside = [shown_path(path) for path in paths if not is_inside(str(path), str(root))]
    if outside:
        raise OutsideError(
            f"{redact_url(named_by)} names {summarise(outside)}, outside of {redact_url(root)}, its place; if you "
            "trust its author with every file and server that this machine reaches, add --allow_outside true"
        )


def is_inside(path: str, root: str) -> bool:
    """Whether a path or URL is below a folder, or on the host or in the bucket of a URL."""
    if path.startswith(root.rstrip("/") + "/") and ".." not in path and "::" not in path:
        return True  # at once, for there may be millions
    *outer, base = path.split("::")
    if any(part.partition("://")[0] not in ARCHIVES for part in outer):
        return False
    root = root.rpartition("::")[2]
    (protocol, inner), (root_protocol, root_inner) = _split(base), _split(root)
    if protocol in ("http", "https"):
        server = server_of(base)
        return root_protocol in ("http", "https") and server is not None and server == server_of(root)
    if protocol != root_protocol:
        return False
    if protocol == "":
        folder = os.path.join(os.path.abspath(root_inner), "")
        return os.path.join(os.path.abspath(inner), "").startswith(folder)
    return _owner(protocol, inner) == _owner(protocol, root_inner)


def _split(path: str) -> tuple[str, str]:
    """Protocol, empty on disk, and path."""
    protocol, separator, inner = path.partition("://")
    if not separator:
        return "", path
    return ("", inner) if protocol.lower() in LOCAL else (protocol.lower(), inner)


def server_of(url: str) -> Server | None:
    """Host and port, as the client of requests reads them, without the usual port; None for what it refuses."""
    try:
        parsed = URL(url)
        return parsed.host, None if parsed.is_default_port() else parsed.port
    except ValueError:
        return None


def _owner(protocol: str, inner: str) -> list[str]:
    parts = posixpath.normpath(inner).strip("/").split("/")[: NUM_PARTS.get(protocol, 1)]
    return [*parts[:-1], parts[-1].partition("@")[0] if protocol == "hf" else parts[-1]]
