"""Reading again from servers that were not reached, or were busy."""

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp

from hf_vlm.data.io.messages import UnreachableError, error_causes, error_text, redact_url, server_status

__all__ = ["retried"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Seconds between attempts; together they outlast the restart of a server.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
READ_SECONDS = 120.0  # after which a read is not tried again: a silent server takes half a minute each time


def _may_pass(error: Exception) -> bool:
    """Whether the next attempt may succeed: the server is busy, restarting or was not reached."""
    status = server_status(error)
    if status is not None and status >= 400:
        return status == 429 or status >= 500
    passing = (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    return any(
        isinstance(cause, passing) and not isinstance(cause, aiohttp.ClientConnectorCertificateError)
        for cause in error_causes(error)
    )


def retried(
    path: object, read: Callable[[], Result], *, num_waits: int | None = None, seconds: float | None = None
) -> Result:
    """What a function reads of a URL; errors of the network that may pass are waited for.

    Args:
        path: Name of the file in the log and in the error.
        read: The function, called again after each wait.
        num_waits: Number of waits, the first of `WAITS`; None for all.
        seconds: Time from the beginning after which it is not called again; None for `READ_SECONDS`.

    Raises:
        UnreachableError: The last attempt failed too; the message has the time that all took.
    """
    limit = READ_SECONDS if seconds is None else seconds
    start, waits = time.monotonic(), iter(WAITS[:num_waits])
    for attempt in itertools.count(1):
        try:
            return read()
        except Exception as error:  # any type: file systems have their own
            if not _may_pass(error):
                raise
            elapsed, wait = time.monotonic() - start, next(waits, math.inf)
            if elapsed + wait > limit or wait == math.inf:
                raise UnreachableError(
                    f"{error_text(error)}, {attempt} times in {elapsed:.0f} s; see whether the server and the network "
                    "are up, then start again"
                ) from error
            logger.warning("%s: %s; trying again in %g s", redact_url(path), error_text(error), wait)
            time.sleep(wait)
    raise AssertionError("the loop has no end")
