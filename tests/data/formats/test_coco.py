"""COCO json files, local and on remote file systems."""

import json
import logging

import fsspec
import pytest
from sample_data import assert_coco_examples, make_coco, write_coco

from hf_vlm.data.formats.coco import find_coco_files, open_coco
from hf_vlm.data.sources import open_source


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("annotations/train.json", "."),
        ("train/_annotations.coco.json", "train"),
        ("_annotations.coco.json", "."),
        ("train.json", "train"),
        ("labels.json", "images"),
    ],
)
def test_coco_layouts(tmp_path, file, images):
    write_coco(tmp_path / file, tmp_path / images)
    (tmp_path / "dataset_infos.json").write_text('{"default": 1}')
    assert_coco_examples(open_source(tmp_path))
    assert_coco_examples(open_source(tmp_path / file, format="coco"))


def test_coco_splits(tmp_path):
    write_coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017", num_images=4)
    write_coco(tmp_path / "annotations" / "instances_val2017.json", tmp_path / "val2017", num_images=2)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    assert_coco_examples(open_source(tmp_path), 4)
    assert_coco_examples(open_source(tmp_path, "val"), 2)
    assert_coco_examples(open_source(tmp_path / "annotations" / "instances_val2017.json", "validation"), 2)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train, validation"):
        open_source(tmp_path, "test")
    with pytest.raises(ValueError, match=r"instances_val2017\.json has no split 'train'; it has validation"):
        open_source(tmp_path / "annotations" / "instances_val2017.json")


def test_coco_images_without_boxes_stay(tmp_path):
    content = make_coco(3)
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 53]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    examples = list(open_source(tmp_path))
    assert [len(example["objects"]["bbox"]) for example in examples] == [1, 0, 3]


def test_coco_without_annotations_is_unlabelled(tmp_path, caplog):
    content = make_coco(3)
    del content["annotations"]
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=3)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert set(source.features) == {"image", "image_id"}
    assert "has no annotations: its images are used without labels" in caplog.text


def test_coco_group_of_roboflow_is_no_class(tmp_path):
    content = make_coco(4)
    for category in content["categories"]:
        category["supercategory"] = "bee"
    content["categories"].insert(0, {"id": 0, "name": "bee", "supercategory": "none"})
    write_coco(tmp_path / "train" / "_annotations.coco.json", tmp_path / "train", content, num_images=4)
    assert_coco_examples(open_source(tmp_path), 4)


def test_coco_boxes_are_checked(tmp_path, caplog):
    content = make_coco(4)
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1]["bbox"] = [-20, 0, 5, 5]
    content["annotations"][2]["bbox"] = [10, 10, 50, 50]
    content["categories"].append({"id": 100, "name": "dog"})
    write_coco(tmp_path / "a.json", tmp_path, content, num_images=4)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    (message,) = caplog.messages
    assert "2 of 7 boxes are dropped" in message
    assert "annotation 1 [3.0, 3.0, 0.0, 5.0], annotation 2 [-20.0, 0.0, 5.0, 5.0]" in message
    assert "1 boxes stick out of their image and will be clipped: annotation 3" in message
    assert "1 of 4 classes have no box: dog" in message
    assert [len(example["objects"]["bbox"]) for example in source] == [0, 1, 3, 1]


def change(content, key, index, **values):
    """The content with values of one of its records changed; None removes them."""
    record = {**content[key][index], **values}
    content[key][index] = {name: value for name, value in record.items() if value is not None}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(make_coco(), "annotations", 2, category_id=3), r"1 annotations have a category_id .* ids 3"),
        (change(make_coco(), "annotations", 0, image_id=1), r"1 annotations have a image_id .* ids 1"),
        (
            change(make_coco(), "annotations", 4, bbox=None),
            r"a\.json: 1 objects .*: annotation 5 has no bbox",
        ),
        (
            change(make_coco(), "annotations", 4, bbox=[1, 2, 3]),
            r"annotation 5 has the bbox \[1, 2, 3\]; it needs",
        ),
        (change(make_coco(), "images", 1, id=50), r"1 image ids are used more than once: 50"),
        (change(make_coco(), "images", 1, id=None), r"every image needs 'id' and 'file_name'; one has file_name"),
        (change(make_coco(), "images", 1, file_name="x/no.png"), r"1 of 10 images are missing in .*: x/no\.png"),
        (change(make_coco(), "categories", 1, name="ant"), r"1 names of categories are used more than once: ant"),
        (change(make_coco(), "categories", 1, name=None), r"every category needs 'id' and 'name'; one is \{'id': 2\}"),
        ({"images": []}, r"a\.json lists no images"),
        ({"license": 1}, r"is not a COCO json: it must hold a list 'images'; it holds license"),
        ([1], r"is not a COCO json: .* it holds a list"),
    ],
)
def test_coco_mistakes_are_named(tmp_path, content, message):
    write_coco(tmp_path / "a.json", tmp_path, content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.json")


def test_coco_files_that_do_not_fit(tmp_path):
    write_coco(tmp_path / "a.json", tmp_path / "elsewhere", num_images=2)
    with pytest.raises(ValueError, match=r"the image 0\.png is in none of the folders .*images"):
        open_source(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"b\.json is not json: Expecting property name"):
        open_source(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"elsewhere holds no COCO json; it holds 0\.png, 1\.png"):
        open_source(tmp_path / "elsewhere", format="coco")
    write_coco(tmp_path / "two" / "a.json", tmp_path / "two")
    write_coco(tmp_path / "two" / "b.json", tmp_path / "two")
    with pytest.raises(ValueError, match=r"several COCO files for the split 'train': .*a\.json, .*b\.json"):
        open_source(tmp_path / "two")


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
