"""Frames come in their order with their times, from files and folders; what is written is read again."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.video import VideoWriter, is_video, open_video


def gray(level, size=(48, 64)):
    return np.full((*size, 3), level, dtype=np.uint8)


def write(path, levels, frame_rate=10):
    with VideoWriter(path, frame_rate) as writer:
        for level in levels:
            writer.write(gray(level))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.webm"])
def test_what_is_written_is_read_again(tmp_path, name):
    levels = [20, 60, 100, 140, 180, 220]
    write(tmp_path / name, levels)
    video = open_video(tmp_path / name)
    frames = list(video)
    assert is_video(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert video.frame_rate == 10
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose([frame.image.mean() for frame in frames], levels, atol=6)
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(6) / 10, atol=1e-3)
    every = list(open_video(tmp_path / name, every=2))
    assert [(frame.index, frame.seconds) for frame in every] == [(frame.index, frame.seconds) for frame in frames[::2]]


def test_colours_are_rgb(tmp_path):
    red = np.zeros((48, 64, 3), dtype=np.uint8)
    red[..., 0] = 200
    with VideoWriter(tmp_path / "red.avi", 5) as writer:
        writer.write(Image.fromarray(red))
    (frame,) = open_video(tmp_path / "red.avi")
    np.testing.assert_allclose(frame.image.mean(axis=(0, 1)), [200, 0, 0], atol=8)


def test_frames_of_a_folder_are_in_natural_order(tmp_path):
    for number in (1, 2, 10, 11, 100):
        Image.fromarray(gray(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    video = open_video(tmp_path, frame_rate=4)
    assert [int(frame.image[0, 0, 0]) for frame in video] == [1, 2, 10, 11, 100]
    assert [frame.seconds for frame in video] == [0, 0.25, 0.5, 0.75, 1]
    thinned = open_video(tmp_path, every=2)
    assert [int(frame.image[0, 0, 0]) for frame in thinned] == [1, 10, 100]
    assert thinned.num_frames == 3


def test_sequences_of_motchallenge_have_their_frame_rate(tmp_path):
    (tmp_path / "img1").mkdir()
    Image.fromarray(gray(7)).save(tmp_path / "img1" / "000001.jpg")
    (tmp_path / "seqinfo.ini").write_text("[Sequence]\nname=a%b\nframeRate=14\n")
    assert open_video(tmp_path).frame_rate == open_video(tmp_path / "img1").frame_rate == 14
    (tmp_path / "seqinfo.ini").write_text("frameRate=fast")
    assert open_video(tmp_path).frame_rate == 30


def test_nothing_is_left_of_a_video_that_fails(tmp_path):
    with VideoWriter(tmp_path / "whole.avi", 5) as out:
        out.write(gray(1))
        with pytest.raises(ValueError, match="frames of a video have one size"):
            out.write(gray(1, size=(24, 32)))
    (tmp_path / "whole.avi").unlink()
    with contextlib.suppress(KeyError), VideoWriter(tmp_path / "a.mp4", 5) as out:
        out.write(gray(1))
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="name a video file"):
        VideoWriter(tmp_path / "a.gif", 5)


def test_what_is_no_video_is_named(tmp_path, capfd):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"broken\.mp4.* cannot be read as a video"):
        open_video(tmp_path / "broken.mp4")
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        open_video(tmp_path / "empty")
    with pytest.raises(ValueError, match="There is no video at"):
        open_video(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="every is 0"):
        open_video(tmp_path, every=0)
