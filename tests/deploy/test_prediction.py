"""Predictions in the formats of others, read back by others' readers."""

import contextlib
import json
import sys

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image

from hf_vlm.data.formats.yolo import open_yolo
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.prediction_files import output_names, prediction_writer

BOXES = np.array([[10, 20, 30, 40], [0, 0, 64, 12.5], [50.5, 1, 60, 47]], dtype=np.float32)


def prediction(**others):
    return Prediction(
        boxes=BOXES,
        scores=np.array([0.9, 0.5, 0.25], dtype=np.float32),
        labels=np.array([2, 0, 2]),
        label_names=["bird", "cat", "bird"],
        image_size=(48, 64),
        **others,
    )


def test_rows_are_selected_with_all_that_belongs_to_them():
    full = prediction(track_ids=np.array([5, 6, 7]), appearance=np.eye(3, dtype=np.float32))
    part = full.select(np.array([False, True, True]))
    assert part.label_names == ["cat", "bird"]
    np.testing.assert_array_equal(part.track_ids, [6, 7])
    np.testing.assert_array_equal(part.appearance, np.eye(3)[1:])
    np.testing.assert_array_equal(part.boxes, BOXES[1:])


def test_coco_files_are_read_by_the_tools_of_coco(tmp_path):
    path = tmp_path / "found.json"
    with prediction_writer("coco", path, ["cat", "dog", "bird"]) as write:
        write(prediction(path="a.png", track_ids=np.array([1, 2, 3])), "a")
        write(prediction(path="b.png"), "b")
    dataset = COCO(str(path))
    assert [image["file_name"] for image in dataset.loadImgs(dataset.getImgIds())] == ["a.png", "b.png"]
    entries = dataset.loadAnns(dataset.getAnnIds(imgIds=[1]))
    np.testing.assert_allclose([e["bbox"] for e in entries], [[10, 20, 20, 20], [0, 0, 64, 12.5], [50.5, 1, 9.5, 46]])
    assert [entry["track_id"] for entry in entries] == [1, 2, 3]
    names = {category["id"]: category["name"] for category in dataset.loadCats(dataset.getCatIds())}
    assert [names[entry["category_id"]] for entry in entries] == ["bird", "cat", "bird"]
    scored = prediction().to_coco(image_id=2)
    results = dataset.loadRes(scored)
    assert [entry["score"] for entry in results.loadAnns(results.getAnnIds(imgIds=[2]))] == [
        entry["score"] for entry in scored
    ]


def test_yolo_labels_are_opened_as_data(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with prediction_writer("yolo", tmp_path, ["cat", "dog", "bird"]) as write:
        write(prediction(), output_names([str(tmp_path / "a.png")])[0])
    source = open_yolo(tmp_path, "train")
    (example,) = source.dataset
    assert source.object_names == ["cat", "dog", "bird"]
    assert list(example["objects"]["category"]) == [2, 0, 2]
    boxes = np.array(example["objects"]["bbox"])
    np.testing.assert_allclose(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), BOXES, atol=1e-3)


def test_json_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "found.jsonl"
    with prediction_writer("json", path, []) as write:
        write(prediction(track_ids=np.array([4, 0, 9]), frame=3, seconds=0.1), "a")
    (line,) = map(json.loads, path.read_text().splitlines())
    assert [entry["track_id"] for entry in line["detections"]] == [4, 0, 9]
    assert (line["frame"], line["seconds"]) == (3, 0.1)
    with contextlib.suppress(RuntimeError), prediction_writer("json", path, []) as write:
        write(prediction(), "a")
        raise RuntimeError
    assert len(path.read_text().splitlines()) == 1


def test_without_supervision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match=r'pip install "hf_vlm\[track\]"'):
        prediction().to_supervision()


def test_what_has_no_boxes_has_no_such_format():
    classes = Prediction(np.array([0.5], dtype=np.float32), np.array([0]), ["cat"], (48, 64))
    for convert in (lambda: classes.to_coco(image_id=1), classes.to_yolo, classes.to_supervision):
        with pytest.raises(ValueError, match="are boxes, which this model does not predict"):
            convert()


def test_names_of_outputs_differ():
    assert list(map(str, output_names(["x/a.png", "x/a.jpg", "x/sub/b.png"]))) == ["a.png", "a.jpg", "sub/b"]
    assert str(output_names(["https://user:secret@host/pictures/a.jpg"])[0]) == "a"
