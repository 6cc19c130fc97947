"""Predictions over HTTP: one FastAPI application with a JSON endpoint, and a page where one is given."""

import asyncio
import logging
import math
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from hf_vlm.data.io.decode import BadImageError, decode_image
from hf_vlm.data.io.messages import one_line
from hf_vlm.deploy.image_request import ImageRequest, Limits, read_request

__all__ = ["Limits", "OneAtATime", "RateLimiter", "build_server", "run_server"]

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # nginx's status for a client that did not wait; it is counted, nobody reads it
MAX_CLIENTS = 10_000  # whose rates are remembered
MAX_RETRY_SECONDS = 60
SECONDS_IDLE = 75  # that a connection stays open, longer than clients keep theirs: a request may not meet its end
SECONDS_TO_FINISH = 30  # for requests that were accepted, once the server is stopped
ENDPOINTS = {
    "POST /predict": "an image, as a multipart file, bytes or JSON; ?threshold=0.5",
    "GET /health": "whether the server answers",
    "GET /metrics": "requests, latency and queue, for Prometheus",
    "GET /openapi.json": "the description of these for programs",
}
IMAGE_SCHEMA = {"type": "string", "format": "binary"}
THRESHOLD_SCHEMA = {"type": "number", "minimum": 0, "maximum": 1}
REQUEST_SCHEMA: dict[str, Any] = {
    "parameters": [{"name": "threshold", "in": "query", "required": False, "schema": THRESHOLD_SCHEMA}],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": IMAGE_SCHEMA, "threshold": THRESHOLD_SCHEMA},
                }
            },
            "image/*": {"schema": IMAGE_SCHEMA},
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "byte", "description": "base64"},
                        "url": {"type": "string", "description": "instead of an image, where the server allows it"},
                        "threshold": THRESHOLD_SCHEMA,
                    },
                }
            },
        },
    },
}


class OneAtATime:
    """A predictor whose calls wait for each other, so that endpoint and page share the cores."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self._lock = threading.Lock()

    def predict(self, images: Any, threshold: float | None = None) -> Any:
        """As that of the predictor."""
        with self._lock:
            return self._predictor.predict(images, threshold)


class RateLimiter:
    """A token bucket per client: a minute's requests at once, then as many as the rate gives.

    Args:
        per_minute: Requests per minute and client.
        clock: Function that returns seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._capacity = max(per_minute, 1.0)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: tokens, and when there were

    def seconds_to_wait(self, client: str) -> float:
        """0 where the client may send a request now, which is counted then; else the time until it may."""
        now = self._clock()
        tokens, since = self._buckets.pop(client, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - since) * self._rate)
        is_allowed = tokens >= 1
        self._buckets[client] = (tokens - is_allowed, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - tokens) / self._rate


