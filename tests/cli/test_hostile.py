"""What commands print of data and models that others made."""

import json
import logging
import re

import pytest
from PIL import Image

from hf_vlm.cli.main import main

NAMES = ["cat\x1b[2J\x1b]0;title\x07", "dog\nTo look at\n  nothing  all is well", "half \ud83d of a pair", "plain"]


@pytest.fixture
def hostile(tmp_path):
    """A COCO folder whose names of classes act on a terminal."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": number, "bbox": [1, 1, 9, 9]} for number in range(3)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES)],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def test_names_of_classes_do_nothing_on_a_terminal(hostile, capfd, monkeypatch):
    monkeypatch.chdir(hostile)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    assert main(["data", str(hostile), "--json", "report.json"]) == 0
    out, error = capfd.readouterr()
    for text in (out, error, (hostile / "report.json").read_text()):
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    assert r"cat\x1b[2J\x1b]0;title\x07" in out
    assert r"dog\nTo look at\n  nothing" in out
    assert r"half \ud83d of a pair" in out
    assert len(re.findall(r"^To look at", out, re.MULTILINE)) == 1
    counts = json.loads((hostile / "report.json").read_text())["boxes"]["class_counts"]
    assert list(counts) == NAMES  # the values themselves are kept


def test_names_of_files_in_errors_do_nothing_on_a_terminal(tmp_path, capfd):
    assert main(["data", str(tmp_path / "a\x1b[2Jb\u202e")]) == 2
    assert r"a\x1b[2Jb\u202e does not exist" in capfd.readouterr().err
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(bytes(tmp_path / "images") + b"/caf\xe9.png", "PNG")
    assert main(["data", str(tmp_path / "images")]) == 2
    assert re.search(r"holds a name that is no Unicode text, '.*caf\\udce9\.png': rename it", capfd.readouterr().err)
