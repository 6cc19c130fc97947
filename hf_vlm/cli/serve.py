"""`hf-vlm serve RUN`"""

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_vlm.cli.options import Parser, check_positive

logger = logging.getLogger(__name__)

PACKAGES = ("fastapi", "uvicorn", "python_multipart")  # of the extra `serve`
NUM_EXAMPLES = 12
MEGABYTE = 10**6


def run(argv: Sequence[str]) -> None:
    """Answers requests with a model's predictions until it is stopped, and shows a page."""
    arguments = _parse(argv)
    _check(arguments)

    from hf_vlm.deploy.server import run_server

    with _listen(arguments.host, arguments.port) as listener, _uploads():
        server = _server(arguments)
        url = _url(arguments.host, listener)
        print(f"Serving {arguments.run} at {url}, and POST {url}/predict; Ctrl-C stops it.", flush=True)
        # Once all is answered, the signal is raised again: one that asks to stop is no failure.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            run_server(server, listener)
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _uploads() -> Iterator[None]:
    """Lets gradio keep what is uploaded in a folder that is gone when the server is."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="hf-vlm-serve-", dir=before, ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _server(arguments: argparse.Namespace) -> Any:
    """The endpoint and the page, with the model loaded."""
    from hf_vlm.deploy.server import Limits, OneAtATime, build_server

    model = _predictor(arguments.run)
    predictor = OneAtATime(model)
    name, page = Path(arguments.run).name, None
    if arguments.page:
        from hf_vlm.deploy.app import build_app

        page = build_app(predictor, _examples(arguments.examples), name=name, threshold=model.score_threshold)
    limits = Limits(
        max_bytes=round(arguments.max_megabytes * MEGABYTE),
        max_requests=arguments.max_requests,
        requests_per_minute=arguments.requests_per_minute,
        allow_urls=arguments.allow_urls,
    )
    return build_server(predictor, limits, name=name, page=page)


def _predictor(run: str) -> Any:
    """A model by torch, or by a runtime, which starts faster, where it was exported for one."""
    from hf_vlm.deploy.exported_predictor import ExportedPredictor, has_runtime

    if has_runtime(run):
        return ExportedPredictor(run)

    from hf_vlm.deploy.predict import Predictor
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    return Predictor.from_pretrained(run)


def _examples(given: str | None) -> list[str]:
    if given is None:
        return []

    from hf_vlm.data.images import image_paths

    return image_paths(given)[:NUM_EXAMPLES]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="hf-vlm serve",
        description="Answers POST /predict with the predictions for an image as JSON, and shows a page where an image "
        "can be dropped and a threshold moved.",
    )
    parser.add_argument("run", help="folder of a fine-tuned or exported model, or its name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at; 0 for any that is free")
    parser.add_argument("--no_page", dest="page", action="store_false", help="the endpoint alone")
    parser.add_argument("--examples", help="image file, folder or wildcards: images to choose from on the page")
    parser.add_argument("--allow_urls", action="store_true", help="fetch images that requests name on public servers")
    parser.add_argument("--max_megabytes", type=float, default=10, help="largest body of a request")
    parser.add_argument("--max_requests", type=int, default=256, help="requests to hold; further ones get status 503")
    parser.add_argument("--requests_per_minute", type=float, help="largest mean rate of one client; none by default")
    return parser.parse_args(argv)


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for options that are wrong or lack a package, before any work is done."""
    for package in PACKAGES:
        if not _is_installed(package):
            raise ValueError(f'{package} is not installed: pip install "hf_vlm[serve]"')
    if arguments.page and not _is_installed("gradio"):
        if arguments.examples is not None:
            raise ValueError('--examples are on the page, which needs gradio: pip install "hf_vlm[app]"')
        logger.warning('There is no page, for gradio is not installed: pip install "hf_vlm[app]"')
        arguments.page = False
    check_positive(arguments, "max_megabytes", "max_requests", "requests_per_minute")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port {arguments.port}: ports are from 0 to 65535")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ValueError where the address is none of this machine's, or taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name too long to be one
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise ValueError(
            f"--host {host} --port {port} cannot be listened at: {reason}; --port 0 takes a free port"
        ) from error
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        logger.warning(
            "%s can be reached from other machines, without a password and unencrypted: let only a proxy that you "
            "trust reach it, or leave --host out.",
            host,
        )
    return listener


def _url(host: str, listener: Any) -> str:
    """The address for a browser on this machine."""
    address, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
