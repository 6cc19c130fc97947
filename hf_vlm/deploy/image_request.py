"""The image and threshold of an HTTP request, read within limits of bytes and time."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from hf_vlm.data.io.messages import error_text, one_line
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.data.io.remote import fetch_public
from hf_vlm.models.nearest_name import did_you_mean

__all__ = ["ImageRequest", "Limits", "read_request"]

HOW_TO_SEND = (
    "Send a multipart form with one file (curl -F image=@photo.jpg), the bytes of an image with its type "
    '(Content-Type: image/jpeg), or JSON {"image": base64}'
)
JSON_KEYS = ("image", "url", "threshold")
MAX_FORM_FIELDS = 8
URL_SECONDS = 20.0
MAX_LENGTH_DIGITS = 18  # of a Content-Length; a longer one is none


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_bytes: Largest body of a request, and file behind a URL. Pixels have the limit of all images,
            `PIL.Image.MAX_IMAGE_PIXELS`.
        body_seconds: Time within which a request's body must have arrived.
        num_concurrent: Images that go through the model at the same time.
        max_requests: Requests that are read, wait or are computed; the next one is answered with 503. They hold up to
            `max_bytes` of memory each.
        requests_per_minute: Largest mean rate of one client; None for any.
        allow_urls: Whether requests may name images on public web servers.
    """

    max_bytes: int = 10 * 2**20
    body_seconds: float = 30.0
    num_concurrent: int = 1
    max_requests: int = 256
    requests_per_minute: float | None = None
    allow_urls: bool = False


@dataclass(frozen=True)
class ImageRequest:
    """What a client asks for.

    Attributes:
        image: Encoded bytes.
        threshold: Lowest score to report, 0 to 1; None for the model's default.
    """

    image: bytes
    threshold: float | None


async def read_request(request: Request, limits: Limits) -> ImageRequest:
    """The image and threshold of a request, which sends them in one of three ways; see `HOW_TO_SEND`.

    Raises:
        HTTPException: The request is wrong, too large or too slow; with a 4xx status and a message for the client.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "The body is compressed: send it without Content-Encoding.")
    body = await _read_body(request, limits)
    if not body:
        raise HTTPException(422, f"The body is empty. {HOW_TO_SEND}.")
    fields: Mapping[str, Any] = {}
    if content_type == "multipart/form-data":
        image, fields = await _read_form(request, body, limits)
    elif content_type == "application/json":
        image, fields = await _read_json(body, limits)
    elif content_type.startswith("image/") or content_type == "application/octet-stream":
        image = body
    else:
        raise HTTPException(415, f"The content type {one_line(content_type)!r} is none that is read. {HOW_TO_SEND}.")
    if not image:
        raise HTTPException(422, "The image is empty.")
    threshold = fields.get("threshold", request.query_params.get("threshold"))
    return ImageRequest(image, _read_threshold(threshold))


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"The body has more than the {limits.max_bytes:,} bytes that are read.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > MAX_LENGTH_DIGITS or int(declared) > limits.max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_bytes:  # nothing was declared, or something false
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {limits.body_seconds:g} s.") from None
    return bytes(body)


async def _read_form(request: Request, body: bytes, limits: Limits) -> tuple[bytes, Mapping[str, Any]]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, whole(), max_files=1, max_fields=MAX_FORM_FIELDS)
    parser.spool_max_size = limits.max_bytes  # images stay in memory, and off the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(422, f"The form cannot be read: {error.message} {HOW_TO_SEND}.") from error
    except (KeyError, ValueError) as error:  # of a header of the form
        raise HTTPException(422, f"The form cannot be read. {HOW_TO_SEND}.") from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise HTTPException(422, f"The form has no file. {HOW_TO_SEND}.")
        return await files[0].read(), {name: value for name, value in form.items() if isinstance(value, str)}
    finally:
        await form.close()


async def _read_json(body: bytes, limits: Limits) -> tuple[bytes, Mapping[str, Any]]:
    try:
        content = parse_json(body)
    except ValueError as error:  # also where it is not in Unicode
        raise HTTPException(422, f"The body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise HTTPException(422, 'The JSON must be an object, such as {"image": base64, "threshold": 0.3}.')
    for name in content:
        if name not in JSON_KEYS:
            raise HTTPException(422, f"There is no key {one_line(name)[:100]!r}{did_you_mean(name[:100], JSON_KEYS)}")
    if ("image" in content) == ("url" in content):
        raise HTTPException(422, 'The JSON must have either "image" (base64) or "url".')
    if "url" in content:
        return await _fetch(content["url"], limits), content
    if not isinstance(content["image"], str):
        raise HTTPException(422, '"image" must be a text in base64.')
    text = content["image"].partition(",")[2] if content["image"].startswith("data:") else content["image"]
    try:
        return base64.b64decode("".join(text.split()), validate=True), content
    except (binascii.Error, ValueError) as error:  # ValueError: letters that are not of ASCII
        raise HTTPException(422, f'"image" is not base64: {error}.') from error


async def _fetch(url: object, limits: Limits) -> bytes:
    if not limits.allow_urls:
        raise HTTPException(422, 'This server fetches no URLs: send the image itself, in base64 as "image".')
    if not isinstance(url, str):
        raise HTTPException(422, '"url" must be a text.')
    try:
        return await fetch_public(url, limit=limits.max_bytes, seconds=URL_SECONDS)
    except (OSError, ValueError) as error:
        raise HTTPException(422, f"The URL cannot be read: {error_text(error)}") from error


def _read_threshold(value: object) -> float | None:
    if value is None:
        return None
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise HTTPException(422, f"threshold is {one_line(value)[:100]}; scores are from 0 to 1.")
    return float(number)