class _Endpoint:
    """`/predict`: admits requests, reads them, and has the model compute them in turns."""

    def __init__(self, predictor: Any, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.num_admitted = 0
        self.statuses: Counter[int] = Counter()
        self.seconds = 0.0  # of all answers
        self._turns = asyncio.Semaphore(limits.num_concurrent)
        self._rates = RateLimiter(limits.requests_per_minute) if limits.requests_per_minute is not None else None

    async def answer(self, request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await self._admit(request)
        except HTTPException as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED)
        except Exception:
            logger.exception("/predict failed")
            response = error_response(HTTPException(500, "The model failed on this image; the server's log says why."))
        seconds = time.perf_counter() - started
        self.statuses[response.status_code] += 1
        self.seconds += seconds
        logger.info("/predict: %d in %.0f ms", response.status_code, 1000 * seconds)
        return response

    async def _admit(self, request: Request) -> Response:
        client = request.client.host if request.client else ""
        wait = self._rates.seconds_to_wait(client) if self._rates is not None else 0.0
        if wait > 0:
            raise HTTPException(
                429,
                f"More than {self.limits.requests_per_minute:g} requests per minute; try again later.",
                headers={"Retry-After": str(math.ceil(wait))},
            )
        if self.num_admitted >= self.limits.max_requests:
            raise HTTPException(
                503,
                f"{self.num_admitted} requests are waiting; try again later.",
                headers={"Retry-After": str(self._seconds_of_queue())},
            )
        self.num_admitted += 1
        try:
            asked = await read_request(request, self.limits)
            async with self._turns:
                if await request.is_disconnected():
                    raise ClientDisconnect
                return JSONResponse(await asyncio.to_thread(self._predict, asked))
        finally:
            self.num_admitted -= 1

    def _predict(self, asked: ImageRequest) -> dict[str, Any]:
        try:
            image, _ = decode_image(asked.image)
        except BadImageError as error:
            raise HTTPException(422, f"The image cannot be read: {one_line(error)}") from error
        prediction: dict[str, Any] = self.predictor.predict([image], asked.threshold)[0].to_dict()
        return prediction

    def _seconds_of_queue(self) -> int:
        """Roughly when there is room again: latency includes the wait."""
        mean = self.seconds / max(self.statuses.total(), 1)
        return min(max(math.ceil(mean), 1), MAX_RETRY_SECONDS)

    def metrics(self) -> str:
        """Counts in the text format of Prometheus."""
        lines = ["# HELP hf_vlm_requests_total Answers of /predict by status.", "# TYPE hf_vlm_requests_total counter"]
        lines += [
            f'hf_vlm_requests_total{{status="{status}"}} {count}' for status, count in sorted(self.statuses.items())
        ]
        lines += [
            "# HELP hf_vlm_request_seconds Time from a request to its answer.",
            "# TYPE hf_vlm_request_seconds summary",
            f"hf_vlm_request_seconds_sum {self.seconds:.6f}",
            f"hf_vlm_request_seconds_count {self.statuses.total()}",
            "# HELP hf_vlm_queue_length Requests that are read, wait or are computed.",
            "# TYPE hf_vlm_queue_length gauge",
            f"hf_vlm_queue_length {self.num_admitted}",
        ]
        return "\n".join(lines) + "\n"


def build_server(predictor: Any, limits: Limits | None = None, *, name: str = "model", page: Any = None) -> FastAPI:
    """An application with `POST /predict`, `GET /health` and `GET /metrics`.

    Args:
        predictor: A [`Predictor`], or what has its `predict(images, threshold)`. Where a page is given too, one that
            both share: [`OneAtATime`].
        limits: What the server takes on.
        name: Name of the model.
        page: Page to show at `/`: what `hf_vlm.deploy.app.build_app` returns.
    """
    limits = limits or Limits()
    endpoint = _Endpoint(predictor, limits)
    # The pages that FastAPI would make of the description load their scripts from servers of others.
    server = FastAPI(title=f"hf_vlm: {name}", docs_url=None, redoc_url=None)

    @server.exception_handler(HTTPException)
    async def answer_error(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            wrong = HTTPException(error.status_code, f"There are {', '.join(ENDPOINTS)}.", headers=error.headers)
            return error_response(wrong)
        return error_response(error)

    @server.post("/predict", summary="What the model finds in an image", openapi_extra=REQUEST_SCHEMA)
    async def predict(request: Request) -> Response:
        return await endpoint.answer(request)

    @server.get("/health", summary="Whether the server answers")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name}

    @server.get("/metrics", summary="Requests, latency and queue, for Prometheus")
    async def metrics() -> Response:
        return PlainTextResponse(endpoint.metrics(), media_type="text/plain; version=0.0.4")

    if page is not None:
        from hf_vlm.deploy.app import mount_app

        return mount_app(server, page, max_bytes=limits.max_bytes)

    @server.get("/", summary="What there is")
    async def index() -> dict[str, Any]:
        return {"model": name, "endpoints": ENDPOINTS}

    return server


class _Server(uvicorn.Server):
    """Ends the streams of open pages when it stops; it would wait for the pages to be closed."""

    def __init__(self, config: uvicorn.Config, server: FastAPI) -> None:
        super().__init__(config)
        self._end_streams: Callable[[], None] = getattr(server.state, "end_streams", lambda: None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)


def run_server(server: FastAPI, listener: socket.socket) -> None:
    """Serves at a socket until SIGINT or SIGTERM; both are raised again when what was accepted is answered."""
    config = uvicorn.Config(
        server,
        log_config=None,  # the log of the process, which keeps what clients send from acting on a terminal
        log_level="warning",
        access_log=False,  # addresses may hold what is private; the endpoint logs status and time
        server_header=False,
        timeout_keep_alive=SECONDS_IDLE,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    _Server(config, server).run(sockets=[listener])


def error_response(error: HTTPException) -> JSONResponse:
    """An error as JSON: what was wrong, and what to do."""
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)
