"""What is written into Parquet files is what the source holds, and the same bytes each time."""

import io

import datasets
import pyarrow.parquet as pq
import pytest
from sample_data import DETECTION, make_objects, png, write_images, write_parquet

from hf_vlm.data import shards
from hf_vlm.data.shards import ParquetShards
from hf_vlm.data.sources import open_source


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 4)


@pytest.fixture
def detection(tmp_path):
    """Ten images with boxes, at paths that are private."""
    rows = range(10)
    images = [{"bytes": png(row), "path": f"home/anna/{row}.png"} for row in rows]
    columns = {"image": images, "image_id": list(rows), "objects": [make_objects(row) for row in rows]}
    write_parquet(tmp_path / "data" / "train.parquet", columns, DETECTION)
    return tmp_path / "data"


def read(contents):
    return [row for content in contents for row in pq.read_table(io.BytesIO(content)).to_pylist()]


def test_all_examples_in_order_with_names_of_files_alone(detection, few_rows):
    written = ParquetShards(open_source(detection), shard_bytes=1)
    contents = list(written)
    assert [pq.read_metadata(io.BytesIO(content)).num_rows for content in contents] == [4, 4, 2]
    rows = read(contents)
    assert [row["image"] for row in rows] == [{"bytes": png(row), "path": f"{row}.png"} for row in range(10)]
    assert [row["objects"] for row in rows] == [example["objects"] for example in open_source(detection)]
    assert (written.num_examples, written.num_bytes) == (10, sum(map(len, contents)))
    found = [category for row in range(10) for category in make_objects(row)["category"]]
    assert written.object_counts == {number: found.count(number) for number in range(3)}
    assert contents == list(ParquetShards(open_source(detection), shard_bytes=1))
    (whole,) = ParquetShards(open_source(detection))
    assert read([whole]) == rows
    assert pq.read_metadata(io.BytesIO(whole)).num_row_groups == 3


def test_datasets_decodes_the_images_and_knows_the_classes(detection, tmp_path):
    (content,) = ParquetShards(open_source(detection))
    (tmp_path / "all.parquet").write_bytes(content)
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "all.parquet"), cache_dir=str(tmp_path))
    assert dataset.features["objects"]["category"].feature.names == ["ant", "bee", "cat"]
    assert dataset[3]["image"].getpixel((0, 0)) == (3, 7, 7)


def test_images_of_folders_are_read_and_their_classes_counted(tmp_path, few_rows):
    write_images(tmp_path, [f"{name}/{row}.png" for name in ("a", "b", "b2") for row in range(5)])
    written = ParquetShards(open_source(tmp_path))
    (content,) = written
    assert {row["image"]["path"] for row in read([content])} == {f"{row}.png" for row in range(5)}
    assert written.label_counts == {0: 5, 1: 5, 2: 5}


def test_unreadable_images_are_left_out_until_there_are_too_many(tmp_path, monkeypatch):
    write_images(tmp_path, [f"{row}.png" for row in range(30)])
    (tmp_path / "7.png").write_bytes(b"no image")
    monkeypatch.setattr(shards, "MAX_BAD_FRACTION", 0.04)
    written = ParquetShards(open_source(tmp_path))
    assert len(read(written)) == 29
    assert len(written.bad) == 1
    assert "7.png" in written.bad[0]
    monkeypatch.setattr(shards, "MAX_BAD_FRACTION", 0.01)
    with pytest.raises(ValueError, match=r"1 of 30 images of split 'train' cannot be read, among them .*7\.png"):
        list(ParquetShards(open_source(tmp_path)))
