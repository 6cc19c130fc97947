"""Captions from wherever data sets have them, in one form: a list of texts per image."""

import io
import json

import datasets
import pytest
from PIL import Image
from sample_data import png, write_images, write_parquet

from hf_vlm.data.sources import open_source

EXPECTED = [["a cat", "a black cat"], ["ein Hund"], []]


def texts(source):
    assert source.has_captions
    assert source.features["text"] == datasets.List(datasets.Value("string"))
    return [example["text"] for example in source]


def images(number=3):
    return [{"bytes": png(value), "path": None} for value in range(number)]


@pytest.mark.parametrize("name", ["text", "captions"])
def test_lists_of_a_column(tmp_path, name):
    column = [["a cat", " a black cat "], ["ein Hund", ""], None]
    write_parquet(tmp_path / "a.parquet", {"image": images(), name: column})
    assert texts(open_source(tmp_path)) == EXPECTED


def test_single_texts_of_a_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": images(), "caption": ["a cat", None, " "], "label": [0, 1, 0]})
    source = open_source(tmp_path)
    assert texts(source) == [["a cat"], [], []]
    assert set(source.unlabelled().features) == {"image", "image_id"}
    mixed = open_source({str(tmp_path): 1.0, "scenes:captions": 1.0}, num_samples=8)
    assert all(text and isinstance(text, str) for example in mixed for text in example["text"])


def test_metadata_of_a_folder(tmp_path):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in zip("abc", EXPECTED)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(open_source(tmp_path)) == EXPECTED


def test_columns_that_hold_no_texts_are_no_captions(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": images(), "text": [1, 2, 3]})
    assert not open_source(tmp_path).has_captions


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_samples_of_tars(tmp_path, write_tar, ending, monkeypatch):
    image = io.BytesIO()
    Image.new("RGB", (10, 8)).save(image, "PNG")
    members = []
    for key, captions in enumerate(EXPECTED):
        content = captions[0] if captions and ending == "txt" else json.dumps({"caption": captions})
        members.append((f"{key}.png", image.getvalue()))
        if captions:
            members.append((f"{key}.{ending}", content.encode()))
    path = write_tar(tmp_path / "a.tar", members)
    first = [captions[:1] for captions in EXPECTED]
    assert texts(open_source(path)) == (first if ending == "txt" else EXPECTED)
