"""Tracks in the format of MOTChallenge survive writing and reading; what is none is named with its line."""

import numpy as np
import pytest

from hf_vlm.deploy.mot import mot_rows, read_mot, write_mot
from hf_vlm.deploy.prediction import Prediction


def test_written_tracks_are_read_again(tmp_path):
    generator = np.random.default_rng(0)
    blocks = []
    for frame in (1, 2, 5):
        corners = np.sort(generator.uniform(0, 90, (3, 2, 2)), axis=1).reshape(3, 4).astype(np.float32)
        prediction = Prediction(
            scores=generator.uniform(size=3).astype(np.float32),
            labels=np.zeros(3, dtype=np.int64),
            label_names=["cat"] * 3,
            image_size=(90, 90),
            boxes=corners,
            track_ids=np.array([3, 1, 2]),
        )
        blocks.append(mot_rows(prediction, frame))
        np.testing.assert_allclose(blocks[-1][:, 4:6], corners[:, 2:] - corners[:, :2], rtol=1e-6)
    write_mot(tmp_path / "out.txt", blocks)
    assert (tmp_path / "out.txt").read_text().splitlines()[0].startswith("1,3,")
    assert {line.count(",") for line in (tmp_path / "out.txt").read_text().splitlines()} == {9}
    np.testing.assert_allclose(read_mot(tmp_path / "out.txt"), np.concatenate(blocks), atol=1e-3)


def test_files_of_truth_and_short_lines(tmp_path):
    (tmp_path / "gt.txt").write_text("2,1,1,2,3,4,0,7,0.25\n\n1,1,1.5,2,3,4\n1,2,1,2,3,4,0.5,-1,-1,-1\n")
    expected = [[1, 1, 1.5, 2, 3, 4, 1, -1, -1], [1, 2, 1, 2, 3, 4, 0.5, -1, -1], [2, 1, 1, 2, 3, 4, 0, 7, 0.25]]
    np.testing.assert_array_equal(read_mot(tmp_path / "gt.txt"), expected)


@pytest.mark.parametrize("line", ["1,2,3", "0,1,1,2,3,4", "a,b,c,d,e,f", "1,1,nan,2,3,4"])
def test_a_line_that_is_none_is_named(tmp_path, line):
    (tmp_path / "gt.txt").write_text(f"1,1,1,2,3,4\n{line}\n")
    with pytest.raises(ValueError, match=r"gt\.txt.*, line 2: a track is"):
        read_mot(tmp_path / "gt.txt")
    with pytest.raises(ValueError, match="cannot be read as a file of tracks"):
        read_mot(tmp_path / "none.txt")
