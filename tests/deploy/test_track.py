"""`hf-vlm track` and what it is made of: ids, classes by vote, files that agree with each other."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.video import open_video
from hf_vlm.deploy.mot import read_mot
from hf_vlm.deploy.predict import Predictor
from hf_vlm.deploy.prediction import Prediction
from hf_vlm.deploy.track import TRACKERS, create_tracker, track


@pytest.fixture
def frames(tmp_path):
    """A folder of ten frames whose names are in natural order alone."""
    folder = tmp_path / "frames"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((96, 64))
    for number in range(8, 13):
        picture.crop((number, 0, number + 64, 48)).save(folder / f"frame{number}.png")
    return folder


class FakePredictor:
    """One object that drifts, and whose class the detector is not sure of."""

    processor = None
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "cat", 1: "dog"}))
    labels = (0, 1, 1, 1, 0)

    def predict_video(self, video, threshold, **options):
        for label, frame in zip(self.labels, video, strict=True):
            index = frame.index
            prediction = Prediction(
                scores=np.array([0.6, 0.05], dtype=np.float32),
                labels=np.array([label, 0]),
                label_names=["", ""],
                image_size=(48, 64),
                boxes=np.array([[10 + index, 10, 30 + index, 30], [40, 40, 45, 45]], dtype=np.float32),
            )
            found = prediction.select(prediction.scores >= threshold)
            yield frame, dataclasses.replace(found, frame=index, seconds=frame.seconds)


def test_the_files_of_the_command_agree(frames, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Predictor, "from_pretrained", lambda run: FakePredictor())
    words = ["track", "a/run", str(frames), "--threshold", "0.5", "--frame_rate", "5"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    words += ["--save", str(tmp_path / "out.mp4"), "--mot", str(tmp_path / "out.txt")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"1 track in 5 frames: {tmp_path / 'out.mp4'}, {tmp_path / 'out.txt'}\n"
    assert [(line["frame"], line["seconds"]) for line in lines] == [(i, i / 5) for i in range(5)]
    printed = [
        [line["frame"] + 1, entry["track_id"], entry["box"]["xmin"], entry["box"]["ymin"], entry["score"]]
        for line in lines
        for entry in line["detections"]
    ]
    written = read_mot(tmp_path / "out.txt")
    np.testing.assert_allclose(written[:, [0, 1, 2, 3, 6]], printed, atol=1e-3)
    np.testing.assert_allclose(written[:, :6], [[1 + i, 1, 10 + i, 10, 20, 20] for i in range(5)])
    drawn = open_video(tmp_path / "out.mp4")
    assert (drawn.frame_rate, len(list(drawn))) == (5, 5)
    assert main(["track", "a/run", str(frames), "--threshold", "0.5", "--output", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == f"1 track in 5 frames: {tmp_path / 'out.json'}\n"


def interpolated(feature_map, y, x):
    """Bilinear value of a map (dim, rows, columns) whose cells have their centres at halves."""
    below, right = ((int(np.floor(value - 0.5)), value - 0.5 - np.floor(value - 0.5)) for value in (y, x))
    total = 0.0
    for row, weight_row in ((below[0], 1 - below[1]), (below[0] + 1, below[1])):
        for column, weight in ((right[0], 1 - right[1]), (right[0] + 1, right[1])):
            inside = (min(max(row, 0), feature_map.shape[1] - 1), min(max(column, 0), feature_map.shape[2] - 1))
            total = total + weight_row * weight * feature_map[:, *inside]
    return total


@pytest.mark.parametrize("do_pad", [False, True])
def test_appearance_is_the_mean_of_the_encoders_map_in_the_middle_of_the_box(saved_detector, frames, do_pad):
    predictor = Predictor.from_pretrained(saved_detector, device="cpu")
    if do_pad:  # of which random boxes are mostly outside
        predictor.processor.do_pad = True
        predictor.model.register_forward_hook(lambda _, __, out: setattr(out, "pred_boxes", out.pred_boxes.sigmoid()))
    width = 64 * 48 / 43 if do_pad else 64  # of the input of 32 x 48 pixels, in which the image has 32 x 43
    image = next(iter(open_video(frames))).image
    (prediction,) = predictor.predict(image, 0.4, with_appearance=True)
    inputs = predictor.processor(Image.fromarray(image), return_tensors="pt")
    feature_map = predictor.model.backbone(**inputs).feature_maps[-1].detach()
    rows, columns = feature_map.shape[2:]
    assert len(prediction) > 0
    for (x1, y1, x2, y2), found in zip(prediction.boxes, prediction.appearance, strict=True):
        x = np.linspace(x1, x2, 29)[8:21:2].clip(0, 63.9)  # the middles of seven parts of the inner half
        y = np.linspace(y1, y2, 29)[8:21:2].clip(0, 47.9)
        sampled = [interpolated(feature_map[0].numpy(), v / 48 * rows, u / width * columns) for v in y for u in x]
        np.testing.assert_allclose(found, np.mean(sampled, axis=0), atol=1e-4)
    empty = predictor.predict(image, 1.0, with_appearance=True)[0].appearance
    assert empty.shape == (0, feature_map.shape[1])


def test_a_track_has_the_class_of_most_of_its_detections(frames, caplog):
    video = open_video(frames)
    tracked = [prediction for _, prediction in track(FakePredictor(), video, tracker="appearance")]
    assert [prediction.track_ids.tolist() for prediction in tracked] == [[1]] * 5
    assert [prediction.label_names for prediction in tracked] == [["cat"], ["cat"], ["dog"], ["dog"], ["dog"]]
    assert caplog.text.count("tracked by motion alone") == 1
    assert [len(prediction) for _, prediction in track(FakePredictor(), video, threshold=0.7)] == [0] * 5


@pytest.mark.parametrize("name", ["bytetrack", "botsort", "ocsort"])
def test_without_the_library_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ValueError, match=r'pip install "hf_vlm\[track\]"'):
        create_tracker(name)


@pytest.mark.parametrize("name", TRACKERS if importlib.util.find_spec("trackers") else TRACKERS[:2])
def test_ids_of_every_tracker_follow_the_detections(name):
    tracker = create_tracker(name, threshold=0.3)
    image = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    for frame in range(8):
        order = [0, 1] if frame % 2 else [1, 0]
        boxes = np.array([[10 + frame, 10, 30 + frame, 40], [70, 70 - frame, 100, 100 - frame]], dtype=np.float32)
        prediction = Prediction(
            scores=np.array([0.4, 0.45], dtype=np.float32)[order],
            labels=np.array(order),
            label_names=["a", "b"],
            image_size=(120, 120),
            boxes=boxes[order],
        )
        ids = tracker(prediction, image)[np.argsort(order)].tolist()
    assert sorted(ids) == [1, 2]
    assert tracker(prediction, image)[np.argsort(order)].tolist() == ids


def test_what_cannot_be_tracked_is_one_message(saved_detector, frames, capsys):
    for words, message in (
        (["nowhere.mp4"], "There is no video at"),
        ([str(frames), "--threshold", "0"], "give a score above 0"),
        ([str(frames), "--save", "out.gif"], "name a video file"),
    ):
        assert main(["track", str(saved_detector), *words]) == 2
        assert message in capsys.readouterr().err
