"""What requests to web servers may cost, and where a server may send them: options of fsspec's file systems."""

import asyncio
import ipaddress
import socket
from typing import Any

import aiohttp
import aiohttp.abc
import fsspec
import fsspec.config
from yarl import URL

from hf_vlm.data.io.messages import OutsideError, error_text, one_line, redact_url
from hf_vlm.data.io.trust import server_of

__all__ = ["REQUEST_BYTES", "fetch_public", "file_system", "http_options"]

REQUEST_BYTES = 2**24  # asked for at a time, so that a request has an end
REQUEST_SECONDS = 60.0  # for a whole request; aiohttp's own limit of 300 s, seven times, would be half an hour
SILENT_SECONDS = 15.0  # until a connection is made, and between two pieces of an answer


async def _check_redirect(_: Any, __: Any, request: aiohttp.TraceRequestRedirectParams) -> None:
    """Refuse a redirect to another server on this machine or in its network, which the public cannot reach itself."""
    target = _other_server(request)
    if target is not None and not await _is_public(target):
        raise OutsideError(
            f"{redact_url(request.url)} redirects to {redact_url(target)}, a server on this machine or in its own "
            "network; if you trust it, give that address itself"
        )


async def _refuse_redirect(_: Any, __: Any, request: aiohttp.TraceRequestRedirectParams) -> None:
    """Refuse a redirect to any other server, which the data must not name either."""
    target = _other_server(request)
    if target is not None:
        raise OutsideError(
            f"{redact_url(request.url)}, named by data, redirects to {redact_url(target)}, another server; if you "
            "trust the author of the data with every file and server that this machine reaches, add --allow_outside "
            "true"
        )


def _other_server(request: aiohttp.TraceRequestRedirectParams) -> URL | None:
    """Where a request is redirected to; None where that is on its own server."""
    target = request.url.join(URL(request.response.headers.get("Location", "")))
    is_own = target.host is None or server_of(str(target)) == server_of(str(request.url))
    return None if is_own else target


async def _is_public(url: URL) -> bool:
    found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    return all(_is_global(str(address[0])) for *_, address in found)


def _is_global(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_global


def _redirects_traced(check: Any) -> list[aiohttp.TraceConfig]:
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    return [trace]


CLIENT_OPTIONS = {
    "timeout": aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
}
# By whether only the own server may answer. Of each one object: fsspec keeps a file system, with its connections, per
# set of options.
TRACES = {False: _redirects_traced(_check_redirect), True: _redirects_traced(_refuse_redirect)}


def http_options(path: object, *, same_server: bool = False) -> dict[str, Any]:
    """Options of fsspec for a path or URL: limits of time and redirects for web servers; the user's own win.

    Args:
        same_server: Whether to refuse redirects to all other servers, and not to those alone that are not public.
    """
    *outer, base = str(path).split("::")  # zip://a.jpg::https://host/b.zip
    protocol = base.partition("://")[0]
    if protocol not in ("http", "https"):
        return {}
    own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    options = {"client_kwargs": {**CLIENT_OPTIONS, "trace_configs": TRACES[same_server], **own}}
    return {protocol: options} if outer else options


def file_system(path: object, *, same_server: bool = False) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    system, inner = fsspec.url_to_fs(str(path), **http_options(path, same_server=same_server))
    return system, inner


class _PublicResolver(aiohttp.ThreadedResolver):
    """Gives public addresses alone, those that are then connected to: asked again, a name might give others."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        found = await super().resolve(host, port, family)
        if not all(_is_global(entry["host"]) for entry in found):
            raise _not_public(host)
        return found


def _not_public(host: object) -> OutsideError:
    return OutsideError(f"{one_line(host)} is a server on this machine or in its own network; name a public one")


async def fetch_public(url: str, *, limit: int, seconds: float) -> bytes:
    """The bytes behind a URL that a stranger gives: from public servers alone, however it is named or redirected.

    Args:
        limit: Largest number of bytes.
        seconds: Time after which nothing more is read.

    Raises:
        OutsideError: It is on this machine or in its network.
        OSError: It cannot be reached within the time.
        ValueError: It is no URL of a web server, or there are more bytes than the limit.
    """
    target = URL(url)
    if target.scheme not in ("http", "https") or not target.host:
        raise ValueError("it is no http:// or https:// URL")
    try:
        is_outside = not _is_global(target.host)
    except ValueError:  # a name, which is resolved on connecting; an address is not
        is_outside = False
    if is_outside:
        raise _not_public(target.host)
    timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=_PublicResolver()),
        timeout=timeout,
        trace_configs=TRACES[False],
        auto_decompress=False,  # or a few bytes would become gigabytes
        raise_for_status=True,
    )
    data = bytearray()
    try:
        async with session, session.get(target) as answer:
            async for piece in answer.content.iter_chunked(2**16):
                data += piece
                if len(data) > limit:
                    raise ValueError(f"there are more than the {limit:,} bytes that are read")
    except aiohttp.ClientError as error:
        raise OSError(error_text(error)) from error
    return bytes(data)
