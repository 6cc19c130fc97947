"""The endpoint answers as the predictor does, and each wrong, slow or superfluous request with a status and advice."""

import asyncio
import base64
import io
import json
import re
import struct
import threading
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from hf_vlm.deploy import image_request
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.server import Limits, OneAtATime, RateLimiter, build_server


def encoded(format="PNG", size=(60, 40), seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


PNG = encoded()
BASE64 = base64.b64encode(PNG).decode()


def png_of_size(width, height):
    """A whole PNG of a few bytes that claims to be as large."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Recorder:
    """A predictor that counts its calls and, while told to, waits; of images of 13 columns it fails."""

    def __init__(self):
        self.thresholds, self.busy, self.most_busy = [], 0, 0
        self.go_on = threading.Event()
        self.go_on.set()

    def predict(self, images, threshold=None):
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        self.thresholds.append(threshold)
        self.go_on.wait(10)
        self.busy -= 1
        (image,) = images
        if image.shape[1] == 13:
            raise RuntimeError("secret of the model")
        scores = np.array([image.mean() / 255], dtype=np.float32)
        return [Prediction(scores=scores, labels=np.array([1]), label_names=["grey"], image_size=image.shape[:2])]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def client(recorder):
    return TestClient(build_server(recorder, Limits(max_bytes=50_000), name="tiny"), raise_server_exceptions=False)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_answers_are_those_of_the_predictor(saved_detector, tmp_path, threshold):
    predictor = Predictor.from_pretrained(saved_detector, device="cpu")
    client = TestClient(build_server(predictor))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    query = "" if threshold is None else f"?threshold={threshold}"
    fields = {} if threshold is None else {"threshold": threshold}
    for image in (PNG, encoded("JPEG", size=(90, 70), exif=exif)):
        (tmp_path / "image").write_bytes(image)
        expected = predictor.predict(tmp_path / "image", threshold)[0].to_dict() | {"path": None}
        assert threshold is None or expected["detections"]
        text = base64.encodebytes(image).decode()  # in lines, as base64 prints it
        answers = [
            client.post("/predict" + query, files={"image": ("cat.jpg", image)}),
            client.post("/predict", files={"any": image}, data=fields),
            client.post("/predict" + query, content=image, headers={"Content-Type": "image/png"}),
            client.post("/predict", json={"image": text, **fields}),
            client.post("/predict" + query, json={"image": "data:image/png;base64," + text}),
        ]
        for answer in answers:
            assert answer.status_code == 200
            assert answer.json() == expected


WRONG = {
    "empty": ({"content": b"", "headers": {"Content-Type": "image/png"}}, 422, "The body is empty. Send a multipart"),
    "no image": (
        {"content": b"hello", "headers": {"Content-Type": "image/png"}},
        422,
        "not an image of a known format",
    ),
    "truncated": ({"files": {"image": encoded("JPEG")[:-400]}}, 422, "The image cannot be read: "),
    "bomb": ({"files": {"image": png_of_size(100_000, 100_000)}}, 422, "MAX_IMAGE_PIXELS|exceeds limit"),
    "no type": ({"content": PNG}, 415, "The content type '' is none"),
    "wrong type": (
        {"content": PNG, "headers": {"Content-Type": "text/html"}},
        415,
        "'text/html' is none",
    ),
    "compressed": ({"content": PNG, "headers": {"Content-Encoding": "gzip"}}, 415, "send it without"),
    "large": ({"files": {"image": bytes(60_000)}}, 413, "more than the 50,000 bytes"),
    "no json": ({"content": "{", "headers": {"Content-Type": "application/json"}}, 422, "no JSON"),
    "no unicode": ({"content": b"\xff", "headers": {"Content-Type": "application/json"}}, 422, "no JSON"),
    "deep json": ({"content": b"[" * 20_000, "headers": {"Content-Type": "application/json"}}, 422, "nests too deep"),
    "list": ({"json": [1]}, 422, "must be an object"),
    "key": ({"json": {"imgae": BASE64}}, 422, "did you mean 'image'"),
    "both": ({"json": {"image": BASE64, "url": "http://a"}}, 422, 'either "image"'),
    "number": ({"json": {"image": 3}}, 422, "must be a text"),
    "garbage": ({"json": {"image": "%%%"}}, 422, "is not base64"),
    "no ascii": ({"json": {"image": "äöü"}}, 422, "is not base64"),
    "half": ({"json": {"image": "data:image/png,"}}, 422, "The image is empty"),
    "url": ({"json": {"url": "https://example.com/a.png"}}, 422, "fetches no URLs: send the image itself"),
    "threshold": ({"json": {"image": BASE64, "threshold": 7}}, 422, "threshold is 7; scores are from 0 to 1"),
    "not a number": ({"files": {"image": PNG}, "data": {"threshold": "nan"}}, 422, "threshold is nan"),
    "bool": ({"json": {"image": BASE64, "threshold": True}}, 422, "threshold is True"),
    "word": ({"files": {"image": PNG}, "data": {"threshold": "low\x1b"}}, 422, r"threshold is low\\x1b;"),
    "no boundary": ({"content": PNG, "headers": {"Content-Type": "multipart/form-data"}}, 422, "form cannot be read"),
    "no file": ({"data": {"threshold": "0.5"}, "files": {}}, 415, "Send a multipart form"),
    "two files": ({"files": {"a": PNG, "b": PNG}}, 422, "Too many files"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_get_a_status_and_a_message(client, recorder, name):
    request, status, message = WRONG[name]
    answer = client.post("/predict", **request)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert re.search(message, answer.json()["error"])
    assert not recorder.thresholds
    assert client.post("/predict", files={"image": PNG}).status_code == 200


def test_what_the_model_raises_stays_in_the_log(client, caplog):
    answer = client.post("/predict", files={"image": encoded(size=(13, 9))})
    assert answer.status_code == 500
    assert answer.json() == {"error": "The model failed on this image; the server's log says why."}
    assert "secret of the model" in caplog.text


def test_other_addresses_say_what_there_is(client):
    assert "POST /predict" in client.get("/").json()["endpoints"]
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    assert "POST /predict" in client.get("/nowhere").json()["error"]
    wrong = client.get("/predict")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    content = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert list(content) == ["multipart/form-data", "image/*", "application/json"]


def test_metrics_count_answers(client):
    for image in (PNG, PNG, b"hello"):
        client.post("/predict", files={"image": image})
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values.pop("hf_vlm_requests_total" + '{status="200"}') == "2"
    assert values.pop("hf_vlm_requests_total" + '{status="422"}') == "1"
    assert 0 < float(values.pop("hf_vlm_request_seconds_sum")) < 10
    assert values == {"hf_vlm_request_seconds_count": "3", "hf_vlm_queue_length": "0"}


def ask(server, messages, headers=()):
    """Status, headers and JSON of an answer to a body that arrives in these messages, after which nothing comes."""
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def run():
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/predict",
        }
        scope |= {"raw_path": b"/predict", "query_string": b"", "client": ("10.0.0.1", 1), "server": ("a", 80)}
        scope |= {"scheme": "http", "root_path": "", "headers": [(b"content-type", b"image/png"), *headers]}
        await asyncio.wait_for(server(scope, receive, send), 10)

    asyncio.run(run())
    body = sent[1].get("body")
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body) if body else None


def piece(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


def test_slow_and_endless_bodies_end(recorder):
    server = build_server(recorder, Limits(body_seconds=0.1, max_bytes=100))
    status, _, content = ask(server, [piece(b"a")])
    assert (status, content) == (408, {"error": "The body did not arrive within 0.1 s."})
    for declared in (b"101", b"9" * 5000):  # before anything has arrived
        assert ask(server, [], [(b"content-length", declared)])[0] == 413
    assert ask(server, [piece(b"a" * 60)] * 2, [(b"content-length", b"60")])[0] == 413
    assert ask(server, [piece(PNG, more=False)])[0] == 413
    assert not recorder.thresholds


def test_clients_that_have_left_are_not_computed_for(recorder):
    server = build_server(recorder)
    assert ask(server, [piece(b"a"), {"type": "http.disconnect"}])[0] == 499
    assert ask(server, [piece(PNG, more=False), {"type": "http.disconnect"}])[0] == 499
    assert not recorder.thresholds
    assert ask(server, [piece(PNG, more=False)])[0] == 200


def asynchronous(server):
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(server), base_url="http://server")


def test_a_full_queue_says_when_to_try_again(recorder):
    server = build_server(recorder, Limits(max_requests=3))

    async def run():
        async with asynchronous(server) as client:
            recorder.go_on.clear()
            waiting = [asyncio.create_task(client.post("/predict", files={"image": PNG})) for _ in range(3)]
            while "hf_vlm_queue_length 3" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            refused = await client.post("/predict", files={"image": PNG})
            recorder.go_on.set()
            return refused, await asyncio.gather(*waiting), await client.post("/predict", files={"image": PNG})

    refused, answers, later = asyncio.run(run())
    assert refused.status_code == 503
    assert "3 requests are waiting; try again later" in refused.json()["error"]
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert [answer.status_code for answer in (*answers, later)] == [200] * 4
    assert recorder.most_busy == 1


def test_200_requests_at_once_are_all_answered_with_their_own_prediction(recorder):
    images = [encoded(size=(8, 8), seed=seed) for seed in range(200)]

    async def run():
        async with asynchronous(build_server(recorder)) as client:
            return await asyncio.gather(*(client.post("/predict", files={"image": image}) for image in images))

    scores = [answer.json()["classes"][0]["score"] for answer in asyncio.run(run())]
    assert len(set(scores)) > 170  # of four decimals
    for image, score in zip(images, scores):
        with Image.open(io.BytesIO(image)) as opened:
            assert score == pytest.approx(np.asarray(opened).mean() / 255, abs=1e-4)


def test_endpoint_and_page_take_turns(recorder):
    shared = OneAtATime(recorder)
    threads = [threading.Thread(target=shared.predict, args=([np.zeros((9, 9, 3), np.uint8)],)) for _ in range(8)]
    recorder.go_on.clear()
    for thread in threads:
        thread.start()
    recorder.go_on.set()
    for thread in threads:
        thread.join()
    assert (len(recorder.thresholds), recorder.most_busy) == (8, 1)


def test_rates_of_clients():
    now = 0.0
    rates = RateLimiter(30, clock=lambda: now)
    assert [rates.seconds_to_wait("a") for _ in range(30)] == [0] * 30
    assert rates.seconds_to_wait("a") == pytest.approx(2)
    assert rates.seconds_to_wait("b") == 0
    now = 1.5
    assert rates.seconds_to_wait("a") == pytest.approx(0.5)
    now = 2.0
    assert rates.seconds_to_wait("a") == 0
    assert rates.seconds_to_wait("a") == pytest.approx(2)
    now = 1e6  # no more than a minute's requests are saved
    assert sum(rates.seconds_to_wait("a") == 0 for _ in range(100)) == 30


def test_clients_above_their_rate_are_told_when_to_come_back(recorder):
    client = TestClient(build_server(recorder, Limits(requests_per_minute=1)))
    assert client.post("/predict", files={"image": PNG}).status_code == 200
    refused = client.post("/predict", files={"image": PNG})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


def test_urls_are_fetched_where_that_is_allowed(recorder, monkeypatch):
    asked = []

    async def fetch(url, *, limit, seconds):
        asked.append((url, limit))
        if url == "http://gone":
            raise OSError("it is gone")
        return PNG

    monkeypatch.setattr(image_request, "fetch_public", fetch)
    client = TestClient(build_server(recorder, Limits(allow_urls=True, max_bytes=50_000)))
    found = client.post("/predict", json={"url": "http://a/b.png", "threshold": 0.25})
    assert found.json() == client.post("/predict", files={"image": PNG}).json()
    assert (asked, recorder.thresholds) == ([("http://a/b.png", 50_000)], [0.25, None])
    for url, message in (("http://gone", "cannot be read: it is gone"), (3, "must be a text")):
        answer = client.post("/predict", json={"url": url})
        assert answer.status_code == 422
        assert message in answer.json()["error"]
