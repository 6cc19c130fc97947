"""What requests to web servers may cost, and where a server may send them: options of fsspec's file systems."""

import asyncio
import ipaddress
from typing import Any

import aiohttp
import fsspec
import fsspec.config
from yarl import URL

from hf_vlm.data.io.messages import OutsideError, redact_url

__all__ = ["REQUEST_BYTES", "file_system", "http_options"]

REQUEST_BYTES = 2**24  # asked for at a time, so that a request has an end
REQUEST_SECONDS = 60.0  # for a whole request; aiohttp's own limit of 300 s, seven times, would be half an hour
SILENT_SECONDS = 15.0  # until a connection is made, and between two pieces of an answer


async def _check_redirect(_: Any, __: Any, request: aiohttp.TraceRequestRedirectParams) -> None:
    """Refuse a redirect to another server on this machine or in its network, which the public cannot reach itself."""
    target = request.url.join(URL(request.response.headers.get("Location", "")))
    if (target.host, target.port) == (request.url.host, request.url.port) or target.host is None:
        return
    found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port)
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    if not all(address.is_global for address in addresses):
        raise OutsideError(
            f"{redact_url(request.url)} redirects to {redact_url(target)}, a server on this machine or in its own "
            "network; if you trust it, give that address itself"
        )


def _redirects_traced() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    return trace


# One object: fsspec keeps a file system, with its connections, per set of options.
CLIENT_OPTIONS = {
    "timeout": aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS),
    "trace_configs": [_redirects_traced()],
}


def http_options(path: object) -> dict[str, Any]:
    """Options of fsspec for a path or URL: limits of time and redirects for web servers; the user's own win."""
    protocol = str(path).partition("://")[0]
    if protocol not in ("http", "https"):
        return {}
    own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {**CLIENT_OPTIONS, **own}}


def file_system(path: object) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    system, inner = fsspec.url_to_fs(str(path), **http_options(path))
    return system, inner
