"""`hf-vlm predict` as a user types it: images from anywhere, videos, formats, tiles."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hf_vlm.cli.main import main
from hf_vlm.data.video import VideoWriter, open_video
from hf_vlm.deploy.predict import Predictor


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Commands silence the bars of the libraries for their process; other tests get them back."""
    from datasets.utils import enable_progress_bars
    from transformers.utils import logging

    yield
    enable_progress_bars()
    logging.enable_progress_bar()


@pytest.fixture
def predict(saved_detector, capsys):
    """`predict(*words) -> (status, what it printed, errors)`"""

    def run(*words):
        capsys.readouterr()
        status = main(["predict", str(saved_detector), *map(str, words)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def frames():
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(5)]
    return [np.asarray(image.resize((64, 48))) for image in noise]


@pytest.fixture
def video(frames, tmp_path):
    with VideoWriter(tmp_path / "clip.avi", 10) as writer:
        for frame in frames:
            writer.write(frame)
    return tmp_path / "clip.avi"


def test_frames_of_a_video_are_predicted_as_images(predict, video, saved_detector, tmp_path):
    out = tmp_path / "out.mp4"
    status, printed, _ = predict(video, "--threshold", "0.4", "--every", "2", "--save", out)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert status == 0
    assert [line["frame"] for line in lines] == [0, 2, 4]
    assert [line["seconds"] for line in lines] == pytest.approx([0, 0.2, 0.4], abs=1e-3)
    images = [frame.image for frame in open_video(video, every=2)]
    expected = Predictor.from_pretrained(saved_detector, device="cpu").predict(images, 0.4)
    for line, prediction in zip(lines, expected, strict=True):
        assert [entry["score"] for entry in line["detections"]] == pytest.approx(prediction.scores.tolist(), abs=1e-4)
    drawn = open_video(out)
    assert (drawn.frame_rate, len(list(drawn))) == (5, 3)


def test_videos_and_images_together(predict, video, frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "photo.png")
    found = tmp_path / "labels"
    status, printed, _ = predict(
        tmp_path / "photo.png", video, "--format", "yolo", "--output", found, "--save", tmp_path / "drawn"
    )
    assert status == 0
    num_objects = sum(len(path.read_text().splitlines()) for path in found.glob("*.txt")) - 3  # classes.txt
    assert printed == f"1 image, 5 frames, {num_objects} objects: {found}, {tmp_path / 'drawn'}\n"
    names = {path.name for path in found.iterdir()}
    assert names == {"classes.txt", "photo.txt", *(f"clip-{number:06d}.txt" for number in range(5))}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"photo.png", "clip.mp4"}


def test_a_list_on_standard_input(predict, frames, tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, frame in zip(paths, frames, strict=False):
        Image.fromarray(frame).save(path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{paths[2]}\n\n{paths[0]}\n"))
    status, printed, _ = predict("-")
    assert status == 0
    assert [json.loads(line)["path"] for line in printed.splitlines()] == [str(paths[2]), str(paths[0])]


def test_a_bad_file_is_named_and_the_others_are_written(predict, frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    status, _, errors = predict(tmp_path, "--format", "coco", "--output", tmp_path / "found.json", "--tile", "32")
    assert status == 2
    assert "1 of 2 images could not be read" in errors
    assert "b.png" in errors
    saved = json.loads((tmp_path / "found.json").read_text())
    assert [image["file_name"] for image in saved["images"]] == [str(tmp_path / "a.png")]
    assert [category["name"] for category in saved["categories"]] == ["cat", "dog", "bird"]


def test_where_nothing_is_found_the_threshold_and_the_highest_score_are_said(predict, frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    best = json.loads(predict(tmp_path / "a.png", "--threshold", "0")[1])["detections"][0]["score"]
    status, printed, errors = predict(tmp_path / "a.png", "--threshold", "1")
    assert (status, json.loads(printed)["detections"]) == (0, [])
    assert f"threshold is 1, and the highest score {best:.4f}. Lower the threshold: --threshold 0." in errors
    lower = errors.rsplit(maxsplit=1)[1]
    assert json.loads(predict(tmp_path / "a.png", "--threshold", lower)[1])["detections"]


@pytest.mark.parametrize("format", ["json", "coco", "yolo"])
def test_nothing_is_left_of_predictions_that_failed(predict, tmp_path, format):
    (tmp_path / "b.png").write_bytes(b"no image")
    written = "--output", tmp_path / "new" / "found", "--save", tmp_path / "drawn" / "b.png"
    assert predict(tmp_path / "b.png", "--format", format, *written)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file:///etc/passwd"], "is no URL of an image: give one of http:// or https://"),
        (["s3://bucket/a.png"], "is no URL of an image"),
        (["nowhere.mp4"], "There is no video at"),
        ([__file__, "--tile", "3"], "tile is 3"),
        ([__file__, "--format", "yolo"], "name a folder with --output"),
        ([__file__, "--threshold", "50"], "scores are from 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_message(predict, words, message):
    status, printed, errors = predict(*words)
    assert (status, printed) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
