"""COCO json files on remote file systems."""

import json

import fsspec
import pytest

from hf_vlm.data.formats.coco import find_coco_files, open_coco


@pytest.fixture
def remote():
    """An empty folder of a remote file system."""
    upath = pytest.importorskip("upath")
    yield upath.UPath("memory://boxed-test")
    fsspec.filesystem("memory").rm("/boxed-test", recursive=True)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train.json", "images/train/"),
        ("labels.json", ""),
        ("train/_annotations.coco.json", "train/"),
    ],
)
def test_remote_coco(remote, file, images):
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    for name, text in ((file, json.dumps(content)), (f"{images}a.jpg", "x"), (f"{images}b.jpg", "x")):
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text(text)
    assert find_coco_files(remote) == [remote / file]
    for source in (remote, remote / file):
        first, second = open_coco(source, "train")
        assert (first["image_id"], first["objects"]["bbox"]) == (5, [])
        assert second["objects"]["bbox"] == [[1, 2, 3, 4]]
        assert second["image"]["path"] == f"memory://boxed-test/{images}b.jpg"
    (remote / f"{images}b.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images are missing in memory://boxed-test.*: b\.jpg"):
        open_coco(remote, "train")
