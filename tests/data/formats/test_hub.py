"""Data sets on the Hub."""

import logging

import datasets
import pytest
from sample_data import DETECTION, make_objects, png, write_detection_parquet, write_parquet

from hf_vlm.data.io.messages import OutsideError
from hf_vlm.data.schema import image_feature
from hf_vlm.data.sources import open_source


def test_hub_streams_have_the_schema(tmp_path, monkeypatch):
    write_detection_parquet(tmp_path / "train-00000-of-00001.parquet", num_rows=5)
    write_detection_parquet(tmp_path / "validation-00000-of-00001.parquet", num_rows=3)
    asked = []
    load = datasets.load_dataset

    def load_from_disk(source, name=None, **options):
        asked.append((source, name, options["revision"]))
        return load(str(tmp_path), **{**options, "revision": None})

    monkeypatch.setattr(datasets, "load_dataset", load_from_disk)
    stream = open_source("my-org/cells", "val", name="small", revision="v1")
    assert asked == [("my-org/cells", "small", "v1")]
    assert stream.features == datasets.Features(DETECTION)
    for row, example in enumerate(stream):
        assert example["image"]["bytes"] == png(row)
        assert (example["image_id"], example["objects"]) == (100 + row, make_objects(row))
    with pytest.raises(ValueError, match=r"my-org/cells has no split 'test'; it has train, validation"):
        open_source("my-org/cells", "test")


def test_hub_boxes_are_judged_by_the_first_images(tmp_path):
    objects = {"bbox": [[8.0, 6.0, 14.0, 11.0]], "category": [0], "area": [48.0], "iscrowd": [0]}
    write_detection_parquet(tmp_path / "train-00000-of-00001.parquet", num_rows=12, objects=[objects] * 12)
    with pytest.raises(ValueError, match=r"12 of 12 boxes do not lie in their image .* as corners"):
        open_source(tmp_path, format="hub")


def test_hub_rows_that_repeat_an_image_for_each_object_are_refused(tmp_path):
    objects = [{"bbox": [[row, 1.0, 4.0, 3.0]], "category": [0], "area": [12.0], "iscrowd": [0]} for row in range(6)]
    images = [{"bytes": png(row // 2), "path": None} for row in range(6)]
    write_detection_parquet(tmp_path / "train.parquet", num_rows=6, objects=objects, image=images)
    with pytest.raises(ValueError, match=r"3 repeat the image of an earlier row: row 1 that of row 0, row 3 that of"):
        open_source(tmp_path, format="hub")


def test_hub_rows_without_id_get_one_from_their_content(tmp_path, caplog):
    rows = {"image": [{"bytes": png(row), "path": None} for row in range(6)], "label": ["a"] * 6}
    features = {"image": image_feature(), "label": datasets.Value("string")}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, features)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path, format="hub")
    ids = [example["image_id"] for example in source]
    assert len(set(ids)) == 6
    assert ids == [example["image_id"] for example in source]
    assert all(0 <= image_id < 2**63 for image_id in ids)
    assert "the column 'label' is left out: without ClassLabel its classes are not known" in caplog.text


@pytest.mark.parametrize("name", ["/etc/passwd", "https://host/a.png", "hf://datasets/my-org/private/a.png"])
def test_rows_name_files_of_their_own_data_set(tmp_path, monkeypatch, name):
    own = "zip://a.png::hf://datasets/my-org/cells@5f1/images.zip"
    rows = {"image": [{"bytes": None, "path": own}, {"bytes": png(0), "path": name}, {"bytes": None, "path": name}]}
    write_parquet(tmp_path / "train.parquet", rows, {"image": image_feature()})
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda source, name=None, **options: load(str(tmp_path), streaming=True)
    )
    examples = iter(open_source("my-org/cells"))
    assert next(examples)["image"]["path"] == own
    assert next(examples)["image"]["bytes"] == png(0)  # a name alone
    with pytest.raises(OutsideError, match=r"my-org/cells names .*, outside of hf://datasets/my-org/cells, its place"):
        next(examples)
    assert [example["image"]["path"] for example in open_source("my-org/cells", allow_outside=True)][2] == name


def test_hub_failures_are_named(monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"scene is no folder or file here.*the Hub cannot be reached.*mean 'scenes'"):
        open_source("scene")
