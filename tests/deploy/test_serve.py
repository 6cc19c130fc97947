"""The command: where it listens, what it prints, and how it ends."""

import importlib.util
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request

import pytest
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.deploy.predict import Predictor


@pytest.fixture(autouse=True)
def bars_as_they_are(monkeypatch):
    """Commands silence the bars of the libraries for their process."""
    monkeypatch.setattr("hf_vlm.training.run.quiet_libraries", lambda: None)


def post(url, image):
    request = urllib.request.Request(f"{url}/predict?threshold=0.4", image, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_ends_when_it_has_answered(saved_detector, tmp_path, monkeypatch, stop, status):
    """While it runs here, another thread asks it, and asks again and stops it before it has answered."""
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "photo.png")
    image = (tmp_path / "photo.png").read_bytes()
    predict, is_busy, answers, threads = Predictor.predict, threading.Event(), [], []

    def predict_slowly(self, images, threshold=None):
        is_busy.set()
        time.sleep(0.3)
        return predict(self, images, threshold)

    def ask(url):
        answers.append(post(url, image))
        monkeypatch.setattr(Predictor, "predict", predict_slowly)
        threads.append(threading.Thread(target=lambda: answers.append(post(url, image))))
        threads[-1].start()
        is_busy.wait(10)
        os.kill(os.getpid(), stop)

    def print_and_ask(line, **_):
        if url := re.search(r"http://127\.0\.0\.1:\d+", line):
            threads.append(threading.Thread(target=ask, args=(url[0],)))
            threads[-1].start()

    monkeypatch.setattr("builtins.print", print_and_ask)
    assert main(["serve", str(saved_detector), "--port", "0", "--no_page"]) == status
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    expected = predict(Predictor.from_pretrained(saved_detector, device="cpu"), tmp_path / "photo.png", 0.4)[0]
    assert len(expected) > 0
    assert answers == [expected.to_dict() | {"path": None}] * 2


def test_what_a_user_mistypes(saved_detector, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            (["--port", port], f"--port {port} cannot be listened at: Address already in use; --port 0 takes a free"),
            (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
            (["--host", "a" * 100], "cannot be listened at"),
            (["--port", "70000"], "ports are from 0 to 65535"),
            (["--max_megabytes", "0"], "it must be above 0"),
            (["--requests_per_minute", "nan"], "it must be above 0"),
        ):
            assert main(["serve", str(saved_detector), "--no_page", *words]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert "Traceback" not in error
    assert main(["serve", "no/such/run", "--port", "0", "--no_page"]) == 2
    assert "no/such/run" in capsys.readouterr().err


def test_missing_packages_are_named_with_their_extra(saved_detector, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    for missing, words, message in (
        ("uvicorn", [], 'uvicorn is not installed: pip install "hf_vlm[serve]"'),
        ("gradio", ["--examples", "photo.jpg"], 'pip install "hf_vlm[app]"'),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))  # noqa: B023
        assert main(["serve", str(saved_detector), *words]) == 2
        assert message in capsys.readouterr().err


def test_other_machines_are_warned_of(saved_detector, monkeypatch, capsys, caplog):
    monkeypatch.setattr("hf_vlm.deploy.server.run_server", lambda server, listener: None)
    for host, shown, is_warned in (("0.0.0.0", "127.0.0.1", True), ("localhost", "localhost", False)):
        caplog.clear()
        assert main(["serve", str(saved_detector), "--port", "0", "--no_page", "--host", host]) == 0
        assert f"Serving {saved_detector} at http://{shown}:" in capsys.readouterr().out
        assert ("can be reached from other machines" in caplog.text) == is_warned
