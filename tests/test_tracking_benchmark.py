"""Clips of the benchmark of tracking: sequences of MOTChallenge are read as they were written, and tracked."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vlm.deploy.mot import write_mot
from hf_vlm.deploy.track import create_tracker
from hf_vlm.metrics.detection_matches import box_ious

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def clips():
    spec = importlib.util.spec_from_file_location("tracking_clips", BENCHMARKS / "tracking_clips.py")
    module = sys.modules["tracking_clips"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tracking_clips"]


def test_a_folder_of_motchallenge_is_the_clip_it_was_written_from(clips, tmp_path):
    (rendered,) = clips.rendered_clips(0, 1, 12, split="train")
    sequence = tmp_path / "clip-1"
    for folder in ("img1", "gt"):
        (sequence / folder).mkdir(parents=True)
    for number, image in enumerate(rendered.images, 1):
        Image.fromarray(image).save(sequence / "img1" / f"{number:06d}.png")
    ignored = np.array([[3.0, 99, 1, 1, 9, 9, 0, 1, 1]])
    write_mot(sequence / "gt" / "gt.txt", [*rendered.truth, ignored])
    (read,) = clips.mot_clips(tmp_path, 0)
    assert len(read.images) == 12
    for frame in range(12):
        assert (read.images[frame] == rendered.images[frame]).all()
        np.testing.assert_allclose(read.truth[frame], rendered.truth[frame], atol=1e-3)
        np.testing.assert_allclose(read.found[frame].boxes, rendered.found[frame].boxes, atol=1e-2)
        np.testing.assert_allclose(read.found[frame].scores, rendered.found[frame].scores)
    with pytest.raises(ValueError, match=r"no SEQUENCE/gt/gt\.txt"):
        next(clips.mot_clips(sequence, 0))


def test_objects_keep_their_ids_by_motion(clips, monkeypatch):
    calm = dataclasses.replace(clips.SETTINGS, max_objects=2, min_objects=2, camera_shake=0.0, max_speed=1.0)
    monkeypatch.setattr(clips, "SETTINGS", calm)
    (clip,) = clips.rendered_clips(0, 1, 40, split="train")
    tracker = create_tracker("motion")
    pairs = []
    for rows, found, image in zip(clip.truth, clip.found, clip.images, strict=True):
        ids = tracker(found, image)
        overlap = box_ious(found.boxes, np.concatenate([rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]], axis=1))
        pairs += [(rows[overlap[i].argmax(), 1], number) for i, number in enumerate(ids) if number]
    assert len(pairs) > 50
    assert len(set(pairs)) == 2


def test_false_detections_leave_the_true_ones_of_the_first_frame_alone(clips):
    ((plain,), (false,)) = (clips.rendered_clips(0, 1, 30, split="train", num_false=rate) for rate in (0.0, 2.0))
    number = len(plain.found[0])
    assert (false.found[0].boxes[:number] == plain.found[0].boxes).all()
    extra = np.mean([len(one) for one in false.found]) - np.mean([len(one) for one in plain.found])
    assert extra == pytest.approx(2.0, abs=0.7)
