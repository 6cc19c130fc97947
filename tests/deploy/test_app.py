"""The page in a real browser, and what it shows of each task."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.prediction import Prediction

pytestmark = [
    pytest.mark.slow,  # gradio is imported in seconds, and is no part of what the suite needs
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # it leaves an event loop open
]
CHROMIUM = "/usr/bin/chromium"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def garbage_of_gradio():
    """What it leaves open is collected here, and not in another test."""
    yield
    gc.collect()


class Fixed:
    """A predictor that finds the same in every image, and counts how often it is asked."""

    def __init__(self, **fields):
        self.fields, self.num_calls = fields, 0

    def predict(self, images, threshold=None):
        self.num_calls += 1
        height, width = images[0].shape[:2]
        fields = dict(self.fields)
        if "masks" in fields and (height, width) != (48, 64):
            fields["masks"] = np.zeros((3, height, width), bool)
        if "segmentation" in fields:
            fields["segmentation"] = np.arange(width)[None].repeat(height, 0) * 2 // width  # two halves
        return [Prediction(image_size=(height, width), **fields)]


SCORES = np.array([0.9, 0.6, 0.1], dtype=np.float32)
CLASSES = {"scores": SCORES, "labels": np.arange(3), "label_names": ["cat", "*dog*", "cat"]}
BOXES = np.array([[1, 2, 30, 31], [5, 5, 9, 9], [0, 0, 3.6, 3.4]], dtype=np.float32)
MASKS = np.random.default_rng(0).random((3, 48, 64)) < 0.5
HALVES = {"scores": SCORES[[1, 2]], "labels": np.arange(2), "label_names": ["road", "sky"], "segmentation": None}
ONE = {"scores": SCORES[:1], "labels": np.arange(1), "label_names": ["cat"]}


@pytest.mark.parametrize(
    ("fields", "start", "summary", "rows"),
    [
        (
            {**CLASSES, "boxes": BOXES},
            0.37,
            r"1 **cat**, 1 **\*dog\***",
            [["cat", 0.9, 1, 2, 30, 31], ["*dog*", 0.6, 5, 5, 9, 9]],
        ),
        (
            {**CLASSES, "boxes": BOXES, "masks": MASKS},
            0.37,
            r"1 **cat**, 1 **\*dog\***",
            [["cat", 0.9, 1, 2, 30, 31], ["*dog*", 0.6, 5, 5, 9, 9]],
        ),
        (CLASSES, 0.37, r"**cat** 0.90, **\*dog\*** 0.60", [["cat", 0.9], ["*dog*", 0.6]]),
        (ONE, 0, "**cat** 0.90", [["cat", 0.9]]),
        (HALVES, 0, "**road** 0.60", [["road", 0.6]]),
    ],
)
def test_every_task_is_shown(fields, start, summary, rows, tmp_path):
    gradio = pytest.importorskip("gradio")
    from hf_vlm.deploy.app import build_app

    predictor = Fixed(**fields)
    app = build_app(predictor, name="a_model", threshold=0.3698)
    assert [block.value for block in app.blocks.values() if isinstance(block, gradio.Slider)] == [start]
    show = next(function.fn for function in app.fns.values() if function.api_name == "predict")
    Image.effect_noise((64, 48), 90).save(tmp_path / "a.png")
    before = predictor.num_calls
    picture, text, table, record, _ = show(str(tmp_path / "a.png"), 0.5)
    assert (text, table) == (summary, rows)
    everything = predictor.predict([np.zeros((48, 64, 3), np.uint8)])[0]
    expected = everything.select(everything.scores >= 0.5)
    assert record == expected.to_dict()
    assert picture.tobytes() == expected.draw(tmp_path / "a.png").tobytes()
    assert show(str(tmp_path / "a.png"), 1)[1:3] == ("Nothing reaches the threshold.", [])
    assert predictor.num_calls == before + 2  # one of them by this test: a threshold does not ask the model again
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"^This file cannot be read: not an image of a known format$"):
        assert show(str(tmp_path / "b.png"), 0.5)[:4] == show(None, 0.5)[:4] == (None, "", [], None)


@pytest.fixture
def served(saved_detector, tmp_path):
    """The address of a page, whose server is stopped afterwards while the browser still shows it."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "hf_vlm.cli", "serve", str(saved_detector), "--port", "0"]
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        line = server.stdout.readline()
        yield re.search(r"http://[\d.:]+", line)[0], server
        server.kill()


def test_in_a_browser(served, saved_detector, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api")
    browsers.expect.set_options(timeout=30_000)
    if not os.path.exists(CHROMIUM):
        pytest.skip("there is no Chromium")
    url, server = served
    Image.effect_noise((120, 90), 90).convert("RGB").save(tmp_path / "photo.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    found = Predictor.from_pretrained(saved_detector, device="cpu").predict(tmp_path / "photo.png", 0)[0]
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors, hosts = [], set()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(re.match(r"\w+://([^/]*)|", request.url)[1]))
        page.goto(url)

        def check(threshold):
            """The line of counts and the saved JSON are those of the predictor's own boxes."""
            expected = found.select(found.scores >= threshold)
            line = ", ".join(f"{count} {name}" for name, count in Counter(expected.label_names).most_common())
            browsers.expect(page.get_by_text(line, exact=True)).to_be_visible()
            with page.expect_download() as download:
                page.get_by_role("button", name="Save as JSON").click()
            assert json.loads(Path(download.value.path()).read_text()) == expected.to_dict() | {"path": None}

        page.set_input_files("input[type=file]", tmp_path / "photo.png")
        check(0.5)
        browsers.expect(page.locator("tbody tr")).not_to_have_count(0)  # a table appears after the text
        page.get_by_role("spinbutton").fill("0.3")
        page.get_by_role("spinbutton").press("Enter")
        check(0.3)
        assert len(found.select(found.scores >= 0.3)) > len(found.select(found.scores >= 0.5))
        page.set_input_files("input[type=file]", tmp_path / "broken.jpg")
        message = page.get_by_text("This file cannot be read: not an image of a known format")
        browsers.expect(message.first).to_be_visible()
        browsers.expect(page.get_by_role("button", name="Save as JSON")).to_be_disabled()
        assert errors == []
        assert hosts - {None} == {url.removeprefix("http://")}
        uploads = tmp_path / "temporary"
        assert [path.name for path in uploads.rglob("photo.png")] == ["photo.png"]
        server.send_signal(signal.SIGINT)
        assert server.wait(25) == 130  # before it would give up waiting for the page
        assert not list(uploads.rglob("photo.png"))
        browser.close()


def test_the_page_fetches_nothing_and_opens_no_other_files(served):
    import httpx2

    url, _ = served
    for path in ("http://127.0.0.1:1/a.png", "https://example.com/a.png", "/etc/passwd"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 0.5]
        event = httpx2.post(f"{url}/gradio_api/call/predict", json={"data": data}).json()["event_id"]
        assert "event: error" in httpx2.get(f"{url}/gradio_api/call/predict/{event}", timeout=20).text
    assert httpx2.get(f"{url}/gradio_api/file=/etc/passwd").status_code in (403, 404)
