"""Tars and a web server for the tests of sources."""

import contextlib
import functools
import io
import re
import tarfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.io import retries


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 10, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, sizes=(5, 3, 7, 2)):
    """Tars with the given numbers of images, whose values are 0, 1, 2, ... in order."""
    value = 0
    for shard, size in enumerate(sizes):
        members = [(f"{value + index:06d}.png", png(value + index)) for index in range(size)]
        write_tar(folder / f"train-{shard:05d}.tar", members)
        value += size
    return value


@pytest.fixture(name="write_tar")
def write_tar_fixture():
    """`write_tar(path, [(name, content), ...], format=PAX)`"""
    return write_tar


@pytest.fixture(name="write_shards")
def write_shards_fixture():
    """`write_shards(folder, sizes)` writes tars of images whose values are 0, 1, 2, ... and returns how many."""
    return write_shards


@pytest.fixture(name="png")
def png_fixture():
    """`png(value)`: an encoded image of 10 x 8 pixels of one value."""
    return png


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Short waits between attempts to reach a server; their number stays."""
    monkeypatch.setattr(retries, "WAITS", tuple(1e-3 for _ in retries.WAITS))


class RangeHandler(BaseHTTPRequestHandler):
    """Answers requests for files of a folder, and for ranges of them, but for those that are to fail."""

    def __init__(self, *args, folder, counts, failures, **kwargs):
        self.folder, self.counts, self.failures = folder, counts, failures
        super().__init__(*args, **kwargs)

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, *, send_body):
        self.counts["all"] += 1
        failure = self.failures(self.counts["all"])
        if failure == "close":
            self.close_connection = True
            return
        if failure == "silent":
            self.rfile.read(1)  # until the client is gone
            self.close_connection = True
            return
        if isinstance(failure, int):
            self.send_error(failure)
            return
        if failure is not None and failure.startswith("http"):
            self.send_response(302)
            self.send_header("Location", failure)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = Path(self.folder, self.path.partition("?")[0].lstrip("/"))
        if path.name.startswith("forbidden") or not path.is_file():
            self.send_error(403 if path.name.startswith("forbidden") else 404)
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2] or len(content) - 1)) if found else (0, len(content) - 1)
        body = content[first : last + 1]
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if found:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.end_headers()
        if send_body:
            self.counts["requests"] += 1
            self.counts["bytes"] += len(body)
            if failure == "slow":
                self.drip(body)
            else:
                self.wfile.write(body[: len(body) // 2] if failure == "half" else body)

    def drip(self, body):
        """Send a byte every 10 ms, as long as somebody waits for them."""
        with contextlib.suppress(OSError):
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.01)

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder, failures=lambda number: None):
    counts = {"requests": 0, "bytes": 0, "all": 0}
    handler = functools.partial(RangeHandler, folder=folder, counts=counts, failures=failures)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(name="serve")
def serve_fixture():
    """`with serve(folder, failures) as (url, counts)`: a web server of a folder, that counts what it sends.

    `failures(number)` gives how the request of a number, counted from 1, fails: by a status, by a connection that is
    "close"d at once or after "half" of the file, by a server that is "silent" or "slow", or by a redirect to a URL;
    None where it does not.
    """
    return serve
